"""Rules on this project's keys. Never imports torch."""

from collections.abc import Iterator

from fvcore.common.config import CfgNode

from scratch_det.config.choices import backbone_names


def timm_keys(cfg: CfgNode) -> Iterator[str]:
    """On MODEL.TIMM; that timm has the model, and the model what is asked for, is seen when it is built."""
    if not cfg.MODEL.TIMM.NAME:
        yield "MODEL.TIMM.NAME is '', expected a model of timm; set MODEL.TIMM.NAME convnext_tiny"
    if not 0 <= cfg.MODEL.TIMM.DROP_PATH < 1:
        yield f"MODEL.TIMM.DROP_PATH is {cfg.MODEL.TIMM.DROP_PATH}, expected a probability, 0 or more and below 1"


def adamw(cfg: CfgNode) -> Iterator[str]:
    """On what ``timm_backbones.optimizer`` reads."""
    decay, name = cfg.SOLVER.LAYER_DECAY, cfg.MODEL.BACKBONE.NAME
    if cfg.SOLVER.NESTEROV:
        yield "SOLVER.NESTEROV is True, which SOLVER.OPTIMIZER AdamW does not have; set it to False"
    if not 0 < decay <= 1:
        yield f"SOLVER.LAYER_DECAY is {decay}, expected a factor above 0 and at most 1"
    if decay != 1 and backbone_names().get(name) != "timm":
        yield f"SOLVER.LAYER_DECAY is {decay}, which MODEL.BACKBONE.NAME {name} ignores; set it to 1.0"
