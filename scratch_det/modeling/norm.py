"""Normalisation layers by detectron2's names."""

from collections.abc import Callable

from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from scratch_det.config.norm_rules import GN_GROUPS


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm of 32 groups, eps 1e-5. Raises ValueError when ``channels`` is not a multiple of 32."""
    return nn.GroupNorm(GN_GROUPS, channels)


NORMS: dict[str, Callable[[int], nn.Module] | None] = {
    "": None,
    "GN": group_norm,
    "BN": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,  # plain BN as long as there is one process
    "FrozenBN": FrozenBatchNorm2d,
}
NORM_LAYERS = (nn.GroupNorm, nn.BatchNorm2d, nn.SyncBatchNorm, nn.LayerNorm)
