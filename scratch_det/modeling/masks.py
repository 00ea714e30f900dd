"""What a mask head is trained towards."""

from torch import Tensor, cat
from torchvision.ops import roi_align


def mask_targets(masks: Tensor, matched: Tensor, boxes: Tensor, resolution: int) -> Tensor:
    """Truth inside each box at the head's resolution: aligned RoIAlign of the matched mask, at least half covered.

    masks uint8 [G, H, W], matched [N] indices into them, boxes [N, 4] -> float32 [N, resolution, resolution] of 0, 1.
    """
    rois = cat([matched[:, None].to(boxes.dtype), boxes], dim=1)
    cropped = roi_align(masks[:, None].to(boxes.dtype), rois, resolution, 1.0, 0, True)
    return (cropped[:, 0] >= 0.5).to(boxes.dtype)
