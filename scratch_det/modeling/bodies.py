"""Bodies that neither torchvision's nor detectron2's builders know, for both backends, with and without FPN.

A body is a module, built from the recipe, from images [N, 3, H, W] to a dictionary of feature maps. It has

``channels``, ``strides``
    of every map, by its name.
``stages``
    lists of its submodules' (or parameters') names, from the pixels on: what MODEL.BACKBONE.FREEZE_AT counts.
``initialized``, if True
    has drawn its own weights, by the rules of its family; all others get He's.
``from_classifier(tensors)``, ``first_layer``, ``pixels``, together or not at all
    an ImageNet model's tensors by the body's names, without what it does not have; the name of the weight that sees
    the pixels; the pixels it was trained on.

A line of BODIES makes it known by two values of MODEL.BACKBONE.NAME: ``net`` as build_net_backbone, whose maps, all
with as many channels, go to RPN and heads as they are, and as build_net_fpn_backbone, where MODEL.FPN.IN_FEATURES
names the maps below a feature pyramid. Free of torch until one is built.
"""

from collections.abc import Iterator
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from fvcore.common.config import CfgNode

from scratch_det.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

BODIES = {"vgg16": "scratch_det.modeling.vgg:VGG16"}  # module:what builds it
PYRAMID_STRIDES = [4, 8, 16, 32]  # of p2 to p5


def body_names() -> dict[str, str]:
    """MODEL.BACKBONE.NAME -> the body's name in BODIES."""
    return {f"build_{body}{fpn}_backbone": body for body in BODIES for fpn in ("", "_fpn")}


def has_fpn(cfg: CfgNode) -> bool:
    """Whether the recipe's backbone is a body with a pyramid on it."""
    return cfg.MODEL.BACKBONE.NAME.endswith("_fpn_backbone")


def build_body(cfg: CfgNode) -> "nn.Module":
    """The body that the recipe names, its weights drawn, its first FREEZE_AT stages frozen.

    Raises ConfigError when its maps are not those that the recipe asks for.
    """
    from scratch_det.modeling.init import initialize  # these import torch
    from scratch_det.modeling.norm import freeze

    body: Any = resolve_name(BODIES[body_names()[cfg.MODEL.BACKBONE.NAME]])(cfg)
    if problems := list(_other_maps(cfg, body)):
        raise ConfigError("\n".join(problems))
    if not getattr(body, "initialized", False):
        initialize(body, {name: "backbone" for name, _ in body.named_children()})
    freeze(body, body.stages[: cfg.MODEL.BACKBONE.FREEZE_AT])
    return body


def _other_maps(cfg: CfgNode, body: Any) -> Iterator[str]:
    """What the recipe wants of the body's maps that they are not."""
    name, maps = cfg.MODEL.BACKBONE.NAME, list(body.strides)
    if has_fpn(cfg):
        asked = list(cfg.MODEL.FPN.IN_FEATURES)
        if [body.strides.get(feature) for feature in asked] != PYRAMID_STRIDES:
            has = ", ".join(f"{feature} {stride}" for feature, stride in body.strides.items())
            yield (
                f"MODEL.FPN.IN_FEATURES is {asked}, expected four maps of strides 4, 8, 16 and 32; {name} has maps "
                f"(and strides) {has}"
            )
        return
    if len(set(body.channels.values())) > 1:
        channels = ", ".join(map(str, body.channels.values()))
        yield f"{name} has maps of {channels} channels, which need a pyramid: name build_..._fpn_backbone"
    for key in ("RPN", "ROI_HEADS"):
        if (asked := list(cfg.MODEL[key].IN_FEATURES)) != maps:
            yield f"MODEL.{key}.IN_FEATURES is {asked}; it has {maps}"
