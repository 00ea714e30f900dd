"""How large a model is."""

from typing import NamedTuple

from torch import nn


class Size(NamedTuple):
    """Counts of numbers: parameters, those of them that are trained, and all that a checkpoint holds of the model."""

    parameters: int
    trainable: int
    weights: int


def size_of(model: nn.Module) -> Size:
    """The size of ``model``, which may lie on the meta device."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    weights = sum(tensor.numel() for tensor in model.state_dict().values())
    return Size(sum(n for n, _ in counts), sum(n for n, trained in counts if trained), weights)
