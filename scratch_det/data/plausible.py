"""What a run can use but is likely a mistake: found in the arrays of a json, all at once. Needs no torch."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from scratch_det.data.checks import CHECKS, LEAST_IOU, OVERHANG, Problem, Record

LEAST_CORNERS = (
    0.25  # share of boxes x0, y0, x1, y1 that stick out when read as x, y, width, height; of random ones 3/4
)


def find_notices(arrays: Mapping[str, np.ndarray], ids: Sequence[Any], categories: Sequence[Record]) -> list[Problem]:
    """The notices of CHECKS on boxes, crowds and categories.

    arrays: see ``data/coco_json.py``; ids: of the N annotations; categories: in the order of the labels.
    """
    used = np.sort(arrays["order"])  # annotations of images that are listed
    names, objects = Counter(str(one["name"]) for one in categories), set(arrays["label"][used].tolist())
    offenders = {
        **{key: [{"id": ids[k]} for k in used[is_odd].tolist()] for key, is_odd in _odd_annotations(arrays, used)},
        "one name": [one for one in categories if names[str(one["name"])] > 1],
        "no annotation": [one for k, one in enumerate(categories) if objects and k not in objects],
    }
    return [replace(CHECKS[key], first=[]).add(*those) for key, those in offenders.items() if those]


def _odd_annotations(arrays: Mapping[str, np.ndarray], used: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Keys of CHECKS, and bool for each of the ``used``: each of these is only of the first kind that fits it."""
    box, area, crowd = (arrays[name][used] for name in ("box", "area", "iscrowd"))
    low, sides, size = box[:, :2], box[:, 2:], np.stack([arrays["width"], arrays["height"]], 1)[arrays["image"][used]]
    high, has_area = low + sides, (sides > 0).all(1)
    sticks_out = (high - size > OVERHANG).any(1)
    fits_as_corners = (sides > low).all(1) & (sides - size <= OVERHANG).all(1) | ~has_area
    are_corners = fits_as_corners.all() and sticks_out.sum() > LEAST_CORNERS * len(used)
    start, end = (corner[used] for corner in mask_extents(arrays))
    shared = (np.minimum(high, end) - np.maximum(low, start)).clip(0).prod(1)
    union = sides.prod(1) + (end - start).prod(1) - shared
    is_off = (np.maximum(abs(start - low), abs(end - high)) > OVERHANG).any(1)
    kinds = {
        "crowds": crowd & (2 * crowd.sum() > len(used)),
        "shares": has_area & (box <= 1).all(1) & (size > 1).all(1),
        "corners": sticks_out & are_corners,
        "box of mask": has_area & is_off & (shared < LEAST_IOU * union),
        "large area": area > (sides + OVERHANG).prod(1),
    }
    first = np.select(list(kinds.values()), list(range(len(kinds))), -1)
    return ((key, first == k) for k, key in enumerate(kinds))


def mask_extents(arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """x y of the upper left and of the lower right corner of each mask, float [N, 2]; NaN where there is none."""
    low, high = np.full((2, len(arrays["label"]), 2), np.nan)
    at = arrays["polygon_at"][arrays["polygons_at"]]  # where the numbers of an object begin
    has = np.diff(at) > 0
    corners, starts = arrays["polygon"].reshape(-1, 2), at[:-1][has] // 2
    low[has], high[has] = (extreme.reduceat(corners, starts, axis=0) for extreme in (np.minimum, np.maximum))
    return low, high
