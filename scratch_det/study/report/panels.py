"""The panels that the figures of a study are made of."""

from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise
from statistics import fmean, median

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from scratch_det.evaluation.metrics import BLUE, COLORS, METRICS, SKY, VERMILION
from scratch_det.study.paper import PRETRAINED, SCRATCH
from scratch_det.study.records import LOSS, Curve, Record

INITS = {SCRATCH: ("random initialisation", VERMILION, "o"), PRETRAINED: ("pre-trained", BLUE, "s")}
STACK = {"pre-training": SKY, "fine-tuning": INITS[PRETRAINED][1], "random initialisation": INITS[SCRATCH][1]}
AP = {name: metric.axis for name, metric in METRICS.items()}
TYPICAL = 2  # of the kx schedule: the usual length of fine-tuning
LOSS_POINTS = 40  # of a smoothed loss


def draw_schedules(axes: Axes, outcomes: Sequence[Record], metric: str) -> None:
    """AP by iteration, a colour an initialisation; several seeds thin, the mean of some thick, ends marked."""
    shown: dict[tuple[str, str], dict[int | None, Record]] = {}
    for one in outcomes:
        if metric in one.curves:
            shown.setdefault((one.run.init, one.run.shown), {})[one.run.seed] = one
    have = {one.run.name for seeds in shown.values() for one in seeds.values()}
    means = {init: finished_by_all([group for key, group in shown.items() if key[0] == init], metric) for init in INITS}
    for (init, _), seeds in shown.items():
        _, color, marker = INITS[init]
        curves = {seed: own_part(one, metric, have) for seed, one in seeds.items()}
        chosen = means[init] or {max(curves, key=lambda seed: len(curves[seed]))}
        thick = mean([curves[seed] for seed in curves if seed in chosen]) if chosen <= curves.keys() else ()
        for curve in curves.values() if len(curves) > 1 or not thick else ():
            axes.plot(*_xy(curve), color=color, lw=0.6, alpha=0.45)
        axes.plot(*_xy(thick), color=color, lw=1.6)
        if thick and thick[-1][0] == next(iter(seeds.values())).run.iterations:
            axes.plot(*thick[-1], marker, color=color, mec="white", mew=0.8, ms=6.5, zorder=3)
    for init, (label, color, marker) in INITS.items():
        if any(init == key[0] for key in shown):
            label += f", mean of {len(means[init])} seeds" * (len(means[init]) > 1)
            axes.plot([], [], marker, ls="-", color=color, mec="white", ms=6.5, label=label)
    _dress(axes, AP[metric])
    axes.set_xlim(0, 1.04 * max(one.run.iterations for one in outcomes))
    axes.legend(loc="lower right", fontsize=8, frameon=False)


def finished_by_all(schedules: Sequence[Mapping[int | None, Record]], metric: str) -> set[int | None]:
    """The seeds that all schedules have finished of which there is a finished one: a mean of other seeds than its
    trunk's would not begin on it."""
    done = [
        {seed for seed, one in schedule.items() if one.curves[metric][-1][0] == one.run.iterations}
        for schedule in schedules
    ]
    return set.intersection(*filter(None, done)) if any(done) else set()


def own_part(outcome: Record, metric: str, have: set[str]) -> Curve:
    """What is not its trunk's, where that is drawn, and the trunk's last point before it."""
    curve = outcome.curves[metric]
    if outcome.run.trunk not in have:
        return curve
    return (*[point for point in curve if point[0] <= outcome.start][-1:],
            *[point for point in curve if point[0] > outcome.start])  # fmt: skip


def mean(curves: Sequence[Curve]) -> Curve:
    """Over the iterations that all of them have."""
    tables = [dict(curve) for curve in curves]
    common = [iteration for iteration in tables[0] if all(iteration in table for table in tables)]
    return tuple((iteration, fmean(table[iteration] for table in tables)) for iteration in common)


def mark_fine_tuning(axes: Axes, per_x: int) -> None:
    """A line at the usual length, and above the panel lengths in units of 1x."""
    axes.axvline(TYPICAL * per_x, color="#666666", lw=1, ls=(0, (4, 3)), zorder=0)
    top = axes.secondary_xaxis("top", functions=(lambda x: np.divide(x, per_x), lambda x: np.multiply(x, per_x)))
    lengths = range(1, int(axes.get_xlim()[1] / per_x) + 1)
    top.set_ticks(lengths, [f"typical fine-tuning: {k}x" if k == TYPICAL else f"{k}x" for k in lengths])
    top.tick_params(length=2, labelsize=8, colors="#555555")
    top.spines["top"].set_visible(False)


def draw_lines(axes: Axes, curves: Mapping[str, Curve]) -> None:
    """Box AP, a colour a line, its last value in the legend."""
    for (label, curve), color in zip(curves.items(), cycle(COLORS), strict=False):
        axes.plot(*_xy(curve), color=color, lw=1.6, label=f"{label}: {curve[-1][1]:.1f}")
        axes.plot(*curve[-1], "o", color=color, mec="white", ms=6.5)
    _dress(axes, AP["bbox/AP"])
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, fontsize=8, frameon=False)


def draw_losses(axes: Axes, outcomes: Sequence[Record]) -> None:
    """Thin as written down, and smoothed."""
    for one in sorted(outcomes, key=lambda one: list(INITS).index(one.run.init)):
        label, color, _ = INITS[one.run.init]
        axes.plot(*_xy(one.curves[LOSS]), color=color, lw=0.5, alpha=0.35)
        axes.plot(*_xy(thin(one.curves[LOSS], LOSS_POINTS)), color=color, lw=1.8, label=label)
    _dress(axes, "training loss")
    axes.legend(loc="best", fontsize=8, frameon=False)


def thin(curve: Curve, most: int) -> Curve:
    """At most so many points, each the median of equally many neighbours."""
    if len(curve) <= most:
        return curve
    ends = [round(part * len(curve) / most) for part in range(most + 1)]
    parts = [curve[start:end] for start, end in pairwise(ends)]
    return tuple((part[len(part) // 2][0], median(value for _, value in part)) for part in parts)


def draw_bars(axes: Axes, values: Mapping[tuple[str, str], float], steps: Sequence[str]) -> None:
    """``values`` by step and initialisation."""
    for shift, (init, (label, color, _)) in zip((-0.2, 0.2), INITS.items(), strict=True):
        places = [place for place, step in enumerate(steps) if (step, init) in values]
        heights = [values[steps[place], init] for place in places]
        bars = axes.bar([place + shift for place in places], heights, 0.38, color=color, label=label)
        axes.bar_label(bars, fmt="%.1f", fontsize=7.5, padding=1)
    axes.set_xticks(range(len(steps)), steps, fontsize=8)
    axes.set_xlim(-0.6, len(steps) - 0.4)
    axes.set_ylim(0, 1.1 * max(values.values(), default=1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def draw_stack(axes: Axes, parts: Mapping[str, float]) -> None:
    """Pre-training and fine-tuning on top of each other, beside training from scratch."""
    bottom = 0.0
    for part, value in parts.items():
        place, below = (1, 0.0) if part == "random initialisation" else (0, bottom)
        axes.bar(place, value, 0.6, bottom=below, color=STACK[part], label=part)
        bottom += value
    for place, total in enumerate((parts["pre-training"] + parts["fine-tuning"], parts["random initialisation"])):
        axes.text(place, 1.01 * total, EngFormatter(places=1)(total), ha="center", va="bottom", fontsize=8)
    axes.set_xticks((0, 1), ("pre-trained", "scratch"), fontsize=8)
    axes.yaxis.set_major_formatter(EngFormatter())
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.margins(x=0.2, y=0.1)


def _xy(curve: Curve) -> tuple[list[int], list[float]]:
    return [iteration for iteration, _ in curve], [value for _, value in curve]


def _dress(axes: Axes, label: str) -> None:
    axes.set_xlabel("iteration", fontsize=9)
    axes.set_ylabel(label, fontsize=9)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=8)
    axes.grid(color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k" if x >= 10_000 else f"{x:g}"))
