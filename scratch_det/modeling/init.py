"""Random initialisation by layer type.

The table is detectron2's, which holds to Detectron's fillers except in the ResNet: there the paper's text, and
detectron2, have He ("MSRA") normal while the released Detectron code had Caffe2's default Xavier.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from scratch_det.modeling.norm import NORM_LAYERS

he_fill = partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")  # N(0, sqrt(2 / fan_out)), MSRAFill
xavier_fill = partial(
    nn.init.kaiming_uniform_, a=1
)  # uniform, standard deviation sqrt(1 / fan_in), Caffe2's XavierFill
FILLS: dict[str, Callable[[Tensor], object]] = {
    "backbone": he_fill,  # stem, block convolutions and shortcuts
    "fpn": xavier_fill,  # lateral and output convolutions
    "rpn": partial(nn.init.normal_, std=0.01),  # 3x3, objectness and box deltas
    "box_conv": he_fill,
    "box_fc": xavier_fill,
    "cls_score": partial(nn.init.normal_, std=0.01),
    "bbox_pred": partial(nn.init.normal_, std=0.001),
    "mask_conv": he_fill,  # 3x3 convolutions and the 2x2 deconvolution
    "mask_predictor": partial(nn.init.normal_, std=0.001),
    "keypoint": he_fill,  # 3x3 convolutions and the 4x4 deconvolution
}


def initialize(model: nn.Module, layer_types: dict[str, str], leave: str | None = None) -> None:
    """Fill every layer that has weights: the longest prefix of its name in ``layer_types`` gives its type in FILLS.

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
            prefixes = [prefix for prefix in layer_types if f"{name}.".startswith(f"{prefix}.")]
            if not prefixes:
                raise ValueError(f"layer '{name}' has weights but no entry among {sorted(layer_types)}")
            FILLS[layer_types[max(prefixes, key=len)]](layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif next(layer.parameters(recurse=False), None) is not None:
            raise ValueError(f"layer '{name}' ({type(layer).__name__}) has weights but no rule in FILLS")


def fill_alike(model: nn.Module, std: float) -> None:
    """Fill every convolution and fully connected layer from one N(0, std), biases with 0.

    A bad initialisation, for comparison only: signals shrink or grow with every layer.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
