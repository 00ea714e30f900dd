"""RPN, box, mask and keypoint heads: torchvision's layers and sampling, detectron2's anchors, targets and losses.

With ROI_HEADS.NAME CascadeROIHeads the box head is a Cascade R-CNN (Cai & Vasconcelos 2018) as detectron2 defines it:
every stage starts from the boxes of the one before. Three stages match at increasing IoU and regress one box for all
classes; scores are averaged over the stages, boxes are the last one's. The mask head is trained on the first stage's
proposals and applied to the last one's boxes.

Labels are 0-based outside of ``RoIHeads`` and 1-based inside, as torchvision's sampling and post-processing have the
background in slot 0: only ``RoIHeads.losses`` adds 1, and only ``RoIHeads.detect`` subtracts it.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads as TorchvisionRoIHeads
from torchvision.models.detection.roi_heads import keypoints_to_heatmap, maskrcnn_inference
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import box_area, box_iou, clip_boxes_to_image, roi_pool

from scratch_det.modeling.anchors import Anchors
from scratch_det.modeling.norm import norm_layer
from scratch_det.modeling.roi_align import roi_align

CANONICAL_SIZE, CANONICAL_LEVEL = 224, 4  # Lin et al., Feature Pyramid Networks, equation 1: a 224 px box pools p4

Maps = dict[str, Tensor]  # [N, C, H, W] by name
Sizes = list[tuple[int, int]]  # height and width of the images, without padding


class ImageAnchors(Anchors):
    """As torchvision's RPN asks for them: [sum of H * W * A over levels, 4] for each image."""

    def forward(self, images: ImageList, features: list[Tensor]) -> list[Tensor]:
        return [torch.cat(self.levels(features))] * len(images.image_sizes)


class Float32RPNHead(RPNHead):
    """torchvision's RPN head; box arithmetic after it stays in float32 under autocast."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [level.float() for level in logits], [level.float() for level in deltas]


class RPN(RegionProposalNetwork):
    """torchvision's RPN; losses are summed over anchors and divided by the nominal sample size, as in detectron2."""

    def __init__(self, cfg: CfgNode, in_channels: int, strides: Sequence[int]):
        keys, anchors = cfg.MODEL.RPN, cfg.MODEL.ANCHOR_GENERATOR
        generator = ImageAnchors(anchors.SIZES, anchors.ASPECT_RATIOS, strides, anchors.OFFSET, anchors.ROUNDING)
        super().__init__(
            generator, Float32RPNHead(in_channels, generator.per_location, conv_depth=len(keys.CONV_DIMS)),
            fg_iou_thresh=keys.IOU_THRESHOLDS[1], bg_iou_thresh=keys.IOU_THRESHOLDS[0],
            batch_size_per_image=keys.BATCH_SIZE_PER_IMAGE, positive_fraction=keys.POSITIVE_FRACTION,
            pre_nms_top_n={"training": keys.PRE_NMS_TOPK_TRAIN, "testing": keys.PRE_NMS_TOPK_TEST},
            post_nms_top_n={"training": keys.POST_NMS_TOPK_TRAIN, "testing": keys.POST_NMS_TOPK_TEST},
            nms_thresh=keys.NMS_THRESH,
        )  # fmt: skip
        self.box_coder, self.keys = BoxCoder(weights=tuple(keys.BBOX_REG_WEIGHTS)), keys

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Any]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Labels and true boxes of the anchors. A target has the image's ``size`` (height, width) without padding.

        With BOUNDARY_THRESH from 0 on, anchors that stick out of their image by more are ignored, after matching as in
        detectron2.
        """
        labels, boxes = super().assign_targets_to_anchors(anchors, targets)
        margin = self.keys.BOUNDARY_THRESH
        for label, anchor, target in zip(labels, anchors, targets, strict=True) if margin >= 0 else ():
            height, width = target["size"]
            (x1, y1, x2, y2), right, bottom = anchor.unbind(1), width + margin, height + margin
            label[(x1 < -margin) | (y1 < -margin) | (x2 >= right) | (y2 >= bottom)] = -1
        return labels, boxes

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Objectness (binary cross-entropy) and box (smooth L1) loss over the sampled anchors of the batch."""
        positive, negative = map(torch.cat, self.fg_bg_sampler(labels))
        # Places: as an index, a mask is counted at each use, forward and backward, and the host waits for the count.
        positive, sampled = (chosen.nonzero()[:, 0] for chosen in (positive, positive | negative))
        logits, truth = objectness.flatten()[sampled], torch.cat(labels)[sampled]
        loss_cls = F.binary_cross_entropy_with_logits(logits, truth, reduction="sum")
        deltas, targets = pred_bbox_deltas[positive], torch.cat(regression_targets)[positive]
        loss_loc = F.smooth_l1_loss(deltas, targets, beta=self.keys.SMOOTH_L1_BETA, reduction="sum")
        scale = self.keys.LOSS_WEIGHT / (self.keys.BATCH_SIZE_PER_IMAGE * len(labels))
        return loss_cls * scale, loss_loc * scale * self.keys.BBOX_REG_LOSS_WEIGHT


class ROIPooler(nn.Module):
    """RoIAlign or RoIPool from the pyramid level that fits a box's size.

    Args:
        kind: ROIAlign, ROIAlignV2 (shifted by half a pixel) or ROIPool.
        strides: of the maps to pool from, by name: a power of 2, each twice the one before.
        resolution: output is [N, C, resolution, resolution].
        sampling_ratio: samples of RoIAlign per bin and axis; 0 adapts to the bin's size.
    """

    def __init__(self, kind: str, strides: dict[str, int], resolution: int, sampling_ratio: int):
        super().__init__()
        self.strides, self.resolution = strides, resolution
        self.pool = roi_pool
        if kind != "ROIPool":
            self.pool = partial(roi_align, ratio=sampling_ratio, aligned=kind == "ROIAlignV2")
        self.first_level = min(strides.values()).bit_length() - 1

    def forward(self, features: Maps, boxes: list[Tensor]) -> Tensor:
        """Pool ``boxes`` (per image [n, 4] x1 y1 x2 y2, pixels of the network's input), in their order."""
        index = torch.cat([box.new_full((box.shape[0], 1), image) for image, box in enumerate(boxes)])
        rois = torch.cat([index, torch.cat(boxes)], dim=1)
        side = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).clamp(min=0).sqrt()
        levels = torch.floor(CANONICAL_LEVEL + torch.log2(side / CANONICAL_SIZE + 1e-8))
        levels = (levels - self.first_level).clamp(0, len(self.strides) - 1)
        order = levels.argsort(stable=True)
        counts = (levels == torch.arange(len(self.strides), device=levels.device)[:, None]).sum(1).tolist()
        by_level = torch.cat([
            self.pool(features[name].float(), of_level, self.resolution, 1 / stride)
            for (name, stride), of_level in zip(self.strides.items(), rois[order].split(counts), strict=True)
        ])  # fmt: skip
        pooled = by_level.new_empty((rois.shape[0], *by_level.shape[1:]))
        pooled[order] = by_level
        return pooled


def box_layers(cfg: CfgNode, in_channels: int) -> tuple[nn.Module, nn.Module]:
    """ROI_BOX_HEAD's convolutions and fully connected layers, and the class and box layers after them."""
    keys = cfg.MODEL.ROI_BOX_HEAD
    side = keys.POOLER_RESOLUTION
    convs, fcs = [keys.CONV_DIM] * keys.NUM_CONV, [keys.FC_DIM] * keys.NUM_FC
    head = FastRCNNConvFCHead((in_channels, side, side), convs, fcs, norm_layer=norm_layer(keys.NORM))
    width = keys.FC_DIM if fcs else [in_channels, *convs][-1] * side**2
    return head, FastRCNNPredictor(width, 1 + cfg.MODEL.ROI_HEADS.NUM_CLASSES)


class Stage(nn.Module):
    """A cascade's box head and predictor, from pooled [N, C, S, S] to logits [N, 1 + classes] and deltas [N, 4]."""

    def __init__(self, cfg: CfgNode, in_channels: int, weights: list[float], iou: float):
        super().__init__()
        self.box_head, self.box_predictor = box_layers(cfg, in_channels)
        self.box_predictor.bbox_pred = nn.Linear(self.box_predictor.bbox_pred.in_features, 4)
        self.coder, self.matcher = BoxCoder(tuple(weights)), Matcher(iou, iou, allow_low_quality_matches=False)

    def refine(self, boxes: list[Tensor], deltas: Tensor, sizes: Sizes) -> list[Tensor]:
        """``boxes`` moved by ``deltas`` and clipped to their images, without gradients."""
        moved = self.coder.decode_single(deltas.detach(), torch.cat(boxes)).split([box.shape[0] for box in boxes])
        return [clip_boxes_to_image(box, size) for box, size in zip(moved, sizes, strict=True)]

    def label(self, boxes: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Label [N] (0 is background) and regression target [N, 4] of every box."""
        if not (len(boxes) and len(target["boxes"])):  # no box has an area once weights are NaN
            return boxes.new_zeros(len(boxes), dtype=torch.int64), torch.zeros_like(boxes)
        matched = self.matcher(box_iou(target["boxes"], boxes))
        chosen = matched.clamp(min=0)
        labels = target["labels"][chosen].where(matched >= 0, 0)
        return labels, self.coder.encode_single(target["boxes"][chosen], boxes)


class RoIHeads(TorchvisionRoIHeads):
    """torchvision's sampling and post-processing around detectron2's losses.

    strides: of the backbone's maps to pool from, by name; they have ``in_channels`` channels. A cascade has ``stages``,
    with the IoUs and box weights of ROI_BOX_CASCADE_HEAD, instead of one box head.
    """

    def __init__(self, cfg: CfgNode, in_channels: int, strides: dict[str, int]):
        keys, box, mask, keypoint = (
            cfg.MODEL[f"ROI_{name}"] for name in ("HEADS", "BOX_HEAD", "MASK_HEAD", "KEYPOINT_HEAD")
        )

        def pooler(head: CfgNode) -> ROIPooler:
            return ROIPooler(head.POOLER_TYPE, strides, head.POOLER_RESOLUTION, head.POOLER_SAMPLING_RATIO)

        # Layers draw random weights in this order; another order would be another training.
        parts, is_cascade = {"box_roi_pool": pooler(box)}, keys.NAME == "CascadeROIHeads"
        parts["box_head"], parts["box_predictor"] = (None, None) if is_cascade else box_layers(cfg, in_channels)
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
            **parts, fg_iou_thresh=keys.IOU_THRESHOLDS[0], bg_iou_thresh=keys.IOU_THRESHOLDS[0],
            batch_size_per_image=keys.BATCH_SIZE_PER_IMAGE, positive_fraction=keys.POSITIVE_FRACTION,
            bbox_reg_weights=tuple(box.BBOX_REG_WEIGHTS), score_thresh=keys.SCORE_THRESH_TEST,
            nms_thresh=keys.NMS_THRESH_TEST, detections_per_img=cfg.TEST.DETECTIONS_PER_IMAGE,
        )  # fmt: skip
        self.box_keys, self.keypoint_keys, self.is_cascade = box, keypoint, is_cascade
        self.most_foreground = keys.BATCH_SIZE_PER_IMAGE * keys.POSITIVE_FRACTION  # sampled boxes of objects per image
        if is_cascade:
            cascade = cfg.MODEL.ROI_BOX_CASCADE_HEAD
            stages = zip(cascade.BBOX_REG_WEIGHTS, cascade.IOUS, strict=True)
            self.stages = nn.ModuleList(Stage(cfg, in_channels, weights, iou) for weights, iou in stages)
            self.box_coder = self.stages[0].coder  # of the targets that the first stage's sampling makes

    def losses(
        self, features: Maps, proposals: list[Tensor], targets: list[dict[str, Tensor]], sizes: Sizes
    ) -> dict[str, Tensor]:
        """The losses of the box head and, if there are such heads, ``loss_mask`` and ``loss_keypoint``.

        A box head's are ``loss_cls`` and ``loss_box_reg``, a cascade's ``loss_cls_stage0`` and so on; only the first
        stage's proposals are sampled.
        """
        targets = [{**target, "labels": target["labels"] + 1} for target in targets]
        proposals, matched, labels, deltas = self.select_training_samples(proposals, targets)
        losses, boxes, true_labels, true_deltas = {}, proposals, labels, deltas
        stages = list(self.stages) if self.is_cascade else [self]
        for number, stage in enumerate(stages):
            logits, predicted = self.predict_boxes(stage, features, boxes)
            own = box_losses(logits, predicted, torch.cat(true_labels), torch.cat(true_deltas), self.box_keys)
            losses |= {f"{name}_stage{number}" if self.is_cascade else name: loss for name, loss in own.items()}
            for following in stages[number + 1 : number + 2]:
                boxes = [box[box_area(box) > 0] for box in stage.refine(boxes, predicted, sizes)]
                found = [following.label(box, target) for box, target in zip(boxes, targets, strict=True)]
                true_labels, true_deltas = zip(*found, strict=True)
        foreground = [(label > 0).nonzero()[:, 0] for label in labels]
        boxes, matched, labels = (
            [one[chosen] for one, chosen in zip(each, foreground, strict=True)] for each in (proposals, matched, labels)
        )
        if self.has_mask():
            logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes))).float()
            logits = logits[torch.arange(len(logits), device=logits.device), torch.cat(labels)]
            masks = [target["masks"][index] for target, index in zip(targets, matched, strict=True)]
            cropped = [one.crop_and_resize(box, logits.shape[-1]) for one, box in zip(masks, boxes, strict=True)]
            truth = torch.cat(cropped).to(logits.dtype)
            loss = F.binary_cross_entropy_with_logits(logits, truth) if len(logits) else logits.sum()
            losses["loss_mask"] = loss
        if self.has_keypoint():
            points = [target["keypoints"][index] for target, index in zip(targets, matched, strict=True)]
            boxes, points = keypoint_samples(boxes, points)
            maps = self.keypoint_predictor(self.keypoint_head(self.keypoint_roi_pool(features, boxes))).float()
            most = self.most_foreground * len(proposals)
            losses["loss_keypoint"] = keypoint_loss(maps, torch.cat(boxes), torch.cat(points), self.keypoint_keys, most)
        return losses

    def predict_boxes(self, stage: nn.Module, features: Maps, boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Class logits [N, 1 + classes], and the deltas of ``boxes``: [N, 4 * (1 + classes)], of a cascade [N, 4].

        Arithmetic after them stays in float32. The gradient of a cascade's pooled features is divided by the number of
        stages, since the stages' losses are summed.
        """
        pooled = self.box_roi_pool(features, boxes)
        if self.is_cascade and pooled.requires_grad:
            pooled.register_hook(lambda gradient: gradient / len(self.stages))
        logits, deltas = stage.box_predictor(stage.box_head(pooled))
        return logits.float(), deltas.float()

    def detect(self, features: Maps, proposals: list[Tensor], sizes: Sizes) -> list[dict[str, Tensor]]:
        """Per image: ``boxes`` [N, 4] (pixels of the network's input), ``scores`` [N] and ``labels`` [N], 0-based."""
        if self.is_cascade:
            scores = []
            for stage in self.stages:
                logits, deltas = self.predict_boxes(stage, features, proposals)
                scores.append(logits.softmax(-1))
                proposals = stage.refine(proposals, deltas, sizes)
            mean = torch.stack(scores).mean(0)
            logits, deltas = mean.log(), torch.zeros_like(mean).repeat(1, 4)  # the last stage's boxes are final
        else:
            logits, deltas = self.predict_boxes(self, features, proposals)
        found = self.postprocess_detections(logits, deltas, proposals, sizes)
        return [{"boxes": b, "scores": s, "labels": c - 1} for b, s, c in zip(*found, strict=True)]

    def shapes(self, features: Maps, found: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Masks and keypoints of the boxes and (0-based) labels of ``found``, per image.

        ``masks`` [N, M, M], probabilities inside the box, and ``heat_maps`` [N, K, S, S], logits of a keypoint.
        """
        boxes, shapes = [image["boxes"] for image in found], {}
        if self.has_mask():
            logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes))).float()
            masks = maskrcnn_inference(logits, [image["labels"] + 1 for image in found])
            shapes["masks"] = [of_image[:, 0] for of_image in masks]
        if self.has_keypoint():
            maps = self.keypoint_predictor(self.keypoint_head(self.keypoint_roi_pool(features, boxes))).float()
            shapes["heat_maps"] = maps.split([one.shape[0] for one in boxes])
        return [{name: values[image] for name, values in shapes.items()} for image in range(len(found))]


def box_losses(logits: Tensor, deltas: Tensor, labels: Tensor, targets: Tensor, keys: CfgNode) -> dict[str, Tensor]:
    """Softmax loss over all sampled boxes; smooth L1 of the true class's deltas, divided by the same count.

    Without any box (no object and no proposal on this rank) both are zero and still have gradients.

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
    """The boxes [N, 4] that contain a labelled keypoint of their object, and their keypoints ``points`` [N, K, 3].

    A border counts as inside. Both are lists with one entry per image.
    """
    chosen = []
    for box, point in zip(boxes, points, strict=True):
        xy, low, high = point[..., :2], box[:, None, :2], box[:, None, 2:]
        chosen.append((((xy >= low) & (xy <= high)).all(-1) & (point[..., 2] > 0)).any(1).nonzero()[:, 0])
    return tuple([one[c] for one, c in zip(each, chosen, strict=True)] for each in (boxes, points))


def keypoint_loss(logits: Tensor, boxes: Tensor, points: Tensor, keys: CfgNode, most_boxes: float) -> Tensor:
    """Softmax loss over the cells of a heat map, for every labelled keypoint inside its box.

    The sum is divided by the number of these keypoints (NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS), or by ``most_boxes`` x K,
    where ``most_boxes`` is how many boxes could be sampled in the batch. Without keypoints it is zero, with gradients.

    Shapes: logits [N, K, S, S], boxes [N, 4], points [N, K, 3]. keys: ROI_KEYPOINT_HEAD.
    """
    places, valid = keypoints_to_heatmap(points, boxes, logits.shape[-1])
    labelled = valid.nonzero(as_tuple=True)
    loss = F.cross_entropy(logits.flatten(2)[labelled], places[labelled], reduction="sum")
    by_visible = keys.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS
    count = max(len(labelled[0]), 1) if by_visible else most_boxes * logits.shape[1]
    return keys.LOSS_WEIGHT * loss / count
