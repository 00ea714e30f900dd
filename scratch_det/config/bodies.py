"""Which bodies there are, and rules on their keys, MODEL.NET for the body ``net``; see scratch_det.modeling.bodies."""

from collections.abc import Callable, Iterator

from fvcore.common.config import CfgNode

from scratch_det.config.defaults import PROJECT_KEYS
from scratch_det.config.keys import flatten, plain

BODIES = {"vgg16": "scratch_det.modeling.vgg:VGG16"}  # module:what builds it
BODY_RULES: dict[str, Callable[[CfgNode], Iterator[str]]] = {}  # by the body's name in BODIES; free of torch


def body_names() -> dict[str, str]:
    """MODEL.BACKBONE.NAME -> the body's name in BODIES."""
    return {f"build_{body}{fpn}_backbone": body for body in BODIES for fpn in ("", "_fpn")}


def is_resnet(cfg: CfgNode) -> bool:
    """Whether the recipe's backbone is a backend's own ResNet."""
    name = cfg.MODEL.BACKBONE.NAME
    return "resnet" in name and name not in body_names()


def has_fpn(cfg: CfgNode) -> bool:
    """Whether the recipe's backbone has a pyramid."""
    return cfg.MODEL.BACKBONE.NAME.endswith("_fpn_backbone")


def section_of(key: str) -> str:
    """The body of BODIES whose MODEL section ``key`` is in, whatever its case; "" for all other keys."""
    first, _, rest = key.partition(".")
    section = rest.partition(".")[0].lower()
    return next((body for body in BODIES if first == "MODEL" and body.lower() == section), "")


def body_keys(cfg: CfgNode) -> Iterator[str]:
    """The body's own rule is kept, and nothing is set that only another body reads."""
    name = cfg.MODEL.BACKBONE.NAME
    own = body_names().get(name, "")
    if own in BODY_RULES:
        yield from BODY_RULES[own](cfg)
    values = flatten(cfg)
    for key, default in PROJECT_KEYS.items():
        if section_of(key) not in ("", own) and plain(values[key]) != plain(default):
            yield (
                f"{key} is {values[key]!r}, which would change nothing with MODEL.BACKBONE.NAME {name}; "
                f"leave it at {default!r}"
            )
