"""PASCAL VOC's box AP; results are COCO result dicts, as in ``scratch_det.evaluation.coco``.

A detection is compared with the object of its class and image that it overlaps most, and is right when their IoU is
above the threshold and no higher-scored detection took that object; a second one on it is an error. Difficult objects
(``ignore`` 1, as well as crowds) do not count, nor do the detections whose best object is one.

VOC's devkit computes IoU from 1-based pixels that belong to the box, width = xmax - xmin + 1. In COCO's boxes
(x = xmin - 1, width up to xmax) that is the plain IoU, so no +1 appears here. detectron2's evaluator is the same but
for rounding: it writes scores to 0.001 and corners to 0.1 px before it reads them again.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as mask_api

from scratch_det.evaluation.coco import IOU_THRESHOLDS, Metrics, Result, at_iou, check_ids, load_truth
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
    check_ids(truth, results, sorted(truth.imgs))
    objects, found = _by_class(truth.dataset["annotations"]), _by_class(results)
    names = {number: category["name"] for number, category in sorted(truth.cats.items())}
    aps = np.array([class_ap(objects[number], found[number], CURVES[ap]) for number in names]) * 100
    metrics = {
        score: _mean(aps[:, at_iou(metric.iou)]) for score, metric in metrics_of("bbox").items() if metric.area == "all"
    }
    if len(names) > 1:
        metrics |= {f"AP-{name}": _mean(row) for name, row in zip(names.values(), aps, strict=True)}
        metrics |= {f"AP50-{name}": _mean(row[:1]) for name, row in zip(names.values(), aps, strict=True)}
    return {"bbox": metrics}


def class_ap(objects: Sequence[Result], found: Sequence[Result], curve: Curve) -> np.ndarray:
    """The AP of one class at each of IOU_THRESHOLDS, from 0 to 1; nan without an object that counts."""
    passed_over = np.array([bool(one.get("ignore") or one["iscrowd"]) for one in objects], dtype=bool)
    number = int((~passed_over).sum())
    if not number:
        return np.full(len(IOU_THRESHOLDS), math.nan)
    found = sorted(found, key=lambda one: -one["score"])
    best, iou = _best_objects(objects, found)
    aps = []
    for threshold in IOU_THRESHOLDS:
        met = iou > threshold
        counted = ~(met & passed_over[best])
        right = _first_of_each(np.where(met, best, -1))[counted]
        hits = right.cumsum()
        aps.append(curve(hits / number, hits / np.arange(1, len(hits) + 1)))
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


def _best_objects(objects: Sequence[Result], found: Sequence[Result]) -> tuple[np.ndarray, np.ndarray]:
    """Of each detection: the place in ``objects`` of the one in its image that it overlaps most, and their IoU.

    0 and an IoU of 0 where its image has none.
    """
    best, iou = np.zeros(len(found), dtype=int), np.zeros(len(found))
    here = _by_image(objects)
    for image, places in _by_image(found).items():
        if image in here:
            ious = mask_api.iou(_boxes(found, places), _boxes(objects, here[image]), [0] * len(here[image]))
            best[places], iou[places] = np.array(here[image])[ious.argmax(1)], ious.max(1)
    return best, iou


def _first_of_each(numbers: np.ndarray) -> np.ndarray:
    """Whether each number is at least 0 and stands there for the first time."""
    values, places = np.unique(numbers, return_index=True)
    first = np.zeros(len(numbers), dtype=bool)
    first[places[values >= 0]] = True
    return first


def _boxes(items: Sequence[Result], places: list[int]) -> np.ndarray:
    return np.array([items[place]["bbox"] for place in places], dtype=float)


def _by_class(items: Sequence[Result]) -> dict[int, list[Result]]:
    classes: dict[int, list[Result]] = defaultdict(list)
    for item in items:
        classes[item["category_id"]].append(item)
    return classes


def _by_image(items: Sequence[Result]) -> dict[Any, list[int]]:
    """Image id -> places in ``items``."""
    images: dict[Any, list[int]] = defaultdict(list)
    for place, item in enumerate(items):
        images[item["image_id"]].append(place)
    return images


def _mean(aps: np.ndarray) -> float:
    """The mean over those that are numbers; nan when none is."""
    return float(np.nanmean(aps)) if not np.isnan(aps).all() else math.nan
