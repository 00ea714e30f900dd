"""Learning curves of one run or of several, the heat map of a grid search, and the style that all figures share."""

import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from scratch_det.config.load import read_resolved
from scratch_det.errors import DataError, UserError, did_you_mean
from scratch_det.evaluation.metrics import INK, LOSSES, PRETRAINED, SCRATCH, all_metrics, colors_of
from scratch_det.files import write_atomically
from scratch_det.reading import read_series

Curve = Sequence[tuple[float, float]]  # completed iterations and value, sorted
Series = Mapping[str, Curve]  # by key of metrics.json

NO_MATH: Any = {"text.parse_math": False}  # names may hold a $
STYLE: Any = NO_MATH | {
    "figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.facecolor": "none", "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "text.color": INK, "grid.color": "#88888840", "legend.frameon": False, "legend.fontsize": 9,
    "font.sans-serif": ["DejaVu Sans"], "svg.fonttype": "none",  # text stays text, small and found by a search
    "svg.hashsalt": "scratch_det",  # else ids are random
}  # fmt: skip
GROUND = "#fefefe"  # of what has the page's colour
STYLE_SHEET = Path(__file__).with_name("figure.css")  # of an SVG on a dark page
BESIDE: Any = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "borderaxespad": 0}  # where a legend covers no data
DASHES = ("-", "--", ":", "-.")  # of a cascade's stages and of data sets
SHOWN = ("total_loss", "bbox/AP")
MOST_POINTS = 1500  # per line: more than the picture has columns


@rc_context(STYLE)
def draw_curves(metrics_file: str | Path, last: int, out_png: str | Path, title: str) -> Path:
    """Draw the run's ``metrics.json`` (detectron2's JSON lines) and return the path of the PNG, replaced atomically.

    ``last``: the run's number of iterations. Raises DataError when the file holds no row at all.
    """
    series = read_series(Path(metrics_file), last)
    if not series:
        raise DataError(f"{metrics_file} holds no row with an 'iteration': expected JSON lines written by a run")
    figure, panels = _panels((9, 8.4), (3, 1.3, 2.2))
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    for axes, draw in zip(panels, (draw_losses, draw_rate, draw_scores), strict=True):
        draw(axes, series)
    _finish(panels)
    figure.align_ylabels()
    return save_figure(figure, out_png)


def compare_runs(runs: Sequence[str], keys: Sequence[str], out: Path) -> Path:
    """Draw ``keys`` of metrics.json of the runs, each a folder or "LABEL=FOLDER", into ``out``, one panel per key.

    Without keys those of SHOWN that a run has: AP once there was an evaluation.

    Raises UserError for an argument that names no run or no PNG, DataError when no run has a key.
    """
    if out.suffix != ".png":
        raise UserError(f"--out {out}: the picture is a PNG; name it .png")
    found: dict[str, Series] = {}
    inits: dict[str, str] = {}
    for word in runs:
        label, _, folder = word.rpartition("=")
        if (label := label or Path(folder).name) in found:
            fix = "write LABEL=FOLDER, such as 2x=output/scratch_2x"
            raise UserError(f"{word}: {label} is another run's label too; {fix}")
        metrics_file, config = files = [Path(folder) / name for name in ("metrics.json", "config.yaml")]
        if missing := [file for file in files if not file.is_file()]:
            raise UserError(f"{word}: there is no {missing[0]}; name the folder of a run that has written metrics")
        cfg = read_resolved(config, ["SOLVER.MAX_ITER", "MODEL.WEIGHTS"])
        found[label] = read_series(metrics_file, cfg.SOLVER.MAX_ITER)
        inits[label] = PRETRAINED if cfg.MODEL.WEIGHTS else SCRATCH
    known = sorted({key for series in found.values() for key in series})
    keys = keys or [key for key in SHOWN if key in known] or SHOWN
    if unknown := [key for key in keys if key not in known]:
        hint = did_you_mean(unknown[0], known)
        raise DataError(f"none of {', '.join(runs)} has {unknown[0]} in its metrics.json{hint}")
    return save_figure(comparison(found, keys, colors_of(inits)), out)


@rc_context(STYLE)
def comparison(runs: Mapping[str, Series], keys: Sequence[str], colors: Mapping[str, str]) -> Figure:
    """A panel for each key, with a line for each run that has it, in its colour."""
    metrics = all_metrics()
    figure, panels = _panels((9, 3.2 * len(keys)), [1] * len(keys))
    for axes, key in zip(panels, keys, strict=True):
        for label, series in runs.items():
            if key in series:
                _plot_thinned(axes, series[key], fewest=40, color=colors[label], label=label, lw=1.8)
        axes.set_ylabel(metrics[key].axis if key in metrics else key.replace("_", " "))
    _finish(panels)
    return figure


def draw_losses(axes: Axes, series: Series) -> None:
    """The total bold and its parts thin, on a log axis, where small parts are as readable as large ones."""
    for key, (name, color, width) in LOSSES.items():
        for stage, dash in zip(("", "_stage0", "_stage1", "_stage2"), ("-", *DASHES), strict=False):
            if key + stage in series:
                label = name + stage.replace("_stage", ", stage ")
                _plot_thinned(axes, series[key + stage], fewest=2, color=color, ls=dash, label=label, lw=width)
    axes.set_ylabel("loss (log scale)")
    if not axes.lines:
        return _say(axes, "no training row yet")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())


def draw_rate(axes: Axes, series: Series) -> None:
    """The learning rate, thinned, but with the points on both sides of every drop."""
    axes.set_ylabel("learning rate")
    if "lr" not in series:
        return _say(axes, "no learning rate yet")
    x, y = np.transpose(series["lr"])
    drops = np.flatnonzero(np.diff(y) < -0.2 * y[:-1])
    kept = np.unique(np.concatenate([np.linspace(0, len(x) - 1, MOST_POINTS).astype(int), drops, drops + 1]))
    axes.plot(x[kept], y[kept], color=INK, lw=1.6, marker="o" if len(x) == 1 else None, ms=5)
    axes.set_ylim(0, 1.15 * y.max() or None)
    axes.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))


def draw_scores(axes: Axes, series: Series) -> None:
    """The metrics that have a colour; of several data sets, each has its name in the legend and a kind of line.

    The last value of each curve is written at its end: the highest above its point, the others below theirs.
    """
    metrics = {name: metric for name, metric in all_metrics().items() if metric.color}
    names = {key: name for name in metrics for key in series if key == name or key.endswith(f"/{name}")}
    axes.set_ylabel("AP (%)" if all(key.endswith("/AP") for key in names) else "accuracy (%)")
    if not names:
        return _say(axes, "no evaluation yet")
    data_sets = sorted({key.removesuffix(name) for key, name in names.items()})
    highest = max(series[key][-1][1] for key in names)
    most = {key: max(value for _, value in series[key]) for key in names}
    for key, name in names.items():
        metric, data_set, curve = metrics[name], key.removesuffix(name), series[key]
        plot(
            axes, curve, color=metric.color, marker=metric.marker, ms=6 if len(curve) < 40 else 3,
            ls=DASHES[data_sets.index(data_set) % len(DASHES)], clip_on=False,
            label=f"{data_set.replace('/', ': ')}{metric.label}, best {most[key]:.1f}",
        )  # fmt: skip
        above = curve[-1][1] == highest
        axes.annotate(
            f"{curve[-1][1]:.1f}", curve[-1], xytext=(0, 7 if above else -7), textcoords="offset points",
            ha="center", va="bottom" if above else "top", color=metric.color, fontsize=9, fontweight="bold",
        )  # fmt: skip
    top = max(1.0, 1.3 * max(most.values()))  # room for a number
    axes.set_ylim(0, min(top, 112) if all(metrics[name].percent for name in names.values()) else top)


@rc_context(NO_MATH)
def draw_grid(
    points: Sequence[Mapping[str, str]], values: Sequence[float | None], title: str, out_png: str | Path
) -> Path:
    """A heat map of ``values`` at ``points``, which are labels by axis; return the path of the PNG.

    The axis with the most labels goes from left to right, every combination of the others is a row. The best point is
    framed, those without a value are grey.
    """
    across = max(points[0], key=lambda axis: len({point[axis] for point in points}))
    names = [", ".join(f"{axis} {label}" for axis, label in point.items() if axis != across) for point in points]
    rows, columns = list(dict.fromkeys(names)), list(dict.fromkeys(point[across] for point in points))
    grid = np.full((len(rows), len(columns)), np.nan)
    for name, point, value in zip(names, points, values, strict=True):
        grid[rows.index(name), columns.index(point[across])] = np.nan if value is None else value
    figure = Figure(figsize=(3 + 1.2 * len(columns), 1.8 + 0.55 * len(rows)), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_facecolor("#dddddd")  # shows where there is no value
    axes.imshow(grid, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(across)
    known = grid[~np.isnan(grid)]
    middle = known.min() + 0.6 * np.ptp(known) if known.size else 0.0  # colours are dark below it
    for (row, column), value in np.ndenumerate(grid):
        text, color = "failed" if np.isnan(value) else f"{value:.2f}", "white" if value < middle else "black"
        axes.text(column, row, text, ha="center", va="center", color=color)
    if known.size:
        row, column = np.argwhere(grid == known.max())[0]
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, lw=3, ec=INK, clip_on=False))
    return save_figure(figure, out_png)


# What all figures share -------------------------------------------------------------------------------------------


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a PNG or SVG without date, atomically, so that a reader never sees an incomplete picture."""
    path, content = Path(path), io.BytesIO()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        figure.savefig(content, format="png", metadata={"Software": None})
    write_atomically(path, content.getvalue() or as_svg(figure))
    return path


@rc_context(STYLE)
def as_svg(figure: Figure) -> str:
    """The figure without ground, and with other colours of text and lines where the reader's page is dark."""
    content = io.StringIO()
    about: Any = {"Date": None, "Creator": None, "Title": figure.get_suptitle()}
    figure.savefig(content, format="svg", facecolor="none", metadata=about)
    return content.getvalue().replace("</style>", f"{STYLE_SHEET.read_text()}</style>", 1)


def thin(curve: Curve, most: int) -> Curve:
    """At most so many points, each the median of equally many neighbours."""
    if len(curve) <= most:
        return curve
    ends = [round(part * len(curve) / most) for part in range(most + 1)]
    parts = [curve[start:end] for start, end in pairwise(ends)]
    return tuple((part[len(part) // 2][0], median(value for _, value in part)) for part in parts)


def show_iterations(axes: Axes, ticks: int) -> None:
    """The x axis of curves, after all lines are drawn: its limit ends the automatic scaling."""
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k" if x >= 10_000 else f"{x:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True))
    axes.set_xlim(left=0)
    axes.set_xlabel("iteration")


def _panels(size: tuple[float, float], heights: Sequence[float]) -> tuple[Figure, Any]:
    """Panels below each other that share their x axis."""
    figure = Figure(figsize=size, dpi=120)
    return figure, figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]


def plot(axes: Axes, curve: Curve, **style: Any) -> None:
    axes.plot(*zip(*curve, strict=True), **style)


def _plot_thinned(axes: Axes, curve: Curve, fewest: int, **style: Any) -> None:
    """``plot`` at most MOST_POINTS, with markers where the curve has less than ``fewest`` points."""
    plot(axes, thin(curve, MOST_POINTS), marker="o" if len(curve) < fewest else None, ms=5, **style)


def _say(axes: Axes, words: str) -> None:
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", color="#666666", fontsize=12)
    axes.set_yticks([])


def _finish(panels: Sequence[Axes]) -> None:
    """Grid, legends and the x axis of panels on which all lines are drawn."""
    for axes in panels:
        axes.grid()
        if axes.get_legend_handles_labels()[1]:
            axes.legend(**BESIDE)
    show_iterations(panels[-1], ticks=8)
