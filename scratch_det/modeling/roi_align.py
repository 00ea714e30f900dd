"""RoIAlign whose gradient on the CPU is a product with a sparse matrix, several times as fast as torchvision's."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.ops
from torch import Tensor
from torch.autograd.function import once_differentiable


def roi_align(features: Tensor, rois: Tensor, size: int, scale: float, ratio: int, aligned: bool) -> Tensor:
    """torchvision's RoIAlign of [N, C, H, W] in ``rois`` [K, 5] (image, x1 y1 x2 y2) -> [K, C, size, size].

    Both are of one type, float32 or float64. ``ratio`` samples a bin and axis; 0 adapts to the bin's size. On the CPU
    the gradient of a fixed ``ratio`` equals torchvision's up to rounding and does not depend on the number of threads.
    """
    if features.device.type != "cpu" or not ratio:
        return torchvision.ops.roi_align(features, rois, size, scale, ratio, aligned)
    return _RoIAlign.apply(features, rois, size, scale, ratio, aligned)


class _RoIAlign(torch.autograd.Function):
    """A bin is a weighted sum of pixels, so a pixel's gradient is a weighted sum of bins.

    torchvision adds each bin's gradient to scattered pixels, channel by channel, in one thread; here the weights are
    sorted by pixel once, for all channels.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, rois: Tensor, size: int, scale: float, ratio: int, aligned: bool) -> Tensor:
        ctx.save_for_backward(rois)
        ctx.given = features.shape, size, scale, ratio, aligned
        return torchvision.ops.roi_align(features, rois, size, scale, ratio, aligned)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (images, channels, height, width), size, scale, ratio, aligned = ctx.given
        rois = ctx.saved_tensors[0].detach().numpy()  # numpy: small arrays, which threads would only slow down
        x1, y1, x2, y2 = rois.T[1:] * rois.dtype.type(scale) - rois.dtype.type(0.5 * aligned)
        y, y_weights = _samples(y1, y2, height, size, ratio, aligned)
        x, x_weights = _samples(x1, x2, width, size, ratio, aligned)
        y += rois[:, 0].astype(int)[:, None, None] * height  # rows of all images, one below the other
        rows, columns = np.broadcast_arrays(y[:, :, None, :, None], x[:, None, :, None, :])  # [K, size, size, 2r, 2r]
        # Sorted by pixel; numbers of 16 bits sort five times as fast.
        order = np.lexsort((_short(columns, width), _short(rows, images * height)))
        weights = (y_weights[:, :, None, :, None] * x_weights[:, None, :, None, :]).ravel()[order]
        counts = np.bincount((rows * width + columns).ravel(), minlength=images * height * width)
        sums = F.embedding_bag(
            torch.from_numpy(order // (2 * ratio) ** 2), grad.permute(0, 2, 3, 1).reshape(-1, channels),
            torch.from_numpy(counts.cumsum() - counts), mode="sum", per_sample_weights=torch.from_numpy(weights),
        )  # fmt: skip
        result = grad.new_empty((images, channels, height * width))
        for target, source in zip(result, sums.view(images, -1, channels), strict=True):
            target.copy_(source.t())  # a fast copy, unlike permute's
        return result.view(ctx.given[0]), None, None, None, None, None


def _short(numbers: np.ndarray, limit: int) -> np.ndarray:
    return numbers.astype(np.min_scalar_type(limit)).ravel()


def _samples(
    start: np.ndarray, end: np.ndarray, length: int, size: int, ratio: int, aligned: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and their weights [K, size, 2 * ratio] that bins are made of, along one axis of ``length`` pixels."""
    extent = end - start if aligned else np.maximum(end - start, 1)
    step = (extent / size)[:, None, None]
    samples = np.arange(ratio, dtype=start.dtype) + start.dtype.type(0.5)
    places = start[:, None, None] + np.arange(size, dtype=start.dtype)[:, None] * step + samples * step / ratio
    inside = (places >= -1) & (places <= length)
    places = np.where(inside, places.clip(0, length - 1), 0)
    low = places.astype(int)
    fraction = places - low.astype(start.dtype)
    pixels = np.stack([low, np.minimum(low + 1, length - 1)], axis=-1)
    weights = np.stack([1 - fraction, fraction], axis=-1) * inside[..., None] / ratio
    shape = len(start), size, 2 * ratio
    return pixels.reshape(shape), weights.reshape(shape).astype(start.dtype)
