"""Samples made of noise, as a data set would yield them."""

from typing import Any

import torch
from torch import Tensor


def boxes_of(*boxes: tuple[float, float, float, float]) -> Tensor:
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


def sample(height: int = 64, width: int = 64, objects: int = 2, seed: int = 0, scale: float = 1.0) -> dict[str, Any]:
    """One sample of noise: rectangles with filled masks; the original image is ``scale`` times as large."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
    boxes = boxes_of(*[(4 + 8 * i, 6 + 4 * i, 28 + 8 * i, 40 + 4 * i) for i in range(objects)])
    masks = torch.zeros((objects, height, width), dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    original = {"height": round(height * scale), "width": round(width * scale)}
    truth = {"boxes": boxes, "labels": torch.arange(objects) % 10, "masks": masks}
    return {"image": image, "image_id": seed, **original, **truth}
