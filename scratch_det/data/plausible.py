"""What a run can use but is likely a mistake: found in the arrays of a json, all at once. Needs no torch."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from hotcoco import mask as mask_api

from scratch_det.data.checks import CHECKS, LEAST_IOU, OVERHANG, Problem, Record

Arrays = Mapping[str, np.ndarray]
LARGEST = 2**31  # pixels of a mask that can be looked at
LEAST_CORNERS = 0.25  # share of boxes x0, y0, x1, y1 that stick out as x, y, width, height: 3/4 of random ones do


def find_notices(arrays: Arrays, ids: Sequence[Any], categories: Sequence[Record]) -> list[Problem]:
    """The notices of CHECKS on boxes, crowds and categories.

    arrays: see ``data/coco_json.py``, and ``extent`` of the masks; ids: of the annotations; categories: in the order of
    the labels.
    """
    used = np.sort(arrays["order"])  # annotations of images that are listed
    names = Counter(str(one["name"]) for one in categories)
    objects = np.bincount(arrays["label"][used], minlength=len(categories))
    offenders = {
        **{key: [{"id": ids[k]} for k in used[is_odd].tolist()] for key, is_odd in _odd_annotations(arrays, used)},
        "one name": [one for one in categories if names[str(one["name"])] > 1],
        "no annotation": [one for k, one in enumerate(categories) if len(used) and not objects[k]],
    }
    return [replace(CHECKS[key], first=[]).add(*those) for key, those in offenders.items() if those]


def _odd_annotations(arrays: Arrays, used: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Keys of CHECKS, and bool for each of the ``used``: each of these is only of the first kind that fits it."""
    image, area, crowd = (arrays[name][used] for name in ("image", "area", "iscrowd"))
    size = np.stack([arrays["width"][image], arrays["height"][image]])
    # x and y as rows: numpy is quick along the longer axis
    low, sides = np.ascontiguousarray(arrays["box"][used].T).reshape(2, 2, -1)
    start, end = np.ascontiguousarray(arrays["extent"][used].T).reshape(2, 2, -1)
    high, has_area = low + sides, (sides > 0).all(0)
    sticks_out = (high - size > OVERHANG).any(0)
    fits_as_corners = (sides > low).all(0) & (sides - size <= OVERHANG).all(0) | ~has_area
    are_corners = fits_as_corners.all() and sticks_out.sum() > LEAST_CORNERS * len(used)
    shared = (np.minimum(high, end) - np.maximum(low, start)).clip(0).prod(0)
    union = sides.prod(0) + (end - start).prod(0) - shared
    is_off = (np.maximum(abs(start - low), abs(end - high)) > OVERHANG).any(0)
    kinds = {
        "crowds": crowd & (2 * crowd.sum() > len(used)),
        "shares": has_area & (low <= 1).all(0) & (sides <= 1).all(0) & (size > 1).all(0),
        "corners": sticks_out & are_corners,
        "box of mask": has_area & is_off & (shared < LEAST_IOU * union),
        "large area": area > (sides + OVERHANG).prod(0),
    }
    first = np.select(list(kinds.values()), list(range(len(kinds))), -1)
    return ((key, first == k) for k, key in enumerate(kinds))


def mask_extents(part: Arrays, counts: Sequence[list[int]]) -> np.ndarray:
    """x0 y0 x1 y1 of each mask in a chunk's columns, float [n, 4]; NaN where there is no sound one.

    counts: those of each RLE, none of what is no RLE.
    """
    extents, sizes = np.full((len(counts), 4), np.nan), part["rle_size"].tolist()
    for k, runs in enumerate(counts):
        if runs and 0 < sum(runs) == math.prod(sizes[k]) <= LARGEST and min(runs) >= 0 < sizes[k][0]:
            # one by one: hotcoco shares a list among threads, which a forked process does not have
            extents[k] = mask_api.to_bbox({"size": sizes[k], "counts": runs})
            extents[k, 2:] += extents[k, :2]
    corners = part["polygon"].reshape(-1, 2)
    owner = np.repeat(np.repeat(np.arange(len(counts)), part["polygons_at"]), part["polygon_at"] // 2)
    first = np.flatnonzero(np.diff(owner, prepend=-1))
    extents[owner[first]] = np.hstack([np.minimum.reduceat(corners, first), np.maximum.reduceat(corners, first)])
    return extents
