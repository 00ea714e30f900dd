"""Normalisation layers by detectron2's names."""

from collections.abc import Callable, Iterable
from math import gcd
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchvision.ops import FrozenBatchNorm2d

from scratch_det.config.rules import GN_GROUPS
from scratch_det.errors import ConfigError

OVER_VALUES = (0, 2, 3)  # all axes of [N, C, H, W] but the channels
HAVE_KERNELS = ("cuda",)  # devices with torch's kernels for nn.SyncBatchNorm, batch_norm_stats and others
NOTHING = 1e-30  # as a number of values: added to a real one it changes nothing


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of 32 groups, eps 1e-5. Raises ConfigError when ``channels`` is not a multiple of 32."""
    if channels % GN_GROUPS:
        raise ConfigError(
            f"GN cannot split a layer of {channels} channels into {GN_GROUPS} groups; change the backbone's widths, by "
            f"a factor of {GN_GROUPS // gcd(channels, GN_GROUPS)} for instance, or its norm, to BN or SyncBN"
        )
    return nn.GroupNorm(GN_GROUPS, channels)


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d whose statistics are those of the values of all ranks together.

    As one process with the concatenated batch: the same output, running statistics and, once the ranks' weight
    gradients are summed, gradients.

    Why: a GPU holds about two images, too few for statistics of their own. The mean of the ranks' variances would leave
    out how far their means are apart, and in a box head it would count a rank with few proposals as much as one with
    many. So each value counts the same.

    A rank may have an empty batch (a head without proposals): it sends a count of 0, which adds nothing, and gets the
    statistics of the others. Its output still has to take part in the loss, since a collective waits for every rank, in
    the forward and in the backward pass. A batch that is empty on all ranks does not change the running statistics.
    Statistics of half-precision input are float32.

    Why not nn.SyncBatchNorm: it is for GPUs only, DistributedDataParallel rejects it on the CPU, its ranks exchange
    different types when some have an empty batch in half precision, and its forward pass waits for the GPU. On GPUs its
    kernels do the arithmetic here, too, unless this rank's batch is empty.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [N, C, H, W] in its own type; N may be 0."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            if self.training and not x.numel():  # nothing to take statistics of
                return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
            return super().forward(x)
        self._check_input_dim(x)
        # A cumulative average (no momentum) has a share that only the GPU knows, and the kernel takes a number.
        by_kernels = x.device.type in HAVE_KERNELS and self.track_running_stats and self.momentum is not None
        counts, means, spreads = all_statistics(x, self.eps, by_kernels)
        if by_kernels and x.numel():
            self.num_batches_tracked += 1
            running = (self.running_mean, self.running_var, self.momentum, self.eps)
            return _KernelBatchNorm.apply(x, self.weight, self.bias, means, spreads, *running, counts[:, 0])
        variances = spreads**-2 - self.eps if by_kernels else spreads
        shares = counts / counts.sum().clamp(min=1)
        count, mean = counts.sum(), (shares * means).sum(0)
        var = (shares * (variances + (means - mean) ** 2)).sum(0)
        if self.track_running_stats:
            with torch.no_grad():  # count is a tensor, 0 or not: reading its value would wait for the GPU
                self.num_batches_tracked += count >= 1
                seen = (count >= 1).to(mean.dtype)
                tracked = self.num_batches_tracked.clamp(min=1)
                share = seen / tracked if self.momentum is None else seen * self.momentum
                self.running_mean.lerp_(mean, share)
                self.running_var.lerp_(var * count / (count - 1).clamp(min=1), share)
        return _GlobalBatchNorm.apply(x, self.weight, self.bias, count, mean, var, self.eps)


@torch.no_grad()
def all_statistics(x: Tensor, eps: float, by_kernels: bool) -> tuple[Tensor, ...]:
    """Of each of W ranks: number of values a channel has [W, 1], their mean [W, C] and biased variance [W, C].

    by_kernels: 1 / sqrt(variance + eps) in the place of the variance. One collective; float32 or, for float64 input,
    float64.
    """
    dtype, channels = torch.promote_types(x.dtype, torch.float32), x.shape[1]
    count: float = x.numel() // channels
    if by_kernels and count:
        mean, spread = torch.batch_norm_stats(packed(x), eps)
    elif by_kernels:  # the kernel that takes all together divides by the first count
        count, mean, spread = NOTHING, *x.new_ones((2, channels), dtype=dtype)
    else:
        x = x.to(dtype)
        mean = x.sum(OVER_VALUES) / max(count, 1)
        # var_mean is 10 times as slow on a CPU
        spread = (x - mean[:, None, None]).square_().sum(OVER_VALUES) / max(count, 1)
    own = torch.cat([mean.new_full((1,), count), mean, spread])
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, own)
    return torch.stack(rows).split([1, channels, channels], dim=1)


def packed(x: Tensor) -> Tensor:
    """``x`` in one of the two orders of memory that the kernels read."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


class _KernelBatchNorm(torch.autograd.Function):
    """As ``_GlobalBatchNorm`` by torch's kernels; updates the running statistics.

    A rank with an empty batch takes ``_GlobalBatchNorm``: the sums that it sends in the backward pass are 0 in both.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, *ranks: Any) -> Tensor:
        """``ranks``: what batch_norm_gather_stats_with_counts takes after the input."""
        x, (*_, eps, counts) = packed(x), ranks
        mean, inverse_std = torch.batch_norm_gather_stats_with_counts(x, *ranks)
        ctx.save_for_backward(x, mean, inverse_std, weight, counts.int())
        return torch.batch_norm_elemt(x, weight, bias, mean, inverse_std, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *given, counts = (packed(grad), *ctx.saved_tensors)
        _, has_weight, has_bias, *_ = ctx.needs_input_grad
        *own, grad_weight, grad_bias = torch.batch_norm_backward_reduce(*given, True, has_weight, has_bias)
        sums = torch.stack(own)
        dist.all_reduce(sums)
        return torch.batch_norm_backward_elemt(*given, *sums, counts), grad_weight, grad_bias, *[None] * 7


class _GlobalBatchNorm(torch.autograd.Function):
    """Batch norm with given statistics; the gradient includes the way through them, from all ranks' outputs."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, count: Tensor, mean: Tensor, var: Tensor,
        eps: float,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, count, mean, (var + eps).rsqrt())
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Ioffe & Szegedy, Batch Normalization (2015), section 3, with the two sums over a batch taken globally."""
        x, weight, count, mean, inverse_std = ctx.saved_tensors
        grad = grad.to(mean.dtype)
        normalised = (x.to(mean.dtype) - mean[:, None, None]).mul_(inverse_std[:, None, None])
        grad_bias, grad_weight = grad.sum(OVER_VALUES), (grad * normalised).sum(OVER_VALUES)
        sums = torch.stack([grad_bias, grad_weight])
        dist.all_reduce(sums)
        along_mean, along_std = sums / count.clamp(min=1)
        slope = inverse_std if weight is None else inverse_std * weight
        grad_x = normalised.mul_(-along_std[:, None, None]).add_(grad).sub_(along_mean[:, None, None])
        grad_x = grad_x.mul_(slope[:, None, None]).to(x.dtype)
        wanted = ctx.needs_input_grad
        return grad_x, grad_weight if wanted[1] else None, grad_bias if wanted[2] else None, None, None, None, None


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "": nn.Identity,
    "GN": group_norm,
    "BN": nn.BatchNorm2d,
    "SyncBN": SyncBatchNorm,
    "FrozenBN": FrozenBatchNorm2d,
}
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
NORM_LAYERS = (nn.GroupNorm, nn.BatchNorm2d, nn.SyncBatchNorm, nn.LayerNorm)


def norm_layer(name: str) -> Callable[[int], nn.Module] | None:
    """The norm for torchvision's builders: None for "", where they give the convolution a bias instead."""
    return NORMS[name] if name else None


def batch_norms(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """The batch norms of ``module``, itself included, by name."""
    return [(name, layer) for name, layer in module.named_modules(prefix=prefix) if isinstance(layer, BATCH_NORMS)]


def replace_norm(model: nn.Module, name: str, norm: nn.Module) -> None:
    """Put ``norm`` in the place of ``model``'s layer ``name``; layers inside that one (timm's activations) are kept."""
    inside = dict(model.get_submodule(name).named_children())  # timm's batch norm also applies the activation
    for child, layer in inside.items():
        norm.add_module(child, layer)
    if inside:
        norm.register_forward_hook(lambda norm, _, output: nn.Sequential(*norm.children())(output))
    model.set_submodule(name, norm)


def frozen(norm: nn.Module) -> FrozenBatchNorm2d:
    """A FrozenBN with the weights and statistics of the batch norm ``norm``."""
    fixed = FrozenBatchNorm2d(norm.num_features, eps=norm.eps)
    fixed.load_state_dict(norm.state_dict(), strict=False)  # FrozenBN counts no batches
    return fixed


def freeze(model: nn.Module, stages: Iterable[Iterable[str]]) -> None:
    """Stop training ``stages``, lists of names of modules or parameters; their batch norms become FrozenBN."""
    for name in (name for stage in stages for name in stage):
        part = attrgetter(name)(model).requires_grad_(False)
        for place, norm in batch_norms(part, name) if isinstance(part, nn.Module) else ():
            replace_norm(model, place, frozen(norm))
