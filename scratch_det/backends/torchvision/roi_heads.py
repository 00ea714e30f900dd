"""Box and mask heads: torchvision's layers and sampling, detectron2's pooling, targets and losses."""

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads as TorchvisionRoIHeads
from torchvision.ops import roi_align

from scratch_det.modeling.masks import mask_targets
from scratch_det.modeling.norm import NORMS

POOLED_LEVELS = ("p2", "p3", "p4", "p5")
CANONICAL_SIZE, CANONICAL_LEVEL = 224, 4  # Lin et al., Feature Pyramid Networks, equation 1: a 224 px box pools p4


class ROIPooler(nn.Module):
    """RoIAlign from the pyramid level that fits a box's size.

    Args:
        resolution: output is [N, C, resolution, resolution].
        sampling_ratio: samples per bin and axis; 0 adapts to the bin's size.
        aligned: shift by half a pixel (detectron2's ROIAlignV2) or not (ROIAlign).
    """

    def __init__(self, resolution: int, sampling_ratio: int, aligned: bool):
        super().__init__()
        self.resolution, self.sampling_ratio, self.aligned = resolution, sampling_ratio, aligned

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: object = None) -> Tensor:
        """Pool ``boxes`` (per image [n, 4] x1 y1 x2 y2, pixels of the network's input), in their order."""
        rois = _with_image_index(boxes)
        levels = _level_of(rois[:, 1:])
        channels = features[POOLED_LEVELS[0]].shape[1]
        pooled = rois.new_zeros((len(rois), channels, self.resolution, self.resolution))
        for level, name in enumerate(POOLED_LEVELS):
            chosen = (levels == level).nonzero()[:, 0]
            pooled = pooled.index_copy(0, chosen, self._align(features[name].float(), rois[chosen], 4 * 2**level))
        return pooled

    def _align(self, feature: Tensor, rois: Tensor, stride: int) -> Tensor:
        return roi_align(feature, rois, self.resolution, 1 / stride, self.sampling_ratio, self.aligned)


def _with_image_index(boxes: list[Tensor]) -> Tensor:
    index = torch.cat([box.new_full((len(box), 1), image) for image, box in enumerate(boxes)])
    return torch.cat([index, torch.cat(boxes)], dim=1)


def _level_of(boxes: Tensor) -> Tensor:
    side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=0).sqrt()
    level = torch.floor(CANONICAL_LEVEL + torch.log2(side / CANONICAL_SIZE + 1e-8))
    return (level - 2).clamp(0, len(POOLED_LEVELS) - 1).to(torch.int64)


class Float32Predictor(FastRCNNPredictor):
    """torchvision's class and box layers (slot 0 is background); arithmetic after them stays in float32."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = super().forward(x)
        return logits.float(), deltas.float()


class RoIHeads(TorchvisionRoIHeads):
    """torchvision's sampling and post-processing around detectron2's losses. Labels are 1-based; 0 is background."""

    def __init__(self, cfg: CfgNode, in_channels: int):
        keys, box = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD
        super().__init__(
            **_box_parts(cfg, in_channels),
            **(_mask_parts(cfg, in_channels) if cfg.MODEL.MASK_ON else {}),
            fg_iou_thresh=keys.IOU_THRESHOLDS[0],
            bg_iou_thresh=keys.IOU_THRESHOLDS[0],
            batch_size_per_image=keys.BATCH_SIZE_PER_IMAGE,
            positive_fraction=keys.POSITIVE_FRACTION,
            bbox_reg_weights=tuple(box.BBOX_REG_WEIGHTS),
            score_thresh=keys.SCORE_THRESH_TEST,
            nms_thresh=keys.NMS_THRESH_TEST,
            detections_per_img=cfg.TEST.DETECTIONS_PER_IMAGE,
        )
        self.beta, self.box_loss_weight = box.SMOOTH_L1_BETA, box.BBOX_REG_LOSS_WEIGHT

    def losses(self, features: dict[str, Tensor], proposals: list[Tensor], targets: list[dict]) -> dict[str, Tensor]:
        """``loss_cls``, ``loss_box_reg`` and, with a mask head, ``loss_mask`` over sampled proposals."""
        proposals, matched, labels, deltas = self.select_training_samples(proposals, targets)
        logits, predicted = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals)))
        losses = box_losses(logits, predicted, torch.cat(labels), torch.cat(deltas), self.beta)
        losses["loss_box_reg"] = losses["loss_box_reg"] * self.box_loss_weight
        if self.has_mask():
            losses["loss_mask"] = self._mask_loss(features, proposals, matched, labels, targets)
        return losses

    def _mask_loss(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        matched: list[Tensor],
        labels: list[Tensor],
        targets: list[dict],
    ) -> Tensor:
        positive = [(label > 0).nonzero()[:, 0] for label in labels]
        boxes = [box[chosen] for box, chosen in zip(proposals, positive, strict=True)]
        logits = self._mask_logits(features, boxes, [label[c] for label, c in zip(labels, positive, strict=True)])
        if not len(logits):
            return logits.sum()
        truth = [
            mask_targets(target["masks"], index[chosen], box, logits.shape[-1])
            for target, index, chosen, box in zip(targets, matched, positive, boxes, strict=True)
        ]
        return F.binary_cross_entropy_with_logits(logits, torch.cat(truth))

    def _mask_logits(self, features: dict[str, Tensor], boxes: list[Tensor], labels: list[Tensor]) -> Tensor:
        """Mask logits [N, M, M] of each box's own class."""
        logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes))).float()
        return logits[torch.arange(len(logits), device=logits.device), torch.cat(labels)]

    def detect(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Per image: ``boxes`` [N, 4] (input pixels), ``scores`` [N], ``labels`` [N] 1-based, ``masks`` [N, M, M]."""
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals)))
        boxes, scores, labels = self.postprocess_detections(logits, deltas, proposals, image_sizes)
        found = [
            {"boxes": b, "scores": s, "labels": c} for b, s, c in zip(boxes, scores, labels, strict=True)
        ]  # fmt: skip
        if self.has_mask():
            masks = self._mask_logits(features, boxes, labels).sigmoid().split([len(b) for b in boxes])
            found = [{**image, "masks": mask} for image, mask in zip(found, masks, strict=True)]
        return found


def box_losses(logits: Tensor, deltas: Tensor, labels: Tensor, targets: Tensor, beta: float) -> dict[str, Tensor]:
    """Softmax loss over all sampled boxes; smooth L1 of the true class's deltas, divided by the same count.

    Without any box (no object and no proposal in this process) both are zeros that keep their gradients.

    Shapes: logits [N, 1 + classes], deltas [N, 4 * (1 + classes)], labels [N], targets [N, 4].
    """
    foreground = (labels > 0).nonzero()[:, 0]
    of_class = deltas.unflatten(1, (-1, 4))[foreground, labels[foreground]]
    distance = F.smooth_l1_loss(of_class, targets[foreground], beta=beta, reduction="sum")
    loss_cls = F.cross_entropy(logits, labels) if len(labels) else logits.sum()
    return {"loss_cls": loss_cls, "loss_box_reg": distance / max(len(labels), 1)}


def _pooler(keys: CfgNode) -> ROIPooler:
    return ROIPooler(keys.POOLER_RESOLUTION, keys.POOLER_SAMPLING_RATIO, aligned=keys.POOLER_TYPE == "ROIAlignV2")


def _box_parts(cfg: CfgNode, in_channels: int) -> dict[str, nn.Module]:
    keys = cfg.MODEL.ROI_BOX_HEAD
    side = keys.POOLER_RESOLUTION
    convs, fcs = [keys.CONV_DIM] * keys.NUM_CONV, [keys.FC_DIM] * keys.NUM_FC
    head = FastRCNNConvFCHead((in_channels, side, side), convs, fcs, norm_layer=NORMS[keys.NORM])
    width = keys.FC_DIM if fcs else (keys.CONV_DIM if convs else in_channels) * side**2
    predictor = Float32Predictor(width, 1 + cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    return {"box_roi_pool": _pooler(keys), "box_head": head, "box_predictor": predictor}


def _mask_parts(cfg: CfgNode, in_channels: int) -> dict[str, nn.Module]:
    keys = cfg.MODEL.ROI_MASK_HEAD
    head = MaskRCNNHeads(in_channels, [keys.CONV_DIM] * keys.NUM_CONV, dilation=1, norm_layer=NORMS[keys.NORM])
    width = keys.CONV_DIM if keys.NUM_CONV else in_channels
    predictor = MaskRCNNPredictor(width, keys.CONV_DIM, 1 + cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    return {"mask_roi_pool": _pooler(keys), "mask_head": head, "mask_predictor": predictor}
