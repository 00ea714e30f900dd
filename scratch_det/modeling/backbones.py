"""Bottom-up networks (what is below the FPN): torchvision's ResNets, VGG-16 and those of projects.

A bottom-up network is a module built from the config, from images [N, 3, H, W] to a dictionary of feature maps. It has

``channels``, ``strides``
    of every map, by its name.
``stages``, if any of it can be frozen
    lists of its submodules' (or parameters') names, from the pixels on: what MODEL.BACKBONE.FREEZE_AT counts.
``initialized``, if True
    has drawn its own weights, by the rules of its family; all others get He's.
``first_layer``, if weights can be adapted to other pixel statistics
    the name of the weight that sees the pixels, a convolution's.
``pixels``, if files of its family's ImageNet models are trained on known ones
    those pixels. A file has the network's names, or the ends of them behind a prefix that all of them have.
``own_name``, if such files have other names, too
    a function from a tensor's name in a file, with any prefix, to the network's; names that it does not know stay.

A line of ``scratch_det.config.choices.BACKBONES`` adds a network under two values of MODEL.BACKBONE.NAME, for both
backends: ``net`` as build_net_backbone, whose maps, all with as many channels, go to RPN and heads as they are, and as
build_net_fpn_backbone, where MODEL.FPN.IN_FEATURES names the maps below a feature pyramid. The entry's keys, such as a
project's MODEL.NET.WIDTH, are for this network only. The ResNets here are those of the torchvision backend; detectron2
has its own.
"""

from collections.abc import Iterator
from itertools import pairwise
from pkgutil import resolve_name
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchvision.models import get_model
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import Bottleneck
from torchvision.models.vgg import cfgs, make_layers

from scratch_det.config.choices import BACKBONES, backbone_names, has_fpn
from scratch_det.errors import ConfigError, raise_problems
from scratch_det.modeling.init import he_fill, initialize
from scratch_det.modeling.norm import NORMS, freeze

RESNET_STAGES = [["conv1", "bn1"], ["layer1"], ["layer2"], ["layer3"], ["layer4"]]  # detectron2: stem, res2 ... res5
RESNET_MAPS = {"layer1": "res2", "layer2": "res3", "layer3": "res4", "layer4": "res5"}
PYRAMID_STRIDES = [4, 8, 16, 32]  # of p2 to p5
TRIAL = (128, 192)  # height and width of an image that every stride divides


class VGG16(nn.Module):
    """VGG-16 (Simonyan & Zisserman 2015, configuration D) without normalisation, for heads or an FPN on top.

    The 13 convolutions up to conv5_3 and its ReLU, with torchvision's names of weights; nothing after them.
    """

    first_layer = "features.0.weight"

    def __init__(self, cfg: CfgNode):
        super().__init__()
        self.channels, self.strides = {"conv5": 512}, {"conv5": 16}
        self.features = make_layers(cfgs["D"])[:-1]  # the last pooling would halve conv5 once more
        ends = [i for i, layer in enumerate(self.features) if isinstance(layer, nn.MaxPool2d)]
        bounds = pairwise([0, *ends, len(self.features)])
        self.stages = [[f"features.{i}" for i in range(low, high)] for low, high in bounds]  # conv1 ... conv5

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images [N, 3, H, W] -> ``conv5`` [N, 512, H / 16, W / 16], rounded down."""
        return {"conv5": self.features(images)}


class StemPool(nn.MaxPool2d):
    """ResNet's pooling; the same bits on the CPU through channels-last memory, whose kernel is three times as fast."""

    def __init__(self) -> None:
        super().__init__(kernel_size=3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H / 2, W / 2], rounded up."""
        return _MaxPool.apply(x) if x.device.type == "cpu" else super().forward(x)


class _MaxPool(torch.autograd.Function):
    """Only the forward pass: the gradient's kernel for channels-last is slower."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        pooled, places = F.max_pool2d_with_indices(x.contiguous(memory_format=torch.channels_last), 3, 2, 1)
        ctx.save_for_backward(x, places.contiguous())
        return pooled.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, places = ctx.saved_tensors
        backward = torch.ops.aten.max_pool2d_with_indices_backward
        return backward(grad.contiguous(), x, [3, 3], [2, 2], [1, 1], [1, 1], False, places)


def build_resnet(cfg: CfgNode) -> nn.Module:
    """torchvision's ResNet or ResNeXt of MODEL.RESNETS, with torchvision's own initial weights, nothing frozen.

    Its convolutions have no bias, with or without norm, as in detectron2.
    """
    keys = cfg.MODEL.RESNETS
    widths = {"groups": keys.NUM_GROUPS, "width_per_group": keys.WIDTH_PER_GROUP}
    resnet = get_model(f"resnet{keys.DEPTH}", norm_layer=NORMS[keys.NORM], **widths)
    network = IntermediateLayerGetter(resnet, RESNET_MAPS)
    network.maxpool = StemPool()
    if keys.STRIDE_IN_1X1:  # in a bottleneck's first convolution, as in the original (MSRA) ResNets
        for block in network.modules():
            if isinstance(block, Bottleneck):
                block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    network.channels = {name: keys.RES2_OUT_CHANNELS << level for level, name in enumerate(RESNET_MAPS.values())}
    network.strides = dict(zip(RESNET_MAPS.values(), PYRAMID_STRIDES, strict=True))
    network.stages, network.first_layer = RESNET_STAGES, "conv1.weight"
    return network


def build_bottom_up(cfg: CfgNode) -> nn.Module:
    """The network that the config names, of BACKBONES or torchvision's ResNet, its first FREEZE_AT stages frozen.

    One of BACKBONES comes initialised; a ResNet has torchvision's own initial weights, the caller draws others.

    Raises ConfigError when the maps of one of BACKBONES are not those that it states or the config asks for, when it
    has fewer stages, or weights that neither the network nor He's rule initialises.
    """
    name, freeze_at = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT
    if name not in backbone_names():
        network = build_resnet(cfg)
        freeze(network, network.stages[:freeze_at])
        return network
    network = resolve_name(BACKBONES[backbone_names()[name]].function)(cfg)
    stages = getattr(network, "stages", [])
    problems = [*_other_maps(cfg, network), *(f"{name} {problem}" for problem in _misstated(network))]
    if not 0 <= freeze_at <= len(stages):
        problems.append(f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}, but {name} has {len(stages)} stages to freeze")
    raise_problems(problems)
    if not getattr(network, "initialized", False):
        try:
            initialize(network, {layer: he_fill for layer, _ in network.named_children()})
        except ValueError as error:
            raise ConfigError(f"{name}: {error}; let it draw its own weights and set `initialized = True`") from None
    freeze(network, stages[:freeze_at])
    return network


def _misstated(network: Any) -> Iterator[str]:
    """Maps whose channels or strides differ from the ones that the network states; does not change the network."""
    training = network.training
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        given = {name: list(one.shape[1:]) for name, one in network.eval()(torch.zeros(1, 3, *TRIAL)).items()}
    network.train(training)
    if list(given) != list(network.strides):
        yield f"gives maps {list(given)}, but has strides of {list(network.strides)}; name both alike, in one order"
        return
    for name, stride in network.strides.items():
        channels = network.channels.get(name)
        if given[name] != (stated := [channels, *(side // stride for side in TRIAL)]):
            yield (
                f"states {channels} channels and stride {stride} for {name}, of an image of {list(TRIAL)} a map of "
                f"{stated}, but gives {given[name]}; fix its `channels` and `strides`"
            )


def _other_maps(cfg: CfgNode, network: Any) -> Iterator[str]:
    """Feature maps in the config that do not match the maps of the network."""
    name, strides, channels = cfg.MODEL.BACKBONE.NAME, network.strides, list(network.channels.values())
    if has_fpn(cfg):
        asked = list(cfg.MODEL.FPN.IN_FEATURES)
        if [strides.get(feature) for feature in asked] != PYRAMID_STRIDES:
            yield (
                f"MODEL.FPN.IN_FEATURES is {asked}, expected four maps of strides {PYRAMID_STRIDES}; the maps and "
                f"strides of {name} are {strides}"
            )
        return
    if len(set(channels)) > 1:
        yield f"{name} has maps of {channels} channels, which need a pyramid: name build_..._fpn_backbone"
    for key in ("RPN", "ROI_HEADS"):
        if (asked := list(cfg.MODEL[key].IN_FEATURES)) != list(strides):
            yield f"MODEL.{key}.IN_FEATURES is {asked}, expected {list(strides)}, the maps of {name}"
