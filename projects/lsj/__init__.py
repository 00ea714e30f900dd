"""Large-scale jitter, INPUT.AUGMENTATION LSJ: detectron2's recipes from scratch in configs/new_baselines."""

import math
from collections.abc import Iterator

from fvcore.common.config import CfgNode

from scratch_det.config.choices import AUGMENTATIONS, PROJECT_KEYS, RESIZE, Choice
from scratch_det.config.ranges import SMALLEST_VIEW

KEYS = {
    "INPUT.AUGMENTATION": RESIZE,  # or LSJ
    "INPUT.LSJ.SIZE": 1024,  # pixels: the side of the square images that are trained on
    "INPUT.LSJ.SCALES": (0.1, 2.0),  # an image is first fitted into a square of SIZE times a number drawn between these
}


def add() -> None:
    """Make augmentation and keys known."""
    PROJECT_KEYS.update(KEYS)
    AUGMENTATIONS["LSJ"] = Choice("lsj.jitter:jitter", ("INPUT.LSJ.SIZE", "INPUT.LSJ.SCALES"), problems)


def problems(cfg: CfgNode) -> Iterator[str]:
    """One line for each thing that INPUT.LSJ cannot mean."""
    size, scales = cfg.INPUT.LSJ.SIZE, tuple(cfg.INPUT.LSJ.SCALES)
    if size < SMALLEST_VIEW:
        yield (
            f"INPUT.LSJ.SIZE is {size}, expected the side of the training images, {SMALLEST_VIEW} pixels or more; "
            "set INPUT.LSJ.SIZE 1024"
        )
    if len(scales) == 2 and 0 < scales[1] < scales[0]:
        yield f'INPUT.LSJ.SCALES is {scales}, expected the smaller one first; set INPUT.LSJ.SCALES "{scales[::-1]}"'
    elif len(scales) != 2 or not 0 < scales[0] <= scales[1] < math.inf:
        yield (
            f'INPUT.LSJ.SCALES is {scales}, expected the two ends of a range above 0; set INPUT.LSJ.SCALES "(0.1, 2.0)"'
        )
