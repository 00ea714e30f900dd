"""COCO's and PASCAL VOC's average precision of predictions, the same for every backend, and why an AP is near zero.

Predictions are COCO result dicts: ``image_id``, ``category_id`` (the id in the json, not the contiguous label),
``score``, ``bbox`` [x, y, width, height] in px of the original image, ``segmentation`` (compressed RLE), ``keypoints``
[x, y, score] * K in px, where whole numbers are centres of pixels.
Metrics are ``{task: {score: value}}`` with detectron2's names, in percent; nan where there is no truth to compare with.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as mask_api

from scratch_det.errors import DataError
from scratch_det.evaluation.metrics import Metrics, metrics_of

Result = Mapping[str, Any]
Curve = Callable[[np.ndarray, np.ndarray], float]  # of recall and precision after each detection, best score first

FIELDS = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}  # task -> the field of a result it reads
IOU_THRESHOLDS = np.arange(50, 100, 5) / 100


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
    _check_ids(truth, results)
    metrics: Metrics = {}
    for task in tasks:
        scorer = run_cocoeval(truth, results, task, oks_sigmas)
        precision = scorer.eval["precision"][..., -1]  # [IoU threshold, recall, class, area]
        areas, classes = scorer.params.areaRngLbl, scorer.params.catIds
        metrics[task] = {
            score: _mean(precision[_at_iou(metric.iou), ..., areas.index(metric.area)])
            for score, metric in metrics_of(task).items()
        }
        if len(classes) > 1:
            names = [truth.cats[number]["name"] for number in classes]
            metrics[task] |= {f"AP-{name}": _mean(precision[:, :, k, 0]) for k, name in enumerate(names)}
    return metrics


def evaluate_voc(json_file: str | Path, results: Sequence[Result], ap: str) -> Metrics:
    """VOC's AP of the boxes of ``results`` against the truth in ``json_file``, in percent, under "bbox".

    ``ap``: "voc_area" or "voc_11point". "AP50" is what VOC and the paper call mAP; "AP" is the mean over the IoU
    thresholds 0.5 to 0.95, as detectron2 reports it. For each class "AP-<class>" is that mean too, as for COCO, and
    "AP50-<class>" the number of VOC's tables. A class without an object that counts has nan and is in no mean.
    Raises DataError where results and json do not belong together.

    A detection is compared with the object of its class and image that it overlaps most. It is right when their IoU is
    above the threshold and no detection with a higher score took that object; a second one on it is an error. Difficult
    objects (``ignore`` 1) and crowds do not count; nor do detections whose best object is one of these.

    VOC's devkit computes IoU from 1-based pixels that belong to the box, width = xmax - xmin + 1. In COCO's boxes
    (x = xmin - 1, width up to xmax) that is the plain IoU, so no +1 appears here. detectron2's evaluator does the same
    except for rounding: it writes scores to 0.001 and corners to 0.1 px before it reads them again.
    """
    truth = load_truth(json_file)
    _check_ids(truth, results)
    objects, found = (_grouped(items, itemgetter("category_id")) for items in (truth.dataset["annotations"], results))
    names = {number: category["name"] for number, category in sorted(truth.cats.items())}
    aps = np.array([_voc_aps(objects[number], found[number], CURVES[ap]) for number in names]) * 100
    of_all_sizes = {score: metric for score, metric in metrics_of("bbox").items() if metric.area == "all"}
    metrics = {score: _voc_mean(aps[:, _at_iou(metric.iou)]) for score, metric in of_all_sizes.items()}
    if len(names) > 1:
        metrics |= {f"AP-{name}": _voc_mean(row) for name, row in zip(names.values(), aps, strict=True)}
        metrics |= {f"AP50-{name}": float(row[0]) for name, row in zip(names.values(), aps, strict=True)}
    return {"bbox": metrics}


def _voc_mean(aps: np.ndarray) -> float:
    """The mean over those that are numbers; nan when none is."""
    return float(np.nanmean(aps)) if not np.isnan(aps).all() else math.nan


def _voc_aps(objects: Sequence[Result], found: Sequence[Result], curve: Curve) -> np.ndarray:
    """The AP of one class at each of IOU_THRESHOLDS, from 0 to 1; nan without an object that counts."""
    ignored = np.array([bool(one.get("ignore") or one["iscrowd"]) for one in objects], dtype=bool)
    if ignored.all():
        return np.full(len(IOU_THRESHOLDS), math.nan)
    found = sorted(found, key=lambda one: -one["score"])
    best, iou = np.zeros(len(found), dtype=int), np.zeros(len(found))  # of each detection: its best object, and IoU
    for here, there, ious in _box_ious(found, objects, itemgetter("image_id")):
        best[here], iou[here] = np.array(there)[ious.argmax(1)], ious.max(1)
    aps = []
    for threshold in IOU_THRESHOLDS:
        is_met = iou > threshold
        first = np.zeros(len(found), dtype=bool)  # whether no detection with a higher score took the same object
        first[np.unique(np.where(is_met, best, -1), return_index=True)[1]] = True
        hits = (is_met & first)[~(is_met & ignored[best])].cumsum()
        aps.append(curve(hits / (~ignored).sum(), hits / np.arange(1, len(hits) + 1)))
    return np.array(aps)


def voc_area(recall: np.ndarray, precision: np.ndarray) -> float:
    """Below the envelope, the best precision at this recall or a higher one (VOC from 2010 on)."""
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.diff(recall, prepend=0) @ envelope)


def voc_11point(recall: np.ndarray, precision: np.ndarray) -> float:
    """The mean of the best precision at a recall of at least 0, 0.1, ..., 1 (VOC up to 2009).

    Three objects of ten reach 0.3, which they do not in detectron2, whose 0.3 is rounded up.
    """
    return float(np.mean([precision[recall >= level].max(initial=0) for level in np.arange(11) / 10]))


CURVES: dict[str, Curve] = {"voc_area": voc_area, "voc_11point": voc_11point}


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


def _check_ids(truth: COCO, results: Sequence[Result]) -> None:
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


def _at_iou(threshold: float | None) -> Any:
    """The index of a threshold, or of all of them, along an axis of IOU_THRESHOLDS."""
    return slice(None) if threshold is None else np.isclose(IOU_THRESHOLDS, threshold)


def _mean(precision: np.ndarray) -> float:
    """The mean in percent over the entries that have truth (COCO marks the others -1); nan when none has."""
    valid = precision[precision > -1]
    return float(valid.mean()) * 100 if valid.size else math.nan


def _grouped(items: Iterable[Any], key: Callable[[Any], Hashable]) -> dict[Any, list[Any]]:
    """The items by their key, in their order; an empty list for any other key."""
    groups: dict[Any, list[Any]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def _box_ious(
    found: Sequence[Result], objects: Sequence[Result], key: Callable[[Result], Hashable]
) -> Iterator[tuple[list[int], list[int], np.ndarray]]:
    """For each key of both: the indices of its detections [N] and of its objects [M], and their boxes' IoU [N, M]."""
    here, there = (_grouped(enumerate(items), lambda pair: key(pair[1])) for items in (found, objects))
    for value in here.keys() & there.keys():
        (at, boxes), (at_objects, true) = (zip(*groups[value], strict=True) for groups in (here, there))
        ious = (np.array([item["bbox"] for item in items], float) for items in (boxes, true))
        yield list(at), list(at_objects), mask_api.iou(*ious, [0] * len(true))


def explain_low_ap(json_file: str | Path, results: Sequence[Result], metrics: Metrics) -> str:
    """At most eight lines on why box AP is below 1 % or nan; else an empty string."""
    if (box_ap := metrics["bbox"]["AP"]) >= 1:
        return ""
    truth = load_truth(json_file)
    objects = [a for a in truth.dataset["annotations"] if a["image_id"] in truth.imgs and not a["iscrowd"]]
    scores = np.array([result["score"] for result in results])
    sizes = [[truth.imgs[result["image_id"]][side] for side in ("width", "height")] for result in results]
    corner, size = np.array([result["bbox"] for result in results]).reshape(-1, 2, 2).swapaxes(0, 1)
    within = (corner > -2) & (corner + size < np.reshape(sizes, (-1, 2)) + 2) & (size > 0)  # px of tolerance
    inside = within.all(1).mean() if results else 0.0
    any_class, own_class = (
        sum((ious.max(0) >= 0.5).sum() for *_, ious in _box_ious(results, objects, itemgetter(*keys)))
        / max(len(objects), 1)
        for keys in (["image_id"], ["image_id", "category_id"])
    )
    without = len(truth.imgs.keys() - {result["image_id"] for result in results})
    predicted, true = (Counter(item["category_id"] for item in items) for items in (results, objects))
    most_predicted, most_true = (max(one.values(), default=0) / max(one.total(), 1) for one in (predicted, true))
    causes = {  # the first that holds is shown
        "these images hold no objects, so AP is undefined (nan): evaluate on annotated images": not objects,
        "the model finds nothing: too few iterations, weights not loaded, or a loss that became nan": not results,
        "boxes are not [x, y, w, h] in px of the original image (corners as sizes, or the resized image's px)":
            inside < 0.5,
        "boxes fit but classes do not: labels mapped to the wrong category ids of the json":
            any_class > 0.3 and own_class < any_class / 3,
        "all scores are tiny: too few iterations, too low a learning rate, or weights not loaded":
            scores.max(initial=0) < 0.05,
        "one class is predicted everywhere: early in training, or the learning rate is too high for this batch":
            len(true) > 1 and most_predicted > 0.95 and most_true < 0.8,
        "boxes miss the objects: early in training, weights not loaded, or layers frozen at random values": True,
    }  # fmt: skip
    lines = [
        f"box AP is {box_ap:.1f}; {len(objects)} objects in {len(truth.imgs)} images. What was predicted:",
        f"  predictions: {len(results)}; score above 0.05: {(scores > 0.05).sum()}, above 0.5: {(scores > 0.5).sum()}",
        f"  images without a prediction: {without} of {len(truth.imgs)}",
        f"  predicted classes: {_top_classes(truth, predicted)}",
        f"  true classes: {_top_classes(truth, true)}",
        f"  boxes inside their image: {inside:.0%}",
        f"  objects met by a box (IoU 0.5): {any_class:.0%} by any class, {own_class:.0%} by their own class",
        f"  most likely: {next(cause for cause, holds in causes.items() if holds)}",
    ]
    return "\n".join(lines if results else [*lines[:3], lines[4], lines[-1]])


def _top_classes(truth: COCO, counts: Counter) -> str:
    """``person 71%, car 12%, dog 3%``: the three most frequent classes."""
    shares = [f"{truth.cats[key]['name']} {count / counts.total():.0%}" for key, count in counts.most_common(3)]
    return ", ".join(shares) or "none"
