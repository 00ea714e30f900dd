"""From an image folder to samples of one size: the training set by stream position, the test set by image.

A sample is a dictionary:
    image        uint8 [3, S, S], channels in INPUT.FORMAT order, S = INPUT.MIN_SIZE_TRAIN
    label        the class, a 0-based number
    image_id     path below the data set's root
    position     place in the stream                         (training only)
    height, width   the original image's size, pixels
"""

import math

import numpy as np
from fvcore.common.config import CfgNode
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from scratch_det.data.dataset import Records, as_sample
from scratch_det.data.image import read_image
from scratch_det.data.image_folder import ImageFolder
from scratch_det.data.stream import Stream
from scratch_det.data.transforms import Sample, flip
from scratch_det.errors import DataError

ASPECT = 4 / 3  # of a crop, at most, either way (Szegedy et al. 2015, *Going Deeper with Convolutions*, section 6)
ATTEMPTS = 10  # to draw a crop that fits into the image


class FolderSet(Dataset):
    """Images and labels by index; a DataError becomes the item, so that it leaves a worker process as it is."""

    def __init__(self, cfg: CfgNode, datasets: list[ImageFolder]):
        self.cfg, self.side = cfg, cfg.INPUT.MIN_SIZE_TRAIN[0]
        self.records = Records([(data.entry.root, *image) for data in datasets for image in data.images])

    def __len__(self) -> int:
        return len(self.records)

    def load(self, index: int) -> Sample:
        root, path, label = self.records[index]
        return {**as_sample(read_image(root / path), self.cfg.INPUT.FORMAT), "image_id": path, "label": label}


class TrainingFolderSet(FolderSet):
    """Training samples addressed by stream position."""

    def __init__(self, cfg: CfgNode, datasets: list[ImageFolder]):
        super().__init__(cfg, datasets)
        self.stream = Stream(cfg.SEED, len(self))

    def __getitem__(self, position: int) -> Sample | DataError:
        try:
            sample = self.load(self.stream.index(position))
        except DataError as error:
            return error
        return {"position": position, **augment(sample, self.cfg, self.stream.rng(position))}

    def describe(self) -> str:
        """For the log."""
        return f"{len(self):,} training images"


class EvaluationFolderSet(FolderSet):
    """Test samples in the folder's order: the shorter side becomes MIN_SIZE_TEST, then the middle is cut out."""

    def __getitem__(self, index: int) -> Sample | DataError:
        try:
            sample = self.load(index)
        except DataError as error:
            return error
        return middle(sample, self.cfg.INPUT.MIN_SIZE_TEST, self.side)


def augment(sample: Sample, cfg: CfgNode, rng: np.random.Generator) -> Sample:
    """A random part of the image with INPUT.CROP, else its middle, as a square; then RANDOM_FLIP with probability 1/2.

    INPUT.CROP.SIZE is the least part of height and width: the area is drawn between the product of the two and the
    whole image, and the aspect between 3/4 and 4/3.
    """
    side = cfg.INPUT.MIN_SIZE_TRAIN[0]
    if cfg.INPUT.CROP.ENABLED:
        crop = draw_crop(*sample["image"].shape[-2:], math.prod(cfg.INPUT.CROP.SIZE), rng)
        sample = {**sample, "image": F.resized_crop(sample["image"], *crop, [side, side], antialias=True)}
    else:
        sample = middle(sample, side, side)
    if cfg.INPUT.RANDOM_FLIP != "none" and rng.random() < 0.5:
        sample = flip(sample, cfg.INPUT.RANDOM_FLIP)
    return sample


def draw_crop(height: int, width: int, least_area: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width in pixels: ``least_area`` to 1 of the image, log-uniform aspect from 3/4 to 4/3.

    The largest square in the middle where no such part fits.
    """
    for _ in range(ATTEMPTS):
        area = height * width * rng.uniform(least_area, 1)
        aspect = math.exp(rng.uniform(-math.log(ASPECT), math.log(ASPECT)))
        h, w = max(1, round(math.sqrt(area / aspect))), max(1, round(math.sqrt(area * aspect)))
        if h <= height and w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def middle(sample: Sample, short_side: int, side: int) -> Sample:
    """Scale the shorter side to ``short_side`` and cut a square of ``side`` out of the middle, pixels."""
    height, width = sample["image"].shape[-2:]
    scale = short_side / min(height, width)
    size = [max(short_side, round(height * scale)), max(short_side, round(width * scale))]
    image = F.resize(sample["image"], size, antialias=True) if size != [height, width] else sample["image"]
    return {**sample, "image": F.center_crop(image, [side, side])}
