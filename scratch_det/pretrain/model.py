"""A classifier around a detector's body: ``build`` and ``losses`` as ``scratch_det.backends`` describes them."""

from typing import Any

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from scratch_det.backends.torchvision.backbone import build_body
from scratch_det.modeling.init import initialize
from scratch_det.modeling.norm import NORM_LAYERS

BEHIND_BODY = ("avgpool", "fc", "classifier")  # parts of torchvision's models that a detector does not use
LAST_NORM = {BasicBlock: "bn2", Bottleneck: "bn3"}


class Classifier(nn.Module):
    """A body's stages one after another, the mean over all places, one linear layer.

    The weights have the names of a torchvision classifier: the stages' own and ``fc``.
    """

    def __init__(self, cfg: CfgNode):
        super().__init__()
        body = build_body(cfg)
        self.stages = [name for name, _ in body.named_children() if name not in BEHIND_BODY]
        for name in self.stages:
            self.add_module(name, body.get_submodule(name))
        channels = [layer.out_channels for layer in self.modules() if isinstance(layer, nn.Conv2d)][-1]
        self.fc = nn.Linear(channels, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
        for name, values in (("pixel_mean", cfg.MODEL.PIXEL_MEAN), ("pixel_std", cfg.MODEL.PIXEL_STD)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def forward(self, batch: list[dict[str, Any]]) -> Tensor:
        """Class scores before the softmax [N, classes] of images of one size."""
        x = torch.stack([sample["image"] for sample in batch]).to(self.pixel_mean.device, non_blocking=True)
        x = (x - self.pixel_mean) / self.pixel_std
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.fc(x.mean((2, 3)))


def build(cfg: CfgNode) -> Classifier:
    """See the contract. He initialisation as in a detector, but every residual block starts as the identity.

    The last layer's weights are drawn from N(0, 0.01), and the scale of each block's last norm is 0 (Goyal et al. 2017,
    section 5.1; Wu & He 2018, section 4.1).
    """
    model = Classifier(cfg)
    initialize(model, {**dict.fromkeys(model.stages, "backbone"), "fc": "cls_score"})
    for block in model.modules():
        norm = getattr(block, LAST_NORM.get(type(block), ""), None)
        if isinstance(norm, NORM_LAYERS):
            nn.init.zeros_(norm.weight)
    return model


def losses(model: nn.Module, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    """See the contract. Puts the model into training mode."""
    scores = model.train()(batch)
    return {"loss_cls": F.cross_entropy(scores, torch.tensor([sample["label"] for sample in batch]).to(scores.device))}


@torch.no_grad()
def ranks(model: nn.Module, batch: list[dict[str, Any]]) -> Tensor:
    """How many classes score higher than the right one, int64 [N]. Puts the model into evaluation mode."""
    scores = model.eval()(batch).cpu()
    right = scores.gather(1, torch.tensor([[sample["label"]] for sample in batch]))
    return (scores > right).sum(1)
