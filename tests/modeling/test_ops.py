"""Pasted masks, by hand and against detectron2."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from samples import boxes_of
from torch import Tensor

from scratch_det.modeling.ops import paste_masks


class TestMasks:
    def test_paste_by_hand(self) -> None:
        """A 2 x 2 mask, top row set, over columns 2-5 and rows 1-4: bilinear, so the border lies at the middle."""
        masks, boxes = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]]), boxes_of((2, 1, 6, 5))
        expected = np.zeros((1, 8, 10), dtype=np.uint8)
        expected[0, 1:3, 2:6] = 1
        assert (paste_masks(masks, boxes, 8, 10) != expected).sum() == 0

    def test_paste_across_the_border_of_the_image(self) -> None:
        pasted = paste_masks(torch.ones(2, 28, 28), boxes_of((-4, -4, 3, 3), (6, 2, 30, 4)), 8, 10)
        assert pasted.shape == (2, 8, 10)
        assert pasted.dtype == np.uint8
        assert [np.argwhere(one).min(0).tolist() for one in pasted] == [[0, 0], [2, 6]]
        assert [np.argwhere(one).max(0).tolist() for one in pasted] == [[2, 2], [3, 9]]

    def test_paste_of_nothing(self) -> None:
        assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), 8, 10).shape == (0, 8, 10)
        assert not paste_masks(torch.ones(1, 28, 28), boxes_of((20, 20, 30, 30)), 8, 10).any()

    @pytest.mark.detectron2
    def test_pasting_equals_detectron2s(self) -> None:
        from detectron2.layers import paste_masks_in_image

        masks, boxes = self._random(resolution=28)
        expected = paste_masks_in_image(masks, boxes, (50, 70), threshold=0.5).numpy()
        assert (paste_masks(masks, boxes, 50, 70) != expected).mean() < 1e-5  # a probability of 0.5 to the last bit

    @staticmethod
    def _random(resolution: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        smooth = F.interpolate(torch.rand(20, 1, 5, 5), (resolution, resolution), mode="bilinear")[:, 0]
        corners = torch.rand(20, 2) * 50 - 10
        return smooth, torch.cat([corners, corners + 1 + torch.rand(20, 2) * 30], dim=1)
