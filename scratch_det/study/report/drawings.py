"""What each figure of the paper is made of: its panels, from the outcomes of its runs."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.figure import Figure

from scratch_det.config import load_config
from scratch_det.study import samples
from scratch_det.study.experiments import find
from scratch_det.study.job import from_here
from scratch_det.study.paper import PRETRAINED, SCRATCH
from scratch_det.study.records import FINISHED, LOSS, Curve, Record
from scratch_det.study.report import panels
from scratch_det.study.report.cells import label_of_norm
from scratch_det.study.run import TRAIN, Run
from scratch_det.study.samples import COCO_IMAGES, COCO_OBJECTS, Seen

WIDTH = 7.0  # inches, 700 px at the SVG's scale in a README
TITLE: dict[str, Any] = {"x": 0.01, "ha": "left", "fontsize": 11, "fontweight": "bold"}
SIZES = {"third": "a third of the images", "tenth": "a tenth of the images", "hundredth": "a hundredth of the images"}
STEPS = {"": "baseline", "train_aug": "+ train aug", "cascade": "+ cascade", "test_aug": "+ test aug"}
SEEN = ("images", "instances", "pixels")
# An image: what tools/prepare_digits.py writes into digits' annotations/instances_train.json with its default seed;
# not counted anew, so that the figure does not depend on whether the data set is at hand.
INSTANCES = {"digits_train": 6_890 / 2_000, "coco_2017_train": COCO_OBJECTS / COCO_IMAGES}
LONGER = 3  # times, trained from scratch: the comparison of Figure 2


def schedules(outcomes: Sequence[Record], norm: str, metric: str) -> Figure | None:
    """Figures 1, 3, 4 and 6."""
    if not any(metric in one.curves for one in outcomes):
        return None
    figure = _figure(f"{_model(outcomes[0])} with {norm}", 4.2)
    axes = figure.subplots()
    panels.draw_schedules(axes, outcomes, metric)
    panels.mark_fine_tuning(axes, outcomes[0].run.per_x)
    return figure


def norms(outcomes: Sequence[Record]) -> Figure | None:
    """Section 4 in one picture: the same schedule with and without a normalisation that suits it."""
    curves = {label_of_norm(one.run): one.curves["bbox/AP"] for one in outcomes if "bbox/AP" in one.curves}
    if not curves:
        return None
    figure = _figure(f"{_model(outcomes[0])} from scratch, 3x, by normalisation", 4.2)
    panels.draw_lines(figure.subplots(), curves)
    return figure


def own_runs(outcomes: Sequence[Record]) -> Figure | None:
    """A line for each recipe, the mean of its seeds; one of each initialisation has the colours of panels.INITS."""
    curves: dict[str, list[Curve]] = {}
    for one in sorted(outcomes, key=lambda one: one.run.init == SCRATCH):
        if "bbox/AP" in one.curves:
            curves.setdefault(one.run.shown, []).append(one.curves["bbox/AP"])
    lines = {label: line for label, seeds in curves.items() if (line := panels.mean(seeds))}
    if not lines:
        return None
    figure = _figure("box AP by iteration", 4.2)
    panels.draw_lines(figure.subplots(), lines)
    return figure


def small_data(outcomes: Sequence[Record]) -> Figure | None:
    """Figure 7: a panel for each number of images and kind of hyper-parameters."""
    by_panel: dict[str, list[Record]] = {}
    for one in outcomes:
        if one.run.kind == TRAIN and "bbox/AP" in one.curves:
            size, *others = [part for part in one.run.shown.split(", ") if part not in panels.INITS]
            by_panel.setdefault("\n".join([SIZES.get(size, f"{size} images"), *others]), []).append(one)
    if not by_panel:
        return None
    figure = _figure(f"{_model(outcomes[0])} with fewer images", 3.3)
    for axes, (title, members) in zip(_row(figure, len(by_panel)), by_panel.items(), strict=True):
        panels.draw_schedules(axes, members, "bbox/AP")
        axes.set_title(title, fontsize=9)
        axes.label_outer()
    values = [value for members in by_panel.values() for one in members for _, value in one.curves["bbox/AP"]]
    axes.set_ylim(0, 1.08 * max(*values, 1))
    return figure


def training_loss(outcomes: Sequence[Record]) -> Figure | None:
    found = [one for one in outcomes if one.run.kind == TRAIN and LOSS in one.curves]
    if not found:
        return None
    size = found[0].run.shown.split(", ")[0]
    figure = _figure(f"{_model(found[0])}, training loss with {SIZES.get(size, f'{size} images')}", 3.8)
    panels.draw_losses(figure.subplots(), found)
    return figure


def enhanced(outcomes: Sequence[Record]) -> Figure | None:
    """Figure 5: a row for each model, box AP beside mask AP."""
    bars: dict[str, dict[str, dict[tuple[str, str], float]]] = {}
    for one in outcomes:
        end = "_TTA" if one.run.evaluates else ""
        for task, shown in (("bbox", "box AP"), ("segm", "mask AP")) if one.state == FINISHED else ():
            if (value := one.metrics.get(f"{task}{end}/AP")) is not None:
                of_model = bars.setdefault(_model(one), {}).setdefault(shown, {})
                of_model[_step(one), one.run.init] = value
    if not bars:
        return None
    figure = _figure("enhanced baselines", 0.5 + 2.7 * len(bars))
    for row, (model, by_task) in zip(figure.subplots(len(bars), 2, squeeze=False), bars.items(), strict=True):
        for axes, task in zip(row, ("box AP", "mask AP"), strict=True):
            panels.draw_bars(axes, by_task.get(task, {}), list(STEPS.values()))
            axes.set_title(f"{model}, {task}", fontsize=9)
    _legend_below(figure)
    return figure


def seen(outcomes: Sequence[Record]) -> Figure | None:
    """Figure 2: what the 2x run that is fine-tuned sees with its pre-training, and the one from scratch, longer."""
    by_schedule = {(one.run.init, one.run.k): one.run for one in outcomes}
    short, long = by_schedule.get((PRETRAINED, 2)), by_schedule.get((SCRATCH, 2 * LONGER))
    if short is None or long is None:
        return None
    tuned, trained = map(_seen_by, (short, long))
    before = samples.of_pretraining_run(find(short.pretraining)) if short.pretraining else samples.of_pretraining()
    parts = {"pre-training": before, "fine-tuning": tuned, "random initialisation": trained}
    figure = _figure(f"seen in 2x of fine-tuning and {2 * LONGER}x from scratch", 3.3)
    for axes, what in zip(_row(figure, len(SEEN), sharey=False), SEEN, strict=True):
        panels.draw_stack(axes, {part: getattr(counts, what) for part, counts in parts.items()})
        axes.set_title(what, fontsize=9)
    _legend_below(figure)
    return figure


def _seen_by(run: Run) -> Seen:
    cfg = load_config(from_here(run.config)).cfg
    return samples.of_schedule(cfg, INSTANCES[cfg.DATASETS.TRAIN[0]])


def _figure(title: str, height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    figure.suptitle(title, **TITLE)
    return figure


def _legend_below(figure: Figure) -> None:
    """One for all panels, which show the same."""
    handles = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)


def _row(figure: Figure, count: int, sharey: bool = True) -> Iterator:
    return iter(figure.subplots(1, count, squeeze=False, sharey=sharey)[0])


def _model(outcome: Record) -> str:
    """..._R_50_FPN_... -> R50-FPN."""
    found = re.search(r"_([RX])_(\d+)", outcome.run.config.stem)
    return f"{found[1]}{found[2]}-FPN" if found else outcome.run.config.stem


def _step(outcome: Record) -> str:
    """Which of Figure 5's steps, each on top of those before."""
    return next(STEPS[word] for word in reversed(STEPS) if word in outcome.run.name)
