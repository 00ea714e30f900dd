"""Keys whose value names one of several things: each has a rule, and keys that it alone reads. Projects add some.

What is done to a training sample: INPUT.AUGMENTATION, a key that detectron2 does not have, and its rules.

Which backbones there are, and rules on their keys, MODEL.NET for the backbone ``net``; see
scratch_det.modeling.backbones.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from fvcore.common.config import CfgNode

from scratch_det.config.defaults import PROJECT_KEYS, flatten, get_cfg, plain
from scratch_det.errors import did_you_mean


@dataclass(frozen=True)
class Choice:
    """What a value names: ``function`` is module:function; ``rule`` is on what it reads.

    ``keys`` are those that no other one reads; ones that all read, such as INPUT.RANDOM_FLIP, are not among them.
    """

    function: str
    keys: tuple[str, ...] = ()
    rule: Callable[[CfgNode], Iterator[str]] | None = None


def known_choice(cfg: CfgNode, key: str, name: str, choices: Mapping[str, Choice]) -> Iterator[str]:
    """There is one of this name, its own rule is kept, and nothing is set that only another one reads."""
    if name not in choices:
        known = list(choices)
        yield f"{key} is '{name}', expected {' or '.join(known)}{did_you_mean(name, known)}"
        return
    if rule := choices[name].rule:
        yield from rule(cfg)
    values, defaults = flatten(cfg), flatten(get_cfg())
    for unread in (unread for other, one in choices.items() if other != name for unread in one.keys):
        if values[unread] != defaults[unread]:
            yield (
                f"{unread} is {values[unread]!r}, which would change nothing with {key} {name}; "
                f"leave it at {defaults[unread]!r}"
            )


def training_sizes(cfg: CfgNode) -> Iterator[str]:
    sizes = tuple(cfg.INPUT.MIN_SIZE_TRAIN)
    if not sizes or min(sizes) < 1:
        yield f"INPUT.MIN_SIZE_TRAIN is {sizes}, expected one or more sides in pixels such as (800,)"
    elif cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and not (len(sizes) == 2 and sizes[0] <= sizes[1]):
        yield (
            f"INPUT.MIN_SIZE_TRAIN is {sizes}, but sampling from a range needs its two ends; "
            f'set INPUT.MIN_SIZE_TRAIN "{min(sizes), max(sizes)}" or INPUT.MIN_SIZE_TRAIN_SAMPLING choice'
        )
    if cfg.INPUT.MAX_SIZE_TRAIN < 1:
        yield f"INPUT.MAX_SIZE_TRAIN is {cfg.INPUT.MAX_SIZE_TRAIN}, expected pixels of the longer side, such as 1333"


RESIZE = "resize"  # detectron2's, which has no key for it
AUGMENTATIONS = {  # by a project's INPUT.AUGMENTATION; functions like ``scratch_det.data.transforms.augment``
    RESIZE: Choice(
        "scratch_det.data.transforms:augment",
        ("INPUT.MIN_SIZE_TRAIN", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "INPUT.MAX_SIZE_TRAIN"),
        training_sizes,
    )
}


def augmentation_name(cfg: CfgNode) -> str:
    """What INPUT.AUGMENTATION is, or means where there is no such key."""
    return cfg.INPUT.get("AUGMENTATION", RESIZE)


def known_augmentation(cfg: CfgNode) -> Iterator[str]:
    """See ``known_choice``."""
    yield from known_choice(cfg, "INPUT.AUGMENTATION", augmentation_name(cfg), AUGMENTATIONS)


BACKBONES = {"vgg16": "scratch_det.modeling.vgg:VGG16"}  # module:what builds it
BACKBONE_RULES: dict[str, Callable[[CfgNode], Iterator[str]]] = {}  # by the name in BACKBONES; free of torch


def backbone_names() -> dict[str, str]:
    """MODEL.BACKBONE.NAME -> the name in BACKBONES."""
    return {f"build_{name}{fpn}_backbone": name for name in BACKBONES for fpn in ("", "_fpn")}


def is_resnet(cfg: CfgNode) -> bool:
    """Whether the recipe's backbone is a backend's own ResNet."""
    name = cfg.MODEL.BACKBONE.NAME
    return "resnet" in name and name not in backbone_names()


def has_fpn(cfg: CfgNode) -> bool:
    """Whether the recipe's backbone has a pyramid."""
    return cfg.MODEL.BACKBONE.NAME.endswith("_fpn_backbone")


def section_of(key: str) -> str:
    """The name in BACKBONES whose MODEL section ``key`` is in, whatever its case; "" for all other keys."""
    first, _, rest = key.partition(".")
    section = rest.partition(".")[0].lower()
    return next((name for name in BACKBONES if first == "MODEL" and name.lower() == section), "")


def backbone_keys(cfg: CfgNode) -> Iterator[str]:
    """The backbone's own rule is kept, and nothing is set that only another backbone reads."""
    name = cfg.MODEL.BACKBONE.NAME
    own = backbone_names().get(name, "")
    if own in BACKBONE_RULES:
        yield from BACKBONE_RULES[own](cfg)
    values = flatten(cfg)
    for key, default in PROJECT_KEYS.items():
        if section_of(key) not in ("", own) and plain(values[key]) != plain(default):
            yield (
                f"{key} is {values[key]!r}, which would change nothing with MODEL.BACKBONE.NAME {name}; "
                f"leave it at {default!r}"
            )
