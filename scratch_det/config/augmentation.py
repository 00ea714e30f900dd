"""What is done to a training sample: INPUT.AUGMENTATION, a key that detectron2 does not have, and its rules."""

from collections.abc import Iterator

from fvcore.common.config import CfgNode

from scratch_det.config.choice import Choice, known_choice


def training_sizes(cfg: CfgNode) -> Iterator[str]:
    sizes = tuple(cfg.INPUT.MIN_SIZE_TRAIN)
    if not sizes or min(sizes) < 1:
        yield f"INPUT.MIN_SIZE_TRAIN is {sizes}, expected one or more sides in pixels such as (800,)"
    elif cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and not (len(sizes) == 2 and sizes[0] <= sizes[1]):
        yield (
            f"INPUT.MIN_SIZE_TRAIN is {sizes}, but sampling from a range needs its two ends; "
            f'set INPUT.MIN_SIZE_TRAIN "{min(sizes), max(sizes)}" or INPUT.MIN_SIZE_TRAIN_SAMPLING choice'
        )
    if cfg.INPUT.MAX_SIZE_TRAIN < 1:
        yield f"INPUT.MAX_SIZE_TRAIN is {cfg.INPUT.MAX_SIZE_TRAIN}, expected pixels of the longer side, such as 1333"


RESIZE = "resize"  # detectron2's, which has no key for it
AUGMENTATIONS = {  # by a project's INPUT.AUGMENTATION; functions like ``scratch_det.data.transforms.augment``
    RESIZE: Choice(
        "scratch_det.data.transforms:augment",
        ("INPUT.MIN_SIZE_TRAIN", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "INPUT.MAX_SIZE_TRAIN"),
        training_sizes,
    )
}


def augmentation_name(cfg: CfgNode) -> str:
    """What INPUT.AUGMENTATION is, or means where there is no such key."""
    return cfg.INPUT.get("AUGMENTATION", RESIZE)


def known_augmentation(cfg: CfgNode) -> Iterator[str]:
    """See ``known_choice``."""
    yield from known_choice(cfg, "INPUT.AUGMENTATION", augmentation_name(cfg), AUGMENTATIONS)
