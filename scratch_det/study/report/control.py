"""The control: a branch of a trunk beside the same run trained on its own."""

from collections.abc import Sequence

from scratch_det.study.records import DECIMALS, Record
from scratch_det.study.report.cells import Cell, Known, is_finished
from scratch_det.study.report.formats import Table
from scratch_det.study.run import Run

BOX = "bbox/AP"
SHOWN = 12  # digits of a digest


def control_table(title: str, runs: Sequence[Run], known: Known, causes: Sequence[str]) -> Table:
    """Every number, as it is stored, and the final weights."""
    apart = next(run for run in runs if run.recipe)
    branch = next(run for run in runs if run.name == apart.recipe)
    header = ("", "branch", "on its own", "")
    if not (is_finished(branch, known) and is_finished(apart, known)):
        rows = [(BOX, *(Cell((run,), BOX).ours(known, set()) for run in (branch, apart)), "not finished")]
        return Table("control", title, header, tuple(rows), tuple(causes))
    ours, theirs = (
        {name: f"{value:.{DECIMALS}f}" for name, value in known[run.name].metrics.items()} for run in (branch, apart)
    )
    rows = [
        (name, ours.get(name, "-"), theirs.get(name, "-"), _verdict(ours.get(name) == theirs.get(name)))
        for name in sorted({*ours, *theirs})
    ]
    points, other = (_points(known[run.name]) for run in (branch, apart))
    equal = len(points & other)
    rows.append(("points of the curves", f"{len(points):,}", f"{len(other):,}", f"{equal:,} equal"))
    rows.append(_weights_row(known[branch.name].weights_sha256, known[apart.name].weights_sha256))
    alike = ours == theirs and points == other
    note = (
        f"All numbers are {'equal' if alike else 'NOT equal'} to the last of the {DECIMALS} decimals that are stored."
    )
    return Table("control", title, header, tuple(rows), (note, *causes))


def _weights_row(ours: str, theirs: str) -> tuple[str, ...]:
    """Digests of all tensors, to the last bit."""
    verdict = _verdict(ours == theirs) if ours and theirs else "-"
    return ("final weights, SHA-256", ours[:SHOWN] or "-", theirs[:SHOWN] or "-", verdict)


def _points(outcome: Record) -> set[tuple[str, int, str]]:
    return {(name, at, f"{value:.{DECIMALS}f}") for name, curve in outcome.curves.items() for at, value in curve}


def _verdict(is_equal: bool) -> str:
    return "equal" if is_equal else "not equal"
