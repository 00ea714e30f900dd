"""A page of a data set's images with their objects, or of a recipe's training images as the model gets them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from fvcore.common.config import CfgNode

from scratch_det.config.load import load_config
from scratch_det.config.rules import check_config
from scratch_det.data.catalog import lookup
from scratch_det.data.coco import CocoDataset, read_coco
from scratch_det.data.image import decode_masks, read_image
from scratch_det.diagnosis.numbers import SIZES
from scratch_det.diagnosis.page import SIDE, render
from scratch_det.engine.datasets import coco_conflicts
from scratch_det.errors import ConfigError, UserError, counted, did_you_mean, listed, raise_problems
from scratch_det.visualization.page import Section, as_jpeg
from scratch_det.visualization.predictions import draw_objects

if TYPE_CHECKING:
    from scratch_det.data.dataset import TrainingSet

CROWD, IGNORED = " (crowd)", " (ignored)"


@dataclass(frozen=True)
class Filter:
    """Which images are shown: those with an object of a class and a size, or a crowd; or those with these ids."""

    classes: Sequence[str] = ()
    size: str = ""
    crowds: bool = False
    ids: Sequence[str] = ()
    count: int = 24

    def __str__(self) -> str:
        """What is asked for, in words."""
        asked = {"class": ", ".join(self.classes), "size": self.size, "image": ", ".join(self.ids)}
        return "; ".join(
            [*(f"{what} {value}" for what, value in asked.items() if value), *["with a crowd"] * self.crowds]
        )

    def numbers(self, data: CocoDataset) -> np.ndarray:
        """The numbers of the images, ascending. Raises UserError for unknown classes and ids, and without an image."""
        if unknown := [one for one in self.classes if one not in data.classes]:
            meant = did_you_mean(unknown[0], list(data.classes))
            raise UserError(f"{data.entry.name} has no class {unknown[0]}{meant}; it has {listed(data.classes)}")
        if self.classes or self.size or self.crowds:
            names = ("image", "label", "area", "box", "iscrowd")
            image, label, area, box, is_crowd = (data.arrays[name][data.arrays["order"]] for name in names)
            area = np.where(np.isnan(area), box[:, 2] * box[:, 3], area)
            low, high = SIZES.get(self.size, (0, np.inf))
            fits = (low <= area) & (area < high) & (is_crowd | (not self.crowds))
            is_asked = np.isin(np.array(data.classes)[label], self.classes) | (not self.classes)
            numbers = np.unique(image[fits & is_asked])
        else:
            numbers = np.arange(len(data.images))
        if self.ids:
            known = {str(data.images.id(n)): n for n in range(len(data.images))}
            if lacking := [one for one in self.ids if one not in known]:
                raise UserError(f"{data.entry.name} has no image {listed(lacking)}; its ids are {listed(list(known))}")
            numbers = np.intersect1d(numbers, [known[one] for one in self.ids])
        if not len(numbers):
            raise UserError(f"no image of {data.entry.name} has all of this: {self}; ask for less")
        return numbers


def view_data(name: str, chosen: Filter, out: Path) -> str:
    """Write the page of a data set of the catalog; returns a line about it.

    Raises UserError for classes that it does not have and where no image is left, DataError as ``read_coco`` does.
    """
    notices: list[str] = []
    data = read_coco(lookup(name), need_masks=False, say=notices.append)
    numbers = chosen.numbers(data)
    spread = np.linspace(0, len(numbers) - 1, min(chosen.count, len(numbers))).astype(int)
    pictures = [of_json(data, number) for number in numbers[spread].tolist()]
    section = Section(f"{len(pictures)} of {len(numbers):,} images", "; ".join(notices), pictures=pictures)
    labels = data.arrays["label"][data.arrays["order"]]
    counts = f"{len(data.images):,} images, {len(labels):,} objects of {counted(len(data.classes), 'classes')}."
    of_each = np.bincount(labels, minlength=len(data.classes)).tolist()
    classes = [["class", "objects"], *([name, f"{n:,}"] for name, n in zip(data.classes, of_each, strict=True))]
    return str(render(out, name, counts, [section, Section("Classes", rows=classes)]))


def view_training(config_file: Path, overrides: Sequence[str], count: int, out: Path) -> str:
    """Write the page of the first images of a training: resized, flipped, with the objects that the model learns.

    Raises ConfigError as ``check_config`` and for a recipe without training data, DataError as ``read_coco`` does.
    """
    recipe = load_config(config_file, overrides)
    cfg = recipe.cfg
    if not cfg.DATASETS.TRAIN:
        raise ConfigError(f"{config_file} trains on nothing: name data, DATASETS.TRAIN \"('NAME',)\"")
    check_config(cfg)
    data = [read_coco(lookup(name), cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON) for name in cfg.DATASETS.TRAIN]
    raise_problems(coco_conflicts(recipe, data, []))
    from scratch_det.data.dataset import TrainingSet  # torch: the user's errors come before

    samples = TrainingSet(cfg, data)
    pictures = list(islice(_of_training(cfg, data[0], samples), count))
    name, where = Path(config_file).stem, ", ".join(cfg.DATASETS.TRAIN)
    note = f"The first {len(pictures)} of the stream of seed {cfg.SEED}."
    headline = f"{len(samples):,} training images of {where}, as the model gets them."
    return str(render(out, name, headline, [Section("Images", note, pictures=pictures)]))


def of_json(data: CocoDataset, number: int, shown: Sequence[str] = ("segm", "keypoints")) -> tuple[str, str]:
    """The caption and the picture of an image with all of its objects: their boxes and what is ``shown`` besides."""
    image, objects = data.images[number], data.objects(number)
    pixels = read_image(data.entry.image_root / image["file_name"], image["width"], image["height"])
    labels = [one["label"] for one in objects]
    names = [data.classes[one["label"]] + CROWD * one["iscrowd"] + IGNORED * one["ignore"] for one in objects]
    words = f"{image['file_name']}, id {image['id']}, {image['width']} x {image['height']}: {len(objects)} objects"
    boxes = np.array([one["bbox"] for one in objects], float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    items: dict[str, Any] = {"boxes": boxes, "labels": labels, "names": names}
    if "segm" in shown and objects and all(one.get("segmentation") for one in objects):
        items["masks"] = decode_masks([one["segmentation"] for one in objects], image["height"], image["width"])
    if "keypoints" in shown and objects and len({len(one["keypoints"]) for one in objects}) == 1:
        points = np.array([one["keypoints"] for one in objects], float).reshape(len(objects), -1, 3)
        items["keypoints"] = points + np.array([0.5, 0.5, 0])  # the json has indices of pixels
    return words, as_jpeg(draw_objects(pixels, items, data.classes, longer_side=SIDE))


def _of_training(cfg: CfgNode, data: CocoDataset, samples: "TrainingSet") -> Iterator[tuple[str, str]]:
    """Of one position of the stream after the other."""
    from scratch_det.engine.pictures import seen_by_model

    for position in range(len(samples)):
        sample = samples[position]
        pixels, items = seen_by_model(cfg, sample)
        height, width = pixels.shape[:2]
        words = f"position {position}, image {sample['image_id']}, {width} x {height}: {len(items['labels'])} objects"
        yield words, as_jpeg(draw_objects(pixels, items, data.classes, longer_side=SIDE))
