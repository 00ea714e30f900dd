"""A study as data, such as results/digits/: runs.csv, a line a run; curves.csv, a line a point.

Beside them is study.json: with what and by which commands it was made, and how long the runs took.
"""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from scratch_det.errors import DataError, UserError
from scratch_det.files import write_atomically
from scratch_det.study.experiment import Experiment
from scratch_det.study.experiments import find
from scratch_det.study.outcome import DECIMALS, Outcome
from scratch_det.study.standing import BLOCKED, FAILED, FINISHED, READY, UNFINISHED, WAITING

RUNS, CURVES = "runs.csv", "curves.csv"
STATES = (WAITING, READY, UNFINISHED, FAILED, BLOCKED, FINISHED)
FIELDS = ("run", "state", "start", "iteration", "error", "weights_sha256", "found")
POINT = ("run", "metric", "iterations", "value")
WRITES_IT = "tools/study.py report EXPERIMENT --out DIR --results FOLDER writes it"
RESTORE = "restore the folder's files as report --results wrote them, from version control or a copy"

Kind = TypeVar("Kind")


def save(outcomes: Sequence[Outcome], folder: Path) -> None:
    """Write runs.csv and curves.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted({name for outcome in outcomes for name in outcome.metrics})
    rows = [[*FIELDS, *names]]
    for one in outcomes:
        numbers = [_text(one.metrics.get(name)) for name in names]
        known = [one.run.name, one.state, str(one.start), str(one.iteration), one.error, one.weights_sha256, one.found]
        rows.append([*known, *numbers])
    _write(folder / RUNS, rows)
    points = [
        [one.run.name, name, str(iteration), _text(value)]
        for one in outcomes
        for name, curve in one.curves.items()
        for iteration, value in curve
    ]
    _write(folder / CURVES, [POINT, *points])


def load(folder: Path, own_runs: Sequence[Experiment] = ()) -> list[Outcome]:
    """What ``save`` wrote, of ``own_runs`` and listed ones.

    Raises DataError when a file is missing, or is not as it was written: where, and what.
    """
    lines = _read(folder / RUNS, FIELDS)
    names = [line.cells["run"] for line in lines]
    if twice := [line for number, line in enumerate(lines) if line.cells["run"] in names[:number]]:
        raise DataError(f"{twice[0].place}: {twice[0].cells['run']} is there twice; {RESTORE}")
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for line in _read(folder / CURVES, POINT):
        points = curves.setdefault(line.cells["run"], {}).setdefault(line.cells["metric"], [])
        points.append((line.read_as(int, "iterations"), line.read_as(float, "value")))
    return [
        Outcome(
            run=line.read_as(partial(find, own_runs=own_runs), "run"),
            state=line.read_as(_state, "state"),
            start=line.read_as(int, "start"),
            iteration=line.read_as(int, "iteration"),
            metrics={
                name: line.read_as(float, name) for name, text in line.cells.items() if name not in FIELDS and text
            },
            curves={name: tuple(points) for name, points in curves.get(line.cells["run"], {}).items()},
            error=line.cells["error"],
            weights_sha256=line.cells["weights_sha256"],
            found=line.cells["found"],
        )
        for line in lines
    ]


def _state(word: str) -> str:
    if word not in STATES:
        raise ValueError(f"{word!r} is none of {', '.join(STATES)}")
    return word


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.{DECIMALS}f}"


def _write(path: Path, rows: Iterable[Sequence[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_atomically(path, text.getvalue())


class _Line(NamedTuple):
    """Of a CSV file; ``place`` says where it is."""

    place: str
    cells: dict[str, str]

    def read_as(self, kind: Callable[[str], Kind], column: str) -> Kind:
        """A cell as int, float, or as the run of that name."""
        try:
            return kind(self.cells[column])
        except (ValueError, UserError) as error:
            raise DataError(f"{self.place}, column {column}: {error}; {RESTORE}") from None


def _read(path: Path, columns: Sequence[str]) -> list[_Line]:
    """Lines that have as many cells as the header, which has at least ``columns``."""
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file, strict=True)
            lines = [_Line(f"{path}:{reader.line_num}", row) for row in reader]
    except FileNotFoundError:
        raise DataError(f"{path} is missing; {WRITES_IT}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {error}; {RESTORE}") from None
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num + 1}: {error}; {RESTORE}") from None
    if missing := [column for column in columns if column not in (reader.fieldnames or ())]:
        raise DataError(f"{path}:1: there is no column {missing[0]}; {RESTORE}")
    for line in lines:
        if None in line.cells or None in line.cells.values():
            raise DataError(f"{line.place}: expected {len(reader.fieldnames or ())} cells, as in line 1; {RESTORE}")
    return lines
