"""What the digits demo is made of: handwritten scans and photographs, split so that val shares none with train.

Both come inside the wheels of scikit-learn and scikit-image, so nothing is downloaded. Only photographs whose free
licence those two projects state are used. Masks are H x W bool arrays.
"""

from functools import cache
from importlib.resources import files
from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator

from scratch_det.errors import DataError

INK = 0.43  # darkness (0..1) of an enlarged scan at the edge of its strokes
CELL = 8  # px: side of an enlarged scan's pixel
NUM_CLASSES = 10
STREAMS = {"train": 0, "val": 1, "pretrain_train": 2, "pretrain_val": 3}  # each split's number in the random seeds
TRAIN_SHARE = 3 / 4  # of each class's scans, in scikit-learn's order; the rest goes to val
PRETRAIN_VAL_SHARE = 1 / 6  # of each class's train scans: used only in the validation part of the pre-training set


class Photograph(NamedTuple):
    """A package's file, the split it serves (the pretrain splits share train's), its licence and author."""

    file: str
    split: str
    license: str
    author: str


LICENSES = {
    "CC BY 2.0": "https://creativecommons.org/licenses/by/2.0/",
    "CC0 1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "public domain": "https://creativecommons.org/publicdomain/mark/1.0/",
}
PHOTOGRAPHS = {
    "china": Photograph("sklearn/datasets/images/china.jpg", "train", "CC BY 2.0", "danielbuechele"),
    "astronaut": Photograph("skimage/data/astronaut.png", "train", "public domain", "NASA"),
    "coffee": Photograph("skimage/data/coffee.png", "train", "CC0 1.0", "Rachel Michetti"),
    "hubble_deep_field": Photograph("skimage/data/hubble_deep_field.jpg", "train", "public domain", "NASA"),
    "camera": Photograph("skimage/data/camera.png", "train", "CC0 1.0", "Lav Varshney"),
    "brick": Photograph("skimage/data/brick.png", "train", "CC0 1.0", "CC0Textures"),
    "grass": Photograph("skimage/data/grass.png", "train", "CC0 1.0", "linolafett"),
    "gravel": Photograph("skimage/data/gravel.png", "train", "CC0 1.0", "CC0Textures"),
    "flower": Photograph("sklearn/datasets/images/flower.jpg", "val", "CC BY 2.0", "vultilion"),
    "chelsea": Photograph("skimage/data/chelsea.png", "val", "CC0 1.0", "Stefan van der Walt"),
    "rocket": Photograph("skimage/data/rocket.jpg", "val", "public domain", "SpaceX"),
}


class Material(NamedTuple):
    """What a split may draw on: scans (N x 8 x 8, ink 0..1), their indices by class, photographs (RGB) by name."""

    scans: np.ndarray
    by_class: list[np.ndarray]
    photographs: dict[str, np.ndarray]


@cache
def load_material(split: str) -> Material:
    """Scans and photographs that ``split``, a key of STREAMS, may show."""
    try:
        scans, labels = _load_scans()
        allowed = np.array(split_scans()[split])
        by_class = [allowed[labels[allowed] == label] for label in range(NUM_CLASSES)]
        photographs = {}
        for name in photograph_names("val" if split == "val" else "train"):
            package, _, path = PHOTOGRAPHS[name].file.partition("/")
            encoded = np.frombuffer(files(package).joinpath(path).read_bytes(), np.uint8)
            if (image := cv2.imdecode(encoded, cv2.IMREAD_COLOR)) is None:
                raise OSError(f"{path} is damaged")
            photographs[name] = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        return Material(scans, by_class, photographs)
    except (ImportError, OSError) as error:
        reinstall = "pip install --force-reinstall scikit-learn 'scikit-image<0.27'"
        raise DataError(f"what the digits demo is drawn from is not there ({error}): {reinstall}") from None


def photograph_names(side: str) -> list[str]:
    """Names of the photographs of ``side``, train or val."""
    return [name for name, photograph in PHOTOGRAPHS.items() if photograph.split == side]


def split_scans() -> dict[str, list[int]]:
    """Each split -> ascending scan indices; train and val are disjoint, and the pretrain splits divide train's.

    The division follows scikit-learn's order and no seed: sets of different seeds stay comparable.
    """
    parts: dict[str, list[int]] = {split: [] for split in STREAMS}
    for label in range(NUM_CLASSES):
        indices = np.flatnonzero(_load_scans()[1] == label).tolist()
        cut = round(TRAIN_SHARE * len(indices))
        pretrain_cut = round((1 - PRETRAIN_VAL_SHARE) * cut)
        parts["train"] += indices[:cut]
        parts["val"] += indices[cut:]
        parts["pretrain_train"] += indices[:pretrain_cut]
        parts["pretrain_val"] += indices[pretrain_cut:cut]
    return {split: sorted(indices) for split, indices in parts.items()}


@cache
def _load_scans() -> tuple[np.ndarray, np.ndarray]:
    """Scans (1797 x 8 x 8 float32, ink 0..1) and their labels (1797 ints, 0..9)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return (bunch.images / 16).astype(np.float32), bunch.target


def make_glyph(scan: np.ndarray, rng: Generator, heights: tuple[int, int], limit: tuple[int, ...]) -> np.ndarray:
    """Opacity (h x w float32, 0..1, no larger than ``limit``) of an 8 x 8 scan, smoothly enlarged, sheared, rotated."""
    ink = cv2.resize(np.pad(scan, 1), None, fx=CELL, fy=CELL, interpolation=cv2.INTER_CUBIC)
    ink = ink + 1.2 * (ink - cv2.GaussianBlur(ink, (0, 0), 1.2 * CELL))  # reopens holes that 8 x 8 pixels blurred shut
    ink = cv2.GaussianBlur(ink, (0, 0), 0.3 * CELL)
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
    strokes = large_pieces(opacity > 0, (opacity > 0).sum() // 20 + 1)  # smaller blots are dirt of the scan
    x, y, width, height = cv2.boundingRect(strokes.astype(np.uint8))
    glyph = (opacity * strokes)[y : y + height, x : x + width]
    shrink = min(1.0, limit[0] / height, limit[1] / width)
    return cv2.resize(glyph, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA) if shrink < 1 else glyph


def fill_holes(mask: np.ndarray) -> np.ndarray:
    """The mask with every enclosed hole filled."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(np.zeros(mask.shape, np.uint8), contours, -1, 1, cv2.FILLED).astype(bool)


def large_pieces(mask: np.ndarray, least: int) -> np.ndarray:
    """The mask without separate pieces of fewer than ``least`` px."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    return mask & (stats[:, cv2.CC_STAT_AREA] >= least)[labels]
