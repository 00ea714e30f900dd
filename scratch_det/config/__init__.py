"""Recipes: detectron2's keys and defaults, strict loading, and the rules a detector from scratch must obey.

Needs only fvcore; never imports torch.
"""

from scratch_det.config.load import LoadedConfig, flatten, get_cfg, load_config, plain, set_key, with_project_keys
from scratch_det.config.rules import check_config, check_model
from scratch_det.config.schedule import settle_batch

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
