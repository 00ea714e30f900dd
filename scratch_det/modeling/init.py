"""Random initialisation: how weights are drawn, and which layer gets which.

The rules are detectron2's, which holds to Detectron's fillers except in the ResNet: there the paper's text, and
detectron2, have He ("MSRA") normal while the released Detectron code had Caffe2's default Xavier.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from scratch_det.modeling.norm import NORM_LAYERS

Fill = Callable[[Tensor], object]  # draws a weight anew, in place

# Caffe2's MSRAFill: normal, standard deviation sqrt(2 / fan_out)
he_fill: Fill = partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")
# Caffe2's XavierFill: uniform, standard deviation sqrt(1 / fan_in)
xavier_fill: Fill = partial(nn.init.kaiming_uniform_, a=1)


def normal_fill(std: float) -> Fill:
    """From N(0, std)."""
    return partial(nn.init.normal_, std=std)


def initialize(model: nn.Module, fills: dict[str, Fill], leave: str | None = None) -> None:
    """Draw every layer's weights by the rule in ``fills`` for the longest prefix of its name.

    A prefix ends at a dot or at the name's end. leave: the name of a part that keeps the weights it has.

    Biases start at 0 and normalisation as the identity (gamma 1, also in the last norm of a residual block). Raises
    ValueError for a layer with weights that no prefix covers: nothing may keep an unintended default.
    """
    for name, layer in model.named_modules():
        if leave is not None and f"{name}.".startswith(f"{leave}."):
            continue
        if isinstance(layer, NORM_LAYERS):
            layer.reset_parameters()
        elif isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            prefixes = [prefix for prefix in fills if f"{name}.".startswith(f"{prefix}.")]
            if not prefixes:
                raise ValueError(f"layer '{name}' has weights but no entry among {sorted(fills)}")
            fills[max(prefixes, key=len)](layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif next(layer.parameters(recurse=False), None) is not None:
            raise ValueError(f"layer '{name}' ({type(layer).__name__}) has weights but no rule in initialize")


def fill_alike(model: nn.Module, std: float) -> None:
    """Fill every convolution and fully connected layer from one N(0, std), biases with 0.

    A bad initialisation, for comparison only: signals shrink or grow with every layer.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
