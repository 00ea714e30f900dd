"""Digits scenes -> COCO's annotation format: boxes, polygons, keypoints, and the json around them.

Coordinates are x, y in px from the top left. Boxes and polygons are continuous: pixel (column i, row j) covers
[i, i + 1] x [j, j + 1]. Keypoints, as in COCO, are indices of pixels: add 0.5 for the continuous coordinate.
"""

from typing import Any

import cv2
import numpy as np

from .digits_scene import Digit, Scene
from .digits_source import LICENSES, NUM_CLASSES, PHOTOGRAPHS, STREAMS, photograph_names, split_scans

VERSION = "1.0"
KEYPOINTS = ["top", "bottom", "left", "right"]
SKELETON = [[1, 2], [3, 4]]
HIDDEN, SEEN = 1, 2
"""COCO's v of a labelled keypoint: behind a later digit, or visible."""
TOLERANCE = 0.75
"""How far a simplified polygon may stray from the edge of its mask, px."""


def image_id(split: str, index: int) -> int:
    """Id of scene ``index``: unique over both splits and independent of how many scenes are made."""
    return 1_000_000 * STREAMS[split] + index + 1


def image_entry(scene: Scene, number: int, file_name: str) -> dict[str, Any]:
    """COCO ``images`` entry; ``photograph`` names the background."""
    height, width = scene.image.shape[:2]
    license_id = 1 + list(LICENSES).index(next(p.license for p in PHOTOGRAPHS if p.name == scene.photograph))
    entry: dict[str, Any] = {"id": number, "file_name": file_name, "height": height, "width": width}
    return entry | {"license": license_id, "photograph": scene.photograph}


def annotation_entries(scene: Scene, number: int) -> list[dict[str, Any]]:
    """COCO ``annotations`` entries of image ``number``, in drawing order; ``scan`` says which scan was drawn."""
    return [
        {"id": 10 * number + order, "image_id": number, "category_id": digit.label + 1, "scan": digit.scan}
        | _shape(digit.visible)
        | {"keypoints": _keypoints(digit, scene.digits[order + 1 :]), "num_keypoints": len(KEYPOINTS)}
        for order, digit in enumerate(scene.digits)
    ]


def coco_json(split: str, seed: int, images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole json; ``info`` lists the photographs and scans of both splits, so that anyone can compare them."""
    info = {
        "description": f"scratch_det digits demo, {split}: handwritten digits drawn over photographs",
        "version": VERSION,
        "seed": seed,
        "split": split,
        "photographs": {side: photograph_names(side) for side in ("train", "val")},
        "scans": {side: split_scans()[side] for side in ("train", "val")},
        "attribution": {p.name: f"{p.author}, {p.license}" for p in PHOTOGRAPHS},
    }
    licenses = [{"id": i, "name": name, "url": url} for i, (name, url) in enumerate(LICENSES.items(), start=1)]
    return {
        "info": info,
        "licenses": licenses,
        "images": images,
        "annotations": annotations,
        "categories": [_category(label) for label in range(NUM_CLASSES)],
    }


def _category(label: int) -> dict[str, Any]:
    """Category ids are 1..10, as COCO's start at 1, so the id of digit 0 is 1."""
    name = str(label)
    return {"id": label + 1, "name": name, "supercategory": "digit", "keypoints": KEYPOINTS, "skeleton": SKELETON}


def _shape(visible: np.ndarray) -> dict[str, Any]:
    """Polygons, the tight x, y, w, h box around them, and the mask's area in px."""
    polygons = mask_polygons(visible)
    points = np.concatenate(polygons)
    low, high = points.min(axis=0), points.max(axis=0)
    return {
        "segmentation": [polygon.ravel().tolist() for polygon in polygons],
        "bbox": [*low.tolist(), *(high - low).tolist()],
        "area": int(visible.sum()),
        "iscrowd": 0,
    }


def mask_polygons(mask: np.ndarray) -> list[np.ndarray]:
    """Outlines (each N x 2 ints: x, y, on pixel edges) of the pieces of a mask without holes.

    OpenCV joins pixel centres, half a pixel too far inside; tracing a 4 x enlarged mask and rounding gives the edges.
    """
    enlarged = cv2.resize(mask.astype(np.uint8), None, fx=4, fy=4, interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(enlarged, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [_simplify(np.rint((contour[:, 0] + 0.5) / 4).astype(np.int32)) for contour in contours]


def _simplify(outline: np.ndarray) -> np.ndarray:
    """The outline with as few points as TOLERANCE allows, but never fewer than a triangle."""
    simple = cv2.approxPolyDP(outline, TOLERANCE, True)[:, 0]
    return simple if len(simple) >= 3 else outline


def _keypoints(digit: Digit, later: list[Digit]) -> list[int]:
    """Flat x, y, v of the silhouette's extreme pixels, found before anything was drawn over it."""
    covered = np.any([other.silhouette for other in later], axis=0) if later else np.zeros_like(digit.silhouette)
    flat: list[int] = []
    for x, y in extreme_pixels(digit.silhouette):
        flat += [x, y, HIDDEN if covered[y, x] else SEEN]
    return flat


def extreme_pixels(mask: np.ndarray) -> list[tuple[int, int]]:
    """The top-, bottom-, left- and right-most pixel (x, y) of a mask; the middle one where several tie."""
    ys, xs = np.nonzero(mask)
    ends = [(ys, ys.min()), (ys, ys.max()), (xs, xs.min()), (xs, xs.max())]
    ties = [np.flatnonzero(values == end) for values, end in ends]
    return [(int(xs[tie[len(tie) // 2]]), int(ys[tie[len(tie) // 2]])) for tie in ties]
