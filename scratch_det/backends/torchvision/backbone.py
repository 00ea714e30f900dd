"""ResNet and ResNeXt with a feature pyramid, and the networks of BACKBONES with and without one."""

from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import Bottleneck
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from scratch_det.config.choices import backbone_names, has_fpn
from scratch_det.modeling.backbones import build_bottom_up
from scratch_det.modeling.norm import NORMS, freeze, norm_layer

STAGES = [["conv1", "bn1"], ["layer1"], ["layer2"], ["layer3"], ["layer4"]]  # detectron2: stem, res2 ... res5
MAPS = {"layer1": "res2", "layer2": "res3", "layer3": "res4", "layer4": "res5"}
PYRAMID_STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "pool": 64}  # detectron2 calls the last one p6


class Backbone(nn.Module):
    """The bottom-up network ``body`` and, with ``build_..._fpn_backbone``, a feature pyramid ``fpn`` on its maps.

    Attributes:
        strides: pixels between two places of each map, by the map's name.
        out_channels: of every map.
        size_divisibility: what the sides of the padded images have to be multiples of.
    """

    def __init__(self, cfg: CfgNode):
        super().__init__()
        self.body, keys = build_any_bottom_up(cfg), cfg.MODEL.FPN
        if has_fpn(cfg):
            self.levels = dict(zip(keys.IN_FEATURES, PYRAMID_STRIDES, strict=False))  # the last one is pooled
            channels = [self.body.channels[name] for name in self.levels]
            self.fpn = FeaturePyramidNetwork(channels, keys.OUT_CHANNELS, LastLevelMaxPool(), norm_layer(keys.NORM))
            self.strides, self.out_channels = PYRAMID_STRIDES, keys.OUT_CHANNELS
            self.size_divisibility = 32  # the stride of p5: every level of the pyramid halves exactly
        else:
            self.strides, self.size_divisibility = self.body.strides, 1
            (self.out_channels,) = set(self.body.channels.values())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images [N, 3, H, W] -> maps by name."""
        maps = self.body(images)
        if not hasattr(self, "fpn"):
            return maps
        return self.fpn({level: maps[name] for name, level in self.levels.items()})


def build_any_bottom_up(cfg: CfgNode) -> nn.Module:
    """The ResNet or network of BACKBONES below the pyramid: stages are its children in order, FREEZE_AT are frozen.

    ``channels`` and ``strides`` are those of the maps it gives, by name. A ResNet is MODEL.RESNETS as torchvision's;
    its convolutions have no bias, with or without norm, as in detectron2.
    """
    if cfg.MODEL.BACKBONE.NAME in backbone_names():
        return build_bottom_up(cfg)
    keys = cfg.MODEL.RESNETS
    widths = {"groups": keys.NUM_GROUPS, "width_per_group": keys.WIDTH_PER_GROUP}
    body = IntermediateLayerGetter(get_model(f"resnet{keys.DEPTH}", norm_layer=NORMS[keys.NORM], **widths), MAPS)
    if keys.STRIDE_IN_1X1:  # in a bottleneck's first convolution, as in the original (MSRA) ResNets
        for layer in body.modules():
            if isinstance(layer, Bottleneck):
                layer.conv1.stride, layer.conv2.stride = layer.conv2.stride, layer.conv1.stride
    body.channels = {name: keys.RES2_OUT_CHANNELS << level for level, name in enumerate(MAPS.values())}
    body.strides = {name: 4 << level for level, name in enumerate(MAPS.values())}
    freeze(body, STAGES[: cfg.MODEL.BACKBONE.FREEZE_AT])
    return body
