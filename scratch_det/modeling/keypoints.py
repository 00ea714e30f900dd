"""From heat maps to keypoints."""

import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints


def decode_keypoints(logits: Tensor, boxes: Tensor) -> Tensor:
    """x, y and score [N, K, 3] of the highest point of each heat map [N, K, S, S], resized to its box [N, 4].

    The score is softmax's, normalised over the S x S places, so that objects of different sizes can be compared.
    """
    points, peaks = heatmaps_to_keypoints(logits, boxes)
    scores = (peaks - logits.flatten(2).logsumexp(2)).exp()
    return torch.cat([points[..., :2], scores[..., None]], dim=2)
