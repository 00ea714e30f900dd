"""RoIAlign from the level of the backbone's maps that fits a box's size.

Keypoint head: torchvision's layers, detectron2's choice of boxes, loss and scores.

Box, mask and keypoint heads: torchvision's layers and sampling, detectron2's pooling, targets and losses.
"""

from typing import Any

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads as TorchvisionRoIHeads
from torchvision.models.detection.roi_heads import keypoints_to_heatmap
from torchvision.ops import roi_align

from scratch_det.modeling.norm import norm_layer
from scratch_det.modeling.ops import mask_targets

CANONICAL_SIZE, CANONICAL_LEVEL = 224, 4  # Lin et al., Feature Pyramid Networks, equation 1: a 224 px box pools p4


class ROIPooler(nn.Module):
    """RoIAlign from the level that fits a box's size.

    Args:
        strides: of the maps to pool from, by name: a power of 2, each twice the one before.
        resolution: output is [N, C, resolution, resolution].
        sampling_ratio: samples per bin and axis; 0 adapts to the bin's size.
        aligned: shift by half a pixel (detectron2's ROIAlignV2) or not (ROIAlign).
    """

    def __init__(self, strides: dict[str, int], resolution: int, sampling_ratio: int, aligned: bool):
        super().__init__()
        self.strides, self.resolution = strides, resolution
        self.sampling_ratio, self.aligned = sampling_ratio, aligned
        self.first_level = min(strides.values()).bit_length() - 1

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        """Pool ``boxes`` (per image [n, 4] x1 y1 x2 y2, pixels of the network's input), in their order."""
        rois = _with_image_index(boxes)
        levels = self.levels_of(rois[:, 1:])
        channels = next(iter(features.values())).shape[1]
        pooled = rois.new_zeros((len(rois), channels, self.resolution, self.resolution))
        for level, (name, stride) in enumerate(self.strides.items()):
            chosen = (levels == level).nonzero()[:, 0]
            pooled = pooled.index_copy(0, chosen, self._align(features[name].float(), rois[chosen], stride))
        return pooled

    def _align(self, feature: Tensor, rois: Tensor, stride: int) -> Tensor:
        return roi_align(feature, rois, self.resolution, 1 / stride, self.sampling_ratio, self.aligned)

    def levels_of(self, boxes: Tensor) -> Tensor:
        side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=0).sqrt()
        level = torch.floor(CANONICAL_LEVEL + torch.log2(side / CANONICAL_SIZE + 1e-8))
        return (level - self.first_level).clamp(0, len(self.strides) - 1).to(torch.int64)


def build_pooler(keys: CfgNode, strides: dict[str, int]) -> ROIPooler:
    """The pooler of a head, from its POOLER_* keys."""
    aligned = keys.POOLER_TYPE == "ROIAlignV2"
    return ROIPooler(strides, keys.POOLER_RESOLUTION, keys.POOLER_SAMPLING_RATIO, aligned)


def _with_image_index(boxes: list[Tensor]) -> Tensor:
    index = torch.cat([box.new_full((len(box), 1), image) for image, box in enumerate(boxes)])
    return torch.cat([index, torch.cat(boxes)], dim=1)


def keypoint_layers(keys: CfgNode, in_channels: int) -> dict[str, nn.Module]:
    """3x3 convolutions, then a deconvolution and bilinear upsampling to K heat maps of 4 x POOLER_RESOLUTION a side."""
    width = keys.CONV_DIMS[-1] if keys.CONV_DIMS else in_channels
    return {
        "keypoint_head": KeypointRCNNHeads(in_channels, keys.CONV_DIMS),
        "keypoint_predictor": KeypointRCNNPredictor(width, keys.NUM_KEYPOINTS),
    }


def keypoint_samples(
    boxes: list[Tensor], matched: list[Tensor], labels: list[Tensor], targets: list[dict[str, Tensor]]
) -> tuple[list[Tensor], list[Tensor]]:
    """The foreground boxes with a labelled keypoint inside, and their objects' keypoints; a list entry an image."""
    chosen_boxes, chosen_points = [], []
    for box, index, label, target in zip(boxes, matched, labels, targets, strict=True):
        foreground = label > 0
        box, points = box[foreground], target["keypoints"][index[foreground]]
        trained = _has_point_inside(box, points)
        chosen_boxes.append(box[trained])
        chosen_points.append(points[trained])
    return chosen_boxes, chosen_points


def _has_point_inside(boxes: Tensor, points: Tensor) -> Tensor:
    """Bool [N] of boxes [N, 4] and keypoints [N, K, 3]; a border counts."""
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    inside = ((points[..., :2] >= low) & (points[..., :2] <= high)).all(-1)
    return (inside & (points[..., 2] > 0)).any(1)


def keypoint_loss(logits: Tensor, boxes: Tensor, points: Tensor, keys: CfgNode, most_boxes: float) -> Tensor:
    """Softmax loss over the places of a heat map, of every labelled keypoint inside its box.

    NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS divides the sum by their number, else ``most_boxes`` x K divides it: the boxes
    that could be sampled in the batch. Zero, with gradients, where there are none.

    Shapes: logits [N, K, S, S], boxes [N, 4], points [N, K, 3].
    """
    places, valid = keypoints_to_heatmap(points, boxes, logits.shape[-1])
    labelled = valid.bool()
    loss = F.cross_entropy(logits.flatten(2)[labelled], places[labelled], reduction="sum")
    by_visible = keys.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS
    count = labelled.sum().clamp(min=1) if by_visible else most_boxes * logits.shape[1]
    return keys.LOSS_WEIGHT * loss / count


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
