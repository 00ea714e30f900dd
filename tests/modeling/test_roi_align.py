"""RoIAlign's own gradient beside torchvision's."""

import pytest
import torch
import torchvision.ops
from torch import Tensor

from scratch_det.modeling.roi_align import roi_align

EDGES = [  # image, x1 y1 x2 y2: inside, of no size, beyond every border, outside, larger than the map, one pixel
    (0, 3.3, 4.1, 30.7, 22.9), (1, 10, 10, 10, 10), (0, -9, -7, 50, 41), (1, 70, 60, 90, 80), (1, -400, -300, 500, 400),
    (0, 47, 39, 48, 40), (1, 20.0, 12.0, 36.0, 28.0), (1, 30, 20, 12, 8),
]  # fmt: skip


def random_rois(count: int, generator: torch.Generator) -> Tensor:
    corners = torch.rand(count, 2, 2, generator=generator, dtype=torch.float64) * torch.tensor([48, 40])
    images = torch.randint(0, 2, (count, 1), generator=generator)
    return torch.cat([images, corners.amin(1), corners.amax(1)], dim=1)


def gradients(rois: Tensor, size: int, ratio: int, aligned: bool) -> tuple[Tensor, Tensor]:
    """Of the same weighted sum of pooled values, with ours and with torchvision's."""
    generator, found = torch.Generator().manual_seed(0), []
    maps = torch.randn(2, 3, 10, 12, generator=generator, dtype=rois.dtype)
    weights = torch.randn(len(rois), 3, size, size, generator=generator, dtype=rois.dtype)
    for function in (roi_align, torchvision.ops.roi_align):
        leaf = maps.clone().requires_grad_()
        (function(leaf, rois, size, 0.25, ratio, aligned) * weights).sum().backward()
        assert leaf.grad is not None
        found.append(leaf.grad)
    return found[0], found[1]


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(("size", "ratio"), [(7, 2), (14, 2), (3, 1), (2, 4), (7, 0)])
class TestGradient:
    def test_is_torchvisions_in_double(self, size: int, ratio: int, aligned: bool) -> None:
        rois = random_rois(40, torch.Generator().manual_seed(1))
        ours, theirs = gradients(rois, size, ratio, aligned)
        assert theirs.abs().max() > 0.1
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("roi", EDGES)
    def test_at_the_borders(self, roi: tuple[float, ...], size: int, ratio: int, aligned: bool) -> None:
        ours, theirs = gradients(torch.tensor([roi], dtype=torch.float64), size, ratio, aligned)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_without_boxes_it_is_zero() -> None:
    ours, _ = gradients(torch.zeros(0, 5), 7, 2, False)
    assert not ours.any()


def test_in_float32_it_is_torchvisions_up_to_rounding_and_the_same_in_any_number_of_threads() -> None:
    rois = random_rois(300, torch.Generator().manual_seed(2)).float()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(gradients(rois, 7, 2, False))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*found[0], rtol=0, atol=1e-4)
    assert all(torch.equal(ours, found[0][0]) for ours, _ in found)


def test_another_device_has_torchvisions_gradient() -> None:
    """Ours needs the boxes as numpy's arrays, which only a CPU's tensors can be."""
    maps = torch.zeros(1, 2, 8, 8, device="meta", requires_grad=True)
    roi_align(maps, torch.zeros(3, 5, device="meta"), 7, 0.25, 2, True).sum().backward()
    assert maps.grad is not None
    assert maps.grad.shape == maps.shape
