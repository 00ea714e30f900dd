"""One scene of the digits demo: a photograph crop with handwritten digits drawn over it, one after another.

A mask here is an H x W bool array; sizes are (height, width) in pixels; colours are RGB 0..255. A digit's silhouette is
its ink with the holes filled, because polygons in COCO's format cannot hold holes: the inside of a 0 belongs to the 0.
"""

from dataclasses import dataclass, field

import cv2
import numpy as np

from .digits_source import NUM_CLASSES, STREAMS, Material

LANDSCAPE, PORTRAIT = (128, 160), (160, 128)
SINGLE = (64, 64)
MAX_DIGITS = 6
SCENE_HEIGHTS, SINGLE_HEIGHTS = (24, 80), (28, 56)
"""Least and greatest height of a digit before it is rotated, px."""
MIN_VISIBLE = 0.4
"""Share of its silhouette that every digit keeps."""
MIN_CONTRAST = 55
"""Least CIELAB distance between a digit's colour and what it is drawn on (black to white is 100)."""
INK = 0.43
"""Darkness of an enlarged scan (0..1) at which the edge of its strokes is drawn."""
MIN_SLIVER = 4
"""Separate visible pieces below this many px are not annotated."""
PLACE_TRIES, COLOUR_TRIES = 20, 40


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


def compose_scene(material: Material, seed: int, split: str, index: int) -> Scene:
    """Scene ``index`` of ``split``: it depends on these numbers alone, never on how many scenes are made."""
    rng = np.random.default_rng([seed, STREAMS[split], index])
    scene = _background(material, rng, PORTRAIT if index % 3 == 2 else LANDSCAPE)
    for _ in range(rng.integers(1, MAX_DIGITS + 1)):
        _add_digit(scene, material, rng, int(rng.integers(NUM_CLASSES)), SCENE_HEIGHTS)
    return scene


def compose_single(material: Material, seed: int, split: str, index: int) -> Scene:
    """Image ``index`` of a pre-training split: one digit of class ``index % 10``."""
    rng = np.random.default_rng([seed, STREAMS[split], index])
    scene = _background(material, rng, SINGLE)
    _add_digit(scene, material, rng, index % NUM_CLASSES, SINGLE_HEIGHTS)
    return scene


def _background(material: Material, rng: np.random.Generator, size: tuple[int, int]) -> Scene:
    """A random crop of a random photograph at random scale, perhaps mirrored, with light and tint varied."""
    name = str(rng.choice(list(material.photographs)))
    photograph = material.photographs[name]
    most = min(photograph.shape[0] / size[0], photograph.shape[1] / size[1])
    scale = rng.uniform(0.8, min(most, 3.0))
    height, width = (int(side * scale) for side in size)
    y = rng.integers(photograph.shape[0] - height + 1)
    x = rng.integers(photograph.shape[1] - width + 1)
    crop = cv2.resize(photograph[y : y + height, x : x + width], size[::-1], interpolation=cv2.INTER_AREA)
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    light = rng.uniform(0.6, 1.3) * rng.uniform(0.88, 1.12, size=3)
    return Scene(np.clip(crop * light, 0, 255).astype(np.uint8), name)


def _add_digit(
    scene: Scene, material: Material, rng: np.random.Generator, label: int, heights: tuple[int, int]
) -> None:
    """Draw a digit where every earlier one stays recognisable, or none when no such place is found."""
    scan = material.draw_scan(rng, label)
    glyph = glyph_alpha(material.scans[scan], rng, heights, scene.image.shape[:2])
    for _ in range(PLACE_TRIES):
        alpha = _place(glyph, rng, scene.image.shape[:2])
        silhouette = fill_holes(alpha > 0.5)
        left = [remove_slivers(digit.visible & ~silhouette) for digit in scene.digits]
        if all(map(_stays_recognisable, scene.digits, left)):
            break
    else:
        return
    for digit, visible in zip(scene.digits, left, strict=True):
        digit.visible = visible
    colour = _contrasting_colour(scene, silhouette, rng)
    blended = scene.image + alpha[..., None] * (colour - scene.image.astype(np.float32))
    scene.image = np.clip(blended + 0.5, 0, 255).astype(np.uint8)
    scene.digits.append(Digit(label, scan, colour, silhouette, silhouette))


def _stays_recognisable(digit: Digit, visible: np.ndarray) -> bool:
    """Enough of the silhouette remains, and no hole was cut into it, which a polygon could not hold."""
    enough = visible.sum() >= MIN_VISIBLE * digit.silhouette.sum()
    return bool(enough and fill_holes(visible).sum() == visible.sum())


def glyph_alpha(
    scan: np.ndarray, rng: np.random.Generator, heights: tuple[int, int], limit: tuple[int, int]
) -> np.ndarray:
    """Opacity (h x w float32, 0..1, no larger than ``limit``) of an 8 x 8 scan, smoothly enlarged, sheared, rotated."""
    cell = 8
    ink = cv2.resize(np.pad(scan, 1), None, fx=cell, fy=cell, interpolation=cv2.INTER_CUBIC)
    ink = ink + 1.2 * (ink - cv2.GaussianBlur(ink, (0, 0), 1.2 * cell))  # reopens holes that 8 x 8 pixels blurred shut
    ink = cv2.GaussianBlur(ink, (0, 0), 0.3 * cell)
    left, top, width, height = cv2.boundingRect((ink > INK).astype(np.uint8))
    target = rng.uniform(*heights)
    stretch = target / height * np.array([rng.uniform(0.85, 1.25), 1.0])
    turn, shear = np.deg2rad(rng.uniform(-12, 12)), rng.uniform(-0.15, 0.15)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    linear = rotation @ np.array([[1, shear], [0, 1]]) @ np.diag(stretch)
    side = int(3 * target)
    offset = side / 2 - linear @ (left + width / 2, top + height / 2)
    warped = cv2.warpAffine(ink, np.column_stack([linear, offset]), (side, side), flags=cv2.INTER_LINEAR)
    alpha = remove_specks(np.clip((warped - INK) * target / 12 + 0.5, 0, 1))
    x, y, width, height = cv2.boundingRect((alpha > 0).astype(np.uint8))
    shrink = min(1.0, limit[0] / height, limit[1] / width)
    alpha = alpha[y : y + height, x : x + width]
    return cv2.resize(alpha, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA) if shrink < 1 else alpha


def remove_specks(alpha: np.ndarray) -> np.ndarray:
    """Opacity without the blots that are a twentieth of the glyph or less: dirt of the scan, not strokes."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats((alpha > 0).astype(np.uint8))
    areas = stats[:, cv2.CC_STAT_AREA]
    specks = [i for i in range(1, count) if areas[i] <= areas[1:].sum() / 20]
    return np.where(np.isin(labels, specks), 0, alpha).astype(np.float32)


def _place(glyph: np.ndarray, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """The glyph's opacity somewhere wholly inside an image of ``size``."""
    y = rng.integers(size[0] - glyph.shape[0] + 1)
    x = rng.integers(size[1] - glyph.shape[1] + 1)
    alpha = np.zeros(size, np.float32)
    alpha[y : y + glyph.shape[0], x : x + glyph.shape[1]] = glyph
    return alpha


def _contrasting_colour(scene: Scene, silhouette: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random colour (float32 RGB) that stands out from the image under it and from every digit it overlaps."""
    under = [scene.image[silhouette].mean(axis=0)]
    under += [digit.colour for digit in scene.digits if (digit.silhouette & silhouette).any()]
    colours = rng.uniform(0, 255, size=(COLOUR_TRIES, 3)).astype(np.float32)
    apart = np.linalg.norm(_lab(colours)[:, None] - _lab(np.array(under, np.float32)), axis=2).min(axis=1)
    good_enough = np.flatnonzero(apart >= MIN_CONTRAST)
    return colours[good_enough[0] if len(good_enough) else apart.argmax()]


def _lab(colours: np.ndarray) -> np.ndarray:
    """N x 3 RGB 0..255 -> N x 3 CIELAB, in which distance is about how different two colours look."""
    return cv2.cvtColor(colours[None] / 255, cv2.COLOR_RGB2LAB)[0]


def fill_holes(mask: np.ndarray) -> np.ndarray:
    """The mask with every enclosed hole filled."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(np.zeros(mask.shape, np.uint8), contours, -1, 1, cv2.FILLED).astype(bool)


def remove_slivers(mask: np.ndarray) -> np.ndarray:
    """The mask without separate pieces smaller than MIN_SLIVER px."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    small = [i for i in range(1, count) if stats[i, cv2.CC_STAT_AREA] < MIN_SLIVER]
    return mask & ~np.isin(labels, small)
