"""COCO's AP of predictions, for every backend alike, and its tables.

Predictions are COCO result dicts: ``image_id``, ``category_id`` (the id in the json, not the contiguous label),
``score``, ``bbox`` [x, y, width, height] in px of the original image, ``segmentation`` (compressed RLE), ``keypoints``
[x, y, score] * K in px, where whole numbers are centres of pixels.
Metrics are ``{task: {score: value}}`` with detectron2's names, in percent; nan where there is no truth to compare with.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as mask_api

from scratch_det.errors import DataError
from scratch_det.evaluation.metrics import metrics_of
from scratch_det.tables import markdown

Metrics = dict[str, dict[str, float]]
Result = Mapping[str, Any]
Item = TypeVar("Item")

FIELDS = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}  # what a task reads of a result, by task
IOU_THRESHOLDS = np.arange(50, 100, 5) / 100
CLASSES_PER_ROW = 3  # in the table of AP per class


def evaluate_predictions(
    json_file: str | Path,
    results: Sequence[Result],
    tasks: Sequence[str] = ("bbox", "segm"),
    image_ids: Iterable[int] | None = None,
    oks_sigmas: Sequence[float] | None = None,
) -> Metrics:
    """COCO AP of ``results`` against the truth in ``json_file``: the METRICS of each task, and "AP-<class>".

    ``image_ids`` restricts the evaluation to these images (default: all of the json; results on others are left out).
    ``oks_sigmas``: one fall-off per keypoint; default: COCO's 17 of a person. The results are not changed.
    Raises DataError where results and json do not belong together.
    """
    truth = load_truth(json_file)
    chosen = sorted(truth.imgs if image_ids is None else set(image_ids))
    check_ids(truth, results, chosen)
    metrics: Metrics = {}
    for task in tasks:
        scorer = run_cocoeval(truth, results, task, chosen, oks_sigmas)
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
    return COCO(dataset, print_function=_silent)


def run_cocoeval(
    truth: COCO,
    results: Sequence[Result],
    task: str,
    image_ids: Sequence[int],
    oks_sigmas: Sequence[float] | None = None,
) -> COCOeval_faster:
    """The finished COCOeval of one task ("bbox", "segm" or "keypoints"): read ``eval["precision"]`` [T, R, K, A, M]."""
    if task not in FIELDS:
        raise DataError(f"unknown iou type '{task}'; expected one of {', '.join(FIELDS)}")
    field, chosen = FIELDS[task], set(image_ids)
    if results and not any(field in result for result in results):
        raise DataError(f"no result holds '{field}': leave '{task}' out, or predict it")
    found = [result for result in results if result["image_id"] in chosen and field in result]
    detections = [
        {name: result[name] for name in ("image_id", "category_id", "score", field)}
        | {"id": number, "area": _area(result, task), "iscrowd": 0}
        for number, result in enumerate(found, start=1)
    ]
    predicted = COCO({**truth.dataset, "annotations": detections}, print_function=_silent)
    scorer = COCOeval_faster(truth, predicted, task, print_function=_silent, kpt_oks_sigmas=oks_sigmas)
    named = [number for number, category in truth.cats.items() if task == "keypoints" and category.get("keypoints")]
    scorer.params.imgIds, scorer.params.catIds = list(image_ids), sorted(named or truth.cats)
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


def check_ids(truth: COCO, results: Sequence[Result], image_ids: Sequence[int]) -> None:
    """Raise DataError for image or category ids that the json does not know."""
    asked = set(image_ids) | {result["image_id"] for result in results}
    if unknown := sorted(asked - truth.imgs.keys(), key=str):
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
    images, classes, field = set(scorer.params.imgIds), set(scorer.params.catIds), FIELDS[task]
    used = [a for a in truth.dataset["annotations"] if a["image_id"] in images and a["category_id"] in classes]
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


def grouped(items: Iterable[Item], key: Callable[[Item], Hashable]) -> dict[Any, list[Item]]:
    """The items by their key, in their order; an empty list for any other key."""
    groups: dict[Any, list[Item]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def _silent(*_: object) -> None:
    """Swallow the progress lines of COCO's API."""


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
    if isinstance(metrics, float | np.floating):
        return float(metrics) if math.isfinite(metrics) else None
    return metrics
