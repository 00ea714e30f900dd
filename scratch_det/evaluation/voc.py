"""PASCAL VOC's average precision of boxes."""

import math
from collections.abc import Callable

import numpy as np

from scratch_det.evaluation.average_precision import IOU_THRESHOLDS, at_iou
from scratch_det.evaluation.metrics import Metrics, metrics_of
from scratch_det.evaluation.predictions import Predictions
from scratch_det.evaluation.truth import Truth, box_ious

Curve = Callable[[np.ndarray, np.ndarray], float]  # of recall and precision after each detection, best score first


def evaluate_voc(truth: Truth, predictions: Predictions, ap: str) -> Metrics:
    """VOC's AP of the predicted boxes, in percent, under "bbox".

    ``ap``: "voc_area" or "voc_11point". "AP50" is what VOC and the paper call mAP; "AP" is the mean over the IoU
    thresholds 0.5 to 0.95, as detectron2 reports it. For each class "AP-<class>" is that mean too, as for COCO, and
    "AP50-<class>" the number of VOC's tables. A class without an object that counts has nan and is in no mean.
    Raises DataError where predictions and truth do not belong together.

    A detection is compared with the object of its class and image that it overlaps most. It is right when their IoU is
    above the threshold and no detection with a higher score took that object; a second one on it is an error. Difficult
    objects (``ignore`` 1) and crowds do not count; nor do detections whose best object is one of these.

    VOC's devkit computes IoU from 1-based pixels that belong to the box, width = xmax - xmin + 1. In COCO's boxes
    (x = xmin - 1, width up to xmax) that is the plain IoU, so no +1 appears here. detectron2's evaluator does the same
    except for rounding: it writes scores to 0.001 and corners to 0.1 px before it reads them again.
    """
    images, classes = truth.places(predictions)
    boxes, objects, names = predictions["bbox"], truth.objects(), truth.data.classes
    falling = np.argsort(-predictions["score"], kind="stable")
    aps = np.zeros((len(names), len(IOU_THRESHOLDS)))
    for label in range(len(names)):
        rows, own = falling[classes[falling] == label], np.flatnonzero(objects.classes == label)
        best, iou = np.zeros(len(rows), dtype=int), np.zeros(len(rows))  # of each detection: its best object, and IoU
        for here, there, ious in box_ious(images[rows], boxes[rows], objects.images[own], objects.boxes[own]):
            best[here], iou[here] = there[ious.argmax(1)], ious.max(1)
        aps[label] = _aps(best, iou, objects.ignored[own], CURVES[ap]) * 100
    of_all_sizes = {score: metric for score, metric in metrics_of("bbox").items() if metric.area == "all"}
    metrics = {score: _mean(aps[:, at_iou(metric.iou)]) for score, metric in of_all_sizes.items()}
    if len(names) > 1:
        metrics |= {f"AP-{name}": _mean(row) for name, row in zip(names, aps, strict=True)}
        metrics |= {f"AP50-{name}": float(row[0]) for name, row in zip(names, aps, strict=True)}
    return {"bbox": metrics}


def _mean(aps: np.ndarray) -> float:
    """The mean over those that are numbers; nan when none is."""
    return float(np.nanmean(aps)) if not np.isnan(aps).all() else math.nan


def _aps(best: np.ndarray, iou: np.ndarray, ignored: np.ndarray, curve: Curve) -> np.ndarray:
    """The AP of one class at each of IOU_THRESHOLDS, from 0 to 1; nan without an object that counts.

    best, iou: the object that each detection, by falling score, overlaps most, and how much; ignored: of each object.
    """
    if ignored.all():
        return np.full(len(IOU_THRESHOLDS), math.nan)
    aps = []
    for threshold in IOU_THRESHOLDS:
        is_met = iou > threshold
        first = np.zeros(len(iou), dtype=bool)  # whether no detection with a higher score took the same object
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
