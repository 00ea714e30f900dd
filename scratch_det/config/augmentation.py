"""What is done to a training sample: INPUT.AUGMENTATION, a key that detectron2 does not have, and its rules."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from fvcore.common.config import CfgNode

from scratch_det.config.defaults import get_cfg
from scratch_det.config.keys import flatten
from scratch_det.errors import did_you_mean


class Augmentation(NamedTuple):
    """``apply`` is module:function, see ``scratch_det.data.transforms.augment``; ``rule`` is on the ``keys`` it reads.

    Keys that others read as well, such as INPUT.RANDOM_FLIP, are not among them.
    """

    apply: str
    keys: tuple[str, ...]
    rule: Callable[[CfgNode], Iterator[str]]


def training_sizes(cfg: CfgNode) -> Iterator[str]:
    sizes = tuple(cfg.INPUT.MIN_SIZE_TRAIN)
    if not sizes or min(sizes) < 1:
        yield f"INPUT.MIN_SIZE_TRAIN is {sizes}, expected one or more sides in pixels such as (800,)"
    elif cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and not (len(sizes) == 2 and sizes[0] <= sizes[1]):
        yield (
            f"INPUT.MIN_SIZE_TRAIN is {sizes}, but sampling from a range needs its two ends; "
            f'set INPUT.MIN_SIZE_TRAIN "{min(sizes), max(sizes)}" or INPUT.MIN_SIZE_TRAIN_SAMPLING choice'
        )


RESIZE = "resize"  # detectron2's, which has no key for it
AUGMENTATIONS = {  # by a project's INPUT.AUGMENTATION
    RESIZE: Augmentation(
        "scratch_det.data.transforms:augment",
        ("INPUT.MIN_SIZE_TRAIN", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "INPUT.MAX_SIZE_TRAIN"),
        training_sizes,
    )
}


def augmentation_name(cfg: CfgNode) -> str:
    """What INPUT.AUGMENTATION is, or means where there is no such key."""
    return cfg.INPUT.get("AUGMENTATION", RESIZE)


def known_augmentation(cfg: CfgNode) -> Iterator[str]:
    """There is one of this name, its own rule is kept, and nothing is set that only another one reads."""
    name = augmentation_name(cfg)
    if name not in AUGMENTATIONS:
        known = list(AUGMENTATIONS)
        yield f"INPUT.AUGMENTATION is '{name}', expected {' or '.join(known)}{did_you_mean(name, known)}"
        return
    yield from AUGMENTATIONS[name].rule(cfg)
    values, defaults = flatten(cfg), flatten(get_cfg())
    for key in (key for other, one in AUGMENTATIONS.items() if other != name for key in one.keys):
        if values[key] != defaults[key]:
            yield (
                f"{key} is {values[key]!r}, which would change nothing with INPUT.AUGMENTATION {name}; "
                f"leave it at {defaults[key]!r}"
            )
