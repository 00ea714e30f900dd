"""One scene of the digits demo: a photograph crop with handwritten digits drawn over it, one after another.

A mask here is an H x W bool array; sizes are (height, width) in pixels; colours are RGB 0..255. A digit's silhouette is
its ink with the holes filled, because polygons in COCO's format cannot hold holes: the inside of a 0 belongs to the 0.
"""

from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.random import Generator

from scratch_det.data.digits.glyph import fill_holes, large_pieces, make_glyph
from scratch_det.data.digits.source import NUM_CLASSES, STREAMS, Material

LANDSCAPE, PORTRAIT, SINGLE = (128, 160), (160, 128), (64, 64)
MAX_DIGITS = 6
SCENE_HEIGHTS, SINGLE_HEIGHTS = (28, 80), (28, 56)  # px: least and greatest height of a digit before it is rotated
LIGHT, CHALK = (0.3, 0.8), (100, 255)  # dimmed photographs, bright digits: a shape is learnt in one polarity only
MIN_VISIBLE = 0.5  # share of its silhouette that every digit keeps
MIN_PIECE = 4  # px: smaller separate pieces of what is visible are not annotated
MIN_CONTRAST = 55  # CIELAB distance between a digit's colour and what it is drawn on (black to white is 100)
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
        if all(_stays_recognisable(digit, silhouette) for digit in scene.digits):
            colour = _contrasting_colour(scene, silhouette, rng)
            return _draw(scene, opacity, Digit(label, scan, colour, silhouette, silhouette))


def _draw(scene: Scene, opacity: np.ndarray, new: Digit) -> None:
    """Blend the new digit over the image and take what it covers from the earlier ones."""
    blended = scene.image + opacity[..., None] * (new.colour - scene.image.astype(np.float32))
    scene.image = np.clip(blended + 0.5, 0, 255).astype(np.uint8)
    for digit in scene.digits:
        digit.visible = _uncovered(digit, new.silhouette)
    scene.digits.append(new)


def _uncovered(digit: Digit, cover: np.ndarray) -> np.ndarray:
    """What stays visible of a digit under another silhouette."""
    return large_pieces(digit.visible & ~cover, MIN_PIECE)


def _stays_recognisable(digit: Digit, cover: np.ndarray) -> bool:
    """Enough of the silhouette remains, and no hole was cut into it, which a polygon could not hold."""
    left = _uncovered(digit, cover)
    return bool(left.sum() >= MIN_VISIBLE * digit.silhouette.sum() and fill_holes(left).sum() == left.sum())


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
