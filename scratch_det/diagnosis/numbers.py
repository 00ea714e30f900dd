"""Where a detector errs: kinds of errors, confusions, precision and recall, calibration, images, doubtful labels.

The numbers are hotcoco's. Kinds of errors are TIDE's (Bolya et al. 2020, *TIDE: A General Toolbox for Identifying
Object Detection Errors*): what AP50 would gain if one kind alone were mended.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from hotcoco import COCO, COCOeval

from scratch_det.errors import DataError
from scratch_det.evaluation.average_precision import FIELDS, annotations_of, at_iou, detections_for
from scratch_det.evaluation.predictions import Predictions
from scratch_det.evaluation.truth import Truth
from scratch_det.files import gc_paused

SHOWN_SCORE = 0.5  # from which a detection counts in the confusion matrix, on images and as a doubt of a label
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, np.inf)}  # areas, px^2: COCO's ranges
KINDS = {  # of errors, by TIDE's names, and what they mean
    "Cls": ("class", "the place is right, the class is not"),
    "Loc": ("place", "the class is right, IoU with the object between 0.1 and 0.5"),
    "Both": ("class and place", "IoU between 0.1 and 0.5 with an object of another class"),
    "Dupe": ("duplicate", "a second detection of an object"),
    "Bkg": ("background", "IoU below 0.1 with every object"),
    "Miss": ("missed", "an object that no detection comes near"),
}


@dataclass(frozen=True)
class Image:
    """Detections and objects of an image, as rows of the predictions and as annotations.

    place: in ``Truth.images``. right, wrong: rows with SHOWN_SCORE or more that match an object, and that match none;
    missed: places, in the image, of the objects that none of them matches. f1: 2 right / (2 right + wrong + missed).
    """

    place: int
    right: tuple[int, ...]
    wrong: tuple[int, ...]
    missed: tuple[int, ...]

    @property
    def f1(self) -> float:
        right, errors = 2 * len(self.right), len(self.wrong) + len(self.missed)
        return right / (right + errors) if right + errors else 1.0

    @property
    def rank(self) -> tuple[float, int, int]:
        """The worst image has the lowest: by F1, then by the number of errors."""
        return self.f1, -len(self.wrong) - len(self.missed), self.place


@dataclass(frozen=True)
class Diagnosis:
    """One task of an evaluation, K classes in the order of ``Truth.categories``; AP in percent.

    counts, detections: of each class, objects and detections with SHOWN_SCORE or more [K].
    precision: [T, 101, K] at IOU_THRESHOLDS and recall 0, 0.01, ..., 1; nan without objects.
    recall: [T, K], the highest of 100 detections an image.
    by_size: AP of small, medium and large objects [3], and how many there are [3].
    kinds: by KINDS, what AP50 would gain, and how many errors there are.
    confusion: [K + 1, K + 1], true class (rows) by predicted class of detections with SHOWN_SCORE; the last is none.
    calibration: [B, 4], lowest score, mean score, share of right ones, count.
    images: worst first. doubts: detections that contradict a label, as hotcoco's ``label_errors``.
    """

    task: str
    classes: tuple[str, ...]
    counts: np.ndarray
    detections: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    by_size: tuple[np.ndarray, np.ndarray]
    kinds: dict[str, tuple[float, int]]
    confusion: np.ndarray
    calibration: np.ndarray
    images: list[Image]
    doubts: list[dict[str, Any]]

    def ap(self, iou: float | None = None) -> np.ndarray:
        """AP of each class [K], in percent, at an IoU or, without one, the mean over all."""
        return 100 * self.precision[at_iou(iou)].mean((0, 1))

    def at_thresholds(self) -> np.ndarray:
        """Mean AP of the classes at each of IOU_THRESHOLDS [T], in percent."""
        return 100 * np.nanmean(self.precision, axis=(1, 2))


def diagnose(truth: Truth, predictions: Predictions, task: str = "bbox") -> Diagnosis:
    """Raises DataError where predictions and truth do not belong together, and where there are no objects."""
    places, classes = truth.places(predictions)
    for field in ("bbox", FIELDS[task]):
        if field not in predictions:
            raise DataError(f"no result holds '{field}', which the diagnosis of {task} needs: predict it")
    with gc_paused():
        scorer, objects = _evaluated(truth, predictions | {"image_id": places, "category_id": classes}, task)
        found = scorer.image_diagnostics(iou_thr=0.5, score_thr=SHOWN_SCORE)
    precision = np.where(scorer.eval["precision"] < 0, np.nan, scorer.eval["precision"])[..., -1]
    recall = np.where(scorer.eval["recall"] < 0, np.nan, scorer.eval["recall"])[..., -1]
    kinds, real = scorer.tide_errors(), [one for one in objects if not one["iscrowd"]]
    ap_by_size = 100 * np.array([_mean(precision[..., k]) for k in (1, 2, 3)])
    bins = scorer.calibration()["bins"]
    count = len(truth.categories)
    counts = np.bincount([one["category_id"] for one in real], minlength=count)
    counts_by_size = np.histogram([one["area"] for one in real], [low for low, _ in SIZES.values()] + [np.inf])[0]
    return Diagnosis(
        task, tuple(truth.data.classes), counts,
        np.bincount(classes[predictions["score"] >= SHOWN_SCORE], minlength=count),
        precision[..., 0], recall[..., 0], (ap_by_size, counts_by_size),
        {kind: (100 * kinds["delta_ap"][kind], kinds["counts"][kind]) for kind in KINDS},
        scorer.confusion_matrix(min_score=SHOWN_SCORE)["matrix"].astype(int),
        np.array([[one["bin_lower"], one["avg_confidence"], one["avg_accuracy"], one["count"]] for one in bins]),
        _images(truth, predictions, places, objects, found),
        found["label_errors"],
    )  # fmt: skip


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else np.nan


def _evaluated(truth: Truth, predictions: Predictions, task: str) -> tuple[Any, list[dict[str, Any]]]:
    """A COCOeval that holds all images at once, which has what the questions need; and the objects.

    predictions: with places as ids. VOC's difficult objects count as crowds where VOC's AP is the score.
    """
    objects = list(annotations_of(truth, slice(None), range(len(truth.categories)), task, 0))
    for one in objects if truth.data.entry.ap else ():
        one["iscrowd"] |= one["ignore"]
    if all(one["iscrowd"] for one in objects):
        raise DataError(f"{truth.data.entry.name} has no objects to compare with; give a data set with annotations")
    images = [image | {"id": place} for place, image in enumerate(truth.images)]
    names = [{"id": place, "name": name} for place, name in enumerate(truth.data.classes)]
    whole = COCO({"images": images, "annotations": objects, "categories": names})
    found = detections_for(predictions, task)
    scorer: Any = COCOeval(whole, whole.load_res(found["dt_anns"], segmentation=found["segmentation"]), task)
    scorer.evaluate()
    scorer.accumulate()
    return scorer, objects


def _images(
    truth: Truth, predictions: Predictions, places: np.ndarray, objects: list[dict[str, Any]], found: dict[str, Any]
) -> list[Image]:
    """All images, worst first."""
    parts: list[tuple[list[int], ...]] = [([], [], []) for _ in truth.images]  # right, wrong, missed
    shown = np.flatnonzero(predictions["score"] >= SHOWN_SCORE).tolist()
    matched = {found["dt_match"].get(row + 1) for row in shown}  # hotcoco counts from 1, as do the ids of objects
    for row in shown:
        if (status := found["dt_status"].get(row + 1)) in ("tp", "fp"):
            parts[places[row]][status == "fp"].append(row)
    seen = [0] * len(parts)
    for one in objects:
        place = one["image_id"]
        if not one["iscrowd"] and one["id"] not in matched:
            parts[place][2].append(seen[place])
        seen[place] += 1
    images = [Image(place, *map(tuple, lists)) for place, lists in enumerate(parts)]
    return sorted(images, key=lambda one: one.rank)
