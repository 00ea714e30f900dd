"""The keys a recipe may set and their defaults, read from ``defaults.yaml`` beside this file."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

DEFAULTS_FILE = Path(__file__).with_name("defaults.yaml")
PROJECT_KEYS: dict[str, Any] = {}  # dotted keys with their defaults, which a project adds to detectron2's


def get_cfg() -> CfgNode:
    """A fresh configuration with every default, to be changed freely by the caller."""
    return with_project_keys(_defaults().clone())


def with_project_keys(cfg: CfgNode) -> CfgNode:
    """``cfg``, changed, with the keys of the projects that were added."""
    for key, value in PROJECT_KEYS.items():
        *sections, name = key.split(".")
        node = cfg
        for section in sections:
            node = node.setdefault(section, CfgNode())
        node[name] = value
    return cfg


@cache
def _defaults() -> CfgNode:
    return CfgNode(_decode(yaml.safe_load(DEFAULTS_FILE.read_text(encoding="utf-8"))))


def _decode(value: Any) -> Any:
    """Turn the texts that spell tuples into tuples, as merging a recipe does."""
    if isinstance(value, dict):
        return {key: _decode(child) for key, child in value.items()}
    return CfgNode._decode_cfg_value(value)
