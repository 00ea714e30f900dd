"""Keypoints from heat maps, and box-sized masks pasted into the image; both backends share them."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints


def decode_keypoints(logits: Tensor, boxes: Tensor) -> Tensor:
    """x, y and score [N, K, 3] of the highest point of each heat map [N, K, S, S], resized to its box [N, 4].

    The score is softmax's, normalised over the S x S places, so that objects of different sizes can be compared.
    """
    points, peaks = heatmaps_to_keypoints(logits, boxes)
    scores = (peaks - logits.flatten(2).logsumexp(2)).exp()
    return torch.cat([points[..., :2], scores[..., None]], dim=2)


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int) -> np.ndarray:
    """Resample each mask at the image's pixel centres, as detectron2 does; pixels from 0.5 on are inside.

    masks float [N, M, M] probabilities, boxes [N, 4] (x1 y1 x2 y2, image pixels) -> uint8 [N, height, width].
    torchvision's own pasting rounds boxes to whole pixels first, which costs mask AP.
    """
    pasted = np.zeros((len(masks), height, width), dtype=np.uint8)
    for canvas, mask, box in zip(pasted, masks.cpu(), boxes.cpu(), strict=True):
        x0, y0 = (int(value) for value in box[:2].floor().clamp(min=0))
        x1, y1 = min(int(box[2].ceil()), width), min(int(box[3].ceil()), height)
        if x1 > x0 and y1 > y0:
            # centres of the pixels in the mask's own coordinates, -1 ... 1 across the box
            x = (torch.arange(x0, x1) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
            y = (torch.arange(y0, y1) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
            grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
            sampled = F.grid_sample(mask[None, None], grid[None], align_corners=False)
            canvas[y0:y1, x0:x1] = (sampled[0, 0] >= 0.5).numpy()
    return pasted
