"""COCO's AP of predictions, for every backend alike, its tables, and what the predictions say about an AP near zero.

Predictions are COCO result dicts: ``image_id``, ``category_id`` (the id in the json, not the contiguous label),
``score``, ``bbox`` [x, y, width, height] in px of the original image, ``segmentation`` (compressed RLE), ``keypoints``
[x, y, score] * K in px, where whole numbers are centres of pixels.
Metrics are ``{task: {score: value}}`` with detectron2's names, in percent; nan where there is no truth to compare with.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as mask_api

from scratch_det.errors import DataError
from scratch_det.evaluation.metrics import metrics_of
from scratch_det.tables import markdown

Metrics = dict[str, dict[str, float]]
Result = Mapping[str, Any]

FIELDS = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}  # what a task reads of a result, by task
IOU_THRESHOLDS = np.arange(50, 100, 5) / 100
CLASSES_PER_ROW = 3  # in the table of AP per class


def evaluate_predictions(
    json_file: str | Path,
    results: Sequence[Result],
    tasks: Sequence[str] = ("bbox", "segm"),
    oks_sigmas: Sequence[float] | None = None,
) -> Metrics:
    """COCO AP of ``results`` against the truth in ``json_file``: the METRICS of each task, and "AP-<class>".

    ``oks_sigmas``: one fall-off per keypoint; default: COCO's 17 of a person. The results are not changed.
    Raises DataError where results and json do not belong together.
    """
    truth = load_truth(json_file)
    check_ids(truth, results)
    metrics: Metrics = {}
    for task in tasks:
        scorer = run_cocoeval(truth, results, task, oks_sigmas)
        precision = scorer.eval["precision"][..., -1]  # [IoU threshold, recall, class, area]
        areas, classes = scorer.params.areaRngLbl, scorer.params.catIds
        metrics[task] = {
            score: _mean(precision[at_iou(metric.iou), ..., areas.index(metric.area)])
            for score, metric in metrics_of(task).items()
        }
        if len(classes) > 1:
            names = [truth.cats[number]["name"] for number in classes]
            metrics[task] |= {f"AP-{name}": _mean(precision[:, :, k, 0]) for k, name in enumerate(names)}
    return metrics


def load_truth(json_file: str | Path) -> COCO:
    """The annotations of a COCO json, indexed.

    COCO's matching takes annotation id 0 for "unmatched", so the ids are renumbered from 1. A missing ``iscrowd``
    counts as 0, a missing ``area`` as that of the box, a missing ``num_keypoints`` as those with v above 0.
    """
    dataset = json.loads(Path(json_file).read_bytes())  # UTF-8, also with a byte order mark, or UTF-16
    for number, annotation in enumerate(dataset.setdefault("annotations", []), start=1):
        annotation["id"] = number
        annotation.setdefault("iscrowd", 0)
        if "area" not in annotation:
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        if "keypoints" in annotation:
            annotation.setdefault("num_keypoints", sum(v > 0 for v in annotation["keypoints"][2::3]))
    return COCO(dataset)


def run_cocoeval(
    truth: COCO, results: Sequence[Result], task: str, oks_sigmas: Sequence[float] | None = None
) -> COCOeval_faster:
    """The finished COCOeval of one task ("bbox", "segm" or "keypoints"): read ``eval["precision"]`` [T, R, K, A, M]."""
    if task not in FIELDS:
        raise DataError(f"unknown iou type '{task}'; expected one of {', '.join(FIELDS)}")
    field = FIELDS[task]
    found = [result for result in results if field in result]
    if results and not found:
        raise DataError(f"no result holds '{field}': leave '{task}' out, or predict it")
    detections = [
        {name: result[name] for name in ("image_id", "category_id", "score", field)}
        | {"id": number, "area": _area(result, task), "iscrowd": 0}
        for number, result in enumerate(found, start=1)
    ]
    predicted = COCO({**truth.dataset, "annotations": detections})
    scorer = COCOeval_faster(truth, predicted, task, kpt_oks_sigmas=oks_sigmas)
    named = [number for number, category in truth.cats.items() if task == "keypoints" and category.get("keypoints")]
    scorer.params.catIds = sorted(named or truth.cats)
    _check_truth(truth, scorer, task)
    scorer.evaluate()
    scorer.accumulate()
    return scorer


def _area(result: Result, task: str) -> float:
    """What COCO's size ranges go by, px^2: the mask for "segm", else the box or, without one, the keypoints' extent."""
    if task == "segm":
        return float(mask_api.area(result["segmentation"]))
    if "bbox" in result:
        return float(result["bbox"][2] * result["bbox"][3])
    return float(np.ptp(result["keypoints"][0::3]) * np.ptp(result["keypoints"][1::3]))  # as COCO's loadRes has it


def check_ids(truth: COCO, results: Sequence[Result]) -> None:
    """Raise DataError for image or category ids that the json does not know."""
    if unknown := sorted({result["image_id"] for result in results} - truth.imgs.keys(), key=str):
        raise DataError(
            f"{len(unknown)} image ids are not in the json, the first is {unknown[0]!r}: "
            "score predictions against the json of the data set they were made on"
        )
    if unknown := sorted({result["category_id"] for result in results} - truth.cats.keys(), key=str):
        raise DataError(
            f"category_id {unknown[0]!r} of the results is not among the json's {len(truth.cats)} category ids "
            f"({', '.join(map(str, sorted(truth.cats)[:5]))}, ...): results carry the json's ids, not contiguous labels"
        )


def _check_truth(truth: COCO, scorer: COCOeval_faster, task: str) -> None:
    """Raise DataError where the json cannot serve the task: no masks, no keypoints, a wrong number of sigmas."""
    classes, field = set(scorer.params.catIds), FIELDS[task]
    used = [a for a in truth.dataset["annotations"] if a["image_id"] in truth.imgs and a["category_id"] in classes]
    if lacking := next((a for a in used if not a.get(field)), None):
        raise DataError(
            f"{task} AP needs '{field}' in every annotation, but one of image {lacking['image_id']} has none; "
            f"add it, or leave '{task}' out"
        )
    if task == "keypoints" and used and len(used[0][field]) != 3 * len(scorer.params.kpt_oks_sigmas):
        raise DataError(
            f"{len(used[0][field]) // 3} keypoints in the json but {len(scorer.params.kpt_oks_sigmas)} OKS sigmas; "
            "set TEST.KEYPOINT_OKS_SIGMAS to one number per keypoint"
        )


def at_iou(threshold: float | None) -> Any:
    """The index of a threshold, or of all of them, along an axis of IOU_THRESHOLDS."""
    return slice(None) if threshold is None else np.isclose(IOU_THRESHOLDS, threshold)


def _mean(precision: np.ndarray) -> float:
    """The mean in percent over the entries that have truth (COCO marks the others -1); nan when none has."""
    valid = precision[precision > -1]
    return float(valid.mean()) * 100 if valid.size else math.nan


def grouped(items: Iterable[Any], key: Callable[[Any], Hashable]) -> dict[Any, list[Any]]:
    """The items by their key, in their order; an empty list for any other key."""
    groups: dict[Any, list[Any]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def box_ious(
    found: Sequence[Result], objects: Sequence[Result], key: Callable[[Result], Hashable]
) -> Iterator[tuple[list[int], list[int], np.ndarray]]:
    """For each key of both: the indices of its detections [N] and of its objects [M], and their boxes' IoU [N, M]."""
    here, there = (grouped(enumerate(items), lambda pair: key(pair[1])) for items in (found, objects))
    for value in here.keys() & there.keys():
        (at, boxes), (at_objects, true) = (zip(*groups[value], strict=True) for groups in (here, there))
        ious = (np.array([item["bbox"] for item in items], float) for items in (boxes, true))
        yield list(at), list(at_objects), mask_api.iou(*ious, [0] * len(true))


def format_table(metrics: Metrics) -> str:
    """A Markdown table: one row per task, its METRICS in percent with one decimal, '-' for nan or absent."""
    columns = list(dict.fromkeys(score for task in FIELDS for score in metrics_of(task)))
    rows = [[task, *(_cell(values.get(name)) for name in columns)] for task, values in metrics.items()]
    return markdown(["task", *columns], rows, align=["left"] + ["right"] * len(columns))


def format_per_class(metrics: Metrics) -> str:
    """A Markdown table of AP per class (one column per task), CLASSES_PER_ROW side by side, read downwards.

    An empty string for a single class, where the per-class AP is the AP.
    """
    names = [key for key in next(iter(metrics.values()), {}) if key.startswith("AP-")]
    if not names:
        return ""
    cells = [[name[3:], *(_cell(values.get(name)) for values in metrics.values())] for name in names]
    side_by_side = min(CLASSES_PER_ROW, len(cells))
    height = math.ceil(len(cells) / side_by_side)
    cells += [[""] * (1 + len(metrics))] * (side_by_side * height - len(cells))
    rows = [list(chain.from_iterable(cells[start::height])) for start in range(height)]
    align = (["left"] + ["right"] * len(metrics)) * side_by_side
    return markdown(["class", *metrics] * side_by_side, rows, align)


def _cell(value: float | None) -> str:
    """One decimal, or '-' for nan and for None, its form in JSON."""
    return "-" if value is None or math.isnan(value) else f"{value:.1f}"


def to_json_numbers(metrics: Any) -> Any:
    """The same nested mapping with None for nan and infinities, which ``json.dump(..., allow_nan=False)`` accepts."""
    if isinstance(metrics, Mapping):
        return {name: to_json_numbers(value) for name, value in metrics.items()}
    return None if isinstance(metrics, float) and not math.isfinite(metrics) else metrics


def explain_low_ap(json_file: str | Path, results: Sequence[Result], metrics: Metrics) -> str:
    """At most eight lines on why box AP is below 1 % or nan; else an empty string."""
    box_ap = metrics["bbox"]["AP"]
    if box_ap >= 1:
        return ""
    truth = load_truth(json_file)
    objects = [a for a in truth.dataset["annotations"] if a["image_id"] in truth.imgs and not a["iscrowd"]]
    scores = np.array([result["score"] for result in results])
    sizes = [[truth.imgs[result["image_id"]][side] for side in ("width", "height")] for result in results]
    corner, size = np.array([result["bbox"] for result in results]).reshape(-1, 2, 2).swapaxes(0, 1)
    within = (corner > -2) & (corner + size < np.reshape(sizes, (-1, 2)) + 2) & (size > 0)  # px of tolerance
    inside = within.all(1).mean() if results else 0.0
    any_class, own_class = (
        sum((ious.max(0) >= 0.5).sum() for *_, ious in box_ious(results, objects, itemgetter(*keys))) / len(objects)
        if objects
        else 0.0
        for keys in (["image_id"], ["image_id", "category_id"])
    )
    without = len(truth.imgs.keys() - {result["image_id"] for result in results})
    lines = [
        f"box AP is {box_ap:.1f}; {len(objects)} objects in {len(truth.imgs)} images. What was predicted:",
        f"  predictions: {len(results)}; score above 0.05: {(scores > 0.05).sum()}, above 0.5: {(scores > 0.5).sum()}",
        f"  images without a prediction: {without} of {len(truth.imgs)}",
        f"  predicted classes: {_top_classes(truth, results)}",
        f"  true classes: {_top_classes(truth, objects)}",
        f"  boxes inside their image: {inside:.0%}",
        f"  objects met by a box (IoU 0.5): {any_class:.0%} by any class, {own_class:.0%} by their own class",
        f"  most likely: {_cause(objects, results, scores, inside, any_class, own_class)}",
    ]
    return "\n".join(lines if results else [*lines[:3], lines[4], lines[-1]])


def _cause(
    objects: Sequence[Result], found: Sequence[Result], scores: np.ndarray, inside: float, any_class: float, own: float
) -> str:
    """The first branch of the decision tree that holds, in words."""
    predicted, true = (Counter(item["category_id"] for item in items) for items in (found, objects))
    if not objects:
        return "these images hold no objects, so AP is undefined (nan): evaluate on annotated images"
    if not found:
        return "the model finds nothing: too few iterations, weights not loaded, or a loss that became nan"
    if inside < 0.5:
        return "boxes are not [x, y, w, h] in px of the original image (corners as sizes, or the resized image's px)"
    if any_class > 0.3 and own < any_class / 3:
        return "boxes fit but classes do not: labels mapped to the wrong category ids of the json"
    if scores.max() < 0.05:
        return "all scores are tiny: too few iterations, too low a learning rate, or weights not loaded"
    if len(true) > 1 and max(predicted.values()) > 0.95 * len(found) and max(true.values()) < 0.8 * len(objects):
        return "one class is predicted everywhere: early in training, or the learning rate is too high for this batch"
    return "boxes miss the objects: early in training, weights not loaded, or layers frozen at random values"


def _top_classes(truth: COCO, items: Sequence[Result]) -> str:
    """``person 71%, car 12%, dog 3%``: the three most frequent classes."""
    counts = Counter(item["category_id"] for item in items)
    return ", ".join(f"{truth.cats[key]['name']} {n / len(items):.0%}" for key, n in counts.most_common(3)) or "none"
