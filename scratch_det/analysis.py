"""What a recipe's model is made of and costs, part by part, and results/models.md: the models of all recipes.

Everything runs on the meta device, which computes shapes and no values: a large model takes neither memory nor minutes.
Counting is torch's (``torch.utils.flop_counter``), as fvcore's needs torch.jit, which cannot trace on that device; a
test compares the two.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log2, prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from scratch_det import backends, tables
from scratch_det.config.choices import model_name
from scratch_det.config.load import load_config
from scratch_det.engine.state import size_of
from scratch_det.errors import UserError
from scratch_det.files import find_file, write_atomically

CONFIGS = Path("configs")
COUNTED = """\
FLOPs are multiply-adds of convolutions, linear layers and attention, activations the numbers that these put out. Box
heads work on RPN.POST_NMS_TOPK_TEST proposals, in every stage of a cascade, other heads on TEST.DETECTIONS_PER_IMAGE
boxes. Norms, activation functions, pooling, upsampling, RoIAlign, box decoding and NMS are not counted."""
LEGEND = f"""\
One row for each model, named by its keys, with the number of recipes that train it, as the first of these that trains
from scratch has it. A run takes its number of classes from its data set. models.csv has the same rows.

{COUNTED}

The last columns are the GFLOPs of the parts."""
NORM_CLASSES = ("Norm", "Norm2d")  # endings of the names of normalisation layers' classes or base classes
BOTTOM_UP = "body", "bottom_up"  # torchvision's and detectron2's name of the network below the FPN
BOX_PARTS = ("box_head", "box_predictor")


@dataclass(frozen=True)
class Cost:
    """Of a part: parameters, those that are trained, multiply-adds, activations, and norm layers by class.

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
    width of the feature maps, those of the bottom-up network first. frozen: names of the backbone's parameters that are
    not trained. unused: those that are trained, but that no feature map's gradient reaches.
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
def analyze(backend: Any, cfg: CfgNode, size: tuple[int, int] | None = None) -> Analysis:
    """Build ``cfg``'s model and count one test image, padded as a batch is.

    backend: as ``backends.load`` returns it. size: height and width in pixels, by default the recipe's test size. Box
    heads, in each stage of a cascade, work on RPN.POST_NMS_TOPK_TEST proposals, other heads on
    TEST.DETECTIONS_PER_IMAGE boxes, so counts do not depend on what a model finds.
    Raises UserError for heads with other names, and when the recipe resizes no test image and no size is given.
    """
    if not size and cfg.INPUT.MIN_SIZE_TEST < 1:
        raise UserError("INPUT.MIN_SIZE_TEST is 0, images stay as they are stored: give a size, --size 800x1333")
    with torch.device("meta"):
        model = backend.build(cfg).eval()
        multiple = model.backbone.size_divisibility or 1
        sides = size or (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
        height, width = (-(-side // multiple) * multiple for side in sides)
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
        shapes = {}
        for name, feature in ({**below, **maps} if isinstance(below, dict) else maps).items():
            _, channels, rows, columns = feature.shape
            stride = 2 ** round(log2(max(height, width) / max(rows, columns)))  # a map's sides are rounded up
            shapes[name] = channels, stride, rows, columns
        frozen = [name for name, p in model.backbone.named_parameters() if not p.requires_grad]
        return Analysis((height, width), parts, shapes, frozen, _unused(model.backbone, height, width))


@torch.enable_grad()
def _unused(backbone: nn.Module, height: int, width: int) -> list[str]:
    """The trained parameters without a gradient after one forward and backward pass."""
    maps = backbone.train()(torch.empty(2, 3, height, width))
    total = sum(feature.sum() for feature in maps.values())
    if total.requires_grad:  # else all of it is frozen
        total.backward()
    return [name for name, p in backbone.named_parameters() if p.requires_grad and p.grad is None]


class Pass:
    """A forward pass of ``module``: its ``output``, and the cost of the module and its children."""

    def __init__(self, module: nn.Module, *inputs: Any):
        def numbers_put_out(*shapes: Any, out_shape: torch.Size, **keywords: Any) -> int:
            return prod(out_shape)

        flops = FlopCounterMode(display=False)
        activations = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(flop_registry, numbers_put_out))
        with flops, activations:
            self.output = module(*inputs)
        self.module, self.flops, self.activations = module, flops.get_flop_counts(), activations.get_flop_counts()

    def cost(self, child: str = "") -> Cost:
        """Of ``child``, by default of all."""
        module = self.module.get_submodule(child)
        name = ".".join(filter(None, (type(self.module).__name__, child)))  # as torch calls it
        flops, activations = (sum(counts.get(name, {}).values()) for counts in (self.flops, self.activations))
        classes = (type(layer) for layer in module.modules())
        norms = Counter(c.__name__ for c in classes if any(base.__name__.endswith(NORM_CLASSES) for base in c.__mro__))
        size = size_of(module)
        return Cost(size.parameters, size.trainable, flops // 2, activations, norms)  # torch counts x and + apart


class HeadWithPredictor(nn.Module):
    """A head and its predictor on pooled features [N, C, S, S]."""

    def __init__(self, head: nn.Module, predictor: nn.Module):
        super().__init__()
        self.head, self.predictor = head, predictor

    def forward(self, pooled: Tensor) -> None:
        layers = getattr(self.head, "layers", self.head)  # detectron2's mask and keypoint heads go on to losses
        self.predictor(layers(pooled))


def _heads(roi_heads: nn.Module, cfg: CfgNode, channels: int) -> dict[str, Cost]:
    """Every child called KIND_head, with its KIND_predictor if it has one, over all stages of a cascade.

    detectron2 lists a cascade's heads and predictors; in this repository's they are in its ``stages``.
    """
    children = dict(roi_heads.named_children())
    if stages := children.pop("stages", None):
        children |= {part: nn.ModuleList([stage.get_submodule(part) for stage in stages]) for part in BOX_PARTS}
    kinds = [name.removesuffix("_head") for name in children if name.endswith("_head")]
    known = {f"{kind}_{part}" for kind in kinds for part in ("head", "predictor")}
    if others := [name for name, part in children.items() if name not in known and size_of(part).parameters]:
        where = f"{type(roi_heads).__name__} has weights in {', '.join(others)}"
        raise UserError(f"{where}; only those of parts called KIND_head and KIND_predictor can be counted")
    parts = {}
    for kind in kinds:
        boxes = cfg.MODEL.RPN.POST_NMS_TOPK_TEST if kind == "box" else cfg.TEST.DETECTIONS_PER_IMAGE
        side = cfg.MODEL[f"ROI_{kind.upper()}_HEAD"].POOLER_RESOLUTION
        both = children[f"{kind}_head"], children.get(f"{kind}_predictor", nn.Identity())
        pairs = zip(*(part if isinstance(part, nn.ModuleList) else [part] for part in both), strict=True)
        pooled = torch.empty(boxes, channels, side, side)
        parts[f"{kind} head"] = sum((Pass(HeadWithPredictor(*pair), pooled).cost() for pair in pairs), Cost())
    return parts


def describe_model(config_file: str, cfg: CfgNode, backend: str, size: tuple[int, int] | None, markdown: bool) -> str:
    """What the model of ``cfg``, the keys of ``config_file``, is made of and costs; ``size`` as in ``analyze``.

    Raises UserError as ``analyze`` does, and when the library of ``backend`` is installed but does not work.
    """
    found = analyze(backends.load(backend), cfg, size)
    title = (
        f"{config_file}, backend {backend}: an image of {' x '.join(map(str, found.image))} with its padding, "
        f"{cfg.MODEL.RPN.POST_NMS_TOPK_TEST} proposals, {cfg.TEST.DETECTIONS_PER_IMAGE} boxes, "
        f"{cfg.MODEL.ROI_HEADS.NUM_CLASSES} classes (a run has its data set's)"
    )
    parts: list[Sequence[str]] = [
        ("part", "parameters", "trainable", "frozen", "GFLOPs", "M activations", "norm layers")
    ]
    for name, cost in (*found.parts.items(), ("total", found.total)):
        counts = (f"{count:,}" for count in (cost.parameters, cost.trainable, cost.parameters - cost.trainable))
        norms = ", ".join(f"{count} {norm}" for norm, count in sorted(cost.norms.items())) or "-"
        parts.append((name, *counts, in_units(cost.flops, 1e9), in_units(cost.activations, 1e6), norms))
    maps = [("feature map", "stride", "channels", "size")]
    maps += [(name, str(s), str(c), f"{h} x {w}") for name, (c, s, h, w) in found.maps.items()]
    frozen, unused = (f": {', '.join(names)}" if names else "" for names in (found.frozen, found.unused))
    passed = (
        f"backbone: {len(found.frozen)} frozen tensors{frozen}\n"
        f"one forward and backward pass leaves {len(found.unused)} tensors without a gradient{unused}"
    )
    texts = (table(parts, markdown, ["left", *["right"] * 5, "left"]), table(maps, markdown))
    return "\n\n".join([title, *texts, passed, COUNTED])


def in_units(number: int, unit: float) -> str:
    return f"{number / unit:,.2f}"


def table(rows: Sequence[Sequence[str]], markdown: bool, align: Sequence[str] | None = None) -> str:
    """``rows``, the first one the header; by default the first column to the left and all others, numbers, right."""
    align = align or ["left", *["right"] * (len(rows[0]) - 1)]
    return tables.markdown(rows[0], rows[1:], align) if markdown else "\n".join(tables.aligned(rows, align))


def write_table(path: Path, backend: str) -> None:
    """Write the table of the models of ``configs/``, and beside it the same rows as .csv.

    A row for every model of the recipes, as the first one that trains it from scratch has it, else the first one.
    Raises UserError when there is no folder for ``path``.
    """
    if not path.parent.is_dir():
        raise UserError(f"--table {path}: there is no folder {path.parent}; make it, or name another")
    if path.is_dir():
        raise UserError(f"--table {path} is a folder; name a file, such as {path / 'models.md'}")
    recipes: dict[str, list[tuple[bool, Path]]] = {}
    for recipe in sorted(
        recipe for recipe in find_file(CONFIGS).glob("[!_]*/*.yaml") if recipe.parent.name != "Pretraining"
    ):
        cfg = load_config(recipe).cfg
        recipes.setdefault(model_name(cfg), []).append((bool(cfg.MODEL.WEIGHTS), recipe))
    rows = []
    for name, same in sorted(recipes.items()):
        cfg = backends.model_config(min(same)[1], (), backend)
        analysis = analyze(backends.load(backend), cfg)
        row = {
            "model": name,
            "recipes": str(len(same)),
            "image": " x ".join(map(str, analysis.image)),
            "classes": str(cfg.MODEL.ROI_HEADS.NUM_CLASSES),
            "proposals": str(cfg.MODEL.RPN.POST_NMS_TOPK_TEST),
            "boxes": str(cfg.TEST.DETECTIONS_PER_IMAGE),
            "parameters": f"{analysis.total.parameters:,}",
            "M activations": in_units(analysis.total.activations, 1e6),
            "GFLOPs": in_units(analysis.total.flops, 1e9),
        }
        rows.append(row | {part: in_units(cost.flops, 1e9) for part, cost in analysis.parts.items()})
    columns = list(dict.fromkeys(column for row in rows for column in row))  # not every model has all parts
    cells = [columns, *([row.get(column, "-") for column in columns] for row in rows)]
    command = f"scratch-det analyze model --table {path} --backend {backend}"
    texts = ["# The models of the recipes", f"Written by `{command}`.", LEGEND, table(cells, markdown=True)]
    write_atomically(path, "\n\n".join(texts) + "\n")
    write_atomically(path.with_suffix(".csv"), tables.as_csv([cell.replace(",", "") for cell in row] for row in cells))
