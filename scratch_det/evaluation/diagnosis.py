"""Why is box AP near zero? What the predictions themselves say."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from faster_coco_eval import COCO
from faster_coco_eval.core import mask as mask_api

from scratch_det.evaluation.coco import Metrics, Result, grouped, load_truth


def explain_low_ap(json_file: str | Path, results: Sequence[Result], metrics: Metrics) -> str:
    """At most eight lines on why box AP is below 1 % or nan; else an empty string."""
    box_ap = metrics.get("bbox", {}).get("AP", math.nan)
    if box_ap >= 1:
        return ""
    truth = load_truth(json_file)
    objects = [a for a in truth.dataset["annotations"] if a["image_id"] in truth.imgs and not a["iscrowd"]]
    found = [result for result in results if result["image_id"] in truth.imgs]
    scores = np.array([result["score"] for result in found])
    inside = _share_inside(truth, found)
    any_class, own_class = (_recall(objects, found, same_class) for same_class in (False, True))
    without = len(truth.imgs.keys() - {result["image_id"] for result in found})
    lines = [
        f"box AP is {box_ap:.1f}; {len(objects)} objects in {len(truth.imgs)} images. What was predicted:",
        f"  predictions: {len(found)}; score above 0.05: {(scores > 0.05).sum()}, above 0.5: {(scores > 0.5).sum()}",
        f"  images without a prediction: {without} of {len(truth.imgs)}",
        f"  predicted classes: {_top_classes(truth, found)}",
        f"  true classes: {_top_classes(truth, objects)}",
        f"  boxes inside their image: {inside:.0%}",
        f"  objects met by a box (IoU 0.5): {any_class:.0%} by any class, {own_class:.0%} by their own class",
        f"  most likely: {_cause(objects, found, scores, inside, any_class, own_class)}",
    ]
    return "\n".join(lines if found else [*lines[:3], lines[4], lines[-1]])


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


def _share_inside(truth: COCO, found: Sequence[Result]) -> float:
    """The share of boxes that lie within their image (2 px tolerance) and are not empty; 0 without boxes."""
    images = truth.imgs
    boxes = [
        (*r["bbox"], images[r["image_id"]]["width"], images[r["image_id"]]["height"]) for r in found if "bbox" in r
    ]
    x, y, w, h, width, height = np.array(boxes, float).reshape(-1, 6).T
    inside = (x > -2) & (y > -2) & (x + w < width + 2) & (y + h < height + 2) & (w > 0) & (h > 0)
    return float(inside.mean()) if boxes else 0.0


def _recall(objects: Sequence[Result], found: Sequence[Result], same_class: bool) -> float:
    """The share of objects that some predicted box meets with IoU 0.5 or more; of the same class, or of any."""

    def by_image(items: Sequence[Result]) -> dict[tuple, list[Result]]:
        return grouped(items, lambda item: (item["image_id"], same_class and item["category_id"]))

    predicted, hits = by_image([result for result in found if "bbox" in result]), 0
    for key, here in by_image(objects).items():
        boxes, true = ([item["bbox"] for item in items] for items in (predicted[key], here))
        if boxes:
            ious = mask_api.iou(np.array(boxes, float), np.array(true, float), [0] * len(true))
            hits += int((ious.max(0) >= 0.5).sum())
    return hits / max(1, len(objects))


def _top_classes(truth: COCO, items: Sequence[Result]) -> str:
    """``person 71%, car 12%, dog 3%``: the three most frequent classes."""
    counts = Counter(item["category_id"] for item in items)
    return ", ".join(f"{truth.cats[key]['name']} {n / len(items):.0%}" for key, n in counts.most_common(3)) or "none"
