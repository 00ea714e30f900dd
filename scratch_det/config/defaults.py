"""The keys a recipe may set and their defaults, read from ``defaults.yaml`` beside this file.

Dotted keys such as ``SOLVER.BASE_LR``: list them, set one, name the one that was meant.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from scratch_det.errors import did_you_mean

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
    cfg = CfgNode(yaml.safe_load(DEFAULTS_FILE.read_text(encoding="utf-8")))
    for key, value in flatten(cfg).items():
        set_key(cfg, key, CfgNode._decode_cfg_value(value))  # a text may spell a tuple, as in a recipe
    return cfg


# Sections of detectron2 that the defaults leave out on purpose.
OUTSIDE_OUR_SUBSET = ("MODEL.RETINANET", "MODEL.SEM_SEG_HEAD", "MODEL.PANOPTIC_FPN", "GLOBAL")


def flatten(tree: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """Every value of nested dictionaries, such as a configuration, by its dotted key, in their order."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= {f"{name}{separator}{key}": item for key, item in flatten(value, separator).items()}
        else:
            flat[str(name)] = value
    return flat


def set_key(cfg: CfgNode, key: str, value: Any) -> None:
    """Set one existing dotted key; the value is stored as it is."""
    *sections, name = key.split(".")
    node = cfg
    for section in sections:
        node = node[section]
    if name not in node or isinstance(node[name], CfgNode):
        raise KeyError(key)
    setattr(node, name, value)  # unlike node[name] = value, raises on a frozen configuration


def plain(value: Any) -> Any:
    """Tuples as lists, which a recipe may have in their place: one that was saved and read again has them."""
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def explain_unknown(key: str, known: list[str]) -> str:
    """What to write instead of ``key``: the same name in its right section first, then the closest spelling."""
    below = [other for other in known if other.startswith(key + ".")]
    if below:
        return f"{key} is a section, not a value; it holds keys such as {below[0]}"
    if key.startswith(OUTSIDE_OUR_SUBSET):
        return f"key {key} belongs to a part of detectron2 that only --backend detectron2 has: remove it, or use that"
    if key.upper() in known:
        return f"unknown key {key}; did you mean '{key.upper()}'?"
    name = key.rpartition(".")[2]
    namesakes = get_close_matches(key, [other for other in known if other.rpartition(".")[2] == name], n=3, cutoff=0)
    if namesakes:
        return f"unknown key {key}; did you mean {' or '.join(repr(other) for other in namesakes)}?"
    return f"unknown key {key}{did_you_mean(key, known) or '; see scratch_det/config/defaults.yaml for all keys'}"
