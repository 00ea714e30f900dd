"""The paper's tables, and one for every other place, from what came of the runs; any of them may be missing."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from scratch_det.evaluation.metrics import METRICS
from scratch_det.study import own
from scratch_det.study.experiments import of_place
from scratch_det.study.paper import METRICS as PAPER_METRICS
from scratch_det.study.paper import PRETRAINED, SCRATCH, TABLE1, TABLE2
from scratch_det.study.records import BLOCKED, FAILED, Record
from scratch_det.study.report.cells import Cell, Known, difference, label_of_norm, metric_of, sharing, signed
from scratch_det.study.report.control import control_table
from scratch_det.study.report.formats import Table
from scratch_det.study.run import PRETRAIN, SEARCH, Run

DIGITS, WHOLES, BOX, TOP1 = "digits/", ("paper", "digits"), "bbox/AP", "classification/top1"
SHOWN_ELSEWHERE = ("figure1", "figure3", "digits/figure1", "digits/figure7", "digits/figure8")  # by a place with more
COLUMNS = [name for name, metric in METRICS.items() if metric.area == "all"]
TITLES = {
    "table1": "Table 1: box AP",
    "table2": "Table 2: the 6x models",
    "table3": "Table 3: enhanced models",
    "vgg": "VGG-16",
    "voc": "PASCAL VOC",
    "pretraining": "Pre-training",
    "norms": "Normalisation",
    "freezing": "Frozen stages",
    "small_data": "Small data",
    own.PLACE: "All runs",
    "control": "A branch beside the same run trained on its own",
}
SEEDS = re.compile(r" \(n = (\d+)\)")
LONGEST_CAUSE = 200  # characters
NOTES = {  # by what occurs in a table's cells
    "±": "±: sample deviation over {seeds} seeds; behind a difference of means its standard error.",
    "†": "†: not independent: numbers with this sign rest on the same first iterations, where model, initialisation "
    "and seed are the same.",
    " at ": "In brackets: a run that is not finished, at its last evaluation.",
}

Rows = Mapping[str, Sequence[Run]]
Grid = Mapping[str, Sequence[Cell]]


def tables_of(experiment: str, outcomes: Sequence[Record]) -> list[Table]:
    """The table of a place or run; for "paper" and "digits" those of all places of which something is known.

    Raises UserError when there is no such experiment.
    """
    known, runs = {outcome.run.name: outcome for outcome in outcomes}, of_place(experiment)
    places = {own.PLACE if own.is_file(experiment) else experiment: runs}
    if experiment in WHOLES:
        names = dict.fromkeys(place for run in runs for place in run.places if place not in SHOWN_ELSEWHERE)
        places = {name: [run for run in runs if name in run.places] for name in names}
        telling = {outcome.run.name for outcome in outcomes if says_something(outcome)}
        places = {name: there for name, there in places.items() if telling & {run.name for run in there}}
    tables = [_table_of(name, there, known) for name, there in places.items()]
    return [table for table in tables if table.rows]


def says_something(outcome: Record) -> bool:
    """Whether there is anything to show."""
    return bool(outcome.metrics or outcome.curves or outcome.state == FAILED)


def _table_of(place: str, runs: Sequence[Run], known: Known) -> Table:
    kind, is_digits = place.removeprefix(DIGITS), place.startswith(DIGITS)
    title = TITLES.get(kind, re.sub(r"^figure(\d)", r"Figure \1", kind)) + (", on digits" if is_digits else "")
    causes = (*_found(runs, known), *_causes(runs, known))
    if kind == "control":
        return control_table(title, runs, known, causes)
    shown = [run for run in runs if run.kind != SEARCH and not (kind == "table3" and run.kind == PRETRAIN)]
    header, grid = _grid(kind, shown, known)
    marked = sharing({run.name: run for run in shown}.values(), known)
    with_paper = any(cell.expected is not None for row in grid.values() for cell in row)
    text = Cell.beside_paper if with_paper else Cell.ours
    rows = [(label, *(text(cell, known, marked) for cell in row)) for label, row in grid.items()]
    if is_digits and kind in ("table1", "table2"):
        rows += _between_initialisations(kind, grid, known)
    if kind == own.PLACE:
        rows += _between_two(grid, known)
    rows, seeds = _seeds_said_once(rows)
    said = "".join(cell for row in rows for cell in row[1:])
    notes = ["paper / ours / difference, in percent." if with_paper else "In percent."]
    notes += [note.format(seeds=seeds) for sign, note in NOTES.items() if sign in said]
    return Table(kind, title, header, tuple(rows), (*notes, *causes))


def _seeds_said_once(rows: Sequence[tuple[str, ...]]) -> tuple[list[tuple[str, ...]], str]:
    """The rows, without their numbers of seeds where all have the same; and that number, or "n"."""
    numbers = {number for row in rows for cell in row for number in SEEDS.findall(cell)}
    if len(numbers) != 1:
        return list(rows), "n"
    return [tuple(SEEDS.sub("", cell) for cell in row) for row in rows], numbers.pop()


def _causes(runs: Sequence[Run], known: Known) -> Iterator[str]:
    for outcome in (known[run.name] for run in runs if run.name in known):
        if outcome.state in (FAILED, BLOCKED):
            cause = outcome.error if len(outcome.error) <= LONGEST_CAUSE else outcome.error[:LONGEST_CAUSE] + " ..."
            yield f"{outcome.run.name} {outcome.state}: {cause or 'no reason was left'}"


def _found(runs: Sequence[Run], known: Known) -> Iterator[str]:
    """What the searches chose that the runs are, or are trained with."""
    for name in dict.fromkeys(run.name if run.kind == SEARCH else str(run.found_by) for run in runs):
        if name in known and known[name].found:
            yield f"{name} chose {known[name].found}."


def _grid(kind: str, runs: Sequence[Run], known: Known) -> tuple[tuple[str, ...], Grid]:
    """Header and rows: models by length in Table 1, elsewhere models or runs by metric."""
    labels = {"table1": _model_of, "table2": _model_of, "norms": label_of_norm, own.PLACE: lambda run: run.shown}
    rows = _grouped(runs, labels.get(kind) or _label_among(runs))
    if kind == "table1":
        lengths = sorted({run.k for run in runs})
        by_length = {label: [[run for run in row if run.k == k] for k in lengths] for label, row in rows.items()}
        grid = {label: [Cell(tuple(cell), BOX) for cell in row] for label, row in by_length.items()}
        return ("", *(f"{k}x" for k in lengths)), grid
    metrics = PAPER_METRICS if kind in ("table2", "table3") else _there(runs, known)
    header = ("", *(METRICS[metric].label for metric in metrics))
    return header, {label: [Cell(tuple(row), metric) for metric in metrics] for label, row in rows.items()}


def _there(runs: Sequence[Run], known: Known) -> Sequence[str]:
    """Those of COLUMNS that a run has, or the one that it is going to have."""
    found = [name for name in COLUMNS if any(_has(run, name, known) for run in runs)]
    return found or [TOP1 if any(run.kind == PRETRAIN for run in runs) else BOX]


def _grouped(runs: Sequence[Run], label_of: Callable[[Run], str]) -> Rows:
    rows: dict[str, list[Run]] = {}
    for run in runs:
        rows.setdefault(label_of(run), []).append(run)
    return rows


def _model_of(run: Run) -> str:
    """Its body's name and its initialisation: "R50, scratch"."""
    body = re.search(r"_([RX])_(\d+)", run.name)
    return f"{''.join(body.groups()) if body else run.name}, {run.init}"


def _label_among(runs: Sequence[Run]) -> Callable[[Run], str]:
    """``shown``, with the recipe where several have the same; seeds of one recipe have one label."""

    def name(run: Run) -> str:
        return run.recipe if run.seed is not None and run.recipe else run.name

    def label(run: Run) -> str:
        names = {name(other) for other in runs if other.shown == run.shown}
        return run.shown if len(names) == 1 else f"{run.shown} ({name(run)})"

    return label


def _has(run: Run, metric: str, known: Known) -> bool:
    name, outcome = metric_of(run, metric), known.get(run.name)
    return name in run.expected or (outcome is not None and (name in outcome.metrics or name in outcome.curves))


def _between_initialisations(kind: str, grid: Grid, known: Known) -> list[tuple[str, ...]]:
    """What can be compared with the paper's where the data are others: initialisations with each other."""
    reported = {
        init: TABLE1[50, init].values() if kind == "table1" else TABLE2[50, init] for init in (SCRATCH, PRETRAINED)
    }
    papers = [signed(a - b) for a, b in zip(reported[SCRATCH], reported[PRETRAINED], strict=True)]
    ours = _difference(grid[f"R18, {SCRATCH}"], grid[f"R18, {PRETRAINED}"], known)
    return [ours, (f"{ours[0]}, R50 in the paper", *papers)]


def _between_two(grid: Grid, known: Known) -> list[tuple[str, ...]]:
    """The difference between one's own recipes where there is one of each initialisation."""
    trained = [row for row in grid.values() if row[0].runs[0].kind != PRETRAIN]
    by_init = {row[0].runs[0].init: row for row in trained}
    return [_difference(by_init[SCRATCH], by_init[PRETRAINED], known)] if len(trained) == len(by_init) == 2 else []


def _difference(scratch: Sequence[Cell], pretrained: Sequence[Cell], known: Known) -> tuple[str, ...]:
    numbers = (difference(a.values(known), b.values(known)) for a, b in zip(scratch, pretrained, strict=True))
    return (f"{SCRATCH} - {PRETRAINED}", *numbers)
