"""Any pyramid of timm as backbone of a detector: MODEL.BACKBONE.NAME build_timm_fpn_backbone; AdamW. See README.md."""

from collections.abc import Iterator
from importlib.util import find_spec

from fvcore.common.config import CfgNode

from scratch_det.config.choices import BACKBONES, OPTIMIZERS, PROJECT_KEYS, Choice, backbone_names
from scratch_det.errors import UserError

KEYS = {
    "MODEL.TIMM.NAME": "",  # timm.list_models() has them
    "MODEL.TIMM.NORM": "",  # what its batch norms become: BN, SyncBN, FrozenBN or GN; "" for a model without any
    "MODEL.TIMM.DROP_PATH": 0.0,  # the last block's probability to be left out; the others' grow up to it
    "SOLVER.OPTIMIZER": "SGD",  # or AdamW
    "SOLVER.LAYER_DECAY": 1.0,  # AdamW: a backbone's layer learns at this rate times the next one's
}


def add() -> None:
    """Make backbone, optimizer and keys known. Raises UserError where timm is missing."""
    if find_spec("timm") is None:
        raise UserError("projects/timm_backbones needs timm, which is not installed; pip install --editable '.[timm]'")
    PROJECT_KEYS.update(KEYS)
    own = tuple(key for key in KEYS if key.startswith("MODEL.TIMM."))
    BACKBONES["timm"] = Choice("timm_backbones.bottom_up:TimmBottomUp", own, timm_keys)
    OPTIMIZERS["AdamW"] = Choice("timm_backbones.bottom_up:build_adamw", ("SOLVER.LAYER_DECAY",), adamw, moments=2)


def timm_keys(cfg: CfgNode) -> Iterator[str]:
    """On MODEL.TIMM; that timm has the model, and the model what is asked for, is seen when it is built."""
    if not cfg.MODEL.TIMM.NAME:
        yield "MODEL.TIMM.NAME is '', expected a model of timm; set MODEL.TIMM.NAME convnext_tiny"
    if not 0 <= cfg.MODEL.TIMM.DROP_PATH < 1:
        yield f"MODEL.TIMM.DROP_PATH is {cfg.MODEL.TIMM.DROP_PATH}, expected a probability, 0 or more and below 1"


def adamw(cfg: CfgNode) -> Iterator[str]:
    """On what ``build_adamw`` reads."""
    decay, name = cfg.SOLVER.LAYER_DECAY, cfg.MODEL.BACKBONE.NAME
    if cfg.SOLVER.NESTEROV:
        yield "SOLVER.NESTEROV is True, which SOLVER.OPTIMIZER AdamW does not have; set it to False"
    if not 0 < decay <= 1:
        yield f"SOLVER.LAYER_DECAY is {decay}, expected a factor above 0 and at most 1"
    if decay != 1 and backbone_names().get(name) != "timm":
        yield f"SOLVER.LAYER_DECAY is {decay}, which MODEL.BACKBONE.NAME {name} ignores; set it to 1.0"
