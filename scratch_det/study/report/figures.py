"""The paper's figures from the records of a study, as SVG and PNG: the same records give the same bytes."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle, product
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from scratch_det.config.load import load_config
from scratch_det.evaluation.metrics import GREY, INITS, INK, METRICS, PRETRAINED, SCRATCH, SKY, TTA, colors_of
from scratch_det.study import own
from scratch_det.study.experiments import COCO_INSTANCES, Seen, experiments, of_place, seen_before, seen_in_schedule
from scratch_det.study.records import FINISHED, LOSS, Record
from scratch_det.study.report.seeds import BOX, Band, bands_of, grouped, line_colors, model_of, rows_of
from scratch_det.study.report.tables import DIGITS, label_of_norm
from scratch_det.study.run import TRAIN, Run, from_here
from scratch_det.visualization.curves import BESIDE, GROUND, STYLE, plot, save_figure, show_iterations, thin

REPORT_STYLE: Any = STYLE | {
    "figure.facecolor": "white", "figure.titlesize": 11, "figure.titleweight": "bold", "axes.titlesize": 9,
    "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8, "lines.markersize": 6.5,
    "lines.markeredgecolor": GROUND, "savefig.dpi": 200,
}  # fmt: skip
WIDTH = 7.0  # inches, 700 px at the SVG's scale in a README
Styles = Mapping[str, tuple[str, str, str]]  # label, colour, marker
Label = Callable[[Run], str]
INIT: Label = attrgetter("init")
SEEN = {"pre-training": SKY, "fine-tuning": INITS[PRETRAINED][1], "random initialisation": INITS[SCRATCH][1]}
SIZES = {"third": "a third of the images", "tenth": "a tenth of the images"}
STEPS = {"": "baseline", "train_aug": "+ train aug", "cascade": "+ cascade", "test_aug": "+ test aug"}
TASKS = {"bbox": "box AP", "segm": "mask AP"}
HEADINGS = {"norms": "In miniature", "smoke": "In miniature", own.PLACE: "All runs", own.MATRIX: "Initialisations"}
# An image, as scratch-det data digits and data subsets write them with their default seeds; not counted here, so that
# the figure does not depend on whether the data set is on this machine.
INSTANCES = {"digits_train_120": 444 / 120, "coco_2017_train": COCO_INSTANCES}
TYPICAL = 2  # of the kx schedule: the usual length of fine-tuning
LONGER = 3  # times that, trained from scratch: the comparison of Figure 2
LOSS_POINTS = 40  # of a smoothed loss
# What the paper reports: an open mark.
REPORTED: Any = {"mfc": GROUND, "mec": INK, "mew": 1.1, "ls": "", "zorder": 4}


@rc_context(REPORT_STYLE)
def figures_of(experiment: str, records: Sequence[Record]) -> dict[str, Figure]:
    """The figures all of whose runs are part of ``experiment``, by name; without those that have nothing to show.

    Raises UserError for an unknown experiment.
    """
    runs, figures = of_place(experiment), {}
    names, is_digits = {run.name for run in runs}, runs[0].places[0].startswith(DIGITS)
    for name, draw_figure in FIGURES.items():
        place = f"{DIGITS * is_digits}{'figure1' if name == 'figure2' else name}"  # Figure 2 is about Figure 1's runs
        shown = [one for one in records if place in one.run.places]
        is_whole = names.issuperset(run.name for run in experiments() if place in run.places)
        if shown and is_whole and (figure := draw_figure(shown)):
            heading = HEADINGS.get(name) or f"Figure {name[-1]}{' in miniature' * is_digits}"
            figure.suptitle(f"{heading}: {figure.get_suptitle()}", x=0.01, ha="left")
            figures[name] = figure
    return figures


@rc_context(REPORT_STYLE)
def draw(figures: Mapping[str, Figure], folder: Path, kinds: Sequence[str] = ("svg", "png")) -> list[Path]:
    """Write NAME.svg and NAME.png of each figure into ``folder``."""
    return [save_figure(one, folder / f"{name}.{kind}") for name, one in figures.items() for kind in kinds]


# Figures: each from the records of its runs, None where they have nothing to show ------------------------------------


def _schedules(records: Sequence[Record], norm: str = "GN", metric: str = BOX) -> Figure | None:
    """Figures 1, 3, 4 and 6: AP of all schedules, and the usual length of fine-tuning."""
    if not any(metric in one.curves for one in records):
        return None
    figure, axes = _figure(f"{_model(records[0])} with {norm}", 4.2)
    _draw_schedules(axes, records, metric)
    per_x = records[0].run.per_x
    axes.axvline(TYPICAL * per_x, color=GREY, lw=1, ls=(0, (4, 3)), zorder=0)
    top = axes.secondary_xaxis("top", functions=(lambda x: np.divide(x, per_x), lambda x: np.multiply(x, per_x)))
    lengths = range(1, int(axes.get_xlim()[1] / per_x) + 1)
    top.set_ticks(lengths, [f"typical fine-tuning: {k}x" if k == TYPICAL else f"{k}x" for k in lengths])
    top.tick_params(length=2, colors=GREY)
    top.spines["top"].set_visible(False)
    return figure


def _seen(records: Sequence[Record]) -> Figure | None:
    """Figure 2: what the 2x run that is fine-tuned sees with its pre-training, and the one from scratch, longer."""
    runs = {(one.run.init, one.run.k): one.run for one in records}
    pair = [runs.get((PRETRAINED, TYPICAL)), runs.get((SCRATCH, TYPICAL * LONGER))]
    cfgs = [load_config(from_here(run.config)).cfg for run in pair if run]
    if len(cfgs) < 2:
        return None
    tuned, trained = (seen_in_schedule(cfg, INSTANCES[cfg.DATASETS.TRAIN[0]]) for cfg in cfgs)
    before, _ = seen_before(cfgs[0].MODEL.WEIGHTS)
    figure, row = _figure(f"seen in {TYPICAL}x of fine-tuning and {TYPICAL * LONGER}x from scratch", 3.3, 1, 3)
    for axes, what, *counts in zip(row, Seen._fields, before, tuned, trained, strict=True):
        axes.bar((0, 0, 1), counts, 0.6, bottom=(0, counts[0], 0), color=list(SEEN.values()), label=list(SEEN))
        for x, total in enumerate((counts[0] + counts[1], counts[2])):
            axes.text(x, 1.01 * total, EngFormatter(places=1)(total), ha="center", va="bottom", fontsize=8)
        axes.set_xticks((0, 1), ("pre-trained", "scratch"))
        axes.yaxis.set_major_formatter(EngFormatter())
        axes.margins(x=0.2, y=0.1)
        axes.set_title(what)
    row[0].set_ylabel("seen in training")
    _legend_below(figure)
    return figure


def _enhanced(records: Sequence[Record]) -> Figure | None:
    """Figure 5: a row for each model, box AP beside mask AP; each step comes on top of those before."""
    ours: dict[tuple[str, ...], float] = {}  # by model, task, step and initialisation
    paper: dict[tuple[str, ...], float] = {}
    for one in records:
        step = next(step for step in reversed(STEPS) if step in one.run.name)
        for values, source in ((ours, one.metrics if one.state == FINISHED else {}), (paper, one.run.expected)):
            for task in TASKS:
                if (value := source.get(f"{task}{TTA * bool(one.run.evaluates)}/AP")) is not None:
                    values[_model(one), task, step, one.run.init] = value
    if not ours:
        return None
    panels = list(product(dict.fromkeys(model for model, *_ in ours), TASKS))
    height = 0.5 + 2.7 * len(panels) / len(TASKS)
    figure, rows = _figure("enhanced baselines", height, len(panels) // len(TASKS), len(TASKS), squeeze=False)
    found = {panel: [y for key, y in (*ours.items(), *paper.items()) if key[:2] == panel] for panel in panels}
    # Points, as the paper's differences of 0.2 to 0.7 AP would be lost in bars from 0; all panels have one scale.
    span = 4 + max(max(values) - min(values) for values in found.values() if values)
    for axes, (model, task) in zip(rows.flat, panels, strict=True):
        bottom = math.floor(min(found[model, task], default=0)) - 2
        for shift, (init, (label, color, marker)) in zip((-0.1, 0.1), INITS.items(), strict=True):
            points, marks = ([(x + shift, values[key]) for x, step in enumerate(STEPS)
                              if (key := (model, task, step, init)) in values] for values in (ours, paper))  # fmt: skip
            if points:
                plot(axes, points, color=color, marker=marker, ls="", label=label)
            for x, y in points:
                axes.annotate(f"{y:.1f}", (x, y), (20 * shift, 6), textcoords="offset points", fontsize=7.5,
                              ha="right" if shift < 0 else "left")  # fmt: skip
            if marks:
                plot(axes, marks, marker="D", label="the paper", **REPORTED)
        axes.set_xticks(range(len(STEPS)), list(STEPS.values()))
        axes.set_xlim(-0.6, len(STEPS) - 0.4)
        axes.set_ylim(bottom, bottom + span)
        axes.set_title(f"{model}, {TASKS[task]}")
        axes.set_ylabel("AP (%)")
        axes.grid(axis="y")
    _legend_below(figure)
    return figure


def _small_data(records: Sequence[Record]) -> Figure | None:
    """Figure 7: a panel for each number of images and kind of hyper-parameters."""
    panels: dict[str, list[Record]] = {}
    for one in records:
        if one.run.kind == TRAIN and BOX in one.curves:
            parts = [part for part in one.run.shown.split(", ") if part not in INITS]
            size, *others = [part for n, part in enumerate(parts) if not n or not re.fullmatch(r"\d+[xk]", part)]
            panels.setdefault("\n".join([SIZES.get(size, f"{size} images"), *others]), []).append(one)
    if not panels:
        return None
    figure, row = _panels(f"{_model(records[0])}, mean and range of the seeds", 3.8, panels)
    drawn = [one for shown in panels.values() for one in shown]
    values = [y for one in drawn for _, y in one.curves[BOX]] + [one.run.expected.get(BOX, 0) for one in drawn]
    row[-1].set_ylim(0, 1.08 * max(1, *values))
    return figure


def _matrix(records: Sequence[Record]) -> Figure | None:
    """A panel for each column of a matrix, a colour for each row."""
    row_of = rows_of(records)
    looks = zip(line_colors(records, row_of).items(), cycle("osDv^Pp*X"), strict=False)
    styles = {row: (INITS[row][0] if row in INITS else row, color, marker) for (row, color), marker in looks}
    panels = grouped((one for one in records if BOX in one.curves), lambda one: one.run.shown.split(", ")[1])
    if not panels:
        return None
    return _panels("mean and range of the seeds", 4.2, panels, styles, row_of)[0]


def _training_loss(records: Sequence[Record]) -> Figure | None:
    """Figure 8: thin as logged, thick smoothed."""
    found = [one for one in records if one.run.kind == TRAIN and LOSS in one.curves]
    if not found:
        return None
    size = found[0].run.shown.split(", ")[0]
    figure, axes = _figure(f"{_model(found[0])}, training loss with {SIZES.get(size, f'{size} images')}", 3.8)
    for one in sorted(found, key=lambda one: list(INITS).index(one.run.init)):
        label, color, _ = INITS[one.run.init]
        plot(axes, one.curves[LOSS], color=color, lw=0.5, alpha=0.35)
        plot(axes, thin(one.curves[LOSS], LOSS_POINTS), color=color, lw=1.8, label=label)
    _label_axes(axes, "training loss")
    axes.legend(loc="best")
    return figure


def _lines(records: Sequence[Record], title: str, label: Callable[[Run], str]) -> Figure | None:
    """Box AP, a line for each label: the mean of its runs, with its last value in the legend."""
    bands = bands_of(records, BOX, label)
    if not bands:
        return None
    figure, axes = _figure(title.format(model=_model(records[0])), 4.2)
    colors = colors_of({label(band.run): band.run.init for band in bands})
    for name, band in ((label(band.run), band) for band in bands):
        _draw_band(axes, band, colors[name], "o", f"{name}: {band.mean[-1][1]:.1f}")
    _label_axes(axes, METRICS[BOX].axis)
    axes.legend(**BESIDE)
    return figure


FIGURES: Mapping[str, Callable[[Sequence[Record]], Figure | None]] = {  # by the place whose runs they show
    "figure1": _schedules,
    "figure2": _seen,
    "figure3": _schedules,
    "figure4": partial(_schedules, norm="SyncBN"),
    "figure5": _enhanced,
    "figure6": partial(_schedules, metric="keypoints/AP"),
    "figure7": _small_data,
    "figure8": _training_loss,
    # Section 4 of the paper: one schedule with and without a normalisation that suits it
    "norms": partial(_lines, title="{model} from scratch, 3x, by normalisation", label=label_of_norm),
    own.MATRIX: _matrix,
    own.PLACE: partial(_lines, title="box AP by iteration", label=lambda run: run.shown),
    "smoke": _schedules,
}


# Parts of figures --------------------------------------------------------------------------------------------------


def _figure(title: str, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure with one panel, or with an array of panels; ``options`` of ``Figure.subplots``."""
    figure = Figure(figsize=(WIDTH, height))
    figure.suptitle(title)
    return figure, figure.subplots(rows, columns, **options)


def _panels(
    title: str, height: float, panels: Mapping[str, Sequence[Record]], styles: Styles = INITS, label: Label = INIT
) -> tuple[Figure, Sequence[Axes]]:
    """Box AP of all schedules, a panel for each title, and one legend."""
    figure, (row,) = _figure(title, height, 1, len(panels), squeeze=False, sharey=True)
    for axes, (name, shown) in zip(row, panels.items(), strict=True):
        _draw_schedules(axes, shown, BOX, styles, label)
        axes.legend().remove()
        axes.set_title(name)
        axes.label_outer()
    _legend_below(figure)
    return figure, row


def _draw_schedules(
    axes: Axes, records: Sequence[Record], metric: str, styles: Styles = INITS, label: Label = INIT
) -> None:
    """AP by iteration, a colour for each ``label``, by default the initialisation; what the paper reports is open."""
    bands = bands_of(records, metric, label)
    for row, (name, color, marker) in styles.items():
        shown = [band for band in bands if label(band.run) == row]
        for band in shown:
            _draw_band(axes, band, color, marker * (band.mean[-1][0] == band.run.iterations))
        if shown:
            several = f", mean and range of {shown[0].seeds} seeds" * (shown[0].seeds > 1)
            axes.plot([], [], marker, ls="-", color=color, label=name + several)
        reported = [(one.run.iterations, one.run.expected[metric]) for one in records
                    if label(one.run) == row and metric in one.run.expected]  # fmt: skip
        if reported:
            plot(axes, reported, marker=marker, **REPORTED)
    if any(metric in one.run.expected for one in records):
        axes.plot([], [], "o", label="the paper", **REPORTED)
    _label_axes(axes, METRICS[metric].axis)
    axes.set_xlim(0, 1.04 * max(one.run.iterations for one in records))
    axes.legend(loc="lower right")


def _draw_band(axes: Axes, band: Band, color: str, marker: str, label: str = "") -> None:
    """The mean with the range of the seeds, its end marked."""
    if band.seeds > 1:
        (x, low), (_, high) = (zip(*curve, strict=True) for curve in (band.low, band.high))
        axes.fill_between(x, low, high, color=color, alpha=0.2, lw=0)
    plot(axes, band.mean, color=color, lw=1.6, label=label)
    if marker:
        axes.plot(*band.mean[-1], marker, color=color, mew=0.8, zorder=3)


def _label_axes(axes: Axes, label: str) -> None:
    show_iterations(axes, ticks=6)
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.grid()


def _legend_below(figure: Figure) -> None:
    """One legend for all panels."""
    shown = {label.partition(", mean")[0]: handle for axes in figure.axes
             for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}  # fmt: skip
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=3)


def _model(record: Record) -> str:
    """..._R_50_FPN_... -> R50-FPN."""
    stem = record.run.config.stem
    return f"{model}-FPN" if (model := model_of(stem)) else stem
