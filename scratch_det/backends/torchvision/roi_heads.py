"""Box, mask and keypoint heads: torchvision's layers and sampling, detectron2's pooling, targets and losses."""

from typing import Any

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads as TorchvisionRoIHeads

from scratch_det.backends.torchvision.keypoint_head import keypoint_layers, keypoint_loss, keypoint_samples
from scratch_det.backends.torchvision.pooler import build_pooler
from scratch_det.modeling.masks import mask_targets
from scratch_det.modeling.norm import norm_layer

Detections = tuple[list[Tensor], list[Tensor], list[Tensor]]  # boxes, scores, labels by image


class Float32Predictor(FastRCNNPredictor):
    """torchvision's class and box layers (slot 0 is background); arithmetic after them stays in float32."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = super().forward(x)
        return logits.float(), deltas.float()


class RoIHeads(TorchvisionRoIHeads):
    """torchvision's sampling and post-processing around detectron2's losses. Labels are 1-based; 0 is background.

    strides: of the backbone's maps to pool from, by name; they have ``in_channels`` channels.
    """

    def __init__(self, cfg: CfgNode, in_channels: int, strides: dict[str, int]):
        keys, box = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD
        super().__init__(
            build_pooler(box, strides),
            *self.box_layers(cfg, in_channels),
            **(_mask_parts(cfg, in_channels, strides) if cfg.MODEL.MASK_ON else {}),
            **(_keypoint_parts(cfg, in_channels, strides) if cfg.MODEL.KEYPOINT_ON else {}),
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
        self.keypoint_keys = cfg.MODEL.ROI_KEYPOINT_HEAD
        self.most_foreground = keys.BATCH_SIZE_PER_IMAGE * keys.POSITIVE_FRACTION  # boxes an image

    @staticmethod
    def box_layers(cfg: CfgNode, in_channels: int) -> tuple[nn.Module | None, nn.Module | None]:
        """The box head and its predictor."""
        return box_head(cfg, in_channels)

    def losses(
        self, features: dict[str, Tensor], proposals: list[Tensor], targets: list[dict], sizes: list[tuple[int, int]]
    ) -> dict[str, Tensor]:
        """Those of the box head and, where there are such heads, ``loss_mask`` and ``loss_keypoint``.

        sizes: of the images, without padding.
        """
        proposals, matched, labels, deltas = self.select_training_samples(proposals, targets)
        losses = self.stage_losses(features, proposals, labels, deltas, targets, sizes)
        if self.has_mask():
            losses["loss_mask"] = self._mask_loss(features, proposals, matched, labels, targets)
        if self.has_keypoint():
            boxes, points = keypoint_samples(proposals, matched, labels, targets)
            maps, most = self._heat_maps(features, boxes), self.most_foreground * len(proposals)
            losses["loss_keypoint"] = keypoint_loss(maps, torch.cat(boxes), torch.cat(points), self.keypoint_keys, most)
        return losses

    def stage_losses(
        self, features: dict[str, Tensor], proposals: list[Tensor], labels: list[Tensor], deltas: list[Tensor], *_: Any
    ) -> dict[str, Tensor]:
        """``loss_cls`` and ``loss_box_reg``."""
        logits, predicted = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals)))
        return box_losses(logits, predicted, torch.cat(labels), torch.cat(deltas), self.beta, self.box_loss_weight)

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

    def _heat_maps(self, features: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        """Keypoint logits [N, K, S, S]."""
        return self.keypoint_predictor(self.keypoint_head(self.keypoint_roi_pool(features, boxes))).float()

    def detect(
        self, features: dict[str, Tensor], proposals: list[Tensor], sizes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Per image: ``boxes`` [N, 4] (input pixels), ``scores`` [N] and ``labels`` [N], 1-based."""
        found = self.detect_boxes(features, proposals, sizes)
        return [{"boxes": b, "scores": s, "labels": c} for b, s, c in zip(*found, strict=True)]

    def detect_boxes(
        self, features: dict[str, Tensor], proposals: list[Tensor], sizes: list[tuple[int, int]]
    ) -> Detections:
        """What ``detect`` says, in three lists."""
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals)))
        return self.postprocess_detections(logits, deltas, proposals, sizes)

    def shapes(self, features: dict[str, Tensor], found: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """What the other heads say of the boxes of ``detect``, per image.

        ``masks`` [N, M, M], probabilities inside the box, and ``heat_maps`` [N, K, S, S], logits of a keypoint.
        """
        boxes, labels = ([image[key] for image in found] for key in ("boxes", "labels"))
        numbers, shapes = [len(each) for each in boxes], {}
        if self.has_mask():
            shapes["masks"] = self._mask_logits(features, boxes, labels).sigmoid().split(numbers)
        if self.has_keypoint():
            shapes["heat_maps"] = self._heat_maps(features, boxes).split(numbers)
        return [{name: values[image] for name, values in shapes.items()} for image in range(len(found))]


def box_losses(
    logits: Tensor, deltas: Tensor, labels: Tensor, targets: Tensor, beta: float, box_weight: float = 1.0
) -> dict[str, Tensor]:
    """Softmax loss over all sampled boxes; smooth L1 of the true class's deltas, divided by the same count.

    Without any box (no object and no proposal in this process) both are zeros that keep their gradients.

    Shapes: logits [N, 1 + classes], deltas [N, 4 * (1 + classes)] or, one box for all classes, [N, 4], labels [N],
    targets [N, 4].
    """
    foreground = (labels > 0).nonzero()[:, 0]
    by_class = deltas.unflatten(1, (-1, 4))
    of_class = by_class[foreground, labels[foreground] if by_class.shape[1] > 1 else 0]
    distance = F.smooth_l1_loss(of_class, targets[foreground], beta=beta, reduction="sum")
    loss_cls = F.cross_entropy(logits, labels) if len(labels) else logits.sum()
    return {"loss_cls": loss_cls, "loss_box_reg": distance * box_weight / max(len(labels), 1)}


def box_head(cfg: CfgNode, in_channels: int) -> tuple[nn.Module, FastRCNNPredictor]:
    """ROI_BOX_HEAD's convolutions and fully connected layers, and the class and box layers after them."""
    keys = cfg.MODEL.ROI_BOX_HEAD
    side = keys.POOLER_RESOLUTION
    convs, fcs = [keys.CONV_DIM] * keys.NUM_CONV, [keys.FC_DIM] * keys.NUM_FC
    head = FastRCNNConvFCHead((in_channels, side, side), convs, fcs, norm_layer=norm_layer(keys.NORM))
    width = keys.FC_DIM if fcs else (keys.CONV_DIM if convs else in_channels) * side**2
    return head, Float32Predictor(width, 1 + cfg.MODEL.ROI_HEADS.NUM_CLASSES)


def _mask_parts(cfg: CfgNode, in_channels: int, strides: dict[str, int]) -> dict[str, nn.Module]:
    keys = cfg.MODEL.ROI_MASK_HEAD
    head = MaskRCNNHeads(in_channels, [keys.CONV_DIM] * keys.NUM_CONV, dilation=1, norm_layer=norm_layer(keys.NORM))
    width = keys.CONV_DIM if keys.NUM_CONV else in_channels
    predictor = MaskRCNNPredictor(width, keys.CONV_DIM, 1 + cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    return {"mask_roi_pool": build_pooler(keys, strides), "mask_head": head, "mask_predictor": predictor}


def _keypoint_parts(cfg: CfgNode, in_channels: int, strides: dict[str, int]) -> dict[str, nn.Module]:
    keys = cfg.MODEL.ROI_KEYPOINT_HEAD
    return {"keypoint_roi_pool": build_pooler(keys, strides), **keypoint_layers(keys, in_channels)}
