"""What the digits demo is made of: handwritten scans and photographs, split so that val shares none with train.

Both come inside the wheels of scikit-learn and scikit-image, so nothing is downloaded. Only photographs whose free
licence those two projects state are used.
"""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import cv2
import numpy as np

from ..errors import DataError

NUM_CLASSES = 10
STREAMS = {"train": 0, "val": 1, "pretrain_train": 2, "pretrain_val": 3}
"""Name of a split -> its number in every random seed; a pretrain split draws on train material only."""
TRAIN_SHARE = 3 / 4
"""Share of each class's scans, in scikit-learn's order, that goes to train; the rest goes to val."""
PRETRAIN_VAL_SHARE = 1 / 6
"""Share of each class's train scans that only the validation half of the pre-training set shows."""


@dataclass(frozen=True)
class Photograph:
    """One bundled photograph: the package and file that hold it, the split it serves, its licence and author."""

    package: str
    file: str
    split: str
    license: str
    author: str

    @property
    def name(self) -> str:
        """File name without folder and ending, such as ``china``."""
        return self.file.rsplit("/", 1)[-1].rsplit(".", 1)[0]


LICENSES = {
    "CC BY 2.0": "https://creativecommons.org/licenses/by/2.0/",
    "CC0 1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "public domain": "https://creativecommons.org/publicdomain/mark/1.0/",
}
PHOTOGRAPHS = (
    Photograph("sklearn.datasets", "images/china.jpg", "train", "CC BY 2.0", "danielbuechele"),
    Photograph("skimage.data", "astronaut.png", "train", "public domain", "NASA"),
    Photograph("skimage.data", "coffee.png", "train", "CC0 1.0", "Rachel Michetti"),
    Photograph("skimage.data", "hubble_deep_field.jpg", "train", "public domain", "NASA"),
    Photograph("skimage.data", "camera.png", "train", "CC0 1.0", "Lav Varshney"),
    Photograph("skimage.data", "brick.png", "train", "CC0 1.0", "CC0Textures"),
    Photograph("skimage.data", "grass.png", "train", "CC0 1.0", "linolafett"),
    Photograph("skimage.data", "gravel.png", "train", "CC0 1.0", "CC0Textures"),
    Photograph("sklearn.datasets", "images/flower.jpg", "val", "CC BY 2.0", "vultilion"),
    Photograph("skimage.data", "chelsea.png", "val", "CC0 1.0", "Stefan van der Walt"),
    Photograph("skimage.data", "rocket.jpg", "val", "public domain", "SpaceX"),
)


@dataclass(frozen=True)
class Material:
    """What one split may draw on: scans (N x 8 x 8, ink 0..1) by class, photographs (H x W x 3 uint8 RGB) by name."""

    scans: np.ndarray
    by_class: dict[int, list[int]]
    photographs: dict[str, np.ndarray]

    def draw_scan(self, rng: np.random.Generator, label: int) -> int:
        """Index of a random scan of class ``label``."""
        return int(rng.choice(self.by_class[label]))


def load_material(split: str) -> Material:
    """Scans and photographs that ``split``, a key of STREAMS, may show."""
    scans, labels = _load_scans()
    allowed = set(split_scans()[split])
    by_class = {c: [int(i) for i in np.flatnonzero(labels == c) if int(i) in allowed] for c in range(NUM_CLASSES)}
    return Material(scans, by_class, {p.name: _read_photograph(p) for p in PHOTOGRAPHS if p.split == _side(split)})


def photograph_names(split: str) -> list[str]:
    """Names of the photographs that ``split`` may show."""
    return [photograph.name for photograph in PHOTOGRAPHS if photograph.split == _side(split)]


@cache
def split_scans() -> dict[str, list[int]]:
    """Each split -> ascending scan indices; train and val are disjoint, and the pretrain splits divide train's.

    The division follows scikit-learn's order and no seed: sets of different seeds stay comparable.
    """
    _, labels = _load_scans()
    parts: dict[str, list[int]] = {split: [] for split in STREAMS}
    for label in range(NUM_CLASSES):
        indices = [int(i) for i in np.flatnonzero(labels == label)]
        cut = round(TRAIN_SHARE * len(indices))
        pretrain_cut = round((1 - PRETRAIN_VAL_SHARE) * cut)
        parts["train"] += indices[:cut]
        parts["val"] += indices[cut:]
        parts["pretrain_train"] += indices[:pretrain_cut]
        parts["pretrain_val"] += indices[pretrain_cut:cut]
    return {split: sorted(indices) for split, indices in parts.items()}


def _side(split: str) -> str:
    """``val`` for val; ``train`` for train and both pretrain splits."""
    return "val" if split == "val" else "train"


@cache
def _load_scans() -> tuple[np.ndarray, np.ndarray]:
    """Scans (1797 x 8 x 8 float32, ink 0..1) and their labels (1797 ints, 0..9)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("the handwritten scans come with scikit-learn: pip install scikit-learn") from None
    bunch = load_digits()
    return (bunch.images / 16).astype(np.float32), bunch.target


def _read_photograph(photograph: Photograph) -> np.ndarray:
    """H x W x 3 uint8 RGB pixels, read from the installed wheel."""
    project = {"sklearn.datasets": "scikit-learn", "skimage.data": "scikit-image"}[photograph.package]
    try:
        encoded = files(photograph.package).joinpath(photograph.file).read_bytes()
    except (ImportError, OSError):
        raise DataError(f"photograph {photograph.file} comes with {project}: pip install {project}") from None
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise DataError(f"photograph {photograph.file} is damaged: pip install --force-reinstall {project}")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
