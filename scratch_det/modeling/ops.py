"""Keypoints from heat maps, and box-sized masks pasted into the image; both backends share them."""

from typing import Any

import numpy as np
import torch
from hotcoco import mask as mask_api
from torch import Tensor
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints


def decode_keypoints(logits: Tensor, boxes: Tensor) -> Tensor:
    """x, y and score [N, K, 3] of the highest point of each heat map [N, K, S, S], resized to its box [N, 4].

    The score is softmax's, normalised over the S x S places, so that objects of different sizes can be compared.
    """
    points, peaks = heatmaps_to_keypoints(logits, boxes)
    scores = (peaks - logits.flatten(2).logsumexp(2)).exp()
    return torch.cat([points[..., :2], scores[..., None]], dim=2)


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int) -> list[dict[str, Any]]:
    """Resample each mask at the image's pixel centres, as detectron2 does; pixels from 0.5 on are inside.

    masks float [N, M, M] probabilities, boxes [N, 4] (x1 y1 x2 y2, image pixels; none empty), on the CPU -> N RLEs.
    torchvision's own pasting rounds boxes to whole pixels first, which costs mask AP.
    """
    cells, corners = np.pad(masks.float().numpy(), ((0, 0), (1, 1), (1, 1))), boxes.numpy()  # outside a mask is 0
    # pixels with their centre in the box; another one, between the mask and the 0 outside, is below 0.5
    first = np.clip(np.ceil(corners[:, :2] - 0.5), 0, None).astype(int).tolist()
    last = np.clip(np.floor(corners[:, 2:] + 0.5), 0, [width, height]).astype(int).tolist()
    canvas, rles = np.zeros((width, height), dtype=np.uint8), []  # COCO counts pixels downwards
    for mask, box, (x0, y0), (x1, y1) in zip(cells, corners, first, last, strict=True):
        rows = _resample(mask, y0, y1, box[1], box[3])
        canvas[x0:x1, y0:y1] = _resample(np.ascontiguousarray(rows.T), x0, x1, box[0], box[2]) >= 0.5
        rles.append({"size": [height, width], "counts": mask_api.encode(canvas.T)["counts"].decode()})
        canvas[x0:x1, y0:y1] = 0
    return rles


def _resample(rows: np.ndarray, start: int, stop: int, low: np.float32, high: np.float32) -> np.ndarray:
    """Rows [M + 2, K], the inner ones equal parts of low ... high, between pixel centres: [stop - start, K].

    The order of the operations is grid_sample's (align_corners False): a mask that is as near as rounding to 0.5 at
    some pixel is the same mask.
    """
    at = (np.arange(start, stop, dtype=np.float32) + 0.5 - low) / (high - low) * 2 - 1  # -1 ... 1 across the box
    at = ((at + 1) * (len(rows) - 2) - 1) / 2
    above = np.floor(at)
    place, share = above.astype(int) + 1, (at - above)[:, None]
    # two products of matrices take as long on one thread, but on several threads more than that
    values = np.diff(rows, axis=0).take(place, axis=0)
    values *= share
    values += rows.take(place, axis=0)
    return values
