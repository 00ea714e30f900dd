"""Large-scale jitter of a training sample (``scratch_det.data.dataset`` describes them).

Scale range, square, padding and the order of transforms are detectron2's ResizeScale, FixedSizeCrop and RandomFlip in
configs/new_baselines.
"""

import numpy as np
import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torchvision.ops import clip_boxes_to_image, masks_to_boxes

from scratch_det.data.transforms import Sample, keep_inside, resize

PAD_VALUE = 128  # grey, in all channels
ROUNDING = 0.5  # pixels: a box that sticks out by less is not cut; json and scaling round


def jitter(sample: Sample, cfg: CfgNode, rng: np.random.Generator) -> Sample:
    """Fit into a square of INPUT.LSJ.SIZE x a number from SCALES, cut out or pad to SIZE x SIZE.

    One random number places the cut-out along both axes, as in detectron2.
    """
    size = cfg.INPUT.LSJ.SIZE
    scale, place = rng.uniform(*cfg.INPUT.LSJ.SCALES), rng.random()
    sample = resize(sample, fitted_size(*sample["image"].shape[-2:], size * scale))
    top, left = (round(place * max(0, extent - size)) for extent in sample["image"].shape[-2:])
    return pad(crop(sample, top, left, size), size)


def fitted_size(height: int, width: int, side: float) -> tuple[int, int]:
    """Height and width of an image, scaled so that the longer one is ``side`` pixels; 1 at least."""
    scale = min(side / height, side / width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def crop(sample: Sample, top: int, left: int, size: int) -> Sample:
    """Cut out the pixels from row ``top`` and column ``left`` on, at most ``size`` x ``size``.

    Of the objects stays what is inside, see ``fit_to_masks`` and ``keep_inside``.
    """
    window = (..., slice(top, top + size), slice(left, left + size))
    boxes = sample["boxes"] - torch.tensor([left, top, left, top])
    cropped = {**sample, "image": sample["image"][window], "boxes": boxes}
    if "keypoints" in sample:
        cropped["keypoints"] = sample["keypoints"] - torch.tensor([left, top, 0])
    if "masks" in sample:
        cropped = fit_to_masks({**cropped, "masks": sample["masks"][window]})
    return keep_inside(cropped)


def fit_to_masks(sample: Sample) -> Sample:
    """A box without a pixel left of its mask loses its area; one that sticks out of the image becomes its mask's box.

    The others keep theirs, which are finer than pixels; detectron2's recompute_boxes takes the mask's for all.
    """
    boxes, masks = sample["boxes"], sample["masks"]
    is_left = masks.flatten(1).any(1).bool()
    is_cut = is_left & ((boxes - clip_boxes_to_image(boxes, masks.shape[-2:])).abs().amax(1) > ROUNDING)
    fitted = boxes * is_left[:, None]
    fitted[is_cut] = masks_to_boxes(masks[is_cut]) + torch.tensor([0.0, 0.0, 1.0, 1.0])  # to the last pixel's far edge
    return {**sample, "boxes": fitted}


def pad(sample: Sample, size: int) -> Sample:
    """Grey pixels below and right of the image, up to ``size`` x ``size``; the masks are 0 there."""
    height, width = sample["image"].shape[-2:]
    margins = (0, size - width, 0, size - height)
    padded = {**sample, "image": F.pad(sample["image"], margins, value=PAD_VALUE)}
    if "masks" in sample:
        padded["masks"] = F.pad(sample["masks"], margins)
    return padded
