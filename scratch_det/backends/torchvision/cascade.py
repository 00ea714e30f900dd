"""Cascade R-CNN (Cai & Vasconcelos 2018) as detectron2 defines it: every stage starts from the boxes of the one before.

Three stages match at rising IoU and regress one box for all classes; scores are averaged over the stages, boxes are
the last one's. The mask head is trained on the first stage's proposals and applied to the last one's boxes.
"""

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.ops import box_iou, clip_boxes_to_image

from scratch_det.backends.torchvision.roi_heads import Detections, RoIHeads, box_head, box_losses
from scratch_det.data.transforms import has_area

Sizes = list[tuple[int, int]]


class Stage(nn.Module):
    """One box head with its predictor. ``forward``: pooled [N, C, S, S] -> logits [N, 1 + classes], deltas [N, 4]."""

    def __init__(self, cfg: CfgNode, in_channels: int, weights: tuple[float, ...], iou: float):
        super().__init__()
        self.box_head, self.box_predictor = box_head(cfg, in_channels)
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
    """``RoIHeads`` with ``stages`` in the place of one box head. The keys of each are in ROI_BOX_CASCADE_HEAD."""

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

    def stage_losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        labels: list[Tensor],
        deltas: list[Tensor],
        targets: list[dict],
        sizes: Sizes,
    ) -> dict[str, Tensor]:
        """``loss_cls_stage0``, ``loss_box_reg_stage0`` and so on; the first stage's proposals are sampled."""
        losses = {}
        for number, stage in enumerate(self.stages):
            if number:
                proposals = [box[has_area(box)] for box in proposals]
                found = [stage.label(box, target) for box, target in zip(proposals, targets, strict=True)]
                labels, deltas = ([each[i] for each in found] for i in (0, 1))
            logits, predicted = stage(self._pool(features, proposals))
            own = box_losses(logits, predicted, torch.cat(labels), torch.cat(deltas), self.beta, self.box_loss_weight)
            losses |= {f"{name}_stage{number}": loss for name, loss in own.items()}
            proposals = stage.refine(proposals, predicted, sizes)
        return losses

    def detect_boxes(self, features: dict[str, Tensor], proposals: list[Tensor], sizes: Sizes) -> Detections:
        scores = []
        for stage in self.stages:
            start = proposals
            logits, deltas = stage(self._pool(features, start))
            scores.append(logits.softmax(-1))
            proposals = stage.refine(start, deltas, sizes)
        mean = torch.stack(scores).mean(0)
        zero = torch.zeros_like(mean).repeat(1, 4)  # the boxes are final
        return self.postprocess_detections(mean.log(), zero, proposals, sizes)

    def _pool(self, features: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        """Pooled features, whose gradient is divided by the number of stages, since the stages' losses are added up."""
        pooled = self.box_roi_pool(features, boxes)
        if pooled.requires_grad:
            pooled.register_hook(lambda gradient: gradient / len(self.stages))
        return pooled
