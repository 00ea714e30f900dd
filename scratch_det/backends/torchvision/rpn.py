"""Region proposals: torchvision's RPN with detectron2's anchors, loss normalisation and configurable betas."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead


class Anchors(nn.Module):
    """Anchors as detectron2 lays them: unrounded, sizes before ratios, strides fixed by level.

    torchvision rounds the corners to whole pixels and derives p6's stride from its rounded-up size; under autocast it
    also computes in half precision.

    Args:
        sizes: side of a square anchor in pixels; a list per level, or one for all.
        aspect_ratios: height / width; a list per level, or one for all.
        strides: pixels between two anchors, per level.
        offset: position of an anchor's centre in its cell, 0 = top left corner, as a fraction of the stride.
    """

    def __init__(
        self, sizes: list[list[float]], aspect_ratios: list[list[float]], strides: Sequence[int], offset: float
    ):
        super().__init__()
        self.strides, self.offset = strides, offset
        for level in range(len(strides)):
            own_sizes, own_ratios = (lists[level if len(lists) > 1 else 0] for lists in (sizes, aspect_ratios))
            sides = torch.tensor([(size / ratio**0.5, size * ratio**0.5) for size in own_sizes for ratio in own_ratios])
            self.register_buffer(f"cell{level}", torch.cat([-sides, sides], dim=1) / 2, persistent=False)
        self.per_location = len(sides)

    def forward(self, images: ImageList, features: list[Tensor]) -> list[Tensor]:
        """Anchors [sum of H * W * A over levels, 4] (x1 y1 x2 y2, pixels), the same for every image of the batch."""
        levels = []
        for level, (feature, stride) in enumerate(zip(features, self.strides, strict=True)):
            cell = getattr(self, f"cell{level}")
            rows, columns = ((torch.arange(n, device=cell.device) + self.offset) * stride for n in feature.shape[-2:])
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            centres = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
            levels.append((centres + cell).reshape(-1, 4))
        return [torch.cat(levels)] * len(images.image_sizes)


class Float32RPNHead(RPNHead):
    """torchvision's RPN head; box arithmetic after it stays in float32 under autocast."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [level.float() for level in logits], [level.float() for level in deltas]


class RPN(RegionProposalNetwork):
    """torchvision's RPN; losses are summed over anchors and divided by the nominal sample size, as in detectron2."""

    def __init__(self, cfg: CfgNode, in_channels: int, strides: Sequence[int]):
        keys, anchors = cfg.MODEL.RPN, cfg.MODEL.ANCHOR_GENERATOR
        generator = Anchors(anchors.SIZES, anchors.ASPECT_RATIOS, strides, anchors.OFFSET)
        super().__init__(
            generator,
            Float32RPNHead(in_channels, generator.per_location, conv_depth=len(keys.CONV_DIMS)),
            fg_iou_thresh=keys.IOU_THRESHOLDS[1],
            bg_iou_thresh=keys.IOU_THRESHOLDS[0],
            batch_size_per_image=keys.BATCH_SIZE_PER_IMAGE,
            positive_fraction=keys.POSITIVE_FRACTION,
            pre_nms_top_n={"training": keys.PRE_NMS_TOPK_TRAIN, "testing": keys.PRE_NMS_TOPK_TEST},
            post_nms_top_n={"training": keys.POST_NMS_TOPK_TRAIN, "testing": keys.POST_NMS_TOPK_TEST},
            nms_thresh=keys.NMS_THRESH,
        )
        self.box_coder, self.keys = BoxCoder(weights=tuple(keys.BBOX_REG_WEIGHTS)), keys

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Objectness (binary cross-entropy) and box (smooth L1) loss over the sampled anchors of the batch."""
        positive, negative = (torch.cat(chosen).bool() for chosen in self.fg_bg_sampler(labels))
        sampled = positive | negative
        loss_cls = F.binary_cross_entropy_with_logits(
            objectness.flatten()[sampled], torch.cat(labels)[sampled], reduction="sum"
        )
        loss_loc = F.smooth_l1_loss(
            pred_bbox_deltas[positive],
            torch.cat(regression_targets)[positive],
            beta=self.keys.SMOOTH_L1_BETA,
            reduction="sum",
        )
        scale = self.keys.LOSS_WEIGHT / (self.keys.BATCH_SIZE_PER_IMAGE * len(labels))
        return loss_cls * scale, loss_loc * scale * self.keys.BBOX_REG_LOSS_WEIGHT
