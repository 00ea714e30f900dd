"""One scene of the digits demo: a photograph crop with handwritten digits drawn over it, and its COCO annotations.

A mask here is an H x W bool array; sizes are (height, width) in pixels; colours are RGB 0..255. A digit's silhouette is
its ink with the holes filled, because polygons in COCO's format cannot hold holes: the inside of a 0 belongs to the 0.

Coordinates are x, y in px from the top left. Boxes and polygons are continuous: pixel (column i, row j) covers
[i, i + 1] x [j, j + 1]. Keypoints, as in COCO, are indices of pixels: add 0.5 for the continuous coordinate.
"""

from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator

from scratch_det.data.digits.source import (
    LICENSES,
    NUM_CLASSES,
    PHOTOGRAPHS,
    STREAMS,
    Material,
    fill_holes,
    large_pieces,
    load_material,
    make_glyph,
    photograph_names,
    split_scans,
)

LANDSCAPE, PORTRAIT, SINGLE = (128, 160), (160, 128), (64, 64)
MAX_DIGITS = 6
SCENE_HEIGHTS, SINGLE_HEIGHTS = (28, 80), (28, 56)  # px: least and greatest height of a digit before it is rotated
LIGHT, CHALK = (0.3, 0.8), (100, 255)  # dimmed photographs, bright digits: a shape is learnt in one polarity only
MIN_VISIBLE = 0.5  # share of its silhouette that every digit keeps
MIN_PIECE = 4  # px: smaller separate pieces of what is visible are not annotated
MIN_CONTRAST = 55  # CIELAB distance between a digit's colour and what it is drawn on (black to white is 100)
PLACE_TRIES, COLOUR_TRIES = 20, 40
VERSION = "1.0"
POINTS = {"keypoints": ["top", "bottom", "left", "right"], "skeleton": [[1, 2], [3, 4]]}
HIDDEN, SEEN = 1, 2  # COCO's v of a labelled keypoint: behind a later digit, or visible
TOLERANCE = 0.75  # px that a simplified polygon may stray from the edge of its mask
COLUMNS, ZOOM, CELL = 4, 3, 480  # of the picture; enlargement of a scene, side in px of the square it is shown in
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
PALETTE = [(230, 60, 60), (60, 200, 80), (70, 130, 255), (250, 200, 40), (220, 90, 240), (40, 220, 230)]


@dataclass
class Digit:
    """One drawn digit; ``visible`` shrinks while later digits are drawn over ``silhouette``."""

    label: int
    scan: int
    colour: np.ndarray
    silhouette: np.ndarray
    visible: np.ndarray


@dataclass
class Scene:
    """An H x W x 3 uint8 RGB image, the photograph behind it and its digits in drawing order."""

    image: np.ndarray
    photograph: str
    digits: list[Digit] = field(default_factory=list)


def compose(seed: int, split: str, index: int) -> Scene:
    """Image ``index`` of ``split``: it depends only on these numbers, never on how many images are made.

    A scene of train or val has up to MAX_DIGITS digits, an image to pre-train on one of class ``index % 10``.
    """
    material, rng = load_material(split), np.random.default_rng([seed, STREAMS[split], index])
    if split not in ("train", "val"):
        scene = _background(material, rng, SINGLE)
        _add_digit(scene, material, rng, index % NUM_CLASSES, SINGLE_HEIGHTS)
        return scene
    scene = _background(material, rng, PORTRAIT if index % 3 == 2 else LANDSCAPE)
    for _ in range(rng.integers(1, MAX_DIGITS + 1)):
        _add_digit(scene, material, rng, int(rng.integers(NUM_CLASSES)), SCENE_HEIGHTS)
    return scene


def _background(material: Material, rng: Generator, size: tuple[int, int]) -> Scene:
    """A random crop of a random photograph at random scale, perhaps mirrored, with light and tint varied."""
    name = str(rng.choice(list(material.photographs)))
    photograph = material.photographs[name]
    most = min(photograph.shape[0] / size[0], photograph.shape[1] / size[1])
    scale = rng.uniform(0.8, min(most, 3.0))
    height, width = (int(side * scale) for side in size)
    y, x = _corner(rng, photograph, (height, width))
    crop = cv2.resize(photograph[y : y + height, x : x + width], size[::-1], interpolation=cv2.INTER_AREA)
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    light = rng.uniform(*LIGHT) * rng.uniform(0.88, 1.12, size=3)
    return Scene(np.clip(crop * light, 0, 255).astype(np.uint8), name)


def _corner(rng: Generator, outer: np.ndarray, inner: tuple[int, ...]) -> tuple[int, int]:
    """A random top left corner (y, x) at which a patch of size ``inner`` lies wholly inside ``outer``."""
    return int(rng.integers(outer.shape[0] - inner[0] + 1)), int(rng.integers(outer.shape[1] - inner[1] + 1))


def _add_digit(scene: Scene, material: Material, rng: Generator, label: int, heights: tuple[int, int]) -> None:
    """Draw a digit where every earlier one stays recognisable, or none when no such place is found."""
    scan = int(rng.choice(material.by_class[label]))
    glyph = make_glyph(material.scans[scan], rng, heights, scene.image.shape[:2])
    for _ in range(PLACE_TRIES):
        y, x = _corner(rng, scene.image, glyph.shape)
        opacity = np.zeros(scene.image.shape[:2], np.float32)
        opacity[y : y + glyph.shape[0], x : x + glyph.shape[1]] = glyph
        silhouette = fill_holes(opacity > 0.5)
        left = [large_pieces(digit.visible & ~silhouette, MIN_PIECE) for digit in scene.digits]
        # of every earlier digit enough remains, and no hole is cut into it, which a polygon could not hold
        if all(
            visible.sum() >= MIN_VISIBLE * digit.silhouette.sum() and (fill_holes(visible) == visible).all()
            for digit, visible in zip(scene.digits, left, strict=True)
        ):
            colour = _contrasting_colour(scene, silhouette, rng)
            blended = scene.image + opacity[..., None] * (colour - scene.image.astype(np.float32))
            scene.image = np.clip(blended + 0.5, 0, 255).astype(np.uint8)
            for digit, visible in zip(scene.digits, left, strict=True):
                digit.visible = visible
            scene.digits.append(Digit(label, scan, colour, silhouette, silhouette))
            return


def _contrasting_colour(scene: Scene, silhouette: np.ndarray, rng: Generator) -> np.ndarray:
    """A random colour (float32 RGB) that stands out from the image under it and from every digit it overlaps."""
    under = [scene.image[silhouette].mean(axis=0)]
    under += [digit.colour for digit in scene.digits if (digit.silhouette & silhouette).any()]
    colours = rng.uniform(*CHALK, size=(COLOUR_TRIES, 3)).astype(np.float32)
    apart = np.linalg.norm(_lab(colours)[:, None] - _lab(np.array(under, np.float32)), axis=2).min(axis=1)
    good_enough = np.flatnonzero(apart >= MIN_CONTRAST)
    return colours[good_enough[0] if len(good_enough) else apart.argmax()]


def _lab(colours: np.ndarray) -> np.ndarray:
    """N x 3 RGB 0..255 -> N x 3 CIELAB, in which distance is about how different two colours look."""
    return cv2.cvtColor(colours[None] / 255, cv2.COLOR_RGB2LAB)[0]


def image_entry(scene: Scene, split: str, index: int) -> dict[str, Any]:
    """COCO ``images`` entry of scene ``index``; its id is unique over both splits. ``photograph`` is the background."""
    number = 1_000_000 * STREAMS[split] + index + 1
    height, width = scene.image.shape[:2]
    license_id = 1 + list(LICENSES).index(PHOTOGRAPHS[scene.photograph].license)
    entry = {"id": number, "file_name": f"{number:07d}.jpg", "height": height, "width": width, "license": license_id}
    return entry | {"photograph": scene.photograph}


def annotation_entries(scene: Scene, number: int) -> list[dict[str, Any]]:
    """COCO ``annotations`` entries of image ``number``, in drawing order; ``scan`` says which scan was drawn.

    Polygons of what is visible, the tight box around them, the mask's area in px; keypoints are the extreme pixels of
    the silhouette, found before anything was drawn over it.
    """
    entries: list[dict[str, Any]] = []
    for order, digit in enumerate(scene.digits):
        polygons = _polygons(digit.visible)
        low, high = np.concatenate(polygons).min(axis=0), np.concatenate(polygons).max(axis=0)
        points: list[int] = []
        for x, y in extreme_pixels(digit.silhouette):
            is_covered = any(later.silhouette[y, x] for later in scene.digits[order + 1 :])
            points += [x, y, HIDDEN if is_covered else SEEN]
        entries.append({
            "id": 10 * number + order, "image_id": number, "category_id": digit.label + 1, "scan": digit.scan,
            "segmentation": [polygon.ravel().tolist() for polygon in polygons],
            "bbox": [*low.tolist(), *(high - low).tolist()], "area": int(digit.visible.sum()), "iscrowd": 0,
            "keypoints": points, "num_keypoints": 4,
        })  # fmt: skip
    return entries


def coco_json(split: str, seed: int, images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole json; ``info`` lists the photographs and scans of both splits, so that anyone can compare them."""
    scans = split_scans()
    info = {
        "description": f"scratch_det digits demo, {split}: handwritten digits drawn over photographs",
        "version": VERSION,
        "seed": seed,
        "split": split,
        "photographs": {side: photograph_names(side) for side in ("train", "val")},
        "scans": {side: scans[side] for side in ("train", "val")},
        "attribution": {name: f"{p.author}, {p.license}" for name, p in PHOTOGRAPHS.items()},
    }
    return {
        "info": info,
        "licenses": [{"id": i, "name": name, "url": url} for i, (name, url) in enumerate(LICENSES.items(), start=1)],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": str(i), "supercategory": "digit"} | POINTS for i in range(NUM_CLASSES)],
    }


def _polygons(mask: np.ndarray) -> list[np.ndarray]:
    """Outlines (each N x 2 ints: x, y, on pixel edges) of the pieces of a mask without holes.

    OpenCV joins pixel centres, half a pixel too far inside; tracing a 4 x enlarged mask and rounding gives the edges.
    """
    enlarged = cv2.resize(mask.astype(np.uint8), None, fx=4, fy=4, interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(enlarged, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    outlines = [np.rint((contour[:, 0] + 0.5) / 4).astype(np.int32) for contour in contours]
    simple = [cv2.approxPolyDP(outline, TOLERANCE, True)[:, 0] for outline in outlines]
    return [short if len(short) >= 3 else outline for short, outline in zip(simple, outlines, strict=True)]


def extreme_pixels(mask: np.ndarray) -> list[tuple[int, int]]:
    """The top-, bottom-, left- and right-most pixel (x, y) of a mask; the middle one where several tie."""
    ys, xs = np.nonzero(mask)
    ties = [np.flatnonzero(at == end) for at, end in ((ys, ys.min()), (ys, ys.max()), (xs, xs.min()), (xs, xs.max()))]
    return [(int(xs[tie[len(tie) // 2]]), int(ys[tie[len(tie) // 2]])) for tie in ties]


def draw_preview(scenes: list[Scene]) -> np.ndarray:
    """Grid (H x W x 3 uint8 RGB) of annotated scenes: box, outline, class; hidden keypoints are hollow."""
    cells = []
    for scene in scenes:  # each enlarged and centred in a black square
        big = cv2.resize(scene.image, None, fx=ZOOM, fy=ZOOM, interpolation=cv2.INTER_CUBIC)
        for annotation, colour in zip(annotation_entries(scene, 0), PALETTE, strict=False):
            _draw_annotation(big, annotation, colour)
        y, x = CELL - big.shape[0], CELL - big.shape[1]
        cells.append(np.pad(big, ((y // 2, y - y // 2), (x // 2, x - x // 2), (0, 0))))
    cells += [np.zeros_like(cells[0])] * (-len(cells) % COLUMNS)
    return np.vstack([np.hstack(cells[i : i + COLUMNS]) for i in range(0, len(cells), COLUMNS)])


def _draw_annotation(big: np.ndarray, annotation: dict[str, Any], colour: tuple[int, int, int]) -> None:
    """Draw one annotation onto the enlarged image, in place."""
    outlines = [np.reshape(ZOOM * np.array(flat), (-1, 1, 2)) for flat in annotation["segmentation"]]
    for edge, thickness in ((WHITE, 3), (colour, 2)):
        cv2.polylines(big, outlines, True, edge, thickness, cv2.LINE_AA)
    x, y, width, height = (ZOOM * value for value in annotation["bbox"])
    cv2.rectangle(big, (x, y), (x + width, y + height), colour, 1)
    cv2.rectangle(big, (x, y), (x + 18, y + 22), colour, cv2.FILLED)
    name = str(annotation["category_id"] - 1)
    cv2.putText(big, name, (x + 2, y + 18), cv2.FONT_HERSHEY_SIMPLEX, 0.65, BLACK, 2, cv2.LINE_AA)
    for x, y, visible in np.reshape(annotation["keypoints"], (-1, 3)):
        centre, fill = (round(ZOOM * (x + 0.5)), round(ZOOM * (y + 0.5))), cv2.FILLED if visible == SEEN else 1
        for edge, radius in ((WHITE, 5), (colour, 3)):
            cv2.circle(big, centre, radius, edge, fill, cv2.LINE_AA)
