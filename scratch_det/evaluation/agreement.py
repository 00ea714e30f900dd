"""Whether two models see the same in an image."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from faster_coco_eval.core import mask as mask_api

MOST = 20  # detections of an image that are compared, the highest scores
SAME_BOX, SAME_SCORE, SAME_MASK = 0.5, 1e-3, 0.9  # pixels of the original image, score, IoU
SAME_POINTS = 0.9  # of the keypoints are as near as SAME_BOX: two peaks of a heat map may be equally high


@dataclass(frozen=True)
class Agreement:
    """How far two lists of detections are apart, pairs taken in the order of their scores.

    found: how many detections both have, up to MOST. compared: pairs. classes: pairs of one class. box, score: largest
    difference in pixels and in score. mask: smallest IoU of two masks, 1 without masks. points: share of the keypoints
    that are at most SAME_BOX apart, None without keypoints.
    """

    found: tuple[int, int]
    compared: int
    classes: int
    box: float
    score: float
    mask: float
    points: float | None = None

    @property
    def holds(self) -> bool:
        """Whether there are any, equally many, of the same classes, apart by less than SAME_BOX and so on."""
        same_number = self.found == (self.compared, self.compared)
        same_place = self.box <= SAME_BOX and self.score <= SAME_SCORE and self.mask >= SAME_MASK
        same_points = self.points is None or self.points >= SAME_POINTS
        return same_number and same_place and same_points and 0 < self.compared == self.classes

    def __str__(self) -> str:
        one, other = self.found
        return (
            f"{one} and {other} detections: {self.classes} of the same class, boxes apart by up to {self.box:.2g} px, "
            f"scores by {self.score:.2g}, masks' IoU at least {self.mask:.4f}"
            + ("" if self.points is None else f", {self.points:.1%} of the keypoints at most {SAME_BOX} px")
        )


def agreement(one: dict[str, Any], other: dict[str, Any]) -> Agreement:
    """Compare the predictions of two models for one image (see ``scratch_det.backends``), MOST at most.

    Where scores are closer than SAME_SCORE the order says nothing, so each detection meets the nearest box among those.
    """
    found = min(len(one["scores"]), MOST), min(len(other["scores"]), MOST)
    pairs = list(_pairs(one, other, min(found)))
    if not pairs:
        return Agreement(found, 0, 0, 0.0, 0.0, 1.0)
    first, second = (torch.tensor(places) for places in zip(*pairs, strict=True))
    return Agreement(
        found=found,
        compared=len(pairs),
        classes=int((one["labels"][first] == other["labels"][second]).sum()),
        box=(one["boxes"][first] - other["boxes"][second]).abs().max().item(),
        score=(one["scores"][first] - other["scores"][second]).abs().max().item(),
        mask=min(_mask_ious(one, other, pairs), default=1.0),
        points=_same_points(one["keypoints"][first], other["keypoints"][second]) if "keypoints" in one else None,
    )


def _pairs(one: dict[str, Any], other: dict[str, Any], number: int) -> Iterable[tuple[int, int]]:
    free = list(range(len(other["scores"])))
    for place in range(number):
        near = [i for i in free if abs(other["scores"][i] - one["scores"][place]) <= SAME_SCORE] or free[:1]
        apart = (other["boxes"][near] - one["boxes"][place]).abs().amax(1)
        wrong_class = other["labels"][near] != one["labels"][place]
        best = near[int((apart + wrong_class * 1e6).argmin())]
        free.remove(best)
        yield place, best


def _mask_ious(one: dict[str, Any], other: dict[str, Any], pairs: list[tuple[int, int]]) -> Iterable[float]:
    if "masks" in one and "masks" in other:
        for first, second in pairs:
            masks = one["masks"][first], other["masks"][second]
            both_empty = not any(mask_api.area(list(masks)))
            yield 1.0 if both_empty else mask_api.iou([masks[0]], [masks[1]], [0]).item()


def _same_points(one: torch.Tensor, other: torch.Tensor) -> float:
    """Keypoints [N, K, 3] of pairs that are at most SAME_BOX apart, as a share."""
    apart = (one[..., :2] - other[..., :2]).norm(dim=-1)
    return (apart <= SAME_BOX).float().mean().item()
