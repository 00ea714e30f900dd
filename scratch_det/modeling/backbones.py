"""Bottom-up networks of this repository and of projects, for both backends, with and without FPN.

A bottom-up network (what is below the FPN) is a module built from the config, from images [N, 3, H, W] to a dictionary
of feature maps. It has

``channels``, ``strides``
    of every map, by its name.
``stages``, if any of it can be frozen
    lists of its submodules' (or parameters') names, from the pixels on: what MODEL.BACKBONE.FREEZE_AT counts.
``initialized``, if True
    has drawn its own weights, by the rules of its family; all others get He's.
``from_classifier(tensors)``, ``first_layer``, ``pixels``, together or not at all
    an ImageNet model's tensors by the network's names, without what it does not have; the name of the weight that sees
    the pixels; the pixels it was trained on.

A line of ``scratch_det.config.choices.BACKBONES`` makes it known by two values of MODEL.BACKBONE.NAME: ``net`` as
build_net_backbone, whose maps, all with as many channels, go to RPN and heads as they are, and as
build_net_fpn_backbone, where MODEL.FPN.IN_FEATURES names the maps below a feature pyramid. Only this network
reads a project's keys MODEL.NET.
"""

from collections.abc import Iterator
from pkgutil import resolve_name
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from scratch_det.config.choices import BACKBONES, backbone_names, has_fpn
from scratch_det.errors import ConfigError, refuse
from scratch_det.modeling.init import initialize
from scratch_det.modeling.norm import freeze

PYRAMID_STRIDES = [4, 8, 16, 32]  # of p2 to p5
TRIAL = (128, 192)  # height and width of an image that every stride divides


def build_bottom_up(cfg: CfgNode) -> nn.Module:
    """The network of BACKBONES that the config names, initialised, its first FREEZE_AT stages frozen.

    Raises ConfigError when its maps are not those that it states or the config asks for, when it has fewer stages, or
    weights that neither the network nor He's rule initialises.
    """
    name, freeze_at = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT
    network: Any = resolve_name(BACKBONES[backbone_names()[name]].function)(cfg)
    stages = getattr(network, "stages", [])
    problems = [*_other_maps(cfg, network), *(f"{name} {problem}" for problem in _misstated(network))]
    if not 0 <= freeze_at <= len(stages):
        problems.append(f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}, but {name} has {len(stages)} stages to freeze")
    refuse(problems)
    if not getattr(network, "initialized", False):
        try:
            initialize(network, {layer: "backbone" for layer, _ in network.named_children()})
        except ValueError as error:
            raise ConfigError(f"{name}: {error}; let it draw its own weights and say `initialized = True`") from None
    freeze(network, stages[:freeze_at])
    return network


def _misstated(network: Any) -> Iterator[str]:
    """Maps whose channels or strides differ from the ones that the network states; does not change the network."""
    training = network.training
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        maps = network.eval()(torch.zeros(1, 3, *TRIAL))
    network.train(training)
    if (found := list(maps)) != list(network.strides):
        yield f"gives maps {found}, but has strides of {list(network.strides)}; both need the same names, in one order"
        return
    for name, stride in network.strides.items():
        shape = tuple(maps[name].shape[1:])
        if shape != (stated := (network.channels.get(name), *(side // stride for side in TRIAL))):
            yield (
                f"states {stated[0]} channels and stride {stride} for {name}, which makes "
                f"{' x '.join(map(str, stated))} of an image of {' x '.join(map(str, TRIAL))}, but gives "
                f"{' x '.join(map(str, shape))}; fix its `channels` and `strides`"
            )


def _other_maps(cfg: CfgNode, network: Any) -> Iterator[str]:
    """Feature maps in the config that do not match the maps of the network."""
    name, maps = cfg.MODEL.BACKBONE.NAME, list(network.strides)
    if has_fpn(cfg):
        asked = list(cfg.MODEL.FPN.IN_FEATURES)
        if [network.strides.get(feature) for feature in asked] != PYRAMID_STRIDES:
            has = ", ".join(f"{feature} {stride}" for feature, stride in network.strides.items())
            yield (
                f"MODEL.FPN.IN_FEATURES is {asked}, expected four maps of strides 4, 8, 16 and 32; {name} has maps "
                f"(and strides) {has}"
            )
        return
    if len(set(network.channels.values())) > 1:
        channels = ", ".join(map(str, network.channels.values()))
        yield f"{name} has maps of {channels} channels, which need a pyramid: name build_..._fpn_backbone"
    for key in ("RPN", "ROI_HEADS"):
        if (asked := list(cfg.MODEL[key].IN_FEATURES)) != maps:
            yield f"MODEL.{key}.IN_FEATURES is {asked}, expected {maps}, the maps of {name}"
