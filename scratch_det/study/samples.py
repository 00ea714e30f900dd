"""How many images, instances and pixels a training sees, each counted as often as it is shown (Figure 2)."""

import math
from pathlib import Path
from typing import NamedTuple

from fvcore.common.config import CfgNode

from scratch_det.config import load_config
from scratch_det.data.catalog import lookup
from scratch_det.data.coco import gc_paused, read_coco
from scratch_det.errors import ConfigError, DataError
from scratch_det.study.experiments import experiments
from scratch_det.study.job import from_here
from scratch_det.study.run import PRETRAIN
from scratch_det.tables import aligned

IMAGENET_IMAGES = 1_281_167  # training images of the 1,000 classes
IMAGENET_EPOCHS = 100  # Figure 2's pre-training; one instance per image
IMAGENET_WEIGHTS = ("ImageNetPretrained/", "download.pytorch.org/models/vgg16-")  # those of configs/_base_/init
COCO_OBJECTS, COCO_IMAGES = 860_001, 118_287  # train2017: 7.3 instances per image


class Seen(NamedTuple):
    """Counts over a whole training."""

    images: float
    instances: float
    pixels: float


def of_pretraining(images: int = IMAGENET_EPOCHS * IMAGENET_IMAGES, side: int = 224) -> Seen:
    """Classification: so many ``images`` in all epochs, square crops of ``side`` pixels; of ImageNet by default."""
    return Seen(images, images, images * side**2)


def of_weights(weights: str) -> tuple[Seen, str]:
    """Of the pre-training that made MODEL.WEIGHTS, and its name; weights of a pre-training run lie in its folder."""
    folder = Path(weights).parent.name
    if run := next((run for run in experiments() if run.kind == PRETRAIN and run.name == folder), None):
        cfg = load_config(from_here(run.config)).cfg
        return of_pretraining(run.length * cfg.SOLVER.IMS_PER_BATCH, cfg.INPUT.MIN_SIZE_TRAIN[0]), run.name
    if any(part in weights for part in IMAGENET_WEIGHTS):
        return of_pretraining(), f"{IMAGENET_EPOCHS} epochs of ImageNet"
    return Seen(0, 0, 0), "weights, not counted" if weights else ""


def of_run(cfg: CfgNode) -> tuple[Seen, str]:
    """Of a detector's training, and where the mean number of instances per image is from: its data set, or COCO's.

    Raises DataError when the training set is neither on disk nor COCO.
    """
    try:
        with gc_paused():
            data = [read_coco(lookup(name), need_masks=False) for name in cfg.DATASETS.TRAIN]
            counts = [len(one.training_annotations(image["id"])) for one in data for image in one.images]
    except DataError:
        if not all(name.startswith("coco_") for name in cfg.DATASETS.TRAIN):
            raise
        return of_schedule(cfg, COCO_OBJECTS / COCO_IMAGES), "train2017's, as the data set is not here"
    return of_schedule(cfg, sum(counts) / len(counts)), f"{', '.join(cfg.DATASETS.TRAIN)}'s"


def of_schedule(cfg: CfgNode, instances: float) -> Seen:
    """Of a detector's training with a mean of so many ``instances`` per image.

    The pixels of an image are the mean training side times the longest side allowed, as in Figure 2 (800 x 1333).
    """
    images, sides = cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH, cfg.INPUT.MIN_SIZE_TRAIN
    return Seen(images, images * instances, images * sum(sides) / len(sides) * cfg.INPUT.MAX_SIZE_TRAIN)


def compare(config_files: list[str]) -> str:
    """A table with a row for each recipe: its training and, where it is known, the pre-training of its weights.

    Raises ConfigError for a classifier's recipe.
    """
    rows: list[tuple[str, ...]] = [("recipe", "images", "instances", "pixels", "instances an image")]
    for file in config_files:
        cfg = load_config(file).cfg
        if cfg.INPUT.CROP.ENABLED:  # which no detector has
            raise ConfigError(
                f"{file} is a classifier's recipe, of tools/pretrain_net.py; expected a detector's, in which the "
                "the pre-training of MODEL.WEIGHTS is counted too"
            )
        own, source = of_run(cfg)
        before, name = of_weights(cfg.MODEL.WEIGHTS)
        total, label = map(sum, zip(own, before, strict=True)), Path(file).stem + (f" + {name}" if name else "")
        rows.append((label, *map(_with_prefix, total), f"{own.instances / own.images:.2f}, {source}"))
    return "\n".join(aligned(rows))


def _with_prefix(number: float) -> str:
    """2560 -> 2.56 k, 131 million -> 131 M, 9.5 billion -> 9.5 G, and so on."""
    power = min(int(math.log10(max(number, 1)) // 3), 4)
    return f"{number / 1000**power:.3g} {' kMGT'[power]}".rstrip()
