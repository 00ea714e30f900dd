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

    Why not nn.SyncBatchNorm: it is for GPUs only, DistributedDataParallel rejects it on the CPU, and its ranks exchange
    different types when some have an empty batch in half precision.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [N, C, H, W] in its own type; N may be 0."""
        if self.training and dist.is_initialized() and dist.get_world_size() > 1:
            self._check_input_dim(x)
            count, mean, var = global_statistics(x)
            if self.track_running_stats:
                with torch.no_grad():  # count is a tensor, 0 or not: reading its value would wait for the GPU
                    self.num_batches_tracked += count > 0
                    seen = (count > 0).to(mean.dtype)
                    tracked = self.num_batches_tracked.clamp(min=1)
                    share = seen / tracked if self.momentum is None else seen * self.momentum
                    self.running_mean.lerp_(mean, share)
                    self.running_var.lerp_(var * count / (count - 1).clamp(min=1), share)
            return _GlobalBatchNorm.apply(x, self.weight, self.bias, count, mean, var, self.eps)
        if self.training and not x.numel():  # nothing to take statistics of
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


@torch.no_grad()
def global_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Over all ranks: number of values a channel has (a scalar), their mean [C] and biased variance [C].

    Zeros when no rank has any. One collective; float32 or, for float64 input, float64.
    """
    x, channels = x.to(torch.promote_types(x.dtype, torch.float32)), x.shape[1]
    count = x.numel() // channels
    mean = x.sum(OVER_VALUES) / max(count, 1)
    var = (x - mean[:, None, None]).square_().sum(OVER_VALUES) / max(count, 1)  # var_mean is 10 times as slow on a CPU
    own = torch.cat([x.new_full((1,), count), mean, var])
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    counts, means, variances = torch.stack(gathered).split([1, channels, channels], dim=1)
    shares = counts / counts.sum().clamp(min=1)
    mean = (shares * means).sum(0)
    return counts.sum(), mean, (shares * (variances + (means - mean) ** 2)).sum(0)


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
