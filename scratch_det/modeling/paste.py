"""From box-sized mask probabilities to masks of the whole image."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int) -> np.ndarray:
    """Resample each mask at the image's pixel centres, as detectron2 does, and cut at 0.5.

    masks float [N, M, M] probabilities, boxes [N, 4] (x1 y1 x2 y2, image pixels) -> uint8 [N, height, width].
    torchvision's own pasting rounds boxes to whole pixels first, which costs mask AP.
    """
    pasted = np.zeros((len(masks), height, width), dtype=np.uint8)
    for canvas, mask, box in zip(pasted, masks.cpu(), boxes.cpu(), strict=True):
        x0, y0 = (int(value) for value in box[:2].floor().clamp(min=0))
        x1, y1 = min(int(box[2].ceil()), width), min(int(box[3].ceil()), height)
        if x1 > x0 and y1 > y0:
            grid = _sampling_grid(box, x0, y0, x1, y1)
            sampled = F.grid_sample(mask[None, None], grid[None], align_corners=False)
            canvas[y0:y1, x0:x1] = (sampled[0, 0] >= 0.5).numpy()
    return pasted


def _sampling_grid(box: Tensor, x0: int, y0: int, x1: int, y1: int) -> Tensor:
    """Centres of the pixels x0 ... x1 - 1, y0 ... y1 - 1 in the mask's own coordinates (-1 ... 1 across the box)."""
    x = (torch.arange(x0, x1) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
    y = (torch.arange(y0, y1) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
