"""SGD with Detectron's parameter groups, the learning rate of an iteration, gradient clipping."""

from collections.abc import Iterator

import torch
from fvcore.common.config import CfgNode
from torch import nn

from scratch_det.config.curve import learning_rate
from scratch_det.modeling.norm import NORM_LAYERS


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.SGD:
    """SGD over the trainable parameters.

    As detectron2 reads the same keys: WEIGHT_DECAY_NORM on the parameters of normalisation layers, then, for every
    parameter called "bias" (those of norms too), BIAS_LR_FACTOR and, unless it is None, WEIGHT_DECAY_BIAS. Detectron
    had 0, 2 and 0 there.
    """
    keys = cfg.SOLVER
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter, is_norm, is_bias in _parameters(model):
        decay = keys.WEIGHT_DECAY_NORM if is_norm and keys.WEIGHT_DECAY_NORM is not None else keys.WEIGHT_DECAY
        if is_bias and keys.WEIGHT_DECAY_BIAS is not None:
            decay = keys.WEIGHT_DECAY_BIAS
        factor = keys.BIAS_LR_FACTOR if is_bias else 1.0
        groups.setdefault((factor, decay), []).append(parameter)
    return torch.optim.SGD(
        [{"params": params, "lr_factor": f, "weight_decay": decay} for (f, decay), params in groups.items()],
        lr=keys.BASE_LR,
        momentum=keys.MOMENTUM,
        nesterov=keys.NESTEROV,
        fused=True,  # one pass over the weights: 4 ms instead of 10 (foreach: 13) for ResNet-18 on two CPU cores
    )


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Parameter, bool, bool]]:
    """Every trainable parameter once, with whether it belongs to a norm layer and whether it is a bias."""
    seen = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                yield parameter, isinstance(module, NORM_LAYERS), name == "bias"


def set_learning_rate(optimizer: torch.optim.Optimizer, cfg: CfgNode, iteration: int) -> float:
    """Give every group the rate of ``iteration`` times its factor; returns the rate before factors."""
    lr = learning_rate(cfg, iteration)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
    return lr


def clip_gradients(cfg: CfgNode, model: nn.Module) -> None:
    """SOLVER.CLIP_GRADIENTS, parameter by parameter as detectron2 does: by value, or by its own norm."""
    keys = cfg.SOLVER.CLIP_GRADIENTS
    for parameter in model.parameters():
        if parameter.grad is not None and keys.CLIP_TYPE == "value":
            nn.utils.clip_grad_value_(parameter, keys.CLIP_VALUE)
        elif parameter.grad is not None:
            nn.utils.clip_grad_norm_(parameter, keys.CLIP_VALUE, keys.NORM_TYPE)
