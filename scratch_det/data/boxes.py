"""Boxes as tensors [N, 4]: x1 y1 x2 y2 in pixels."""

from torch import Tensor
from torchvision.ops import clip_boxes_to_image


def has_area(boxes: Tensor) -> Tensor:
    """Bool [N]."""
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def inside(boxes: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The parts of ``boxes`` inside an image that have an area, [M, 4], and their places among ``boxes``, int64 [M]."""
    clipped = clip_boxes_to_image(boxes, (height, width))
    kept = has_area(clipped).nonzero()[:, 0]
    return clipped[kept], kept
