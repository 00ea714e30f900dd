"""One recipe's model as text, and results/models.md: the models of all recipes. Imports torch after its checks only."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fvcore.common.config import CfgNode

from scratch_det import backends, tables
from scratch_det.config import check_model, load_config
from scratch_det.config.choices import model_name
from scratch_det.errors import UserError
from scratch_det.files import write_atomically

if TYPE_CHECKING:
    from scratch_det.analysis.cost import Analysis

CONFIGS = Path("configs")
LARGE, SMALL = "mask_rcnn_X_152_32x8d_FPN_gn", "mask_rcnn_R_101_FPN_gn"
COUNTED = """\
FLOPs are multiply-adds of convolutions, linear layers and attention, activations the numbers that these put out. Box
heads work on RPN.POST_NMS_TOPK_TEST proposals, in every stage of a cascade, other heads on TEST.DETECTIONS_PER_IMAGE
boxes. Norms, activation functions, pooling, upsampling, RoIAlign, box decoding and NMS are not counted."""
LEGEND = f"""\
One row for each model, named by its keys, with the number of recipes that train it, as the first of these that trains
from scratch has it. A run takes its number of classes from its data set. models.csv has the same rows.

{COUNTED}

The last columns are the GFLOPs of the parts."""


def describe_model(
    config_file: str, overrides: Sequence[str], backend: str, size: tuple[int, int] | None, markdown: bool
) -> str:
    """What the recipe's model is made of and costs for one test image, by default of the recipe's size.

    Raises UserError for what cannot be built.
    """
    backend = backends.choose(backend)
    cfg, found = examine(Path(config_file), overrides, backend, size)
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


def examine(
    config_file: Path, overrides: Sequence[str], backend: str, size: tuple[int, int] | None = None
) -> tuple[CfgNode, "Analysis"]:
    """The recipe and its model's analysis for one image of ``size`` (height, width), by default of its test size.

    Raises UserError for a recipe whose model cannot be built, and when it resizes no test image and no size is given.
    """
    cfg = load_config(config_file, overrides, backends.defaults(backend)).cfg
    check_model(cfg)
    backends.check_keys(backend, cfg)
    if not size and cfg.INPUT.MIN_SIZE_TEST < 1:
        raise UserError("INPUT.MIN_SIZE_TEST is 0, images stay as they are stored: give a size, --size 800x1333")

    from scratch_det.analysis.cost import analyze  # imports torch

    return cfg, analyze(backends.load(backend), cfg, size or (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST))


def parse_size(text: str) -> tuple[int, int]:
    """800x1333 as height and width. Raises UserError."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise UserError(f"--size is {text!r}, expected HEIGHTxWIDTH in pixels, such as 800x1333")
    return int(height), int(width)


def in_units(number: int, unit: float) -> str:
    return f"{number / unit:,.2f}"


def table(rows: Sequence[Sequence[str]], markdown: bool, align: Sequence[str] | None = None) -> str:
    """``rows``, the first one the header; by default the first column to the left and all others, numbers, right."""
    align = align or ["left", *["right"] * (len(rows[0]) - 1)]
    return tables.markdown(rows[0], rows[1:], align) if markdown else "\n".join(tables.aligned(rows, align))


def write_table(path: Path, backend: str) -> None:
    """Write the table of this folder's ``configs/``, and beside it the same rows as .csv.

    Raises UserError when there are none, or no folder for ``path``.
    """
    if not path.parent.is_dir():
        raise UserError(f"--table {path}: there is no folder {path.parent}; make it, or name another")
    if path.is_dir():
        raise UserError(f"--table {path} is a folder; name a file, such as {path / 'models.md'}")
    backend = backends.choose(backend)
    command = f"python tools/analyze_model.py --table {path} --backend {backend}"
    text, values = models_table(CONFIGS, backend)
    write_atomically(path, f"# The models of the recipes\n\nWritten by `{command}`.\n\n{text}")
    write_atomically(path.with_suffix(".csv"), values)


def models_table(configs: Path, backend: str) -> tuple[str, str]:
    """results/models.md without its title, and the same rows as comma-separated values.

    A row for every model of the recipes, as the first one that trains it from scratch has it, else the first one.
    """
    recipes: dict[str, list[tuple[bool, Path]]] = {}
    for path in sorted(path for path in configs.glob("[!_]*/*.yaml") if path.parent.name != "Pretraining"):
        cfg = load_config(path).cfg
        recipes.setdefault(model_name(cfg), []).append((bool(cfg.MODEL.WEIGHTS), path))
    if not recipes:
        raise UserError(f"there are no recipes in {configs.absolute()}: start this in the repository's folder")
    found = {name: examine(min(paths)[1], (), backend) for name, paths in sorted(recipes.items())}
    cells = [
        {
            "model": name,
            "recipes": str(len(recipes[name])),
            "image": " x ".join(map(str, analysis.image)),
            "classes": str(cfg.MODEL.ROI_HEADS.NUM_CLASSES),
            "proposals": str(cfg.MODEL.RPN.POST_NMS_TOPK_TEST),
            "boxes": str(cfg.TEST.DETECTIONS_PER_IMAGE),
            "parameters": f"{analysis.total.parameters:,}",
            "M activations": in_units(analysis.total.activations, 1e6),
            "GFLOPs": in_units(analysis.total.flops, 1e9),
            **{part: in_units(cost.flops, 1e9) for part, cost in analysis.parts.items()},  # not every model has all
        }
        for name, (cfg, analysis) in found.items()
    ]
    columns = list(dict.fromkeys(column for row in cells for column in row))
    rows = [columns, *([row.get(column, "-") for column in columns] for row in cells)]
    texts = [LEGEND, table(rows, markdown=True)]
    if {LARGE, SMALL} <= found.keys():
        large, small = found[LARGE][1], found[SMALL][1]
        below = large.parts["bottom-up"].flops / small.parts["bottom-up"].flops
        texts.append(
            f"The bottom-up network of X-152-32x8d has {below:.2f} times the FLOPs of R-101's, the whole model "
            f"{large.total.flops / small.total.flops:.2f} times;\nthe paper says about 4 times: see docs/fidelity.md."
        )
    values = "".join(",".join(cell.replace(",", "") for cell in row) + "\n" for row in rows)
    return "\n\n".join(texts) + "\n", values
