"""Keypoint head: torchvision's layers, detectron2's choice of boxes, loss and scores."""

import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.roi_heads import keypoints_to_heatmap


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
