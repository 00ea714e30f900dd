"""results/models.md: the models of all recipes side by side."""

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from fvcore.common.config import CfgNode

from scratch_det import backends
from scratch_det.analysis.report import COUNTED, examine, giga, mega, table
from scratch_det.config.source import base_path, read_source
from scratch_det.errors import UserError
from scratch_det.textfile import write_atomically

if TYPE_CHECKING:
    from scratch_det.analysis.parts import Analysis

CONFIGS = Path("configs")
MODELS, HEADS, SCRATCH = Path("_base_/model"), Path("_base_/head"), Path("_base_/init/scratch.yaml")
LARGE, SMALL = "mask_rcnn_X_152_32x8d_FPN_gn", "mask_rcnn_R_101_FPN_gn"
LEGEND = f"""\
One row for each file of `configs/_base_/model`, and for each with a file of `configs/_base_/head`, with the number of
recipes that are built on them, as the first of these that trains from scratch has it. A run takes its number of classes
from its data set.

{COUNTED}

The last columns are the GFLOPs of the parts."""


def write_table(path: Path, backend: str) -> None:
    """Write the table of this folder's ``configs/``. Raises UserError when there is none, or no folder for ``path``."""
    if not path.parent.is_dir():
        raise UserError(f"--table {path}: there is no folder {path.parent}; make it, or name another")
    if path.is_dir():
        raise UserError(f"--table {path} is a folder; name a file, such as {path / 'models.md'}")
    backend = backends.choose(backend)
    command = f"python tools/analyze_model.py --table {path} --backend {backend}"
    title = f"# The models of the recipes\n\nWritten by `{command}`.\n\n"
    write_atomically(path, title + models_table(CONFIGS, backend))


def models_table(configs: Path, backend: str) -> str:
    """A row for every file of ``configs``/_base_/model, for every one with another head, and what the numbers mean.

    The model is that of a recipe built on it, the first one from scratch where there is one, else the file's own.
    """
    models = sorted((configs / MODELS).glob("*.yaml"))
    if not models:
        raise UserError(f"there are no recipes in {configs.absolute()}: start this in the repository's folder")
    scratch, cells, analyses = (configs / SCRATCH).resolve(), [], {}
    for model, head, built_on in _built_on(configs, models):
        name = f"{model.stem} + {head.stem}" if head else model.stem
        example = min(built_on, key=lambda recipe: scratch not in _bases(recipe), default=model)
        cfg, analyses[name] = examine(example, (), backend)
        cells.append({"model": name, "recipes": str(len(built_on)), **_cells(cfg, analyses[name])})
    columns = list(dict.fromkeys(column for row in cells for column in row))
    rows = [columns, *([row.get(column, "-") for column in columns] for row in cells)]
    return "\n\n".join([LEGEND, table(rows), *_comparison(analyses)]) + "\n"


def _built_on(configs: Path, models: list[Path]) -> Iterator[tuple[Path, Path | None, list[Path]]]:
    """Every model without and with every other head, and the recipes that are built so; a model without any too."""
    recipes, heads = _detectors(configs), sorted((configs / HEADS).glob("*.yaml"))
    for model in models:
        own = [recipe for recipe in recipes if model.resolve() in _bases(recipe)]
        for head in (None, *heads):
            has = {head.resolve()} if head else set()
            built = [recipe for recipe in own if _bases(recipe) & {other.resolve() for other in heads} == has]
            if built or not head:
                yield model, head, built


def _detectors(configs: Path) -> list[Path]:
    """All recipes but those of classifiers."""
    return sorted(path for path in configs.glob("[!_]*/*.yaml") if path.parent.name != "Pretraining")


@cache
def _bases(path: Path) -> frozenset[Path]:
    """Every file that a recipe is built on, absolute."""
    source = read_source(path, str(path))
    direct = {base_path(source, base).resolve() for base in source.bases}
    return frozenset(direct.union(*map(_bases, direct)))


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
