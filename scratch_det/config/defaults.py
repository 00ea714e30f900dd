"""The keys a recipe may set and their defaults, read from ``defaults.yaml`` beside this file."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

DEFAULTS_FILE = Path(__file__).with_name("defaults.yaml")


def get_cfg() -> CfgNode:
    """A fresh configuration with every default, to be changed freely by the caller."""
    return _defaults().clone()


@cache
def _defaults() -> CfgNode:
    return CfgNode(_decode(yaml.safe_load(DEFAULTS_FILE.read_text(encoding="utf-8"))))


def _decode(value: Any) -> Any:
    """Turn the texts that spell tuples into tuples, as merging a recipe does."""
    if isinstance(value, dict):
        return {key: _decode(child) for key, child in value.items()}
    return CfgNode._decode_cfg_value(value)
