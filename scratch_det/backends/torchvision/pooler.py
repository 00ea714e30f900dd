"""RoIAlign from the level of the backbone's maps that fits a box's size."""

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.ops import roi_align

CANONICAL_SIZE, CANONICAL_LEVEL = 224, 4  # Lin et al., Feature Pyramid Networks, equation 1: a 224 px box pools p4


class ROIPooler(nn.Module):
    """RoIAlign from the level that fits a box's size.

    Args:
        strides: of the maps to pool from, by name: a power of 2, each twice the one before.
        resolution: output is [N, C, resolution, resolution].
        sampling_ratio: samples per bin and axis; 0 adapts to the bin's size.
        aligned: shift by half a pixel (detectron2's ROIAlignV2) or not (ROIAlign).
    """

    def __init__(self, strides: dict[str, int], resolution: int, sampling_ratio: int, aligned: bool):
        super().__init__()
        self.strides, self.resolution = strides, resolution
        self.sampling_ratio, self.aligned = sampling_ratio, aligned
        self.first_level = min(strides.values()).bit_length() - 1

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        """Pool ``boxes`` (per image [n, 4] x1 y1 x2 y2, pixels of the network's input), in their order."""
        rois = _with_image_index(boxes)
        levels = self._level_of(rois[:, 1:])
        channels = next(iter(features.values())).shape[1]
        pooled = rois.new_zeros((len(rois), channels, self.resolution, self.resolution))
        for level, (name, stride) in enumerate(self.strides.items()):
            chosen = (levels == level).nonzero()[:, 0]
            pooled = pooled.index_copy(0, chosen, self._align(features[name].float(), rois[chosen], stride))
        return pooled

    def _align(self, feature: Tensor, rois: Tensor, stride: int) -> Tensor:
        return roi_align(feature, rois, self.resolution, 1 / stride, self.sampling_ratio, self.aligned)

    def _level_of(self, boxes: Tensor) -> Tensor:
        side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp(min=0).sqrt()
        level = torch.floor(CANONICAL_LEVEL + torch.log2(side / CANONICAL_SIZE + 1e-8))
        return (level - self.first_level).clamp(0, len(self.strides) - 1).to(torch.int64)


def build_pooler(keys: CfgNode, strides: dict[str, int]) -> ROIPooler:
    """The pooler of a head, from its POOLER_* keys."""
    aligned = keys.POOLER_TYPE == "ROIAlignV2"
    return ROIPooler(strides, keys.POOLER_RESOLUTION, keys.POOLER_SAMPLING_RATIO, aligned)


def _with_image_index(boxes: list[Tensor]) -> Tensor:
    index = torch.cat([box.new_full((len(box), 1), image) for image, box in enumerate(boxes)])
    return torch.cat([index, torch.cat(boxes)], dim=1)
