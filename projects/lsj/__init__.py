"""Large-scale jitter, INPUT.AUGMENTATION LSJ: detectron2's recipes from scratch in configs/new_baselines."""

from lsj.recipe import problems
from scratch_det.config.choices import AUGMENTATIONS, RESIZE, Choice
from scratch_det.config.defaults import PROJECT_KEYS

KEYS = {
    "INPUT.AUGMENTATION": RESIZE,  # or LSJ
    "INPUT.LSJ.SIZE": 1024,  # pixels: the side of the square images that are trained on
    "INPUT.LSJ.SCALES": (0.1, 2.0),  # an image is first fitted into a square of SIZE times a number drawn between these
}


def add() -> None:
    """Make augmentation and keys known."""
    PROJECT_KEYS.update(KEYS)
    AUGMENTATIONS["LSJ"] = Choice("lsj.jitter:jitter", ("INPUT.LSJ.SIZE", "INPUT.LSJ.SCALES"), problems)
