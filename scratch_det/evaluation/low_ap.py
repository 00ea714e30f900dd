"""Why box AP is near zero."""

from collections import Counter

import numpy as np

from scratch_det.evaluation.metrics import Metrics
from scratch_det.evaluation.predictions import Predictions
from scratch_det.evaluation.truth import Objects, Truth, box_ious


def explain_low_ap(truth: Truth, predictions: Predictions, metrics: Metrics) -> str:
    """At most eight lines on why box AP is below 1 % or nan; else an empty string."""
    if (box_ap := metrics["bbox"]["AP"]) >= 1:
        return ""
    images, classes = truth.places(predictions)
    scores, boxes, number, every = predictions["score"], predictions["bbox"], len(images), truth.objects()
    objects = Objects(*(column[~every.crowd] for column in every))
    corner, size = boxes[:, :2], boxes[:, 2:]
    sides = np.array([[image["width"], image["height"]] for image in truth.images])[images]
    within = (corner > -2) & (corner + size < sides + 2) & (size > 0)  # px of tolerance
    inside = within.all(1).mean() if number else 0.0
    any_class, own_class = (
        sum((ious.max(0) >= 0.5).sum() for *_, ious in box_ious(found, boxes, true, objects.boxes)) / max(len(true), 1)
        for found, true in (
            (images, objects.images),
            (images + len(truth.images) * classes, objects.images + len(truth.images) * objects.classes),
        )
    )
    without = len(truth.images) - len(np.unique(images))
    predicted, true = Counter(classes.tolist()), Counter(objects.classes.tolist())
    most_predicted, most_true = (max(one.values(), default=0) / max(one.total(), 1) for one in (predicted, true))
    causes = {  # the first that holds is shown
        "these images hold no objects, so AP is undefined (nan): evaluate on annotated images": not true,
        "the model finds nothing: too few iterations, weights not loaded, or a loss that became nan": not number,
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
        f"box AP is {box_ap:.1f}; {true.total()} objects in {len(truth.images)} images. What was predicted:",
        f"  predictions: {number}; score above 0.05: {(scores > 0.05).sum()}, above 0.5: {(scores > 0.5).sum()}",
        f"  images without a prediction: {without} of {len(truth.images)}",
        f"  predicted classes: {_top_classes(truth, predicted)}",
        f"  true classes: {_top_classes(truth, true)}",
        f"  boxes inside their image: {inside:.0%}",
        f"  objects met by a box (IoU 0.5): {any_class:.0%} by any class, {own_class:.0%} by their own class",
        f"  most likely: {next(cause for cause, holds in causes.items() if holds)}",
    ]
    return "\n".join(lines if number else [*lines[:3], lines[4], lines[-1]])


def _top_classes(truth: Truth, counts: Counter) -> str:
    """``person 71%, car 12%, dog 3%``: the three most frequent classes."""
    shares = [f"{truth.categories[key]['name']} {count / counts.total():.0%}" for key, count in counts.most_common(3)]
    return ", ".join(shares) or "none"
