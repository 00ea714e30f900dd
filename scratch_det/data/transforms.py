"""Geometric transforms of samples (see ``scratch_det.data.dataset``), as the keys INPUT.* of a recipe ask for.

Boxes are tensors [N, 4]: x1 y1 x2 y2 in pixels. Every random number comes from the generator that is passed in.
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor
from torchvision.ops import box_area, clip_boxes_to_image
from torchvision.transforms.v2 import functional as F

Sample = dict[str, Any]
PER_OBJECT = ("boxes", "labels", "masks", "keypoints")  # keys of a sample


def augment(sample: Sample, cfg: CfgNode, rng: np.random.Generator) -> Sample:
    """INPUT.AUGMENTATION resize: the short side is drawn from MIN_SIZE_TRAIN.

    Every augmentation has these parameters and returns a new sample; RANDOM_FLIP and ``keep_inside`` follow.
    """
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    is_range = cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range"
    short_side = int(rng.integers(sizes[0], sizes[1] + 1) if is_range else rng.choice(sizes))
    return resize(sample, output_size(*sample["image"].shape[-2:], short_side, cfg.INPUT.MAX_SIZE_TRAIN))


def output_size(height: int, width: int, short_side: int, max_size: int) -> tuple[int, int]:
    """Height and width after scaling the short side to ``short_side``, the long one capped (detectron2's rounding)."""
    if short_side == 0:  # detectron2: 0 leaves test images as they are
        return height, width
    scale = short_side / min(height, width)
    size = (short_side, scale * width) if height < width else (scale * height, short_side)
    cap = min(1.0, max_size / max(size))  # as in detectron2, not one combined factor, which rounds x.5 differently
    return max(1, int(size[0] * cap + 0.5)), max(1, int(size[1] * cap + 0.5))  # of 1 x 3000 px no side becomes 0


def to_test_size(sample: Sample, cfg: CfgNode) -> Sample:
    """Scale an image and its objects to MIN_SIZE_TEST, at most MAX_SIZE_TEST."""
    keys, (height, width) = cfg.INPUT, sample["image"].shape[-2:]
    return resize(sample, output_size(height, width, keys.MIN_SIZE_TEST, keys.MAX_SIZE_TEST))


def resize(sample: Sample, size: tuple[int, int]) -> Sample:
    """Scale image (bilinear, antialiased), boxes, masks and keypoints to a height and width."""
    height, width = sample["image"].shape[-2:]
    if size == (height, width):
        return {**sample, "image": contiguous(sample["image"])}
    resized = {**sample, "image": contiguous(F.resize(sample["image"], list(size), antialias=True))}
    scale_x, scale_y = size[1] / width, size[0] / height
    if "boxes" in sample:
        resized["boxes"] = sample["boxes"] * torch.tensor([scale_x, scale_y, scale_x, scale_y])
    if "keypoints" in sample:
        resized["keypoints"] = sample["keypoints"] * torch.tensor([scale_x, scale_y, 1])
    if "masks" in sample:
        resized["masks"] = sample["masks"].moved((scale_x, scale_y))
    return resized


def contiguous(image: Tensor) -> Tensor:
    """A uint8 image [3, H, W] with each channel's pixels together; torch takes ten times as long as OpenCV."""
    if image.is_contiguous():
        return image
    channels = np.empty(image.shape, dtype=np.uint8)
    cv2.split(image.permute(1, 2, 0).numpy(), list(channels))
    return torch.from_numpy(channels)


def flip(sample: Sample, direction: str, flip_indices: Sequence[int] | None = None) -> Sample:
    """Flip image, boxes, masks and keypoints left-right ("horizontal") or upside down ("vertical").

    flip_indices: of keypoints (see ``CocoDataset``), needed if the sample has any: a left eye becomes a right one.
    """
    axis, low, high = (-1, 0, 2) if direction == "horizontal" else (-2, 1, 3)
    extent = sample["image"].shape[axis]
    flipped = {**sample, "image": sample["image"].flip(axis)}
    if "boxes" in sample:
        flipped["boxes"] = sample["boxes"].clone()
        flipped["boxes"][:, low] = extent - sample["boxes"][:, high]
        flipped["boxes"][:, high] = extent - sample["boxes"][:, low]
    if "keypoints" in sample:
        assert flip_indices is not None
        assert direction == "horizontal"
        flipped["keypoints"] = sample["keypoints"][:, list(flip_indices)]
        flipped["keypoints"][..., 0] = extent - flipped["keypoints"][..., 0]
    if "masks" in sample:
        mirrored = [((-1.0, 1.0), (extent, 0.0)), ((1.0, -1.0), (0.0, extent))]
        flipped["masks"] = sample["masks"].moved(*mirrored[low])
    return flipped


def keep_inside(sample: Sample) -> Sample:
    """Clip boxes to the image, drop objects whose box has no area left, and unlabel keypoints outside the image."""
    height, width = sample["image"].shape[-2:]
    boxes = clip_boxes_to_image(sample["boxes"], (height, width))
    kept = box_area(boxes) > 0
    sample = {key: value[kept] if key in PER_OBJECT else value for key, value in {**sample, "boxes": boxes}.items()}
    if "keypoints" in sample:
        x, y, v = sample["keypoints"].unbind(-1)
        labelled = (x >= 0) & (x <= width) & (y >= 0) & (y <= height) & (v > 0)
        sample["keypoints"] = sample["keypoints"] * labelled[..., None]
    return sample
