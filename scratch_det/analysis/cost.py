"""A detector taken apart: parameters, multiply-adds and activations of bottom-up network, FPN, RPN and heads.

Everything runs on the meta device, which computes shapes and no values: a large model takes neither memory nor minutes.
Counting is torch's (``torch.utils.flop_counter``), as fvcore's needs torch.jit, which cannot trace on that device; a
test compares the two.
"""

from collections import Counter
from dataclasses import dataclass, field
from math import log2, prod
from typing import Any, NamedTuple

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from scratch_det.engine.state import size_of
from scratch_det.errors import UserError

NORM_NAMES = ("Norm", "Norm2d")  # how a class of normalisation layers, or one that it is made from, ends


@dataclass(frozen=True)
class Cost:
    """Of a part: parameters, those that train, multiply-adds, activations and norm layers by class.

    Multiply-adds (``flops``) are those of convolutions and linear layers; activations are the numbers they put out.
    """

    parameters: int = 0
    trainable: int = 0
    flops: int = 0
    activations: int = 0
    norms: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, name) - getattr(other, name) for name in self.__dataclass_fields__))


class Analysis(NamedTuple):
    """What ``analyze`` finds.

    image: height and width after padding. parts: in the order of a forward pass. maps: channels, stride, height and
    width of the feature maps, those of the bottom-up network below an FPN first. frozen: the names of the backbone's
    parameters that do not train; unused: of those that do, but that no map's gradient reaches.
    """

    image: tuple[int, int]
    parts: dict[str, Cost]
    maps: dict[str, tuple[int, int, int, int]]
    frozen: list[str]
    unused: list[str]

    @property
    def total(self) -> Cost:
        return sum(self.parts.values(), Cost())


@torch.no_grad()
def analyze(backend: Any, cfg: CfgNode, size: tuple[int, int]) -> Analysis:
    """Build ``cfg``'s model and count one test image of ``size`` (height, width in pixels), padded as a batch is.

    The RPN's head sees all its maps; box heads, in each stage of a cascade, RPN.POST_NMS_TOPK_TEST proposals; other
    heads TEST.DETECTIONS_PER_IMAGE boxes. So counts do not depend on what a model finds. ``backend`` is a backend's
    ``model`` module. Raises UserError for heads that are put together in another way.
    """
    with torch.device("meta"):
        model = backend.build(cfg).eval()
        multiple = model.backbone.size_divisibility or 1
        height, width = (-(-side // multiple) * multiple for side in size)
        backbone = Pass(model.backbone, torch.empty(1, 3, height, width))
        bottom_up = next((name for name in BOTTOM_UP if hasattr(model.backbone, name)), "")
        parts, maps = {"bottom-up": backbone.cost(bottom_up)}, backbone.output
        if (pyramid := backbone.cost() - parts["bottom-up"]) != Cost():
            parts["FPN"] = pyramid
        rpn = model.rpn.head if hasattr(model, "rpn") else model.proposal_generator.rpn_head
        seen = getattr(getattr(model, "proposal_generator", None), "in_features", maps)
        parts["RPN"] = Pass(rpn, [maps[name] for name in seen]).cost()
        parts |= _heads(model.roi_heads, cfg, channels=list(maps.values())[-1].shape[1])
        below = model.backbone.get_submodule(bottom_up)(torch.empty(1, 3, height, width))
        every = {**below, **maps} if isinstance(below, dict) else maps
        shapes = {name: _shape(feature, max(height, width)) for name, feature in every.items()}
        frozen = [name for name, p in model.backbone.named_parameters() if not p.requires_grad]
        return Analysis((height, width), parts, shapes, frozen, _unused(model.backbone, height, width))


@torch.enable_grad()
def _unused(backbone: nn.Module, height: int, width: int) -> list[str]:
    """The parameters without a gradient after one forward and backward pass of an image."""
    maps = backbone.train()(torch.empty(2, 3, height, width))
    total = sum(feature.sum() for feature in maps.values())
    if total.requires_grad:  # else all of it is frozen
        total.backward()
    return [name for name, p in backbone.named_parameters() if p.requires_grad and p.grad is None]


BOTTOM_UP = "body", "bottom_up"  # torchvision's and detectron2's name of the network below the FPN
BOX_PARTS = ("box_head", "box_predictor")


class Pass:
    """A forward pass of ``module``: its ``output``, and what it and its children cost."""

    def __init__(self, module: nn.Module, *inputs: Any):
        flops = FlopCounterMode(display=False)
        activations = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(flop_registry, _numbers_put_out))
        with flops, activations:
            self.output = module(*inputs)
        self.module, self.flops, self.activations = module, flops.get_flop_counts(), activations.get_flop_counts()

    def cost(self, child: str = "") -> Cost:
        """Of ``child``, by default of all."""
        module = self.module.get_submodule(child)
        name = ".".join(filter(None, (type(self.module).__name__, child)))  # as torch calls it
        flops, activations = (sum(counts.get(name, {}).values()) for counts in (self.flops, self.activations))
        norms = Counter(
            type(layer).__name__
            for layer in module.modules()
            if any(base.__name__.endswith(NORM_NAMES) for base in type(layer).__mro__)
        )
        size = size_of(module)
        return Cost(size.parameters, size.trainable, flops // 2, activations, norms)  # torch counts x and + apart


class Stages(nn.Module):
    """Heads with their predictors, one pair or those of a cascade, each on the same pooled features [N, C, S, S]."""

    def __init__(self, heads: nn.Module, predictors: nn.Module):
        super().__init__()
        self.heads, self.predictors = _listed(heads), _listed(predictors)

    def forward(self, pooled: Tensor) -> None:
        for head, predictor in zip(self.heads, self.predictors, strict=True):
            layers = getattr(head, "layers", head)  # detectron2's mask and keypoint heads go on to losses or detections
            predictor(layers(pooled))


def _heads(roi_heads: nn.Module, cfg: CfgNode, channels: int) -> dict[str, Cost]:
    """Every child called KIND_head, with its KIND_predictor if it has one; a cascade's may be in its stages."""
    children = dict(roi_heads.named_children())
    if stages := children.pop("stages", None):
        children |= {part: nn.ModuleList([stage.get_submodule(part) for stage in stages]) for part in BOX_PARTS}
    kinds = [name.removesuffix("_head") for name in children if name.endswith("_head")]
    known = {f"{kind}_{part}" for kind in kinds for part in ("head", "predictor")}
    if others := [name for name, part in children.items() if name not in known and size_of(part).parameters]:
        raise UserError(
            f"{type(roi_heads).__name__} has weights in {', '.join(others)}; only heads that are called KIND_head and "
            "KIND_predictor can be counted"
        )
    parts = {}
    for kind in kinds:
        boxes = cfg.MODEL.RPN.POST_NMS_TOPK_TEST if kind == "box" else cfg.TEST.DETECTIONS_PER_IMAGE
        side = cfg.MODEL[f"ROI_{kind.upper()}_HEAD"].POOLER_RESOLUTION
        stages = Stages(children[f"{kind}_head"], children.get(f"{kind}_predictor", nn.Identity()))
        parts[f"{kind} head"] = Pass(stages, torch.empty(boxes, channels, side, side)).cost()
    return parts


def _listed(module: nn.Module) -> nn.ModuleList:
    return module if isinstance(module, nn.ModuleList) else nn.ModuleList([module])


def _shape(feature: Tensor, side: int) -> tuple[int, int, int, int]:
    """Channels, stride, height, width of a map; ``side`` is the image's longer one, in pixels."""
    _, channels, height, width = feature.shape
    return channels, 2 ** round(log2(side / max(height, width))), height, width  # sides are rounded up


def _numbers_put_out(*shapes: Any, out_shape: torch.Size, **keywords: Any) -> int:
    return prod(out_shape)
