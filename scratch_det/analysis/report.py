"""One recipe's model as text. What can be refused is refused before torch is imported."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fvcore.common.config import CfgNode

from scratch_det import backends
from scratch_det.config import check_model, load_config
from scratch_det.errors import UserError

if TYPE_CHECKING:
    from scratch_det.analysis.parts import Analysis, Cost

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

    from scratch_det.analysis.parts import analyze  # imports torch

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
