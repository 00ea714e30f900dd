"""What a training sees: images, instances and pixels, each as often as it is shown (the paper's Figure 2)."""

import math
from dataclasses import dataclass
from pathlib import Path

from fvcore.common.config import CfgNode

from scratch_det.columns import aligned
from scratch_det.config import load_config
from scratch_det.data.catalog import lookup
from scratch_det.data.coco import collection_paused, read_coco
from scratch_det.errors import DataError

IMAGENET_IMAGES = 1_281_167  # training images of the 1,000 classes
IMAGENET_EPOCHS, IMAGENET_SIDE = 100, 224  # Figure 2's pre-training; one instance an image
COCO_OBJECTS, COCO_IMAGES = 860_001, 118_287  # train2017: 7.3 instances an image


@dataclass(frozen=True)
class Seen:
    """Counts over a whole training."""

    images: float
    instances: float
    pixels: float

    def __add__(self, other: "Seen") -> "Seen":
        return Seen(self.images + other.images, self.instances + other.instances, self.pixels + other.pixels)


def of_pretraining(images: int = IMAGENET_IMAGES, epochs: float = IMAGENET_EPOCHS, side: int = IMAGENET_SIDE) -> Seen:
    """Classification of ``images`` square crops of ``side`` pixels for ``epochs``."""
    return Seen(images * epochs, images * epochs, images * epochs * side**2)


def of_run(cfg: CfgNode) -> tuple[Seen, str]:
    """What a recipe's iterations see, and where the number of instances is from.

    Instances are those of the training set where it is on disk, else COCO's.
    """
    instances, source = instances_an_image(cfg)
    return of_schedule(cfg, instances), source


def of_schedule(cfg: CfgNode, instances: float) -> Seen:
    """What a recipe's iterations see, with so many ``instances`` an image.

    An image counts the mean training side times the longest side allowed, as in Figure 2 (800 x 1333).
    """
    images = cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH
    sides = cfg.INPUT.MIN_SIZE_TRAIN
    area = sum(sides) / len(sides) * cfg.INPUT.MAX_SIZE_TRAIN
    return Seen(images, images * instances, images * area)


def instances_an_image(cfg: CfgNode) -> tuple[float, str]:
    """The mean over the training images, and its source in words."""
    try:
        with collection_paused():
            data = [read_coco(lookup(name), need_masks=False) for name in cfg.DATASETS.TRAIN]
            counts = [len(one.training_annotations(image["id"])) for one in data for image in one.images]
    except DataError:
        if not all(name.startswith("coco_") for name in cfg.DATASETS.TRAIN):
            raise
        return COCO_OBJECTS / COCO_IMAGES, "train2017's, as the data set is not here"
    return sum(counts) / len(counts), f"{', '.join(cfg.DATASETS.TRAIN)}'s"


def compare(config_files: list[str]) -> str:
    """A table: what each recipe sees, with the pre-training behind it where it starts from weights."""
    rows: list[tuple[str, ...]] = [("recipe", "images", "instances", "pixels", "instances an image")]
    for file in config_files:
        cfg = load_config(file).cfg
        own, source = of_run(cfg)
        pretrained = bool(cfg.MODEL.WEIGHTS)
        total = own + of_pretraining() if pretrained else own
        name = Path(file).stem + (f" + {IMAGENET_EPOCHS} epochs of ImageNet" if pretrained else "")
        mean = f"{own.instances / own.images:.2f}, {source}"
        rows.append((name, *map(_short, (total.images, total.instances, total.pixels)), mean))
    return "\n".join(aligned(rows))


def _short(number: float) -> str:
    """2560 -> 2.56 k, 131 million -> 131 M, 9.5 billion -> 9.5 G, and so on."""
    power = min(int(math.log10(max(number, 1)) // 3), 4)
    return f"{number / 1000**power:.3g} {' kMGT'[power]}".rstrip()
