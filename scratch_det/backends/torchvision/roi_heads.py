"""Box, mask and keypoint heads: torchvision's layers and sampling, detectron2's pooling, targets and losses.

Labels are 0-based outside of ``RoIHeads`` and 1-based inside, as torchvision's sampling and post-processing have the
background in slot 0: ``RoIHeads.losses`` adds 1 and ``RoIHeads.detect`` takes it off, nothing else does.
"""

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

Maps = dict[str, Tensor]  # [N, C, H, W] by name
Sizes = list[tuple[int, int]]  # height and width of the images, without padding


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

    def forward(self, features: Maps, boxes: list[Tensor]) -> Tensor:
        """Pool ``boxes`` (per image [n, 4] x1 y1 x2 y2, pixels of the network's input), in their order."""
        index = torch.cat([box.new_full((len(box), 1), image) for image, box in enumerate(boxes)])
        rois = torch.cat([index, torch.cat(boxes)], dim=1)
        levels = self.levels_of(rois[:, 1:])
        channels = next(iter(features.values())).shape[1]
        pooled = rois.new_zeros((len(rois), channels, self.resolution, self.resolution))
        for level, (name, stride) in enumerate(self.strides.items()):
            chosen = (levels == level).nonzero()[:, 0]
            values = roi_align(
                features[name].float(), rois[chosen], self.resolution, 1 / stride, self.sampling_ratio, self.aligned
            )
            pooled = pooled.index_copy(0, chosen, values)
        return pooled

    def levels_of(self, boxes: Tensor) -> Tensor:
        """The place in ``strides`` [N] of the map that each of ``boxes`` [N, 4] is pooled from."""
        side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=0).sqrt()
        level = torch.floor(CANONICAL_LEVEL + torch.log2(side / CANONICAL_SIZE + 1e-8))
        return (level - self.first_level).clamp(0, len(self.strides) - 1).to(torch.int64)


class Float32Predictor(FastRCNNPredictor):
    """torchvision's class and box layers (slot 0 is background); arithmetic after them stays in float32."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = super().forward(x)
        return logits.float(), deltas.float()


class RoIHeads(TorchvisionRoIHeads):
    """torchvision's sampling and post-processing around detectron2's losses.

    strides: of the backbone's maps to pool from, by name; they have ``in_channels`` channels.
    """

    def __init__(self, cfg: CfgNode, in_channels: int, strides: dict[str, int]):
        keys, box, mask, keypoint = (
            cfg.MODEL[f"ROI_{name}"] for name in ("HEADS", "BOX_HEAD", "MASK_HEAD", "KEYPOINT_HEAD")
        )

        def pooler(head: CfgNode) -> ROIPooler:
            aligned = head.POOLER_TYPE == "ROIAlignV2"
            return ROIPooler(strides, head.POOLER_RESOLUTION, head.POOLER_SAMPLING_RATIO, aligned)

        parts: dict[str, nn.Module] = {"box_roi_pool": pooler(box)}  # the order of layers is that of random draws
        parts["box_head"], parts["box_predictor"] = self.box_layers(cfg, in_channels)
        if cfg.MODEL.MASK_ON:
            widths, norm = [mask.CONV_DIM] * mask.NUM_CONV, norm_layer(mask.NORM)
            parts["mask_roi_pool"] = pooler(mask)
            parts["mask_head"] = MaskRCNNHeads(in_channels, widths, dilation=1, norm_layer=norm)
            width = [in_channels, *widths][-1]
            parts["mask_predictor"] = MaskRCNNPredictor(width, mask.CONV_DIM, 1 + keys.NUM_CLASSES)
        if cfg.MODEL.KEYPOINT_ON:  # to heat maps of 4 x POOLER_RESOLUTION a side
            parts["keypoint_roi_pool"] = pooler(keypoint)
            parts["keypoint_head"] = KeypointRCNNHeads(in_channels, keypoint.CONV_DIMS)
            width = [in_channels, *keypoint.CONV_DIMS][-1]
            parts["keypoint_predictor"] = KeypointRCNNPredictor(width, keypoint.NUM_KEYPOINTS)
        super().__init__(
            **parts,
            fg_iou_thresh=keys.IOU_THRESHOLDS[0],
            bg_iou_thresh=keys.IOU_THRESHOLDS[0],
            batch_size_per_image=keys.BATCH_SIZE_PER_IMAGE,
            positive_fraction=keys.POSITIVE_FRACTION,
            bbox_reg_weights=tuple(box.BBOX_REG_WEIGHTS),
            score_thresh=keys.SCORE_THRESH_TEST,
            nms_thresh=keys.NMS_THRESH_TEST,
            detections_per_img=cfg.TEST.DETECTIONS_PER_IMAGE,
        )
        self.box_keys, self.keypoint_keys = box, keypoint
        self.most_foreground = keys.BATCH_SIZE_PER_IMAGE * keys.POSITIVE_FRACTION  # sampled boxes per image

    @staticmethod
    def box_layers(cfg: CfgNode, in_channels: int) -> tuple[nn.Module | None, nn.Module | None]:
        """ROI_BOX_HEAD's convolutions and fully connected layers, and the class and box layers after them."""
        keys = cfg.MODEL.ROI_BOX_HEAD
        side = keys.POOLER_RESOLUTION
        convs, fcs = [keys.CONV_DIM] * keys.NUM_CONV, [keys.FC_DIM] * keys.NUM_FC
        head = FastRCNNConvFCHead((in_channels, side, side), convs, fcs, norm_layer=norm_layer(keys.NORM))
        width = keys.FC_DIM if fcs else [in_channels, *convs][-1] * side**2
        return head, Float32Predictor(width, 1 + cfg.MODEL.ROI_HEADS.NUM_CLASSES)

    def losses(
        self, features: Maps, proposals: list[Tensor], targets: list[dict[str, Tensor]], sizes: Sizes
    ) -> dict[str, Tensor]:
        """Those of the box head and, where there are such heads, ``loss_mask`` and ``loss_keypoint``."""
        targets = [{**target, "labels": target["labels"] + 1} for target in targets]
        proposals, matched, labels, deltas = self.select_training_samples(proposals, targets)
        losses = self.box_head_losses(features, proposals, labels, deltas, targets, sizes)
        foreground = [(label > 0).nonzero()[:, 0] for label in labels]
        boxes, matched, labels = (
            [one[chosen] for one, chosen in zip(each, foreground, strict=True)] for each in (proposals, matched, labels)
        )
        if self.has_mask():
            logits = self._mask_logits(features, boxes, torch.cat(labels))
            masks = [target["masks"] for target in targets]
            truth = [mask_targets(*one, logits.shape[-1]) for one in zip(masks, matched, boxes, strict=True)]
            losses["loss_mask"] = (
                F.binary_cross_entropy_with_logits(logits, torch.cat(truth)) if len(logits) else logits.sum()
            )
        if self.has_keypoint():
            points = [target["keypoints"][index] for target, index in zip(targets, matched, strict=True)]
            boxes, points = keypoint_samples(boxes, points)
            maps, most = self._heat_maps(features, boxes), self.most_foreground * len(proposals)
            losses["loss_keypoint"] = keypoint_loss(maps, torch.cat(boxes), torch.cat(points), self.keypoint_keys, most)
        return losses

    def box_head_losses(
        self, features: Maps, proposals: list[Tensor], labels: list[Tensor], deltas: list[Tensor],
        targets: list[dict[str, Tensor]], sizes: Sizes,
    ) -> dict[str, Tensor]:  # fmt: skip
        """``loss_cls`` and ``loss_box_reg``; a cascade's later stages also need ``targets`` and ``sizes``."""
        logits, predicted = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals)))
        return box_losses(logits, predicted, torch.cat(labels), torch.cat(deltas), self.box_keys)

    def detect(self, features: Maps, proposals: list[Tensor], sizes: Sizes) -> list[dict[str, Tensor]]:
        """Per image: ``boxes`` [N, 4] (pixels of the network's input), ``scores`` [N] and ``labels`` [N], 0-based."""
        found = self.postprocess_detections(*self.predict_boxes(features, proposals, sizes), sizes)
        return [{"boxes": b, "scores": s, "labels": c - 1} for b, s, c in zip(*found, strict=True)]

    def predict_boxes(
        self, features: Maps, proposals: list[Tensor], sizes: Sizes
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Class logits [N, 1 + classes], deltas [N, 4 * (1 + classes)], and the boxes that these are to move."""
        return *self.box_predictor(self.box_head(self.box_roi_pool(features, proposals))), proposals

    def shapes(self, features: Maps, found: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Masks and keypoints of the boxes and (0-based) labels of ``found``, per image.

        ``masks`` [N, M, M], probabilities inside the box, and ``heat_maps`` [N, K, S, S], logits of a keypoint.
        """
        boxes, shapes = [image["boxes"] for image in found], {}
        numbers = [len(one) for one in boxes]
        if self.has_mask():
            slots = torch.cat([image["labels"] for image in found]) + 1
            shapes["masks"] = self._mask_logits(features, boxes, slots).sigmoid().split(numbers)
        if self.has_keypoint():
            shapes["heat_maps"] = self._heat_maps(features, boxes).split(numbers)
        return [{name: values[image] for name, values in shapes.items()} for image in range(len(found))]

    def _mask_logits(self, features: Maps, boxes: list[Tensor], slots: Tensor) -> Tensor:
        """Mask logits [N, M, M] of each box's own class."""
        logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes))).float()
        return logits[torch.arange(len(logits), device=logits.device), slots]

    def _heat_maps(self, features: Maps, boxes: list[Tensor]) -> Tensor:
        """Keypoint logits [N, K, S, S]."""
        return self.keypoint_predictor(self.keypoint_head(self.keypoint_roi_pool(features, boxes))).float()


def box_losses(logits: Tensor, deltas: Tensor, labels: Tensor, targets: Tensor, keys: CfgNode) -> dict[str, Tensor]:
    """Softmax loss over all sampled boxes; smooth L1 of the true class's deltas, divided by the same count.

    Without any box (no object and no proposal in this process) both are zeros that keep their gradients.

    Shapes: logits [N, 1 + classes], deltas [N, 4 * (1 + classes)] or, one box for all classes, [N, 4], labels [N]
    (0 is background), targets [N, 4]. keys: ROI_BOX_HEAD.
    """
    foreground = (labels > 0).nonzero()[:, 0]
    by_class = deltas.unflatten(1, (-1, 4))
    of_class = by_class[foreground, labels[foreground] if by_class.shape[1] > 1 else 0]
    distance = F.smooth_l1_loss(of_class, targets[foreground], beta=keys.SMOOTH_L1_BETA, reduction="sum")
    loss_cls = F.cross_entropy(logits, labels) if len(labels) else logits.sum()
    return {"loss_cls": loss_cls, "loss_box_reg": distance * keys.BBOX_REG_LOSS_WEIGHT / max(len(labels), 1)}


def keypoint_samples(boxes: list[Tensor], points: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Those of ``boxes`` [N, 4] that have a labelled one of their ``points`` [N, K, 3] inside, and the points.

    A border counts as inside. Both are lists with an entry per image.
    """
    chosen = []
    for box, point in zip(boxes, points, strict=True):
        xy, low, high = point[..., :2], box[:, None, :2], box[:, None, 2:]
        chosen.append((((xy >= low) & (xy <= high)).all(-1) & (point[..., 2] > 0)).any(1))
    return tuple([one[c] for one, c in zip(each, chosen, strict=True)] for each in (boxes, points))


def keypoint_loss(logits: Tensor, boxes: Tensor, points: Tensor, keys: CfgNode, most_boxes: float) -> Tensor:
    """Softmax loss over the places of a heat map, of every labelled keypoint inside its box.

    NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS divides the sum by their number, else ``most_boxes`` x K divides it: the boxes
    that could be sampled in the batch. Zero, with gradients, where there are none.

    Shapes: logits [N, K, S, S], boxes [N, 4], points [N, K, 3]. keys: ROI_KEYPOINT_HEAD.
    """
    places, valid = keypoints_to_heatmap(points, boxes, logits.shape[-1])
    labelled = valid.bool()
    loss = F.cross_entropy(logits.flatten(2)[labelled], places[labelled], reduction="sum")
    by_visible = keys.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS
    count = labelled.sum().clamp(min=1) if by_visible else most_boxes * logits.shape[1]
    return keys.LOSS_WEIGHT * loss / count
