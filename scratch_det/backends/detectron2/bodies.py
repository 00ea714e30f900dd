"""This repository's bodies as detectron2's backbones, by the same names."""

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from fvcore.common.config import CfgNode
from torch import Tensor

from scratch_det.config.bodies import body_names, has_fpn
from scratch_det.modeling.bodies import build_body


class BareBackbone(Backbone):
    """A body's maps as they are; its weights lie where those of a pyramid's body do."""

    def __init__(self, cfg: CfgNode, input_shape: ShapeSpec):
        super().__init__()
        self.bottom_up = build_body(cfg)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images [N, 3, H, W] -> maps by name."""
        return self.bottom_up(images)

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every map."""
        strides = self.bottom_up.strides
        return {name: ShapeSpec(channels=n, stride=strides[name]) for name, n in self.bottom_up.channels.items()}


def build_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """The recipe's body, under detectron2's FPN where its name says so."""
    bare = BareBackbone(cfg, input_shape)
    if not has_fpn(cfg):
        return bare
    keys = cfg.MODEL.FPN
    pyramid = FPN(bare, keys.IN_FEATURES, keys.OUT_CHANNELS, keys.NORM, LastLevelMaxPool(), keys.FUSE_TYPE)
    pyramid.bottom_up = bare.bottom_up  # FPN asks for a Backbone and uses a module; names are those of a ResNet's
    return pyramid


def register_bodies() -> None:
    """Make the bodies known to ``build_model``, once."""
    for name in body_names():
        if name not in BACKBONE_REGISTRY:
            BACKBONE_REGISTRY._do_register(name, build_backbone)
