"""All experiments: the paper's, the miniatures on digits, and YAML files of the user's own runs."""

from collections.abc import Sequence
from pathlib import Path

from scratch_det.errors import UserError, did_you_mean
from scratch_det.study import digits, own, paper
from scratch_det.study.run import Run

CURVES = {"figure1", "figure3", "figure4", "figure6", "figure7", "figure8"}
HEADER = ("experiment", "paper", "iterations", "with a shared prefix", "reported")


def experiments() -> list[Run]:
    """All runs that are listed here, each after those that it needs."""
    return [*paper.runs(), *digits.runs(), *digits.smoke()]


def find(name: str, own_runs: Sequence[Run] = ()) -> Run:
    """The run called ``name``, from ``own_runs`` or the lists here. Raises UserError when there is none."""
    known = {experiment.name: experiment for experiment in (*experiments(), *own_runs)}
    if name not in known:
        raise UserError(f"there is no experiment {name}{did_you_mean(name, list(known))}")
    return known[name]


def of_place(place: str) -> list[Run]:
    """The runs of a table or figure, all runs of "paper" or "digits", the runs in a file, or the run with this name.

    Raises UserError when there are none.
    """
    if own.is_file(place):
        return own.runs(Path(place))
    known = experiments()
    places = sorted({known_place for run in known for known_place in run.places})
    groups = {"paper": paper.runs(), "digits": digits.runs()}
    groups |= {known_place: [run for run in known if known_place in run.places] for known_place in places}
    found = groups | {run.name: [run] for run in known}
    if place not in found:
        fix = "; tools/study.py samples counts it" if place == "figure2" else did_you_mean(place, list(found))
        raise UserError(
            f"no experiment {place}{fix}; there are {', '.join(groups)}, names that list prints, and files, *.yaml"
        )
    return found[place]


def listing(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Rows below HEADER, a run each, and the iterations of all of them, trained apart and off shared trunks.

    A run whose trunk is not among ``runs`` counts in full.
    """
    by_name = {run.name: run for run in runs}
    spent = [run.iterations - run.branch_at(by_name.get(run.trunk or "")) for run in runs]
    rows = []
    for run, own_iterations in zip(runs, spent, strict=True):
        reported = " ".join(f"{metric} {value}" for metric, value in run.expected.items())
        curve = "a curve" if CURVES.intersection(run.places) else "-"
        where = f"{', '.join(run.places)}: {run.shown}"
        rows.append((run.name, where, f"{run.iterations:,}", f"{own_iterations:,}", reported or curve))
    total = ("all", f"{len(runs)} runs", f"{sum(run.iterations for run in runs):,}", f"{sum(spent):,}", "")
    return [*rows, total]
