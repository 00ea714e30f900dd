"""The paper's figures from a study's outcomes, as SVG and PNG: the same bytes from the same outcomes."""

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from scratch_det.config import load_config
from scratch_det.study import panels, samples
from scratch_det.study.experiment import TRAIN
from scratch_det.study.experiments import find, of_place
from scratch_det.study.job import from_here
from scratch_det.study.outcome import LOSS, Outcome
from scratch_det.study.paper import PRETRAINED, SCRATCH
from scratch_det.study.samples import Seen
from scratch_det.study.standing import FINISHED
from scratch_det.textfile import write_atomically

WIDTH = 7.0  # inches, 700 px at the SVG's scale in a README
DOTS = 200  # an inch, of the PNG
DIGITS = "digits/"
SCHEDULES = {
    "figure1": ("Figure 1", "GN", "bbox/AP"),
    "figure3": ("Figure 3", "GN", "bbox/AP"),
    "figure4": ("Figure 4", "SyncBN", "bbox/AP"),
    "figure6": ("Figure 6", "GN", "keypoints/AP"),
    "smoke": ("Smoke", "GN", "bbox/AP"),
}
SIZES = {"third": "a third of the images", "tenth": "a tenth of the images", "hundredth": "a hundredth of the images"}
STEPS = {"": "baseline", "train_aug": "+ train aug", "cascade": "+ cascade", "test_aug": "+ test aug"}
SEEN = ("images", "instances", "pixels")
LONGER = 3  # times, trained from scratch: the comparison of Figure 2


def figures_of(experiment: str, outcomes: Sequence[Outcome]) -> dict[str, Figure]:
    """The figures all of whose runs are part of ``experiment``, by name; without those that have nothing to show.

    Raises UserError for an unknown experiment.
    """
    runs = of_place(experiment)
    prefix = DIGITS if runs[0].places[0].startswith(DIGITS) else ""
    ours = {run.name for run in runs}
    drawn: dict[str, Figure] = {}
    for name, draw_one in sorted(BUILDERS.items()):
        place = f"{prefix}{'figure1' if name == 'figure2' else name}"
        members = [run for run in runs if place in run.places]
        if members and ours.issuperset(run.name for run in of_place(place)):
            found = draw_one(name, [one for one in outcomes if place in one.run.places])
            drawn |= {name: found} if found else {}
    return drawn


def draw(experiment: str, outcomes: Sequence[Outcome], folder: Path) -> list[Path]:
    """Write NAME.svg and NAME.png of each figure into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures_of(experiment, outcomes).items():
        paths += [folder / f"{name}.svg", folder / f"{name}.png"]
        write_atomically(paths[-2], as_svg(figure))
        partial = paths[-1].with_name(f"{name}.png.partial")
        FigureCanvasAgg(figure)
        figure.savefig(partial, format="png", dpi=DOTS, metadata={"Software": None})
        partial.replace(paths[-1])
    return paths


def as_svg(figure: Figure) -> str:
    """A document whose ids are not drawn at random and that does not tell when it was made."""
    text = io.StringIO()
    with rc_context({"svg.hashsalt": "scratch_det"}):
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _schedules(name: str, outcomes: Sequence[Outcome]) -> Figure | None:
    title, norm, metric = SCHEDULES[name]
    if not any(metric in one.curves for one in outcomes):
        return None
    figure = _figure(f"{title}: {_model(outcomes[0])} with {norm}", 4.2)
    axes = figure.subplots()
    panels.draw_schedules(axes, outcomes, metric)
    panels.mark_fine_tuning(axes, outcomes[0].run.per_x)
    return figure


def _norms(name: str, outcomes: Sequence[Outcome]) -> Figure | None:
    curves = {_norm(one): one.curves["bbox/AP"] for one in outcomes if "bbox/AP" in one.curves}
    if not curves:
        return None
    figure = _figure(f"Normalisation: {_model(outcomes[0])} from scratch, 3x", 4.2)
    panels.draw_lines(figure.subplots(), curves)
    return figure


def _small_data(name: str, outcomes: Sequence[Outcome]) -> Figure | None:
    """Figure 7: a panel for each number of images and kind of hyper-parameters."""
    by_panel: dict[str, list[Outcome]] = {}
    for one in outcomes:
        if one.run.kind == TRAIN and "bbox/AP" in one.curves:
            size, *others = [part for part in one.run.shown.split(", ") if part not in panels.INITS]
            by_panel.setdefault("\n".join([SIZES.get(size, f"{size} images"), *others]), []).append(one)
    if not by_panel:
        return None
    figure = _figure(f"Figure 7: {_model(outcomes[0])} with fewer images", 3.3)
    for axes, (title, members) in zip(_row(figure, len(by_panel)), by_panel.items(), strict=True):
        panels.draw_schedules(axes, members, "bbox/AP")
        axes.set_title(title, fontsize=9)
        axes.label_outer()
    axes.set_ylim(
        0, 1.08 * max(value for group in by_panel.values() for one in group for _, value in one.curves["bbox/AP"])
    )
    return figure


def _training_loss(name: str, outcomes: Sequence[Outcome]) -> Figure | None:
    found = [one for one in outcomes if one.run.kind == TRAIN and LOSS in one.curves]
    if not found:
        return None
    size = found[0].run.shown.split(", ")[0]
    figure = _figure(f"Figure 8: {_model(found[0])}, training loss with {SIZES.get(size, f'{size} images')}", 3.8)
    panels.draw_losses(figure.subplots(), found)
    return figure


def _enhanced(name: str, outcomes: Sequence[Outcome]) -> Figure | None:
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
    figure = _figure("Figure 5: enhanced baselines", 0.5 + 2.7 * len(bars))
    for row, (model, by_task) in zip(figure.subplots(len(bars), 2, squeeze=False), bars.items(), strict=True):
        for axes, task in zip(row, ("box AP", "mask AP"), strict=True):
            panels.draw_bars(axes, by_task.get(task, {}), list(STEPS.values()))
            axes.set_title(f"{model}, {task}", fontsize=9)
    _legend_below(figure)
    return figure


def _samples(name: str, outcomes: Sequence[Outcome]) -> Figure | None:
    """Figure 2: what the 2x run that is fine-tuned sees with its pre-training, and the one from scratch, longer."""
    by_schedule = {(one.run.init, one.run.k): one.run for one in outcomes}
    short, long = by_schedule.get((PRETRAINED, 2)), by_schedule.get((SCRATCH, 2 * LONGER))
    if short is None or long is None:
        return None
    (tuned, source), (trained, _) = (samples.of_run(load_config(from_here(run.config)).cfg) for run in (short, long))
    parts = {"pre-training": _pretraining(short.pretraining), "fine-tuning": tuned, "random initialisation": trained}
    shown = [what for what in SEEN if not (short.pretraining and what == "instances" and "not here" in source)]
    figure = _figure(f"Figure 2: seen by {_model(outcomes[0])}, 2x fine-tuned against {2 * LONGER}x from scratch", 3.3)
    for axes, what in zip(_row(figure, len(shown), sharey=False), shown, strict=True):
        panels.draw_stack(axes, {part: getattr(seen, what) for part, seen in parts.items()})
        axes.set_title(what, fontsize=9)
    _legend_below(figure)
    return figure


def _pretraining(name: str | None) -> Seen:
    """ImageNet's, or that of a run."""
    if name is None:
        return samples.of_pretraining()
    run = find(name)
    cfg = load_config(from_here(run.config)).cfg
    return samples.of_pretraining(run.length * cfg.SOLVER.IMS_PER_BATCH, 1, cfg.INPUT.MIN_SIZE_TRAIN[0])


def _figure(title: str, height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def _legend_below(figure: Figure) -> None:
    """One for all panels, which show the same."""
    handles = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)


def _row(figure: Figure, count: int, sharey: bool = True) -> Iterator:
    return iter(figure.subplots(1, count, squeeze=False, sharey=sharey)[0])


def _model(outcome: Outcome) -> str:
    """..._R_50_FPN_... -> R50-FPN."""
    found = re.search(r"_([RX])_(\d+)", outcome.run.config.stem)
    return f"{found[1]}{found[2]}-FPN" if found else outcome.run.config.stem


def _norm(outcome: Outcome) -> str:
    """What a line of the comparison of norms is called: there are two schedules of other figures among them."""
    if not outcome.run.shown.startswith(SCRATCH):
        return outcome.run.shown
    return "SyncBN" if outcome.run.name.endswith("syncbn") else "GN"


def _step(outcome: Outcome) -> str:
    """Which of Figure 5's steps, each on top of those before."""
    return next(STEPS[word] for word in reversed(STEPS) if word in outcome.run.name)


BUILDERS: Mapping[str, Callable[[str, Sequence[Outcome]], Figure | None]] = {
    **dict.fromkeys(SCHEDULES, _schedules),
    "figure2": _samples,
    "figure5": _enhanced,
    "figure7": _small_data,
    "figure8": _training_loss,
    "norms": _norms,
}
