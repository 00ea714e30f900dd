"""One recipe's model as text. What can be refused is refused before torch is imported.

results/models.md: the models of all recipes side by side.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fvcore.common.config import CfgNode

from scratch_det import backends
from scratch_det.config import check_model, load_config
from scratch_det.config.choices import model_name
from scratch_det.errors import UserError
from scratch_det.files import write_atomically

if TYPE_CHECKING:
    from scratch_det.analysis.cost import Analysis, Cost

HEADER = ("part", "parameters", "trainable", "frozen", "GFLOPs", "M activations", "norm layers")
COUNTED = """\
FLOPs are multiply-adds of convolutions, linear layers and attention, activations the numbers that these put out. Box
heads work on RPN.POST_NMS_TOPK_TEST proposals, in every stage of a cascade, other heads on TEST.DETECTIONS_PER_IMAGE
boxes. Norms, activation functions, pooling, upsampling, RoIAlign, box decoding and NMS are not counted."""


def describe(
    config_file: str, overrides: Sequence[str], backend: str, size: tuple[int, int] | None, markdown: bool
) -> str:
    """What the recipe's model is made of and costs for one test image, by default of the recipe's size.

    Raises UserError for what cannot be built.
    """
    backend = backends.choose(backend)
    cfg, analysis = examine(Path(config_file), overrides, backend, size)
    title = (
        f"{config_file}, backend {backend}: an image of {' x '.join(map(str, analysis.image))} with its padding, "
        f"{cfg.MODEL.RPN.POST_NMS_TOPK_TEST} proposals, {cfg.TEST.DETECTIONS_PER_IMAGE} boxes, "
        f"{cfg.MODEL.ROI_HEADS.NUM_CLASSES} classes (a run has its data set's)"
    )
    parts = [HEADER, *(_row(*part) for part in analysis.parts.items()), _row("total", analysis.total)]
    maps = [("feature map", "stride", "channels", "size")]
    maps += [(name, str(s), str(c), f"{h} x {w}") for name, (c, s, h, w) in analysis.maps.items()]
    passed = "\n".join(_trained(analysis))
    return "\n\n".join([title, table(parts, markdown), table(maps, markdown), passed, COUNTED])


def _trained(analysis: "Analysis") -> Iterator[str]:
    """Which parameters of the backbone do not train."""
    frozen, unused = analysis.frozen, analysis.unused
    yield f"backbone: {len(frozen)} frozen tensors{_listed(frozen)}"
    yield f"one forward and backward pass leaves {len(unused)} tensors without a gradient{_listed(unused)}"


def _listed(names: list[str]) -> str:
    return ": " + ", ".join(names) if names else ""


def examine(
    config_file: Path, overrides: Sequence[str], backend: str, size: tuple[int, int] | None = None
) -> tuple[CfgNode, "Analysis"]:
    """The recipe and its model's analysis for one image of ``size`` (height, width), by default of its test size."""
    cfg = load_config(config_file, overrides, backends.defaults(backend)).cfg
    check_model(cfg)
    backends.check_keys(backend, cfg)
    size = size or largest_image(cfg)

    from scratch_det.analysis.cost import analyze  # imports torch

    return cfg, analyze(backends.load(backend), cfg, size)


def largest_image(cfg: CfgNode) -> tuple[int, int]:
    """Height and width of the largest image that the recipe tests on, lying. Raises UserError when it resizes none."""
    sides = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    if sides[0] < 1:
        raise UserError("INPUT.MIN_SIZE_TEST is 0, images stay as they are stored: give a size, --size 800x1333")
    return sides


def parse_size(text: str) -> tuple[int, int]:
    """800x1333 as height and width. Raises UserError."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise UserError(f"--size is {text!r}, expected HEIGHTxWIDTH in pixels, such as 800x1333")
    return int(height), int(width)


def table(rows: Sequence[Sequence[str]], markdown: bool = True) -> str:
    """``rows``, the first one the header, in columns that line up, numbers to the right."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(map(_is_number, column[1:])) for column in columns]
    lines = [
        [cell.rjust(w) if number else cell.ljust(w) for cell, w, number in zip(row, widths, right, strict=True)]
        for row in rows
    ]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in lines)
    rule = ["-" * (w - 1) + (":" if number else "-") for w, number in zip(widths, right, strict=True)]
    lines.insert(1, rule)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def giga(flops: int) -> str:
    return f"{flops / 1e9:,.2f}"


def mega(numbers: int) -> str:
    return f"{numbers / 1e6:,.2f}"


def _row(name: str, cost: "Cost") -> tuple[str, ...]:
    norms = ", ".join(f"{count} {norm}" for norm, count in sorted(cost.norms.items())) or "-"
    counts = (cost.parameters, cost.trainable, cost.parameters - cost.trainable)
    return name, *(f"{count:,}" for count in counts), giga(cost.flops), mega(cost.activations), norms


def _is_number(cell: str) -> bool:
    """Also sizes, 8 x 10, and the absence of a number."""
    return cell == "-" or (cell[0].isdecimal() and cell[-1].isdecimal())


if TYPE_CHECKING:
    from scratch_det.analysis.cost import Analysis

CONFIGS = Path("configs")
LARGE, SMALL = "mask_rcnn_X_152_32x8d_FPN_gn", "mask_rcnn_R_101_FPN_gn"
LEGEND = f"""\
One row for each model, named by its keys, with the number of recipes that train it, as the first of these that trains
from scratch has it. A run takes its number of classes from its data set. models.csv has the same rows.

{COUNTED}

The last columns are the GFLOPs of the parts."""


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
    title = f"# The models of the recipes\n\nWritten by `{command}`.\n\n"
    text, values = models_table(CONFIGS, backend)
    write_atomically(path, title + text)
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
    cells, analyses = [], {}
    for name, found in sorted(recipes.items()):
        cfg, analyses[name] = examine(min(found)[1], (), backend)
        cells.append({"model": name, "recipes": str(len(found)), **_cells(cfg, analyses[name])})
    columns = list(dict.fromkeys(column for row in cells for column in row))
    rows = [columns, *([row.get(column, "-") for column in columns] for row in cells)]
    values = "".join(",".join(cell.replace(",", "") for cell in row) + "\n" for row in rows)
    return "\n\n".join([LEGEND, table(rows), *_comparison(analyses)]) + "\n", values


def _cells(cfg: CfgNode, analysis: "Analysis") -> dict[str, str]:
    """Column -> cell; the parts are the last columns, as not every model has the same."""
    (height, width), total = analysis.image, analysis.total
    return {
        "image": f"{height} x {width}",
        "classes": str(cfg.MODEL.ROI_HEADS.NUM_CLASSES),
        "proposals": str(cfg.MODEL.RPN.POST_NMS_TOPK_TEST),
        "boxes": str(cfg.TEST.DETECTIONS_PER_IMAGE),
        "parameters": f"{total.parameters:,}",
        "M activations": mega(total.activations),
        "GFLOPs": giga(total.flops),
        **{name: giga(cost.flops) for name, cost in analysis.parts.items()},
    }


def _comparison(analyses: Mapping[str, "Analysis"]) -> Iterator[str]:
    """The paper gives X152 about 4 times the FLOPs of R101."""
    if {LARGE, SMALL} <= analyses.keys():
        bodies, totals = (
            [pick(analyses[name]) for name in (LARGE, SMALL)]
            for pick in (lambda found: found.parts["body"].flops, lambda found: found.total.flops)
        )
        yield (
            f"The body of X-152-32x8d has {bodies[0] / bodies[1]:.2f} times the FLOPs of R-101's, the whole model "
            f"{totals[0] / totals[1]:.2f} times;\nthe paper says about 4 times: see docs/fidelity.md."
        )
