"""Recipes: detectron2's keys and defaults, strict loading, and the rules a detector from scratch must obey.

Needs fvcore alone; never imports torch.
"""

from scratch_det.config.batch import settle_batch
from scratch_det.config.check import check_config, check_model
from scratch_det.config.defaults import get_cfg, with_project_keys
from scratch_det.config.keys import flatten, plain, set_key
from scratch_det.config.load import LoadedConfig, load_config

__all__ = [
    "LoadedConfig",
    "check_config",
    "check_model",
    "flatten",
    "get_cfg",
    "load_config",
    "plain",
    "set_key",
    "settle_batch",
    "with_project_keys",
]
