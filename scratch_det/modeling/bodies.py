"""Bodies that neither torchvision's nor detectron2's builders know, for both backends.

A body is a module from images [N, 3, H, W] to a dictionary of feature maps. It states their ``channels`` and
``strides`` by name, and the ``stages`` that MODEL.BACKBONE.FREEZE_AT counts; its weights are initialised.
"""

from collections.abc import Callable

from fvcore.common.config import CfgNode
from torch import nn

from scratch_det.modeling.vgg import VGG16

BODIES: dict[str, Callable[[CfgNode], nn.Module]] = {  # by MODEL.BACKBONE.NAME
    "build_vgg16_backbone": VGG16,
}


def build_body(cfg: CfgNode) -> nn.Module:
    """The body that the recipe names, its first FREEZE_AT stages frozen."""
    body = BODIES[cfg.MODEL.BACKBONE.NAME](cfg)
    for stage in body.stages[: cfg.MODEL.BACKBONE.FREEZE_AT]:
        stage.requires_grad_(False)
    return body
