"""Large-scale jitter of a training sample (``scratch_det.data.dataset`` describes them).

Scale range, square, padding and the order of transforms are detectron2's ResizeScale, FixedSizeCrop and RandomFlip in
configs/new_baselines.
"""

import numpy as np
import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from scratch_det.data.masks import Masks
from scratch_det.data.transforms import Sample, keep_inside, resize

PAD_VALUE = 128  # grey, in all channels
ROUNDING = 0.5  # pixels, as json and scaling round: a box that sticks out by less is not cut, an object has more


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
        cropped = fit_to_masks({**cropped, "masks": sample["masks"].moved(offset=(-left, -top))})
    return keep_inside(cropped)


def fit_to_masks(sample: Sample) -> Sample:
    """A box with nothing left of its mask loses its area; one that sticks out of the image becomes its mask's box.

    The others keep theirs; detectron2's recompute_boxes takes the mask's for all.
    """
    boxes, size = sample["boxes"], sample["image"].shape[-2:]
    inside = boxes_inside(sample["masks"], *size)
    is_left = (inside[:, 2:] - inside[:, :2]).amin(1) > ROUNDING
    is_cut = (boxes - clip_boxes_to_image(boxes, size)).abs().amax(1) > ROUNDING
    return {**sample, "boxes": inside.where(is_cut[:, None], boxes) * is_left[:, None]}


def boxes_inside(masks: Masks, height: int, width: int) -> Tensor:
    """The box of what lies inside a ``height`` x ``width`` image, of each mask: float32 [N, 4], 0 where nothing does.

    Each edge is cut where it enters or leaves the image, and what is left or right of it moves onto the border, where
    it bounds the mask as it did before. There, an odd number of pieces lies between every second end and the next.
    """
    part = torch.repeat_interleave(masks.edge_starts.diff())  # of each edge
    x0, y0, x1, y1 = masks.edges.double().unbind(1)
    slope = (x1 - x0) / (y1 - y0)
    ends = [end.clamp(0, height) for end in torch.stack([y0, y1]).aminmax(dim=0)]
    cuts = [(y0 + (x - x0) / slope).nan_to_num().clamp(*ends) for x in (0, width)]  # a vertical edge is not cut
    y = torch.stack([*ends, *cuts], dim=1).sort(dim=1).values  # [E, 4]: three pieces
    x = x0[:, None] + (y - y0[:, None]) * slope[:, None]
    rows, columns = (torch.stack([ends[:, :-1], ends[:, 1:]], dim=2) for ends in (y, x))  # [E, 3, 2] of the pieces
    middle = columns.mean(2)
    is_outside = (middle <= 0) | (middle >= width)
    border, ends = (2 * part[:, None] + (middle >= width))[is_outside].repeat_interleave(2), rows[is_outside].flatten()
    order = ends.argsort()
    order = order[border[order].argsort(stable=True)]
    border = border[order][::2]
    part = torch.cat([part[:, None].expand_as(middle)[~is_outside], border // 2])
    rows = torch.cat([rows[~is_outside], ends[order].view(-1, 2)])
    columns = torch.cat([columns[~is_outside].clamp(0, width), (border % 2 * width)[:, None].expand(-1, 2)])
    has_rows = rows[:, 0] < rows[:, 1]
    index = torch.repeat_interleave(masks.part_starts.diff())[part[has_rows], None].expand(-1, 2)
    corners = torch.stack([columns, rows], dim=2)[has_rows].aminmax(dim=1)
    nothing = x.new_zeros(len(masks.part_starts) - 1, 2)
    boxes = [
        nothing.scatter_reduce(0, index, one, how, include_self=False)
        for one, how in zip(corners, ("amin", "amax"), strict=True)
    ]
    return torch.cat(boxes, dim=1)[masks.chosen].float()


def pad(sample: Sample, size: int) -> Sample:
    """Grey pixels below and right of the image, up to ``size`` x ``size``."""
    height, width = sample["image"].shape[-2:]
    return {**sample, "image": F.pad(sample["image"], (0, size - width, 0, size - height), value=PAD_VALUE)}
