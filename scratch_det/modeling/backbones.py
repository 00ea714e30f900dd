"""Bodies that neither torchvision's nor detectron2's builders know, for both backends, with and without FPN.

A body is a module, built from the recipe, from images [N, 3, H, W] to a dictionary of feature maps. It has

``channels``, ``strides``
    of every map, by its name.
``stages``, if any of it can be frozen
    lists of its submodules' (or parameters') names, from the pixels on: what MODEL.BACKBONE.FREEZE_AT counts.
``initialized``, if True
    has drawn its own weights, by the rules of its family; all others get He's.
``from_classifier(tensors)``, ``first_layer``, ``pixels``, together or not at all
    an ImageNet model's tensors by the body's names, without what it does not have; the name of the weight that sees
    the pixels; the pixels it was trained on.

A line of ``scratch_det.config.choices.BACKBONES`` makes it known by two values of MODEL.BACKBONE.NAME: ``net`` as
build_net_backbone, whose maps, all with as many channels, go to RPN and heads as they are, and as
build_net_fpn_backbone, where MODEL.FPN.IN_FEATURES names the maps below a feature pyramid. A project's keys MODEL.NET
are that body's alone, under rules that stand there too. Free of torch until one is built.
"""

from collections.abc import Iterable, Iterator
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from fvcore.common.config import CfgNode

from scratch_det.config.choices import BACKBONES, backbone_names, has_fpn
from scratch_det.errors import ConfigError, refuse

if TYPE_CHECKING:
    from torch import nn

PYRAMID_STRIDES = [4, 8, 16, 32]  # of p2 to p5
TRIAL = (128, 192)  # height and width of an image that every stride divides


def build_bottom_up(cfg: CfgNode) -> "nn.Module":
    """The body that the recipe names, its weights drawn, its first FREEZE_AT stages frozen.

    Raises ConfigError when its maps are not those that it states or the recipe asks for, when it has fewer stages, or
    weights that it leaves to draw and He's rule does not cover.
    """
    from scratch_det.modeling.init import initialize  # these import torch
    from scratch_det.modeling.norm import freeze

    name, freeze_at = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT
    body: Any = resolve_name(BACKBONES[backbone_names()[name]].function)(cfg)
    stages = getattr(body, "stages", [])
    problems = [*_other_maps(cfg, body), *(f"{name} {problem}" for problem in _misstated(body))]
    if not 0 <= freeze_at <= len(stages):
        problems.append(f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}, but {name} has {len(stages)} stages to freeze")
    refuse(problems)
    if not getattr(body, "initialized", False):
        try:
            initialize(body, {layer: "backbone" for layer, _ in body.named_children()})
        except ValueError as error:
            raise ConfigError(f"{name}: {error}; let it draw its own weights and say `initialized = True`") from None
    freeze(body, stages[:freeze_at])
    return body


def _misstated(body: Any) -> Iterator[str]:
    """The maps of one image that are not of the channels and strides that the body states; it stays as it was."""
    import torch

    training = body.training
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        maps = body.eval()(torch.zeros(1, 3, *TRIAL))
    body.train(training)
    if (found := list(maps)) != list(body.strides):
        yield f"gives maps {found}, but has strides of {list(body.strides)}; both need the same names in the same order"
        return
    for name, stride in body.strides.items():
        shape = tuple(maps[name].shape[1:])
        if shape != (stated := (body.channels.get(name), *(side // stride for side in TRIAL))):
            yield (
                f"states {stated[0]} channels and stride {stride} for {name}, which makes {_text(stated)} of an image "
                f"of {_text(TRIAL)}, but gives {_text(shape)}; mend its `channels` and `strides`"
            )


def _text(sides: Iterable[int | None]) -> str:
    return " x ".join(map(str, sides))


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
