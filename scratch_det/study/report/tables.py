"""Tables of what a study's runs reached, beside the paper's numbers where it has them, as Markdown, CSV and LaTeX."""

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev, variance

from scratch_det import tables
from scratch_det.evaluation.metrics import METRICS
from scratch_det.study import own
from scratch_det.study.experiments import of_place
from scratch_det.study.paper import METRICS as PAPER_METRICS
from scratch_det.study.paper import PRETRAINED, SCRATCH, TABLE1, TABLE2
from scratch_det.study.records import BLOCKED, DECIMALS, FAILED, FINISHED, Record
from scratch_det.study.run import EVALUATE, PRETRAIN, SEARCH, Run

DIGITS, WHOLES, BOX, TOP1 = "digits/", ("paper", "digits"), "bbox/AP", "classification/top1"
SHOWN_ELSEWHERE = ("figure1", "figure3", "digits/figure1", "digits/figure7", "digits/figure8")  # part of other tables
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
LONGEST_ERROR = 200  # characters
TABLES_OF_PAPER: Mapping[str, Mapping[tuple[int, str], Sequence[float]]] = {
    "table1": {model: tuple(row.values()) for model, row in TABLE1.items()},
    "table2": TABLE2,
}
NOTES = {  # below a table with this text in one of its numbers
    "±": "±: sample deviation over {seeds} seeds; behind a difference of means its standard error.",
    "†": "†: not independent: numbers with this sign rest on the same first iterations, where model, initialisation "
    "and seed are the same.",
    " at ": "In brackets: a run that is not finished, at its last evaluation.",
}
LATEX = str.maketrans(
    {sign: f"\\{sign}" for sign in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "[": "{[}", "]": "{]}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$", "†": r"$^{\dagger}$"}
)

Records = Mapping[str, Record]  # by the run's name


@dataclass(frozen=True)
class Table:
    """A table as text, which may come from run folders: each format escapes it.

    Attributes:
        name: of its file, without suffix.
        title: one line.
        header: a word for each column.
        rows: each with as many cells as the header.
        notes: sentences below the table.
    """

    name: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One metric, in percent, of a run and its repetitions with other seeds.

    Attributes:
        values: those of the finished runs.
        expected: what the paper reports.
        status: shown while there are no values: how far the runs are.
        mark: "†" when the values are not independent of others in the table.
    """

    values: Sequence[float]
    expected: float | None
    status: str
    mark: str

    def text(self, with_paper: bool, with_count: bool) -> str:
        """The mean and its deviation; ``with_paper`` paper / ours / difference, ``with_count`` the number of seeds."""
        ours, values = self.status, self.values
        if values:
            spread = f" ± {stdev(values):.1f}{f' (n = {len(values)})' * with_count}" if len(values) > 1 else ""
            ours = f"{mean(values):.1f}{spread}{self.mark}"
        if not with_paper or (ours == "-" and self.expected is None):
            return ours
        paper = "-" if self.expected is None else f"{self.expected:.1f}"
        difference = "-" if self.expected is None or not values else signed(mean(values) - self.expected)
        return f"{paper} / {ours} / {difference}"


def tables_of(experiment: str, records: Sequence[Record]) -> list[Table]:
    """The table of a place or run; for "paper" and "digits" those of all places with something to show.

    Raises UserError when there is no such experiment.
    """
    known, runs = {one.run.name: one for one in records}, of_place(experiment)
    places = {own.PLACE if own.is_file(experiment) else experiment: runs}
    if experiment in WHOLES:
        names = dict.fromkeys(place for run in runs for place in run.places if place not in SHOWN_ELSEWHERE)
        places = {name: [run for run in runs if name in run.places] for name in names}
        begun = {one.run.name for one in records if has_something_to_show(one)}
        places = {name: there for name, there in places.items() if any(run.name in begun for run in there)}
    found = [_table(name, there, known) for name, there in places.items()]
    return [table for table in found if table.rows]


def has_something_to_show(record: Record) -> bool:
    """Whether there is anything to show."""
    return bool(record.metrics or record.curves or record.state == FAILED)


def label_of_norm(run: Run) -> str:
    """A run's name among normalisations: two of them are schedules of other tables."""
    if not run.shown.startswith(SCRATCH):
        return run.shown
    return "SyncBN" if run.name.endswith("syncbn") else "GN"


def signed(difference: float) -> str:
    return f"{round(difference, 1) + 0.0:+.1f}"  # never -0.0


def _table(place: str, runs: Sequence[Run], known: Records) -> Table:
    kind, is_digits = place.removeprefix(DIGITS), place.startswith(DIGITS)
    title = TITLES.get(kind, re.sub(r"^figure(\d)", r"Figure \1", kind)) + (", on digits" if is_digits else "")
    said = (*_found(runs, known), *_failures(runs, known))
    if kind == "control":
        compared, verdict = _control(runs, known)
        return Table(kind, title, ("", "branch", "on its own", ""), tuple(compared), (*verdict, *said))
    shown = [run for run in runs if run.kind != SEARCH and not (kind == "table3" and run.kind == PRETRAIN)]
    header, grid = _grid(kind, shown, known)
    cells = [cell for row in grid.values() for cell in row]
    with_paper = any(cell.expected is not None for cell in cells)
    counts = {len(cell.values) for cell in cells if len(cell.values) > 1}
    rows = [(label, *(cell.text(with_paper, len(counts) > 1) for cell in row)) for label, row in grid.items()]
    if is_digits and kind in TABLES_OF_PAPER:
        # Other data: only the difference between the initialisations compares with the paper's.
        scratch, pretrained = (TABLES_OF_PAPER[kind][50, init] for init in (SCRATCH, PRETRAINED))
        gap = _gap(grid[f"R18, {SCRATCH}"], grid[f"R18, {PRETRAINED}"])
        papers = (signed(a - b) for a, b in zip(scratch, pretrained, strict=True))
        rows += [gap, (f"{gap[0]}, R50 in the paper", *papers)]
    if kind == own.PLACE:
        inits = {run.shown: run.init for run in shown if run.kind != PRETRAIN}
        if sorted(inits.values()) == sorted((SCRATCH, PRETRAINED)):
            by_init = {init: grid[label] for label, init in inits.items()}
            rows.append(_gap(by_init[SCRATCH], by_init[PRETRAINED]))
    text = "".join(cell for row in rows for cell in row[1:])
    seeds = counts.pop() if len(counts) == 1 else "n"
    notes = ["paper / ours / difference, in percent." if with_paper else "In percent."]
    notes += [note.format(seeds=seeds) for sign, note in NOTES.items() if sign in text]
    return Table(kind, title, header, tuple(rows), (*notes, *said))


def _grid(kind: str, runs: Sequence[Run], known: Records) -> tuple[tuple[str, ...], dict[str, list[Cell]]]:
    """Header and rows by label; columns are schedules in Table 1, metrics elsewhere."""
    rows: dict[str, list[Run]] = {}
    for run in runs:
        rows.setdefault(_label(kind, run, runs), []).append(run)
    if kind == "table1":
        columns = [(f"{k}x", BOX, {k}) for k in sorted({run.k for run in runs})]
    else:
        every = {run.k for run in runs}
        metrics: Sequence[str] = [name for name in COLUMNS if any(_has(run, name, known) for run in runs)]
        metrics = metrics or [TOP1 if any(run.kind == PRETRAIN for run in runs) else BOX]
        columns = [
            (METRICS[name].label, name, every) for name in (PAPER_METRICS if kind in ("table2", "table3") else metrics)
        ]
    dependent = _dependent(runs, known)
    grid = {
        label: [
            _cell([run for run in row if run.k in lengths], metric, known, dependent) for _, metric, lengths in columns
        ]
        for label, row in rows.items()
    }
    return ("", *(header for header, _, _ in columns)), grid


def _label(kind: str, run: Run, runs: Sequence[Run]) -> str:
    """Of a row. Seeds of one recipe share a label; runs of different recipes with the same label add their names."""
    if kind in TABLES_OF_PAPER:  # R50, scratch
        model = re.search(r"_([RX])_(\d+)", run.name)
        return f"{''.join(model.groups()) if model else run.name}, {run.init}"
    if kind == "norms":
        return label_of_norm(run)
    names = {
        one.recipe if one.seed is not None and one.recipe else one.name: one for one in runs if one.shown == run.shown
    }
    if kind == own.PLACE or len(names) == 1:
        return run.shown
    return f"{run.shown} ({run.recipe if run.seed is not None and run.recipe else run.name})"


def _metric_of(run: Run, metric: str) -> str:
    """The metric's name in the run's results: evaluations of another run's weights are with test augmentation."""
    return metric.replace("/", "_TTA/") if run.kind == EVALUATE else metric


def _has(run: Run, metric: str, known: Records) -> bool:
    name, record = _metric_of(run, metric), known.get(run.name)
    return name in run.expected or (record is not None and (name in record.metrics or name in record.curves))


def _cell(runs: Sequence[Run], metric: str, known: Records, dependent: set[str]) -> Cell:
    values, unfinished, failed = [], "", False
    for record in (known[run.name] for run in runs if run.name in known):
        name = _metric_of(record.run, metric)
        failed |= record.state == FAILED
        if record.state == FINISHED and math.isfinite(value := record.metrics.get(name, math.nan)):
            values.append(round(value, DECIMALS))
        elif record.state != FINISHED and record.curves.get(name) and not unfinished:
            iteration, value = record.curves[name][-1]
            unfinished = f"({value:.1f} at {iteration:,} of {record.run.iterations:,})"
    expected = (run.expected[name] for run in runs if (name := _metric_of(run, metric)) in run.expected)
    mark = "†" if any(run.name in dependent for run in runs) else ""
    return Cell(values, next(expected, None), "failed" if failed else unfinished or "-", mark)


def _dependent(runs: Iterable[Run], known: Records) -> set[str]:
    """The finished ones among ``runs`` that share their first iterations with another one among them."""
    roots = {
        run.name: _root(known[run.name], known)
        for run in runs
        if run.name in known and known[run.name].state == FINISHED
    }
    count = Counter(roots.values())
    return {name for name, root in roots.items() if count[root] > 1}


def _root(record: Record, known: Records) -> str:
    """The run whose first iterations a record rests on."""
    run = record.run
    if run.evaluates:
        return _root(known[run.evaluates], known) if run.evaluates in known else run.evaluates
    return str(run.trunk) if record.shares else run.name


def _gap(scratch: Sequence[Cell], pretrained: Sequence[Cell]) -> tuple[str, ...]:
    """The difference of two rows' means, with its standard error where both have several seeds."""
    texts = []
    for ours, theirs in ((a.values, b.values) for a, b in zip(scratch, pretrained, strict=True)):
        text = signed(mean(ours) - mean(theirs)) if ours and theirs else "-"
        if min(len(ours), len(theirs)) > 1:
            text += f" ± {math.sqrt(variance(ours) / len(ours) + variance(theirs) / len(theirs)):.1f}"
        texts.append(text)
    return (f"{SCRATCH} - {PRETRAINED}", *texts)


def _found(runs: Sequence[Run], known: Records) -> Iterator[str]:
    """What searches among ``runs``, or behind them, chose."""
    for name in dict.fromkeys(run.name if run.kind == SEARCH else str(run.found_by) for run in runs):
        if name in known and known[name].found:
            yield f"{name} chose {known[name].found}."


def _failures(runs: Sequence[Run], known: Records) -> Iterator[str]:
    for record in (known[run.name] for run in runs if run.name in known):
        if record.state in (FAILED, BLOCKED):
            error = record.error[:LONGEST_ERROR] + " ..." * (len(record.error) > LONGEST_ERROR)
            yield f"{record.run.name} {record.state}: {error or 'no reason was left'}"


def _control(runs: Sequence[Run], known: Records) -> tuple[list[tuple[str, ...]], list[str]]:
    """Rows and notes that compare a branch with the same run on its own: every stored number, and the final weights."""
    apart = next(run for run in runs if run.recipe)
    branch = next(run for run in runs if run.name == apart.recipe)
    pair = [known.get(run.name) for run in (branch, apart)]
    a, b = pair
    if a is None or b is None or {a.state, b.state} != {FINISHED}:
        return [
            (BOX, *(_cell([run], BOX, known, set()).text(False, False) for run in (branch, apart)), "not finished")
        ], []
    numbers = [{name: f"{value:.{DECIMALS}f}" for name, value in one.metrics.items()} for one in (a, b)]
    points = [
        {(name, at, f"{value:.{DECIMALS}f}") for name, curve in one.curves.items() for at, value in curve}
        for one in (a, b)
    ]
    verdict = {True: "equal", False: "not equal"}
    rows: list[tuple[str, ...]] = []
    for name in sorted({*numbers[0], *numbers[1]}):
        ours, theirs = (one.get(name, "-") for one in numbers)
        rows.append((name, ours, theirs, verdict[ours == theirs]))
    rows.append(("points of the curves", *(f"{len(one):,}" for one in points), f"{len(points[0] & points[1]):,} equal"))
    digests = (a.weights_sha256, b.weights_sha256)
    same = verdict[digests[0] == digests[1]] if all(digests) else "-"
    rows.append(("final weights, SHA-256", *(digest[:12] or "-" for digest in digests), same))
    equal = numbers[0] == numbers[1] and points[0] == points[1]
    note = (
        f"All numbers are {'equal' if equal else 'NOT equal'} to the last of the {DECIMALS} decimals that are stored."
    )
    return rows, [note]


# Formats ---------------------------------------------------------------------------------------------------------


def on_one_line(text: str) -> str:
    """Without line ends and control characters, which a terminal would obey."""
    return "".join(sign for sign in " ".join(text.split()) if sign.isprintable())


def markdown_text(text: str) -> str:
    """Escaped: neither markup nor HTML."""
    text = re.sub(r"([\\`*|~\[\]])", r"\\\1", on_one_line(text))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def latex_text(text: str) -> str:
    """Escaped; two hyphens are no dash."""
    return on_one_line(text).translate(LATEX).replace("--", "-{}-")


def as_markdown(table: Table) -> str:
    """The title in bold, the table, a paragraph for each note."""
    header, *rows = [[markdown_text(cell) for cell in row] for row in (table.header, *table.rows)]
    title, *notes = map(markdown_text, (table.title, *table.notes))
    return "\n\n".join([f"**{title}**", tables.markdown(header, rows), *notes]) + "\n"


def as_csv(table: Table) -> str:
    """Header and rows."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([table.header, *table.rows])
    return text.getvalue()


def as_latex(table: Table) -> str:
    """A table environment for the booktabs package. Not tabulate's, which escapes fewer signs, and no caption."""
    header, *rows = [f"{' & '.join(map(latex_text, row))} \\\\" for row in (table.header, *table.rows)]
    title, columns = latex_text(table.title), "l" + "c" * (len(table.header) - 1)
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{title}}}", rf"\begin{{tabular}}{{{columns}}}"]
    lines += [r"\toprule", header, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"]
    lines += [f"\n{{\\footnotesize {latex_text(note)}\\par}}" for note in table.notes]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


FORMATS = {"md": as_markdown, "csv": as_csv, "tex": as_latex}
