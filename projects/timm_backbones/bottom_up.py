"""A model of timm as bottom-up network, with maps res2 ... res5 of strides 4, 8, 16 and 32; and its optimizer.

AdamW is Loshchilov & Hutter's (2019), with learning rates that fall from layer to layer towards the pixels.
"""

import re
from inspect import signature
from typing import Any

import timm
import torch
from fvcore.common.config import CfgNode
from timm.models import get_arch_pretrained_cfgs, group_parameters
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from scratch_det.engine.state import parameter_groups
from scratch_det.errors import ConfigError, did_you_mean
from scratch_det.modeling.norm import NORMS, batch_norms, frozen, replace_norm
from scratch_det.weights.pixels import Pixels

MAPS = {4: "res2", 8: "res3", 16: "res4", 32: "res5"}  # by stride, by detectron2's names
ANY_SIZE = {"strict_img_size": False, "always_partition": True, "dynamic_img_size": True}  # where a model has them
TRIAL = (160, 224)  # height and width of an image that no model was made for
PREFIX = "net.model."  # of the names in timm's own files
LAYERS = {  # an EfficientNet's, as EfficientNet-PyTorch (lukemelas; Lite: ml-illustrated) names them, and timm
    "_conv_stem": "conv_stem", "_conv_head": "conv_head", "_fc": "classifier",
    "_bn0": "bn1", "_bn1": "bn2", "_bn2": "bn3",
    "_expand_conv": "conv_pw", "_depthwise_conv": "conv_dw", "_project_conv": "conv_pwl",
    "_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand",
}  # fmt: skip
UNEXPANDED = LAYERS | {"_project_conv": "conv_pw", "_bn1": "bn1", "_bn2": "bn2"}  # of a block without an expansion
FOREIGN = re.compile(rf"(.*?)(?<![^.])(?:_blocks\.(\d+)\.)?({'|'.join(LAYERS)})\.(\w+)")


class TimmBottomUp(nn.Module):
    """The model MODEL.TIMM.NAME without its classifier, initialised by timm's own rules.

    Attributes are those that ``scratch_det.modeling.backbones`` describes; ``net.model`` is timm's.
    """

    initialized = True

    def __init__(self, cfg: CfgNode):
        super().__init__()
        keys = cfg.MODEL.TIMM
        check_name(keys.NAME)
        self.name = keys.NAME
        self.net = timm.create_model(self.name, **arguments_of(self.name, keys.DROP_PATH))
        choose_norm(self.net.model, keys.NORM, self.name)
        info = self.net.feature_info
        self.strides = {MAPS[stride]: stride for stride in info.reduction()}
        self.channels = dict(zip(self.strides, info.channels(), strict=True))
        known = self.net.model.pretrained_cfg
        first = known.get("first_conv") or ""
        self.first_layer = f"{PREFIX}{first if isinstance(first, str) else first[0]}.weight"
        self.pixels = Pixels("RGB", *(tuple(round(255 * v, 3) for v in known[key]) for key in ("mean", "std")))
        self.stages = stages_of(self.net.model)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images [N, 3, H, W] -> maps by name; H and W are multiples of 32."""
        return dict(zip(self.strides, self.net(images), strict=True))

    def own_name(self, name: str) -> str:
        """Another name of a file's tensor becomes timm's, see ``timm_name``."""
        return timm_name(name, self.net.model)


def timm_name(name: str, net: nn.Module) -> str:
    """What a tensor of the EfficientNet ``net`` by EfficientNet-PyTorch's name is called in timm, any prefix kept.

    There the blocks of all stages are numbered through. Other names stay.
    """
    if not (match := FOREIGN.fullmatch(name)):
        return name
    prefix, number, layer, leaf = match.groups()
    if number is None:
        return f"{prefix}{LAYERS[layer]}.{leaf}"
    blocks = [(place, block) for place, block in net.named_modules() if re.fullmatch(r"blocks\.\d+\.\d+", place)]
    if int(number) >= len(blocks):
        return name
    place, block = blocks[int(number)]
    return f"{prefix}{place}.{(LAYERS if hasattr(block, 'conv_pwl') else UNEXPANDED)[layer]}.{leaf}"


def check_name(name: str) -> None:
    """Raise ConfigError for a model, or a tag of its weights behind a dot, that timm does not have."""
    model, _, tag = name.partition(".")
    models = timm.list_models()
    if model not in models:
        raise ConfigError(
            f"MODEL.TIMM.NAME is '{name}', which timm {timm.__version__} lacks{did_you_mean(model, models)}"
        )
    tags = list(get_arch_pretrained_cfgs(model))
    if tag and name not in tags:
        raise ConfigError(
            f"MODEL.TIMM.NAME is '{name}', but timm {timm.__version__} has no such weights of {model}; leave out the "
            f"tag{did_you_mean(name, tags)}"
        )


def arguments_of(name: str, drop_path: float) -> dict[str, Any]:
    """Arguments of ``timm.create_model`` with which the model ``name`` gives the maps of MAPS for images of any size.

    Found with models on the meta device. Raises ConfigError for one that has no such maps.
    """
    arguments = {"features_only": True, "feature_cls": "getter", "pretrained": False}
    try:
        with torch.device("meta"):
            probe = timm.create_model(name, **arguments)
            takes = signature(type(probe.model)).parameters
            strides = probe.feature_info.reduction()
            arguments |= {key: value for key, value in ANY_SIZE.items() if key in takes}
            if drop_path and "drop_path_rate" not in takes:
                raise ConfigError(f"MODEL.TIMM.NAME {name} has no paths to drop; set MODEL.TIMM.DROP_PATH 0.0")
            arguments |= {"drop_path_rate": drop_path} if drop_path else {}
            if strides[-1] != 32 or len(set(strides)) < len(strides) or not set(MAPS) <= set(strides):
                raise ConfigError(f"MODEL.TIMM.NAME {name} has maps of strides {strides}; FPN needs 4, 8, 16 and 32")
            indices = probe.feature_info.out_indices
            arguments["out_indices"] = [i for i, s in zip(indices, strides, strict=True) if s in MAPS]
            maps = timm.create_model(name, **arguments).eval()(torch.empty(1, 3, *TRIAL))
            found = [tuple(one.shape[-2:]) for one in maps]
            assert found == [(TRIAL[0] // s, TRIAL[1] // s) for s in MAPS], f"of {TRIAL} pixels it makes {found}"
    except ConfigError:
        raise
    except Exception as error:  # of a thousand models' code, any kind
        reason = next(iter(str(error).splitlines()), "")
        raise ConfigError(
            f"MODEL.TIMM.NAME {name} gives no pyramid for images of any size ({type(error).__name__}: {reason}); "
            "choose another, such as convnext_tiny"
        ) from None
    return arguments


def choose_norm(net: nn.Module, norm: str, name: str) -> None:
    """Replace every batch norm by MODEL.TIMM.NORM. Raises ConfigError when that cannot be done or replaces nothing."""
    found = batch_norms(net)
    if found and not norm:
        raise ConfigError(f"MODEL.TIMM.NORM is '', but {name} has {len(found)} batch norms; set it to GN, SyncBN or BN")
    if norm and not found:
        raise ConfigError(f'MODEL.TIMM.NORM is {norm}, but {name} has no batch norm to replace; set it to ""')
    for place, old in found:
        try:
            new = frozen(old) if norm == "FrozenBN" else NORMS[norm](old.num_features)
        except ConfigError:
            raise ConfigError(
                f"MODEL.TIMM.NORM is GN, but {place} of {name} has {old.num_features} channels, no multiple of GN's 32 "
                "groups; set it to SyncBN or BN"
            ) from None
        if isinstance(new, nn.BatchNorm2d):
            new.eps, new.momentum = old.eps, old.momentum
            new.load_state_dict(old.state_dict())  # timm may start a block's last norm at 0
        replace_norm(net, place, new)


def stages_of(net: nn.Module) -> list[list[str]]:
    """timm's own groups of layers, stem first, as names in the network; a module stands for its parameters.

    Empty where timm has not grouped them by stages.
    """
    try:
        groups = group_parameters(net, net.group_matcher(coarse=True))
    except (AttributeError, AssertionError):  # no group_matcher, or RDNet's, which only asserts
        return []
    modules = [dict.fromkeys(name.rpartition(".")[0] or name for name in groups[number]) for number in sorted(groups)]
    return [[PREFIX + name for name in stage] for stage in modules]


def build_adamw(cfg: CfgNode, model: nn.Module) -> torch.optim.AdamW:
    """SOLVER.MOMENTUM is its first beta, the second is 0.999.

    timm's network has timm's groups: SOLVER.LAYER_DECAY by its layers, no weight decay for vectors, nor for what the
    model exempts (Swin's position biases). All other parameters have the groups of SGD.
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
