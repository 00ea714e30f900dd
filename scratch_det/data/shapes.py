"""Boxes, masks and keypoints of a COCO json that cannot be what was meant."""

import math
from collections.abc import Iterator
from operator import mul
from typing import Any

import numpy as np

from scratch_det.data.problem import Problem, error, notice, split

Record = dict[str, Any]
Sizes = dict[int, tuple[int, int]]  # width and height in pixels, by image id
UNKNOWN_SIZE = (math.inf, math.inf)
OVERHANG = 1.0  # pixels; COCO's own boxes and sizes are rounded
ROUNDING = 1e-6  # square pixels; coordinates below 10^4 leave a sum of products uncertain by less


def box_problems(annotations: list[Record], sizes: Sizes, drop_empty: bool) -> Iterator[Problem]:
    """Boxes that are none, have no area (unless those are dropped), or lie outside their image."""
    boxed, others = split(annotations, lambda one: _are_numbers(one["bbox"], 4))
    x, y, width, height = np.array([one["bbox"] for one in boxed], dtype=float).reshape(-1, 4).T
    crowd = np.array([bool(one.get("iscrowd")) for one in boxed], dtype=bool)
    image_width, image_height = np.array([sizes.get(one["image_id"], UNKNOWN_SIZE) for one in boxed]).reshape(-1, 2).T
    has_area = (width > 0) & (height > 0)
    outside = has_area & ((x >= image_width) | (y >= image_height) | (x + width <= 0) | (y + height <= 0))
    overhang = np.maximum.reduce([-x, -y, x + width - image_width, y + height - image_height])

    def ids(chosen: np.ndarray) -> Iterator[Any]:
        return (boxed[i]["id"] for i in np.flatnonzero(chosen))

    yield from error(
        "annotations whose bbox is not [x, y, width, height] of numbers",
        (one["id"] for one in others),
    )
    yield from error(
        "annotations with a box of no width or height",
        ids(~has_area & ~crowd) if not drop_empty else (),
        "mend the boxes, or set 'drop_empty_boxes: true' in the data set's catalog entry",
    )
    yield from error(
        "annotations with a box that lies outside its image",
        ids(outside),
        "boxes are [x, y, width, height] in pixels from the upper left corner; mend them or drop the annotations",
    )
    yield from notice(
        f"annotations with a box that sticks out of its image by more than {OVERHANG:g} pixel",
        ids(has_area & ~outside & (overhang > OVERHANG)),
        "training clips them to the image",
    )


def mask_problems(annotations: list[Record], sizes: Sizes) -> Iterator[Problem]:
    """Masks that are neither polygons nor RLE, that do not fit their image, or that are empty."""
    malformed, misfits, flat = [], [], []
    for one in annotations:
        mask: Any = one.get("segmentation")
        number = one["id"]
        if _is_rle(mask):
            if one["image_id"] in sizes and not _fits(mask, *sizes[one["image_id"]]):
                misfits.append(number)
        elif not _is_polygons(mask):
            malformed.append(number)
        elif not all(map(encloses_area, mask)):
            flat.append(number)
    yield from error(
        "annotations whose segmentation is neither polygons of 3+ points nor RLE",
        malformed,
        "mend them, or train without masks (MODEL.MASK_ON False)",
    )
    yield from error(
        "annotations whose RLE does not fit the image: size [height, width], counts that add up to height x width",
        misfits,
        "mend them, or the image's height and width",
    )
    yield from notice(
        "annotations with a polygon that encloses no area (two corners, all on one line, or crossing itself)",
        flat,
        "such a part of a mask is empty",
    )


def keypoint_problems(annotations: list[Record], count: int) -> Iterator[Problem]:
    """Keypoints that are not x, y, v of ``count`` points or have an unknown v, and wrong ``num_keypoints``."""
    complete, others = split(annotations, lambda one: _are_numbers(one.get("keypoints"), 3 * count))
    sound, unknown = split(complete, lambda one: set(one["keypoints"][2::3]) <= {0, 1, 2})
    yield from error(
        f"annotations whose keypoints are not x, y, v of {count} points",
        (one["id"] for one in others),
        f"write {3 * count} numbers, with 0, 0, 0 for what is not labelled",
    )
    yield from error(
        "annotations whose keypoints have a v other than 0, 1 or 2",
        (one["id"] for one in unknown),
        "0 is not labelled, 1 hidden, 2 visible",
    )
    yield from notice(
        "annotations whose num_keypoints is not their number of keypoints with v above 0",
        (one["id"] for one in sound if one.get("num_keypoints", count_visible(one)) != count_visible(one)),
        "keypoint AP ignores objects with 0; a missing one is counted",
    )


def count_visible(annotation: Record) -> int:
    """How many keypoints are labelled, hidden ones included."""
    return sum(v > 0 for v in annotation["keypoints"][2::3])


def encloses_area(polygon: list[float]) -> bool:
    """Whether the area inside, x and y of the corners taking turns, is more than rounding (Gauss's area formula)."""
    x, y = polygon[0::2], polygon[1::2]
    twice = sum(map(mul, x, y[1:] + y[:1])) - sum(map(mul, y, x[1:] + x[:1]))
    return abs(twice) > ROUNDING


def _are_numbers(values: Any, count: int) -> bool:
    """Whether ``values`` is a list of ``count`` finite numbers."""
    return isinstance(values, list) and len(values) == count and _are_finite(values)


def _are_finite(values: list[Any]) -> bool:
    """Whether all are numbers, neither infinite nor NaN: adding them up tells, and quickly."""
    try:
        return math.isfinite(sum(values))
    except (TypeError, OverflowError):
        return False


def _is_polygons(mask: Any) -> bool:
    return (
        isinstance(mask, list)
        and len(mask) > 0
        and all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 and _are_finite(p) for p in mask)
    )


def _is_rle(mask: Any) -> bool:
    if not isinstance(mask, dict) or not isinstance(mask.get("size"), list):
        return False
    counts = mask.get("counts")
    return isinstance(counts, str) or (isinstance(counts, list) and _are_finite(counts))


def _fits(rle: dict[str, Any], width: int, height: int) -> bool:
    """Whether size and uncompressed counts reach the last pixel; compressed counts (text) are not looked into."""
    counts = rle["counts"]
    return rle["size"] == [height, width] and (isinstance(counts, str) or sum(counts) == height * width)
