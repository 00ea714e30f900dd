"""From a validated COCO data set to samples: the training set by stream position, the test set by image.

A sample is a dictionary of an image with N objects, in pixels of the (resized) image; labels are 0-based class indices:
    image        uint8 [3, H, W], channels in INPUT.FORMAT order; contiguous once it has been resized
    image_id     the json's id
    position     index in the stream                         (training only)
    file_name    the json's                                  (training only)
    height, width   the original image's size, pixels
    boxes        float32 [N, 4], x1 y1 x2 y2                 (training only)
    labels       int64 [N]                                   (training only)
    masks        Masks of N objects                          (training only, with MODEL.MASK_ON)
    keypoints    float32 [N, K, 3], x y v, 0 0 0: unlabelled (training only, with MODEL.KEYPOINT_ON)
Boxes, masks and keypoints are continuous: the centre of the first pixel is 0.5, 0.5.
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor
from torch.utils.data import Dataset

from scratch_det.config.choices import REPEATS, choice_of
from scratch_det.data.checks import told
from scratch_det.data.coco import CocoDataset, nothing_to_train_on
from scratch_det.data.image import find_dark_images, read_image
from scratch_det.data.masks import Masks
from scratch_det.data.transforms import Sample, flip, keep_inside, to_test_size
from scratch_det.errors import DataError

ORDER, AUGMENTATION = 0, 1  # part of the seed, so that the two generators are independent


class Stream:
    """An endless sequence of image indices; each pass over the data (epoch) is its own permutation.

    Image and augmentation at a position are a function of only (seed, position), without any state. So a resumed run,
    or a run with another number of workers, processes or iterations, sees the same images. So two runs differ only in
    what their configs differ in, and a resumed run equals the uninterrupted run bit for bit.

    Args:
        seed: non-negative.
        num_images: images per epoch, at least 1.
        portrait: bool [num_images]; when given, positions 2k and 2k+1 hold images of one orientation wherever an epoch
            allows it. A batch is padded to its largest height and width, so mixed orientations cost memory and time;
            detectron2's DATALOADER.ASPECT_RATIO_GROUPING uses buffers, whose content depends on earlier images.
            Always pairs, even if a rank has more images, because the paper trains with 2 images per GPU.
        factors: how often an epoch shows each image in the mean [num_images], at least 1. An epoch then has their sum,
            rounded up, and of an image the whole number below or above its factor, at least 1.
    """

    def __init__(
        self, seed: int, num_images: int, portrait: np.ndarray | None = None, factors: np.ndarray | None = None
    ):
        self.seed, self.portrait, self.factors = seed, portrait, factors
        self.num_images, self.length = num_images, num_images if factors is None else math.ceil(factors.sum())
        self._cached = -1, np.empty(0, int)  # the last used epoch and its order

    def at(self, position: int) -> tuple[int, np.random.Generator]:
        """Index of the image at a position, and the random generator for its augmentation.

        A position is a 0-based count of images since the start of training, over all ranks.
        """
        epoch, offset = divmod(position, self.length)
        if self._cached[0] != epoch:
            rng = np.random.default_rng([self.seed, ORDER, epoch])
            order = rng.permutation(self.num_images)
            if self.factors is not None:  # images along a line by their factors, and points on it at a distance of 1
                ends = self.factors[order].cumsum() * (self.length / self.factors.sum())
                ends[-1] = self.length
                counts = np.diff(np.floor(ends + rng.random()).astype(int), prepend=0)
                order = rng.permutation(np.repeat(order, counts))
            if self.portrait is not None:
                starts_odd = (epoch * self.length) % 2 == 1
                order = _pair_up(order, self.portrait[order], rng, starts_odd)
            self._cached = epoch, order
        return int(self._cached[1][offset]), np.random.default_rng([self.seed, AUGMENTATION, position])


def _pair_up(order: np.ndarray, portrait: np.ndarray, rng: np.random.Generator, starts_odd: bool) -> np.ndarray:
    """Reorder one epoch so that its pairs, counted from even global positions, share an orientation.

    Images that cannot be paired go to the ends of the epoch: one image if the number of images is odd (at the start if
    a pair is cut there anyway), two of different orientation or none if it is even.
    """
    pairs, left_over = [], []
    for group in (order[portrait], order[~portrait]):
        whole = len(group) // 2 * 2
        pairs.append(group[:whole].reshape(-1, 2))
        left_over.extend(group[whole:])
    shuffled = rng.permutation(np.concatenate(pairs))
    head, tail = (left_over[:1], left_over[1:]) if starts_odd else ([], left_over)
    return np.concatenate([np.array(head, order.dtype), shuffled.reshape(-1), np.array(tail, order.dtype)])


class SampleSet(Dataset):
    """Samples, read by a DataLoader.

    items: a record of each image, an array where workers share it; description: for the log, what is trained on.
    """

    items: Sequence[Any] | np.ndarray
    description = ""

    def __len__(self) -> int:
        return len(self.items)

    def __getitems__(self, indices: Sequence[int]) -> list[Sample] | list[DataError]:
        """A batch; a DataError is its only item, not raised: DataLoader would put a traceback into the message."""
        try:
            return [self[index] for index in indices]
        except DataError as error:
            return [error]


class TrainingSet(SampleSet):
    """Training samples addressed by stream position: INPUT.AUGMENTATION, then RANDOM_FLIP with probability 1/2."""

    def __init__(self, cfg: CfgNode, datasets: list[CocoDataset]):
        self.cfg, self.augment = cfg, resolve_name(choice_of(cfg, "INPUT.AUGMENTATION").function)
        self.flip_indices, self.num_keypoints = datasets[0].flip_indices, len(datasets[0].keypoints)
        self.datasets = list(datasets)
        chosen = [data.training_images(cfg) for data in datasets]
        # number of the data set, number of its image
        self.items = np.concatenate([np.stack([np.full_like(of_one, k), of_one], 1) for k, of_one in enumerate(chosen)])
        if not len(self):
            raise DataError(nothing_to_train_on(cfg, datasets))
        lacking = "objects or keypoints" if cfg.MODEL.KEYPOINT_ON else "objects"
        left_out = sum(len(data.images) for data in datasets) - len(self)
        dark = [told(data.entry.name, one) for data in datasets for one in find_dark_images(data)]
        self.description = "\n".join([f"{len(self):,} training images; {left_out:,} without {lacking} left out", *dark])
        portrait = np.concatenate([data.arrays["height"][of_one] > data.arrays["width"][of_one]
                                   for data, of_one in zip(datasets, chosen, strict=True)])  # fmt: skip
        grouped = portrait if cfg.DATALOADER.ASPECT_RATIO_GROUPING else None
        factors = repeat_factors(cfg, datasets, chosen) if cfg.DATALOADER.SAMPLER_TRAIN == REPEATS else None
        self.stream = Stream(cfg.SEED, len(self), grouped, factors)
        if factors is not None:
            most = f"rare classes are repeated, an image up to {factors.max():.1f} times"
            self.description += f"; {most}: {self.stream.length:,} in a pass over the data"

    def __getitem__(self, position: int) -> Sample:
        index, rng = self.stream.at(position)
        number, place = self.items[index].tolist()
        data = self.datasets[number]
        image, annotations = data.images[place], data.training_objects(place)
        sample = load_sample(data.entry.image_root / image["file_name"], self.cfg, image)
        boxes = torch.tensor([one["bbox"] for one in annotations], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        sample["boxes"] = boxes
        sample["labels"] = torch.tensor([one["label"] for one in annotations], dtype=torch.int64)
        if self.cfg.MODEL.MASK_ON:
            sample["masks"] = Masks.read([one["segmentation"] for one in annotations])
        if self.cfg.MODEL.KEYPOINT_ON:
            points = torch.tensor([one["keypoints"] for one in annotations], dtype=torch.float32)
            sample["keypoints"] = points.reshape(-1, self.num_keypoints, 3)
            sample["keypoints"][..., :2] += 0.5  # the json has pixel indices, as detectron2 assumes
        sample = self.augment(sample, self.cfg, rng)
        if self.cfg.INPUT.RANDOM_FLIP != "none" and rng.random() < 0.5:
            sample = flip(sample, self.cfg.INPUT.RANDOM_FLIP, self.flip_indices)
        return {"position": position, "file_name": image["file_name"], **keep_inside(sample)}

    def image_id(self, position: int) -> int:
        """The json's id of the image at a position of the stream."""
        number, place = self.items[self.stream.at(position)[0]].tolist()
        return self.datasets[number].images[place]["id"]


def repeat_factors(cfg: CfgNode, datasets: Sequence[CocoDataset], chosen: Sequence[np.ndarray]) -> np.ndarray:
    """How often each training image is shown, at least 1 [images], by its rarest class (Gupta et al. 2019, *LVIS*).

    For a class in a share f of the images, sqrt(REPEAT_THRESHOLD / f), without REPEAT_SQRT the quotient itself.
    chosen: numbers of the images of each data set. Crowds count, as in detectron2.
    """
    starts = np.cumsum([0, *map(len, chosen)])
    places, labels = [], []
    for start, data, of_one in zip(starts, datasets, chosen, strict=False):
        image, label = (data.arrays[name][data.arrays["order"]] for name in ("image", "label"))
        is_chosen = np.isin(image, of_one)
        places.append(start + np.searchsorted(of_one, image[is_chosen]))
        labels.append(label[is_chosen])
    place, label = np.unique([np.concatenate(places), np.concatenate(labels)], axis=1)
    factors, shares = np.ones(starts[-1]), np.bincount(label) / starts[-1]
    of_classes = cfg.DATALOADER.REPEAT_THRESHOLD / np.maximum(shares, 1e-12)  # those without objects are not asked for
    np.maximum.at(factors, place, (np.sqrt(of_classes) if cfg.DATALOADER.REPEAT_SQRT else of_classes)[label])
    return factors


class EvaluationSet(SampleSet):
    """Test samples in the order of the json, without objects; ``resized`` to MIN_SIZE_TEST, or in their own size."""

    def __init__(self, cfg: CfgNode, data: CocoDataset, resized: bool = True):
        self.cfg, self.image_root, self.resized = cfg, data.entry.image_root, resized
        self.items = data.images

    def __getitem__(self, index: int) -> Sample:
        image = self.items[index]
        sample = load_sample(self.image_root / image["file_name"], self.cfg, image)
        return to_test_size(sample, self.cfg) if self.resized else sample


def load_sample(path: Path, cfg: CfgNode, entry: dict[str, Any] | None = None) -> Sample:
    """A sample without objects. ``entry`` is the image's entry in the json: its id, and the size that is expected.

    Raises DataError as ``read_image`` does.
    """
    entry = entry or {"id": path.name, "width": None, "height": None}
    return sample_of(read_image(path, entry["width"], entry["height"], cfg.INPUT.FORMAT), entry["id"])


def sample_of(pixels: np.ndarray, image_id: Any = "") -> Sample:
    """A sample without objects, of an image uint8 [H, W, 3] with its channels in INPUT.FORMAT order."""
    image = torch.from_numpy(pixels).permute(2, 0, 1)  # a pixel's channels still lie together: resized in half the time
    return {"image": image, "image_id": image_id, "height": pixels.shape[0], "width": pixels.shape[1]}


def first_image(cfg: CfgNode, datasets: Iterable[CocoDataset]) -> Tensor | None:
    """An image to train on as it is in its file, uint8 [3, H, W]; None where the first of no data set can be read."""
    for data in datasets:
        for image in (data.images[place] for place in data.training_images(cfg)[:1]):
            with suppress(DataError):
                return load_sample(data.entry.image_root / image["file_name"], cfg, image)["image"]
    return None
