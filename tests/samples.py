"""Samples made of noise, as a data set would yield them, and what tests ask of masks."""

from typing import Any

import torch
from torch import Tensor

from scratch_det.data.masks import Masks


def boxes_of(*boxes: tuple[float, float, float, float]) -> Tensor:
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


def rectangles(boxes: Tensor) -> Masks:
    """Masks that fill ``boxes``, as polygons."""
    return Masks.read([[[x1, y1, x2, y1, x2, y2, x1, y2]] for x1, y1, x2, y2 in boxes.tolist()])


def bitmaps(masks: Masks, height: int, width: int) -> Tensor:
    """Uint8 [N, height, width], 1 where a pixel's centre is inside."""
    side = max(height, width)
    whole = boxes_of((0, 0, side, side)).expand(len(masks), 4)
    return masks.crop_and_resize(whole, side)[:, :height, :width].to(torch.uint8)


def equal(one: Any, other: Any) -> bool:
    """Whether two entries of samples are the same to the last bit."""
    if isinstance(one, Masks):
        return all(map(torch.equal, vars(one).values(), vars(other).values()))
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def sample(height: int = 64, width: int = 64, objects: int = 2, seed: int = 0, scale: float = 1.0) -> dict[str, Any]:
    """One sample of noise: rectangles with filled masks; the original image is ``scale`` times as large."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
    boxes = boxes_of(*[(4 + 8 * i, 6 + 4 * i, 28 + 8 * i, 40 + 4 * i) for i in range(objects)])
    original = {"height": round(height * scale), "width": round(width * scale)}
    truth = {"boxes": boxes, "labels": torch.arange(objects) % 10, "masks": rectangles(boxes)}
    return {"image": image, "image_id": seed, **original, **truth}
