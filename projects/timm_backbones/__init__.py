"""Any pyramid of timm as backbone of a detector: MODEL.BACKBONE.NAME build_timm_fpn_backbone; AdamW. See README.md."""

from importlib.util import find_spec

from scratch_det.config.choices import BACKBONES, OPTIMIZERS, Choice
from scratch_det.config.defaults import PROJECT_KEYS
from scratch_det.errors import UserError
from timm_backbones.recipe import adamw, timm_keys

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
    BACKBONES["timm"] = Choice("timm_backbones.bottom_up:TimmBottomUp", rule=timm_keys)
    OPTIMIZERS["AdamW"] = Choice("timm_backbones.optimizer:build_adamw", ("SOLVER.LAYER_DECAY",), adamw, moments=2)
