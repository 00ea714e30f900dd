"""ResNet and ResNeXt bodies with a feature pyramid, and bodies without one."""

from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from scratch_det.config.choices import backbone_names, has_fpn
from scratch_det.modeling.backbones import build_bottom_up
from scratch_det.modeling.norm import NORMS, freeze, norm_layer

BLOCKS = {
    18: (BasicBlock, [2, 2, 2, 2]),
    34: (BasicBlock, [3, 4, 6, 3]),
    50: (Bottleneck, [3, 4, 6, 3]),
    101: (Bottleneck, [3, 4, 23, 3]),
    152: (Bottleneck, [3, 8, 36, 3]),
}
STAGES = [["conv1", "bn1"], ["layer1"], ["layer2"], ["layer3"], ["layer4"]]  # detectron2: stem, res2 ... res5
LEVELS = {"layer1": "p2", "layer2": "p3", "layer3": "p4", "layer4": "p5"}
PYRAMID_DIVISIBILITY = 32  # the stride of p5: every level of the pyramid halves exactly
PYRAMID_STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "pool": 64}


class BareBackbone(nn.Module):
    """A body's maps as they are. ``out_channels`` is the number that all of them have."""

    size_divisibility = 1

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body, self.strides = body, body.strides
        (self.out_channels,) = set(body.channels.values())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images [N, 3, H, W] -> maps by name."""
        return self.body(images)


class PyramidBackbone(nn.Module):
    """A body's maps under FPN: p2 ... p5 and ``pool`` (p6), of MODEL.FPN.OUT_CHANNELS each."""

    strides, size_divisibility = PYRAMID_STRIDES, PYRAMID_DIVISIBILITY

    def __init__(self, cfg: CfgNode, body: nn.Module):
        super().__init__()
        self.body, self.out_channels = body, cfg.MODEL.FPN.OUT_CHANNELS
        self.levels = dict(zip(cfg.MODEL.FPN.IN_FEATURES, LEVELS.values(), strict=True))
        channels = [body.channels[name] for name in self.levels]
        self.fpn = FeaturePyramidNetwork(
            channels, self.out_channels, LastLevelMaxPool(), norm_layer(cfg.MODEL.FPN.NORM)
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images [N, 3, H, W] -> maps by name."""
        maps = self.body(images)
        return self.fpn({level: maps[name] for name, level in self.levels.items()})


def build_backbone(cfg: CfgNode) -> nn.Module:
    """A module from images to maps by name, with their ``strides`` in pixels and common ``out_channels``.

    Its ``size_divisibility`` is what the sides of the padded images have to be multiples of.
    """
    body = build_any_bottom_up(cfg)
    if isinstance(body, ResNet):
        return build_fpn(cfg, body)
    return PyramidBackbone(cfg, body) if has_fpn(cfg) else BareBackbone(body)


def build_fpn(cfg: CfgNode, body: ResNet) -> BackboneWithFPN:
    """ResNet-FPN: maps p2 ... p5 with strides 4 ... 32 and ``pool`` (p6) with stride 64."""
    res2 = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS
    backbone = BackboneWithFPN(
        body,
        return_layers=LEVELS,
        in_channels_list=[res2 * 2**level for level in range(len(LEVELS))],
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        extra_blocks=LastLevelMaxPool(),
        norm_layer=norm_layer(cfg.MODEL.FPN.NORM),
    )
    backbone.strides, backbone.size_divisibility = PYRAMID_STRIDES, PYRAMID_DIVISIBILITY
    return backbone


def build_any_bottom_up(cfg: CfgNode) -> nn.Module:
    """The body of the recipe's backbone, its stages the module's children in their order; FREEZE_AT are frozen."""
    if cfg.MODEL.BACKBONE.NAME in backbone_names():
        return build_bottom_up(cfg)
    body = build_resnet(cfg)
    freeze(body, STAGES[: cfg.MODEL.BACKBONE.FREEZE_AT])
    return body


def build_resnet(cfg: CfgNode) -> ResNet:
    """MODEL.RESNETS as torchvision's ResNet; convolutions have no bias, with or without norm, as in detectron2."""
    block, layers = BLOCKS[cfg.MODEL.RESNETS.DEPTH]
    body = ResNet(
        block,
        layers,
        groups=cfg.MODEL.RESNETS.NUM_GROUPS,
        width_per_group=cfg.MODEL.RESNETS.WIDTH_PER_GROUP,
        norm_layer=NORMS[cfg.MODEL.RESNETS.NORM],
    )
    if cfg.MODEL.RESNETS.STRIDE_IN_1X1:
        _stride_in_1x1(body)
    return body


def _stride_in_1x1(body: ResNet) -> None:
    """Stride in the first 1x1 convolution of a bottleneck, where the original (MSRA) ResNets have it."""
    for layer in body.modules():
        if isinstance(layer, Bottleneck):
            layer.conv1.stride, layer.conv2.stride = layer.conv2.stride, layer.conv1.stride
