"""Pre-training without labels, MODEL.PRETRAINING barlow_twins: views of an image get the same features; README.md."""

from collections.abc import Iterator
from importlib.util import find_spec

from fvcore.common.config import CfgNode

from scratch_det.config.choices import CLASSIFY, PRETRAININGS, PROJECT_KEYS, Choice

KEYS = {
    "MODEL.PRETRAINING": CLASSIFY,  # or barlow_twins
    "MODEL.BARLOW_TWINS.WIDTH": 8192,  # channels of the three layers of the projection head; the method's own
    "MODEL.BARLOW_TWINS.LAMBDA": 0.005,  # weight of the redundancy term; the method's own
    "INPUT.VIEWS.COLOURS": (0.4, 0.4, 0.2, 0.1),  # jitter of brightness, contrast, saturation, hue; the method's own
    "INPUT.VIEWS.GREY": 0.2,  # probability of a grey view; the method's own
}


def add() -> None:
    """Make method and keys known."""
    PROJECT_KEYS.update(KEYS)
    PRETRAININGS["barlow_twins"] = Choice("self_supervised.barlow_twins", tuple(KEYS)[1:], problems)


def problems(cfg: CfgNode) -> Iterator[str]:
    """One line for each thing that keeps the method from training."""
    if find_spec("lightly") is None:
        yield "MODEL.PRETRAINING barlow_twins needs lightly, which is not installed; pip install lightly"
    if cfg.MODEL.BARLOW_TWINS.WIDTH < 2:
        yield f"MODEL.BARLOW_TWINS.WIDTH is {cfg.MODEL.BARLOW_TWINS.WIDTH}, expected 2 channels or more"
    if not cfg.INPUT.CROP.ENABLED:
        yield "INPUT.CROP.ENABLED is False, but two views need two parts of an image; set it to True"
