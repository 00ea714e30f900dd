"""How the digits demo is drawn: scenes of digits over photographs, and their annotations.

A mask here is an H x W bool array; sizes are (height, width) in pixels; colours are RGB 0..255. A digit's silhouette is
its ink with the holes filled, because polygons in COCO's format cannot hold holes: the inside of a 0 belongs to the 0.
Coordinates are x, y in px from the top left. Boxes and polygons are continuous: pixel (column i, row j) covers
[i, i + 1] x [j, j + 1]. Keypoints, as in COCO, are indices of pixels: add 0.5 for the continuous coordinate.
"""

from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.random import Generator

from scratch_det.errors import DataError

NUM_CLASSES = 10
# Of each class's scans, in scikit-learn's order; no scan is in two of them.
SHARES = {"train": 0.3, "val": 0.2, "pretrain_train": 0.4, "pretrain_val": 0.1}
SCENES = ("train", "val", "search")  # the splits of the detection set; the others are single digits

LANDSCAPE, PORTRAIT, SINGLE = (128, 160), (160, 128), (64, 64)
MAX_DIGITS = 6
SCENE_HEIGHTS, SINGLE_HEIGHTS = (28, 80), (28, 56)  # px: least and greatest height of a digit before it is rotated
LIGHT, CHALK = (0.3, 0.8), (100, 255)  # dimmed photographs, bright digits: a digit is always brighter than its ground
SCAN_PIXEL = 8  # px: side of a scan's pixel once enlarged
INK = 0.43  # darkness (0..1) of an enlarged scan at the edge of its strokes
MIN_VISIBLE = 0.5  # share of its silhouette that every digit keeps
MIN_PIECE = 4  # px: smaller separate pieces of what is visible are not annotated
MIN_CONTRAST = 55  # CIELAB distance between a digit's colour and what it is drawn on (black to white is 100)
PLACE_TRIES, COLOUR_TRIES = 20, 40

HIDDEN, SEEN = 1, 2  # COCO's v of a labelled keypoint: behind a later digit, or visible
TOLERANCE = 0.75  # px: largest distance of a simplified polygon from the edge of its mask


class Split(NamedTuple):
    """Its number in the random seeds; the scans, a key of SHARES, and the group of photographs that it shows."""

    stream: int
    scans: str
    photographs: str


SPLITS = {
    "train": Split(0, "train", "train"),
    "val": Split(1, "val", "val"),
    "pretrain_train": Split(2, "pretrain_train", "pretrain"),
    "pretrain_val": Split(3, "pretrain_val", "pretrain"),
    "search": Split(4, "pretrain_val", "pretrain"),
}


class Photograph(NamedTuple):
    """A package's file, its group of photographs, its licence and author."""

    file: str
    group: str
    license: str
    author: str


LICENSES = {
    "CC BY 2.0": "https://creativecommons.org/licenses/by/2.0/",
    "CC0 1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "public domain": "https://creativecommons.org/publicdomain/mark/1.0/",
}
PHOTOGRAPHS = {
    "china": Photograph("sklearn/datasets/images/china.jpg", "train", "CC BY 2.0", "danielbuechele"),
    "astronaut": Photograph("skimage/data/astronaut.png", "pretrain", "public domain", "NASA"),
    "coffee": Photograph("skimage/data/coffee.png", "train", "CC0 1.0", "Rachel Michetti"),
    "hubble_deep_field": Photograph("skimage/data/hubble_deep_field.jpg", "pretrain", "public domain", "NASA"),
    "camera": Photograph("skimage/data/camera.png", "train", "CC0 1.0", "Lav Varshney"),
    "brick": Photograph("skimage/data/brick.png", "pretrain", "CC0 1.0", "CC0Textures"),
    "grass": Photograph("skimage/data/grass.png", "pretrain", "CC0 1.0", "linolafett"),
    "gravel": Photograph("skimage/data/gravel.png", "train", "CC0 1.0", "CC0Textures"),
    "flower": Photograph("sklearn/datasets/images/flower.jpg", "val", "CC BY 2.0", "vultilion"),
    "chelsea": Photograph("skimage/data/chelsea.png", "val", "CC0 1.0", "Stefan van der Walt"),
    "rocket": Photograph("skimage/data/rocket.jpg", "val", "public domain", "SpaceX"),
}


class Material(NamedTuple):
    """What scenes are drawn from.

    scans: float32 [1797, 8, 8], ink 0..1. shares: key of SHARES -> for each class, 0 to 9, the ascending indices of its
    scans. photographs: RGB images by name.
    """

    scans: np.ndarray
    shares: dict[str, list[list[int]]]
    photographs: dict[str, np.ndarray]


@cache
def load_material() -> Material:
    """All scans and photographs. Raises DataError when the wheels lack them.

    The splits follow scikit-learn's order and no seed, so that sets of different seeds can be compared.
    """
    photographs = {}
    try:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        for name, photograph in PHOTOGRAPHS.items():
            package, _, path = photograph.file.partition("/")
            encoded = np.frombuffer(files(package).joinpath(path).read_bytes(), np.uint8)
            if (image := cv2.imdecode(encoded, cv2.IMREAD_COLOR)) is None:
                raise OSError(f"{path} is damaged")
            photographs[name] = image[..., ::-1]
    except (ImportError, OSError) as error:
        reinstall = "pip install --force-reinstall scikit-learn 'scikit-image<0.27'"
        raise DataError(f"the digits demo cannot read its scans and photographs ({error}): {reinstall}") from None
    shares: dict[str, list[list[int]]] = {share: [] for share in SHARES}
    for label in range(NUM_CLASSES):
        indices = np.flatnonzero(bunch.target == label)
        ends = np.rint(np.cumsum([*SHARES.values()]) * len(indices)).astype(int)
        for share, part in zip(SHARES, np.split(indices, ends[:-1]), strict=True):
            shares[share].append(part.tolist())
    return Material((bunch.images / 16).astype(np.float32), shares, photographs)


def photograph_names(split: str) -> list[str]:
    """Names of the photographs that ``split`` shows."""
    return [name for name, photograph in PHOTOGRAPHS.items() if photograph.group == SPLITS[split].photographs]


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
    """An H x W x 3 uint8 RGB image, the name of the photograph behind it, and its digits in drawing order."""

    image: np.ndarray
    photograph: str
    digits: list[Digit] = field(default_factory=list)


def compose(seed: int, split: str, index: int) -> Scene:
    """Image ``index`` of ``split``: a function of these three, whatever the number of images that are made.

    A scene has up to MAX_DIGITS digits, an image to pre-train on one of class ``index % 10``.
    """
    rng, is_scene = np.random.default_rng([seed, SPLITS[split].stream, index]), split in SCENES
    size = (PORTRAIT if index % 3 == 2 else LANDSCAPE) if is_scene else SINGLE
    scene = _draw_background(split, rng, size)
    for _ in range(rng.integers(1, MAX_DIGITS + 1) if is_scene else 1):
        label = int(rng.integers(NUM_CLASSES)) if is_scene else index % NUM_CLASSES
        _draw_digit(scene, split, rng, label, SCENE_HEIGHTS if is_scene else SINGLE_HEIGHTS)
    return scene


def _draw_background(split: str, rng: Generator, size: tuple[int, int]) -> Scene:
    """A random crop of a random photograph at random scale, mirrored or not, with random light and tint."""
    name = str(rng.choice(photograph_names(split)))
    photograph = load_material().photographs[name]
    most = min(photograph.shape[0] / size[0], photograph.shape[1] / size[1])
    scale = rng.uniform(0.8, min(most, 3.0))
    height, width = (int(side * scale) for side in size)
    y, x = _draw_corner(rng, photograph, (height, width))
    crop = cv2.resize(photograph[y : y + height, x : x + width], size[::-1], interpolation=cv2.INTER_AREA)
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    light = rng.uniform(*LIGHT) * rng.uniform(0.88, 1.12, size=3)
    return Scene(np.clip(crop * light, 0, 255).astype(np.uint8), name)


def _draw_corner(rng: Generator, outer: np.ndarray, inner: tuple[int, ...]) -> tuple[int, int]:
    """A random top left corner (y, x) of a patch of size ``inner`` that lies wholly inside ``outer``."""
    return int(rng.integers(outer.shape[0] - inner[0] + 1)), int(rng.integers(outer.shape[1] - inner[1] + 1))


def _draw_digit(scene: Scene, split: str, rng: Generator, label: int, heights: tuple[int, int]) -> None:
    """Draw a digit where every earlier one stays recognisable, or none when no such place is found."""
    material = load_material()
    scan = int(rng.choice(material.shares[SPLITS[split].scans][label]))
    glyph = _draw_glyph(material.scans[scan], rng, heights, scene.image.shape[:2])
    for _ in range(PLACE_TRIES):
        y, x = _draw_corner(rng, scene.image, glyph.shape)
        opacity = np.zeros(scene.image.shape[:2], np.float32)
        opacity[y : y + glyph.shape[0], x : x + glyph.shape[1]] = glyph
        silhouette = fill_holes(opacity > 0.5)
        left = [_large_pieces(digit.visible & ~silhouette, MIN_PIECE) for digit in scene.digits]
        # of every earlier digit enough remains, without a hole, which a polygon could not hold
        if all(
            visible.sum() >= MIN_VISIBLE * digit.silhouette.sum() and (fill_holes(visible) == visible).all()
            for digit, visible in zip(scene.digits, left, strict=True)
        ):
            colour = _draw_colour(scene, silhouette, rng)
            blended = scene.image + opacity[..., None] * (colour - scene.image.astype(np.float32))
            scene.image = np.clip(blended + 0.5, 0, 255).astype(np.uint8)
            for digit, visible in zip(scene.digits, left, strict=True):
                digit.visible = visible
            scene.digits.append(Digit(label, scan, colour, silhouette, silhouette))
            return


def _draw_glyph(scan: np.ndarray, rng: Generator, heights: tuple[int, int], limit: tuple[int, ...]) -> np.ndarray:
    """Opacity (h x w float32, 0..1, no larger than ``limit``) of an 8 x 8 scan, smoothly enlarged, sheared, rotated."""
    ink = cv2.resize(np.pad(scan, 1), None, fx=SCAN_PIXEL, fy=SCAN_PIXEL, interpolation=cv2.INTER_CUBIC)
    ink = ink + 1.2 * (ink - cv2.GaussianBlur(ink, (0, 0), 1.2 * SCAN_PIXEL))  # opens holes that the scan blurred shut
    ink = cv2.GaussianBlur(ink, (0, 0), 0.3 * SCAN_PIXEL)
    left, top, width, height = cv2.boundingRect((ink > INK).astype(np.uint8))
    target = rng.uniform(*heights)
    stretch = target / height * np.array([rng.uniform(0.85, 1.25), 1.0])
    turn, shear = np.deg2rad(rng.uniform(-12, 12)), rng.uniform(-0.15, 0.15)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    linear = rotation @ np.array([[1, shear], [0, 1]]) @ np.diag(stretch)
    side = int(3 * target)
    offset = side / 2 - linear @ (left + width / 2, top + height / 2)
    warped = cv2.warpAffine(ink, np.column_stack([linear, offset]), (side, side), flags=cv2.INTER_LINEAR)
    opacity = np.clip((warped - INK) * target / 12 + 0.5, 0, 1)
    strokes = _large_pieces(opacity > 0, (opacity > 0).sum() // 20 + 1)  # smaller spots are dirt of the scan
    x, y, width, height = cv2.boundingRect(strokes.astype(np.uint8))
    glyph = (opacity * strokes)[y : y + height, x : x + width]
    shrink = min(1.0, limit[0] / height, limit[1] / width)
    return cv2.resize(glyph, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA) if shrink < 1 else glyph


def _draw_colour(scene: Scene, silhouette: np.ndarray, rng: Generator) -> np.ndarray:
    """A random colour (float32 RGB) that stands out from the image under it and from every digit it overlaps."""
    under = [scene.image[silhouette].mean(axis=0)]
    under += [digit.colour for digit in scene.digits if (digit.silhouette & silhouette).any()]
    colours = rng.uniform(*CHALK, size=(COLOUR_TRIES, 3)).astype(np.float32)
    # N x 3 RGB 0..255 -> N x 3 CIELAB, in which distance is about how different two colours look
    drawn, below = (cv2.cvtColor(c[None] / 255, cv2.COLOR_RGB2LAB)[0] for c in (colours, np.array(under, np.float32)))
    apart = np.linalg.norm(drawn[:, None] - below, axis=2).min(axis=1)
    good_enough = np.flatnonzero(apart >= MIN_CONTRAST)
    return colours[good_enough[0] if len(good_enough) else apart.argmax()]


def fill_holes(mask: np.ndarray) -> np.ndarray:
    """The mask with every enclosed hole filled."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(np.zeros(mask.shape, np.uint8), contours, -1, 1, cv2.FILLED).astype(bool)


def _large_pieces(mask: np.ndarray, least: int) -> np.ndarray:
    """The mask without separate pieces of fewer than ``least`` px."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    return mask & (stats[:, cv2.CC_STAT_AREA] >= least)[labels]


def annotation_entries(scene: Scene, number: int) -> list[dict[str, Any]]:
    """COCO ``annotations`` entries of image ``number``, in drawing order; ``scan`` is the index of the drawn scan.

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
