"""AdamW (Loshchilov & Hutter 2019), with rates that fall from layer to layer towards the pixels."""

import torch
from fvcore.common.config import CfgNode
from timm.optim import param_groups_layer_decay
from torch import nn

from scratch_det.engine.state import parameter_groups
from timm_backbones.bottom_up import TimmBottomUp


def build_adamw(cfg: CfgNode, model: nn.Module) -> torch.optim.AdamW:
    """SOLVER.MOMENTUM is its first beta, the second is 0.999.

    A body of timm has timm's groups: SOLVER.LAYER_DECAY by its layers, no decay for vectors, nor for what the model
    exempts (Swin's position biases). All else has the groups of SGD.
    """
    keys = cfg.SOLVER
    groups, done = [], set()
    for net in (module.net.model for module in model.modules() if isinstance(module, TimmBottomUp)):
        exempt = net.no_weight_decay() if hasattr(net, "no_weight_decay") else ()
        found = param_groups_layer_decay(net, keys.WEIGHT_DECAY, exempt, layer_decay=keys.LAYER_DECAY)
        groups += [
            {"params": g["params"], "lr_factor": g["lr_scale"], "weight_decay": g["weight_decay"]} for g in found
        ]
        done.update(net.parameters())
    groups += parameter_groups(cfg, model, without=done)
    return torch.optim.AdamW(groups, lr=keys.BASE_LR, betas=(keys.MOMENTUM, 0.999), fused=True)
