"""What came of a study's runs, from their folders or from results/: what tables, figures and the report are made of.

results/digits/ holds a study as data: runs.csv, a line a run; curves.csv, a line a point; study.json, with what and by
which commands it was made, and how long it took.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scratch_det.errors import DataError
from scratch_det.study.experiment import Experiment
from scratch_det.study.experiments import find
from scratch_det.study.standing import Standing, read_rows
from scratch_det.textfile import write_atomically

LOSS = "total_loss"
SCORES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "top1", "top5")  # of what is named task/score; not those by class
RUNS, CURVES = "runs.csv", "curves.csv"
FIELDS = ("run", "state", "start", "iteration", "error")
DECIMALS = 4  # in the files and out of run folders, so that both give the same tables and figures

Curve = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Outcome:
    """What is known of one run.

    Attributes:
        run: which it is.
        state: as in ``standing``.
        start: completed iterations of the checkpoint that it branched off; 0 for a run of its own.
        iteration: how far it is.
        metrics: of its last evaluation, in percent: "bbox/AP", "segm/AP50", "bbox_TTA/AP", "classification/top1", ...
        curves: (completed iterations, value) of the same and of LOSS, those before ``start`` included.
        error: why it failed.
    """

    run: Experiment
    state: str
    start: int
    iteration: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)
    error: str = ""

    @property
    def shares(self) -> bool:
        """Whether other schedules' numbers come from the same first iterations as this one's."""
        return self.start > 0


def collect(standings: Sequence[Standing], out: Path) -> list[Outcome]:
    """The outcomes of a study in ``out``; of runs that have not begun too."""
    return [
        Outcome(
            run=standing.job.run,
            state=standing.state,
            start=standing.job.start,
            iteration=standing.iteration,
            metrics={name: round(value, DECIMALS) for name, value in standing.metrics.items() if _is_shown(name)},
            curves=read_curves(out / standing.job.name / "metrics.json", standing.job.run.iterations),
            error=standing.error,
        )
        for standing in standings
    ]


def read_curves(path: Path, last: int) -> dict[str, Curve]:
    """By name; after a resume an iteration may occur twice, of which the last one counts.

    A line says the iteration, from 0, that it comes after, the one at the end of ``last`` iterations their number.
    """
    points: dict[str, dict[int, float]] = {}
    for row in read_rows(path):
        for name, value in row.items():
            if "iteration" in row and (name == LOSS or _is_shown(name)) and isinstance(value, int | float):
                points.setdefault(name, {})[min(int(row["iteration"]) + 1, last)] = round(float(value), DECIMALS)
    return {name: tuple(sorted(found.items())) for name, found in sorted(points.items())}


def save(outcomes: Sequence[Outcome], folder: Path) -> None:
    """Write runs.csv and curves.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted({name for outcome in outcomes for name in outcome.metrics})
    rows = [[*FIELDS, *names]]
    for one in outcomes:
        numbers = [_text(one.metrics.get(name)) for name in names]
        rows.append([one.run.name, one.state, str(one.start), str(one.iteration), one.error, *numbers])
    _write(folder / RUNS, rows)
    points = [
        [one.run.name, name, str(iteration), _text(value)]
        for one in outcomes
        for name, curve in one.curves.items()
        for iteration, value in curve
    ]
    _write(folder / CURVES, [["run", "metric", "iterations", "value"], *points])


def load(folder: Path) -> list[Outcome]:
    """What ``save`` wrote. Raises DataError when a file is missing, UserError when a run is none of the experiments."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in _read(folder / CURVES):
        points = curves.setdefault(row["run"], {}).setdefault(row["metric"], [])
        points.append((int(row["iterations"]), float(row["value"])))
    return [
        Outcome(
            run=find(row["run"]),
            state=row["state"],
            start=int(row["start"]),
            iteration=int(row["iteration"]),
            metrics={name: float(value) for name, value in row.items() if name not in FIELDS and value},
            curves={name: tuple(points) for name, points in curves.get(row["run"], {}).items()},
            error=row["error"],
        )
        for row in _read(folder / RUNS)
    ]


def _is_shown(name: str) -> bool:
    return name.partition("/")[2] in SCORES


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.{DECIMALS}f}"


def _write(path: Path, rows: Iterable[Sequence[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_atomically(path, text.getvalue())


def _read(path: Path) -> list[dict[str, str]]:
    try:
        with open(path, newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        raise DataError(
            f"{path} is missing; tools/study.py report EXPERIMENT --out DIR --results FOLDER writes it"
        ) from None
