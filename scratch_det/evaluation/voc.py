"""PASCAL VOC's box AP; results are COCO result dicts, as in ``scratch_det.evaluation.coco``.

A detection is compared with the object of its class and image that it overlaps most. It is right when their IoU is
above the threshold and no detection with a higher score took that object; a second one on it is an error. Difficult
objects (``ignore`` 1) and crowds do not count, nor do the detections whose best object is one.

VOC's devkit computes IoU from 1-based pixels that belong to the box, width = xmax - xmin + 1. In COCO's boxes
(x = xmin - 1, width up to xmax) that is the plain IoU, so no +1 appears here. detectron2's evaluator is the same but
for rounding: it writes scores to 0.001 and corners to 0.1 px before it reads them again.
"""

import math
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path

import numpy as np

from scratch_det.evaluation.coco import (
    IOU_THRESHOLDS,
    Metrics,
    Result,
    at_iou,
    box_ious,
    check_ids,
    grouped,
    load_truth,
)
from scratch_det.evaluation.metrics import metrics_of

Curve = Callable[[np.ndarray, np.ndarray], float]  # recall and precision after each detection, best score first


def evaluate_voc(json_file: str | Path, results: Sequence[Result], ap: str) -> Metrics:
    """VOC's AP of the boxes of ``results`` against the truth in ``json_file``, in percent, under "bbox".

    ``ap``: "voc_area" or "voc_11point". "AP50" is what VOC and the paper call mAP; "AP" is the mean over the IoU
    thresholds 0.5 to 0.95, as detectron2 reports it. For each class "AP-<class>" is that mean too, as for COCO, and
    "AP50-<class>" the number of VOC's tables. nan for classes without an object that counts, which no mean includes.
    Raises DataError where results and json do not belong together.
    """
    truth = load_truth(json_file)
    check_ids(truth, results)
    objects, found = (grouped(items, itemgetter("category_id")) for items in (truth.dataset["annotations"], results))
    names = {number: category["name"] for number, category in sorted(truth.cats.items())}
    aps = np.array([class_ap(objects[number], found[number], CURVES[ap]) for number in names]) * 100
    of_all_sizes = {score: metric for score, metric in metrics_of("bbox").items() if metric.area == "all"}
    metrics = {score: _mean(aps[:, at_iou(metric.iou)]) for score, metric in of_all_sizes.items()}
    if len(names) > 1:
        metrics |= {f"AP-{name}": _mean(row) for name, row in zip(names.values(), aps, strict=True)}
        metrics |= {f"AP50-{name}": _mean(row[:1]) for name, row in zip(names.values(), aps, strict=True)}
    return {"bbox": metrics}


def class_ap(objects: Sequence[Result], found: Sequence[Result], curve: Curve) -> np.ndarray:
    """The AP of one class at each of IOU_THRESHOLDS, from 0 to 1; nan without an object that counts."""
    ignored = np.array([bool(one.get("ignore") or one["iscrowd"]) for one in objects], dtype=bool)
    if ignored.all():
        return np.full(len(IOU_THRESHOLDS), math.nan)
    found = sorted(found, key=lambda one: -one["score"])
    best, iou = np.zeros(len(found), dtype=int), np.zeros(len(found))  # of each detection: its best object, and IoU
    for here, there, ious in box_ious(found, objects, itemgetter("image_id")):
        best[here], iou[here] = np.array(there)[ious.argmax(1)], ious.max(1)
    aps = []
    for threshold in IOU_THRESHOLDS:
        is_met = iou > threshold
        first = np.zeros(len(found), dtype=bool)  # whether no detection with a higher score took the same object
        first[np.unique(np.where(is_met, best, -1), return_index=True)[1]] = True
        hits = (is_met & first)[~(is_met & ignored[best])].cumsum()
        aps.append(curve(hits / (~ignored).sum(), hits / np.arange(1, len(hits) + 1)))
    return np.array(aps)


def area(recall: np.ndarray, precision: np.ndarray) -> float:
    """Below the envelope, the best precision at this recall or a higher one (VOC from 2010 on)."""
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.diff(recall, prepend=0) @ envelope)


def eleven_points(recall: np.ndarray, precision: np.ndarray) -> float:
    """The mean of the best precision at a recall of at least 0, 0.1, ..., 1 (VOC up to 2009).

    Three objects of ten reach 0.3, which they do not in detectron2, whose 0.3 is rounded up.
    """
    return float(np.mean([precision[recall >= level].max(initial=0) for level in np.arange(11) / 10]))


CURVES: dict[str, Curve] = {"voc_area": area, "voc_11point": eleven_points}


def _mean(aps: np.ndarray) -> float:
    """The mean over those that are numbers; nan when none is."""
    return float(np.nanmean(aps)) if not np.isnan(aps).all() else math.nan
