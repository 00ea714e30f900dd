"""Learning curves of a run as one PNG: losses, learning rate and AP against the completed iterations.

Curves of several runs in one picture, from what a command line says.
"""

import math
import os
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from scratch_det.errors import DataError, UserError, did_you_mean
from scratch_det.evaluation.metrics import BLACK, BLUE, BROWN, COLORS, GREEN, PURPLE, SKY, VERMILION, all_metrics
from scratch_det.files import completed, read_lines

Series = dict[str, tuple[np.ndarray, np.ndarray]]

PARTS = {
    "loss_cls": ("class", BLUE),
    "loss_box_reg": ("box", VERMILION),
    "loss_mask": ("mask", GREEN),
    "loss_keypoint": ("keypoints", BROWN),
    "loss_rpn_cls": ("proposal objectness", PURPLE),
    "loss_rpn_loc": ("proposal box", SKY),
}
STAGES = {"": "-", "_stage0": "-", "_stage1": "--", "_stage2": ":"}  # how names of losses end, in a cascade
DASHES = ("-", "--", ":", "-.")
MOST_POINTS = 1500  # per line: more than the picture has columns


def draw_curves(metrics_file: str | Path, last: int, out_png: str | Path, title: str) -> Path:
    """Draw the run's ``metrics.json`` (detectron2's JSON lines) and return the path of the PNG, replaced atomically.

    ``last``: the run's number of iterations. Raises DataError when the file holds no row at all.
    """
    series = read_series(metrics_file, last)
    figure = Figure(figsize=(9, 8.4), dpi=120, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    losses, rate, scores = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1.3, 2.2])
    draw_losses(losses, series)
    _draw_rate(rate, series)
    draw_scores(scores, series)
    for axes in (losses, rate, scores):
        _dress(axes)
    scores.set_xlabel("iteration")
    scores.set_xlim(left=0)
    figure.align_ylabels()
    return save_figure(figure, out_png)


def compare_curves(runs: Mapping[str, Series], keys: Sequence[str], out_png: str | Path) -> Path:
    """Draw each of ``keys`` of metrics.json for several runs, by their labels, one panel a key.

    Raises DataError when no run has a key.
    """
    metrics = all_metrics()
    figure = Figure(figsize=(9, 3.2 * len(keys)), dpi=120, layout="constrained")
    for axes, key in zip(figure.subplots(len(keys), 1, sharex=True, squeeze=False)[:, 0], keys, strict=True):
        if not any(key in series for series in runs.values()):
            known = sorted({name for series in runs.values() for name in series})
            raise DataError(f"no run has {key} in its metrics.json{did_you_mean(key, known)}")
        for (label, series), color in zip(runs.items(), cycle(COLORS), strict=False):
            if key in series:
                x, y = _thin(*series[key])
                axes.plot(x, y, color=color, label=label, lw=1.8, marker="o" if len(x) < 40 else None, ms=5)
        axes.set_ylabel(metrics[key].axis if key in metrics else key.replace("_", " "))
        _dress(axes)
        _legend(axes)
    axes.set_xlabel("iteration")
    axes.set_xlim(left=0)
    return save_figure(figure, out_png)


def read_series(metrics_file: str | Path, last: int) -> Series:
    """``{key: (completed iterations [N], values [N])}`` of a run of ``last``, in the order of iterations.

    After a resume an iteration may occur twice: the last one counts. Null, nan and text are left out, and so is a line
    that was cut off when the run was killed. Raises DataError when no row is left.
    """
    values: dict[str, dict[int, float]] = {}
    for row in read_lines(Path(metrics_file)):
        for key, value in row.items():
            if "iteration" in row and isinstance(value, int | float) and math.isfinite(value):
                values.setdefault(key, {})[completed(row, last)] = value
    if not values:
        raise DataError(f"{metrics_file} holds no row with an 'iteration': expected JSON lines written by a run")
    return {key: _sorted_arrays(points) for key, points in values.items()}


def save_figure(figure: Figure, out_png: str | Path) -> Path:
    """Write the PNG beside its place and move it there, so that a reader never meets half a picture."""
    path = Path(out_png)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        FigureCanvasAgg(figure).print_png(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _sorted_arrays(points: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray]:
    iterations = sorted(points)
    return np.array(iterations, float), np.array([points[i] for i in iterations], float)


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST_POINTS points: the medians of equally many neighbours."""
    if len(x) <= MOST_POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), MOST_POINTS)
    return np.array([np.median(x[part]) for part in parts]), np.array([np.median(y[part]) for part in parts])


def draw_losses(axes: Axes, series: Series) -> None:
    """The total bold and its parts thin, on a log axis where the small parts are as readable as the large."""
    lines = {"total_loss": ("total", BLACK), **PARTS}
    for key, (name, color) in lines.items():
        for stage, style in STAGES.items():
            if key + stage in series:
                x, y = _thin(*series[key + stage])
                marker, label = "o" if len(x) == 1 else None, name + stage.replace("_stage", ", stage ")
                width = 2.2 if key == "total_loss" else 1.2
                axes.plot(x, y, color=color, ls=style, label=label, lw=width, marker=marker, ms=5)
    axes.set_ylabel("loss (log scale)")
    if axes.lines:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        _legend(axes)
    else:
        _say(axes, "no training row yet")


def _draw_rate(axes: Axes, series: Series) -> None:
    axes.set_ylabel("learning rate")
    if "lr" not in series:
        return _say(axes, "no learning rate yet")
    x, y = series["lr"]
    keep = np.unique(np.concatenate([np.linspace(0, len(x) - 1, MOST_POINTS).astype(int), _corners(y)]))
    axes.plot(x[keep], y[keep], color="#444444", lw=1.6, marker="o" if len(x) == 1 else None, ms=5)
    axes.set_ylim(0, 1.15 * y.max() or None)
    axes.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    return None


def _corners(values: np.ndarray) -> np.ndarray:
    """Indices on both sides of every drop, which thinning must not round off."""
    drops = np.flatnonzero(np.diff(values) < -0.2 * values[:-1])
    return np.concatenate([drops, drops + 1])


def draw_scores(axes: Axes, series: Series) -> None:
    """A colour a task; where there are several data sets, each has its name and a kind of line."""
    metrics = {name: metric for name, metric in all_metrics().items() if metric.color}
    tasks = {key: name for name in metrics for key in series if key == name or key.endswith(f"/{name}")}
    sets = sorted({key.removesuffix(task) for key, task in tasks.items()})
    axes.set_ylabel("AP (%)" if all(key.endswith("/AP") for key in tasks) else "accuracy (%)")
    if not tasks:
        return _say(axes, "no evaluation yet")
    for key, task in tasks.items():
        metric = metrics[task]
        x, y = series[key]
        name = key.removesuffix(task)
        style: dict[str, Any] = {
            "ls": DASHES[sets.index(name) % len(DASHES)],
            "marker": metric.marker,
            "ms": 6 if len(x) < 40 else 3,
        }
        label = f"{name.replace('/', ': ')}{metric.label}, best {y.max():.1f}"
        axes.plot(x, y, color=metric.color, clip_on=False, label=label, **style)
    top = max(series[key][1].max() for key in tasks)
    axes.set_ylim(0, min(max(1.0, 1.3 * top), 112))  # percent, and room for a number
    _number_last_points(axes, [(*series[key], metrics[task].color) for key, task in tasks.items()])
    _legend(axes)
    return None


def _number_last_points(axes: Axes, curves: list[tuple[np.ndarray, np.ndarray, str]]) -> None:
    """Write the last value of each curve: the highest above its point, the others below theirs."""
    highest = max(y[-1] for _, y, _ in curves)
    for x, y, color in curves:
        above = y[-1] == highest
        axes.annotate(
            f"{y[-1]:.1f}", (x[-1], y[-1]), xytext=(0, 7 if above else -7), textcoords="offset points",
            ha="center", va="bottom" if above else "top", color=color, fontsize=9, fontweight="bold",
        )  # fmt: skip


def _legend(axes: Axes) -> None:
    """Beside the panel, where it covers no data."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, frameon=False, fontsize=9)


def _say(axes: Axes, words: str) -> None:
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", color="#666666", fontsize=12)
    axes.set_yticks([])


def _dress(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}")
    )
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))


def compare_runs(runs: Sequence[str], keys: Sequence[str], out: Path) -> Path:
    """Draw ``keys`` of the runs, each "LABEL=FOLDER", into ``out``. Raises UserError for what is no run, or no PNG."""
    if out.suffix != ".png":
        raise UserError(f"--out {out}: the picture is a PNG; name it .png")
    found: dict[str, Series] = {}
    for word in runs:
        label, equals, folder = word.partition("=")
        if not (label and equals and folder) or label in found:
            raise UserError(f"{word}: expected LABEL=FOLDER, each label once, such as 2x=output/scratch_2x")
        metrics, config = (Path(folder) / name for name in ("metrics.json", "config.yaml"))
        for file in (metrics, config):
            if not file.is_file():
                raise UserError(f"{word}: there is no {file}; name the folder of a run that has written metrics")
        found[label] = read_series(metrics, _iterations(config))
    return compare_curves(found, keys, out)


def _iterations(config: Path) -> int:
    """SOLVER.MAX_ITER in the config.yaml of a run."""
    try:
        return int(CfgNode.load_cfg(config.read_text()).SOLVER.MAX_ITER)
    except Exception as error:  # whatever yaml and yacs make of a file that was edited
        raise DataError(f"{config} is not as the run wrote it ({str(error).splitlines()[0]}); restore it") from None
