"""Pasted masks, by hand, against torch's resampling and against detectron2."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as mask_api
from samples import boxes_of
from torch import Tensor

from scratch_det.modeling.ops import paste_masks


def pasted(masks: Tensor, boxes: Tensor, height: int, width: int) -> np.ndarray:
    rles = paste_masks(masks, boxes, height, width)
    assert all(rle["size"] == [height, width] and isinstance(rle["counts"], str) for rle in rles)
    return np.array([mask_api.decode(rle) for rle in rles])


def by_grid_sample(mask: Tensor, box: Tensor, height: int, width: int) -> np.ndarray:
    """One mask at all pixels of the image."""
    x, y = (
        (torch.arange(size) + 0.5 - low) / (high - low) * 2 - 1
        for size, low, high in zip((width, height), box[:2], box[2:], strict=True)
    )
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    return (F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0] >= 0.5).numpy()


def smooth(count: int, resolution: int = 28) -> Tensor:
    blobs = torch.randn(count, 1, 7, 7)
    return F.interpolate(blobs, (resolution, resolution), mode="bicubic")[:, 0].mul(4).sigmoid()


def boxes_around(count: int, height: int, width: int, largest: float) -> Tensor:
    """Some are smaller than a pixel, some lie across the border."""
    sides = torch.exp(torch.rand(count, 2) * np.log(largest / 0.5)) * 0.5
    centres = torch.rand(count, 2) * torch.tensor([width, height])
    return torch.cat([centres - sides / 2, centres + sides / 2], dim=1)


class TestMasks:
    def test_paste_by_hand(self) -> None:
        """A 2 x 2 mask, top row set, over columns 2-5 and rows 1-4: bilinear, so the border lies at the middle."""
        masks, boxes = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]]), boxes_of((2, 1, 6, 5))
        expected = np.zeros((1, 8, 10), dtype=np.uint8)
        expected[0, 1:3, 2:6] = 1
        assert (pasted(masks, boxes, 8, 10) != expected).sum() == 0

    def test_paste_across_the_border_of_the_image(self) -> None:
        found = pasted(torch.ones(2, 28, 28), boxes_of((-4, -4, 3, 3), (6, 2, 30, 4)), 8, 10)
        assert [np.argwhere(one).min(0).tolist() for one in found] == [[0, 0], [2, 6]]
        assert [np.argwhere(one).max(0).tolist() for one in found] == [[2, 2], [3, 9]]

    def test_paste_of_nothing(self) -> None:
        assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), 8, 10) == []
        outside = boxes_of((20, 20, 30, 30), (-9, -9, -2, -1), (3, 20, 5, 30), (4.6, 4.6, 5.4, 5.4))
        assert not pasted(torch.ones(4, 28, 28), outside, 8, 10).any()

    def test_half_at_the_very_border_is_inside(self) -> None:
        """Pixel centres on all four sides of the box: 1 beside the 0 outside, and 1/4 in the corners."""
        found = pasted(torch.ones(1, 4, 4), boxes_of((2.5, 1.5, 6.5, 5.5)), 8, 10)[0]
        expected = np.zeros((8, 10))
        expected[1:6, 2:7] = 1
        expected[[1, 1, 5, 5], [2, 6, 2, 6]] = 0
        assert found.tolist() == expected.tolist()

    @pytest.mark.parametrize(("height", "width", "largest"), [(60, 80, 90), (480, 640, 500)])
    def test_pixels_are_grid_samples(self, height: int, width: int, largest: float) -> None:
        torch.manual_seed(0)
        masks, boxes = smooth(150), boxes_around(150, height, width, largest)
        found = pasted(masks, boxes, height, width)
        for one, mask, box in zip(found, masks, boxes, strict=True):
            assert (one != by_grid_sample(mask, box, height, width)).sum() == 0
        assert found.any((1, 2)).sum() > 100

    @pytest.mark.detectron2
    def test_pasting_equals_detectron2s(self) -> None:
        from detectron2.layers import paste_masks_in_image

        torch.manual_seed(0)
        masks, boxes = smooth(100), boxes_around(100, 50, 70, 60)
        expected = paste_masks_in_image(masks, boxes, (50, 70), threshold=0.5).numpy()
        assert (pasted(masks, boxes, 50, 70) != expected).sum() == 0
