"""Cascade R-CNN (Cai & Vasconcelos 2018) as detectron2 defines it: every stage starts from the boxes of the one before.

Three stages match at rising IoU and regress one box for all classes; scores are averaged over the stages, boxes are
the last one's. The mask head is trained on the first stage's proposals and applied to the last one's boxes.
"""

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.ops import box_area, box_iou, clip_boxes_to_image

from scratch_det.backends.torchvision.roi_heads import Maps, RoIHeads, Sizes, box_losses


class Stage(nn.Module):
    """One box head with its predictor. ``forward``: pooled [N, C, S, S] -> logits [N, 1 + classes], deltas [N, 4]."""

    def __init__(self, cfg: CfgNode, in_channels: int, weights: tuple[float, ...], iou: float):
        super().__init__()
        self.box_head, self.box_predictor = RoIHeads.box_layers(cfg, in_channels)
        self.box_predictor.bbox_pred = nn.Linear(self.box_predictor.bbox_pred.in_features, 4)
        self.coder, self.matcher = BoxCoder(weights), Matcher(iou, iou, allow_low_quality_matches=False)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        return self.box_predictor(self.box_head(pooled))

    def refine(self, boxes: list[Tensor], deltas: Tensor, sizes: Sizes) -> list[Tensor]:
        """The boxes that ``deltas`` make of ``boxes``, inside their images, without gradients."""
        moved = self.coder.decode_single(deltas.detach(), torch.cat(boxes)).split([len(box) for box in boxes])
        return [clip_boxes_to_image(box, size) for box, size in zip(moved, sizes, strict=True)]

    def label(self, boxes: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Label [N] (0 is background) and regression target [N, 4] of every box."""
        if not len(target["boxes"]):
            return boxes.new_zeros(len(boxes), dtype=torch.int64), torch.zeros_like(boxes)
        matched = self.matcher(box_iou(target["boxes"], boxes))
        chosen = matched.clamp(min=0)
        labels = target["labels"][chosen].where(matched >= 0, 0)
        return labels, self.coder.encode_single(target["boxes"][chosen], boxes)


class CascadeRoIHeads(RoIHeads):
    """``RoIHeads`` with ``stages`` instead of one box head; ROI_BOX_CASCADE_HEAD has their IoUs and box weights."""

    def __init__(self, cfg: CfgNode, in_channels: int, strides: dict[str, int]):
        super().__init__(cfg, in_channels, strides)
        keys = cfg.MODEL.ROI_BOX_CASCADE_HEAD
        self.stages = nn.ModuleList(
            Stage(cfg, in_channels, tuple(weights), iou)
            for weights, iou in zip(keys.BBOX_REG_WEIGHTS, keys.IOUS, strict=True)
        )
        self.box_coder = self.stages[0].coder  # of the targets that the first stage's sampling makes

    @staticmethod
    def box_layers(cfg: CfgNode, in_channels: int) -> tuple[None, None]:
        """None: the stages have their own."""
        return None, None

    def box_head_losses(
        self, features: Maps, proposals: list[Tensor], labels: list[Tensor], deltas: list[Tensor],
        targets: list[dict[str, Tensor]], sizes: Sizes,
    ) -> dict[str, Tensor]:  # fmt: skip
        """``loss_cls_stage0``, ``loss_box_reg_stage0`` and so on; only the first stage's proposals are sampled."""
        losses = {}
        for number, stage in enumerate(self.stages):
            if number:
                proposals = [box[box_area(box) > 0] for box in proposals]
                found = [stage.label(box, target) for box, target in zip(proposals, targets, strict=True)]
                labels, deltas = zip(*found, strict=True)
            logits, predicted = stage(self._pool(features, proposals))
            own = box_losses(logits, predicted, torch.cat(labels), torch.cat(deltas), self.box_keys)
            losses |= {f"{name}_stage{number}": loss for name, loss in own.items()}
            proposals = stage.refine(proposals, predicted, sizes)
        return losses

    def predict_boxes(
        self, features: Maps, proposals: list[Tensor], sizes: Sizes
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The mean of the stages' scores as logits, and the last stage's boxes, which are final: deltas of 0."""
        scores = []
        for stage in self.stages:
            logits, deltas = stage(self._pool(features, proposals))
            scores.append(logits.softmax(-1))
            proposals = stage.refine(proposals, deltas, sizes)
        mean = torch.stack(scores).mean(0)
        return mean.log(), torch.zeros_like(mean).repeat(1, 4), proposals

    def _pool(self, features: Maps, boxes: list[Tensor]) -> Tensor:
        """Pooled features; their gradient is divided by the number of stages, since the stages' losses are summed."""
        pooled = self.box_roi_pool(features, boxes)
        if pooled.requires_grad:
            pooled.register_hook(lambda gradient: gradient / len(self.stages))
        return pooled
