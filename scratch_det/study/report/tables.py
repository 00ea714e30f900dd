"""Tables of what a study's runs reached, beside the paper's numbers where it has them, as Markdown, CSV and LaTeX."""

import math
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from statistics import mean, stdev

from scratch_det import tables
from scratch_det.evaluation.metrics import METRICS, PRETRAINED, SCRATCH, TTA
from scratch_det.study import own
from scratch_det.study.digits import CLAIMS
from scratch_det.study.experiments import of_place
from scratch_det.study.paper import METRICS as PAPER_METRICS
from scratch_det.study.records import BLOCKED, DECIMALS, DIVERGED, FAILED, FINISHED, READY, Record
from scratch_det.study.report.inits import NOTES as NOTES_OF_MATRIX
from scratch_det.study.report.inits import matrix
from scratch_det.study.report.seeds import BOX, Difference, Seeds, difference, epochs, grouped, model_of, scores, stated
from scratch_det.study.run import EVALUATE, PRETRAIN, SEARCH, Claim, Run

DIGITS, WHOLES, TOP1 = "digits/", ("paper", "digits"), "classification/top1"
# Figures without a table of their own, and the one that their runs are part of:
SHOWN_IN = {"figure1": "table1", "figure2": "table1", "figure3": "table1", "digits/figure1": "digits/table1",
            "digits/figure2": "digits/table1", "digits/figure7": "digits/small_data",
            "digits/figure8": "digits/small_data"}  # fmt: skip
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
    own.MATRIX: "Initialisations",
    own.CLAIMS: "What the text says",
    "control": "A branch beside the same run trained on its own",
}
LONGEST_ERROR = 200  # characters
BY_MODEL = ("table1", "table2")  # tables with a row for each model and initialisation
NOTES = {  # below a table with this text in one of its numbers
    "±": "±: sample deviation over {seeds} seeds; of a difference half of its 95 % interval, by Student's t over pairs "
    "of equal seeds.",
    "†": "†: not independent: numbers with this sign rest on the same first iterations, where model, initialisation "
    "and seed are the same.",
    " at ": "In brackets: a run that is not finished, at its last evaluation.",
}
LATEX = str.maketrans(
    {sign: f"\\{sign}" for sign in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "[": "{[}", "]": "{]}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$", "†": r"$^{\dagger}$"}
)


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
        values: those of the finished runs, by seed.
        expected: what the paper reports.
        status: shown while there are no values: how far the runs are.
        mark: "†" when the values are not independent of others in the table.
    """

    values: Seeds
    expected: float | None
    status: str
    mark: str

    def text(self, with_paper: bool = False, with_count: bool = False) -> str:
        """The mean and its deviation; ``with_paper`` paper / ours / difference, ``with_count`` the number of seeds."""
        ours, values = self.status, [*self.values.values()]
        if values:
            spread = f" ± {stdev(values):.1f}{f' (n = {len(values)})' * with_count}" if len(values) > 1 else ""
            ours = f"{mean(values):.1f}{spread}{self.mark}"
        if not with_paper or (ours == "-" and self.expected is None):
            return ours
        paper = "-" if self.expected is None else f"{self.expected:.1f}"
        gap = math.nan if self.expected is None or not values else mean(values) - self.expected
        return f"{paper} / {ours} / {Difference(gap)}"


def tables_of(experiment: str, records: Sequence[Record]) -> list[Table]:
    """The table of a place or run; for "paper" and "digits" those of all places with something to show; of a file all.

    Raises UserError when there is no such experiment.
    """
    known, path = {one.run.name: one for one in records}, own.file_of(experiment)
    runs, claims = own.read(path) if path else (of_place(experiment), CLAIMS)
    places = {experiment: runs}
    if path or experiment in WHOLES:
        names = dict.fromkeys(place for run in runs for place in run.places if place not in SHOWN_IN)
        begun = {place for one in records if has_something_to_show(one) for place in one.run.places}
        places = {name: [run for run in runs if name in run.places] for name in names if path or name in begun}
        places |= {own.CLAIMS: runs} if path and claims else {}
    ready = {run.name: Record(run, READY) for run in runs}
    found = [_table(name, [(ready | known)[run.name] for run in runs], known, claims) for name, runs in places.items()]
    return [table for table in found if table.rows]


def title_of(place: str) -> str:
    kind = place.removeprefix(DIGITS)
    return TITLES.get(kind, re.sub(r"^figure(\d)", r"Figure \1", kind)) + ", on digits" * place.startswith(DIGITS)


def has_something_to_show(record: Record) -> bool:
    return bool(record.metrics or record.curves or record.state == FAILED)


def label_of_norm(run: Run) -> str:
    """A run's name among normalisations: two of them are schedules of other tables."""
    if not run.shown.startswith(SCRATCH):
        return run.shown
    return "SyncBN" if run.name.endswith("syncbn") else "GN"


def _table(place: str, records: Sequence[Record], known: Mapping[str, Record], claims: Sequence[Claim]) -> Table:
    """The table of a place from the ``records`` of its runs; ``known`` has those that they rest on too, by name."""
    kind, is_digits, title = place.removeprefix(DIGITS), place.startswith(DIGITS), title_of(place)
    searches = dict.fromkeys(one.run.name if one.run.kind == SEARCH else str(one.run.found_by) for one in records)
    remarks = [f"{name} chose {known[name].found}." for name in searches if name in known and known[name].found]
    for one in records:
        if one.state in (FAILED, BLOCKED) or (one.state == FINISHED and one.error):
            error = one.error[:LONGEST_ERROR] + " ..." * (len(one.error) > LONGEST_ERROR)
            remarks.append(f"{one.run.name} {one.status}: {error or 'no reason was left'}")
    if kind == own.MATRIX:
        header, rows = matrix(records, known)
        return Table(kind, TITLES[kind], tuple(header), tuple(rows), (*NOTES_OF_MATRIX, *remarks))
    if kind == own.CLAIMS:
        head, said, note = stated(claims, records)
        has_begun = any(count != "0" for _, _, count, _ in said)
        return Table(kind, title, head, said if has_begun else (), (note, *remarks))
    if kind == "control":
        compared, verdict = _control(records)
        return Table(kind, title, ("", "branch", "on its own", ""), tuple(compared), (*verdict, *remarks))
    shown = [one for one in records if one.run.kind != SEARCH and not (kind == "table3" and one.run.kind == PRETRAIN)]
    header, grid = _grid(kind, shown, known)
    cells = [cell for row in grid.values() for cell in row]
    with_paper = any(cell.expected is not None for cell in cells)
    counts = {len(cell.values) for cell in cells if len(cell.values) > 1}
    rows = [(label, *(cell.text(with_paper, len(counts) > 1) for cell in row)) for label, row in grid.items()]
    inits = {one.run.init: _label(kind, one.run, shown) for one in shown if one.run.kind != PRETRAIN}
    if kind in (*BY_MODEL, own.PLACE) and len(grid) == len(inits) == 2:
        both = zip(grid[inits[SCRATCH]], grid[inits[PRETRAINED]], strict=True)
        rows.append((f"{SCRATCH} - {PRETRAINED}", *(str(difference(a.values, b.values)) for a, b in both)))
    if kind in BY_MODEL and is_digits:  # other data: only the difference between the initialisations compares
        _, paper = _grid(kind, [Record(run, READY) for run in of_place(kind)], {})
        pairs = zip(paper[f"R50, {SCRATCH}"], paper[f"R50, {PRETRAINED}"], strict=True)
        papers = [str(Difference(a.expected - b.expected)) for a, b in pairs if a.expected and b.expected]
        rows.append((f"{rows[-1][0]}, R50 in the paper", *papers))
    seen = _epochs(kind, shown)
    if kind == "table1":
        header = [f"{name}, {seen[name]} epochs" if name in seen else name for name in header]
    elif seen:
        header, rows = [*header, "epochs"], [(*row, seen.get(row[0], "")) for row in rows]
    text = "".join(cell for row in rows for cell in row[1:])
    seeds = counts.pop() if len(counts) == 1 else "n"
    notes = ["paper / ours / difference, in percent." if with_paper else "In percent."]
    notes += [note.format(seeds=seeds) for sign, note in NOTES.items() if sign in text]
    return Table(kind, title, tuple(header), tuple(rows), (*notes, *remarks))


def _grid(kind: str, records: Sequence[Record], known: Mapping[str, Record]) -> tuple[list[str], dict[str, list[Cell]]]:
    """Header and rows by label; columns are schedules in Table 1, metrics elsewhere."""
    rows = grouped(records, lambda one: _label(kind, one.run, records))
    roots = {one.run.name: _root(one, known) for one in records if one.state == FINISHED}
    shared = {name for name, root in roots.items() if [*roots.values()].count(root) > 1}
    if kind == "table1":
        columns = [(f"{k}x", BOX, k) for k in sorted({one.run.k for one in records})]
    else:
        metrics: Sequence[str] = PAPER_METRICS
        if kind not in ("table2", "table3"):
            has = {name for one in records for name in (*one.run.expected, *one.metrics, *one.curves)}
            metrics = [name for name in COLUMNS if {name, name.replace("/", f"{TTA}/")} & has]
            metrics = metrics or [TOP1 if any(one.run.kind == PRETRAIN for one in records) else BOX]
        columns = [(METRICS[metric].label, metric, -1) for metric in metrics]
    cells = {
        label: [_cell([one for one in row if k in (-1, one.run.k)], metric, shared) for _, metric, k in columns]
        for label, row in rows.items()
    }
    return ["", *(label for label, _, _ in columns)], cells


def _epochs(kind: str, records: Sequence[Record]) -> dict[str, str]:
    """Of the finished runs of each row, of each column in Table 1; none where nobody says."""
    found = grouped(records, lambda one: f"{one.run.k}x" if kind == "table1" else _label(kind, one.run, records))
    return {label: text for label, group in found.items() if (text := epochs(group))}


def _label(kind: str, run: Run, records: Sequence[Record]) -> str:
    """The label of a row. Seeds of a recipe share a label; other runs with the same label add their names."""
    if kind in BY_MODEL:  # R50, scratch
        return f"{model_of(run.name) or run.name}, {run.init}"
    if kind == "norms":
        return label_of_norm(run)
    names = {one.run.name: one.run.repeats for one in records if one.run.shown == run.shown}
    is_one = kind == own.PLACE or len(set(names.values())) == 1
    return run.shown if is_one else f"{run.shown} ({names[run.name]})"


def _cell(records: Sequence[Record], metric: str, shared: Set[str] = frozenset()) -> Cell:
    """``shared``: the finished runs that rest on the same first iterations as others of the table."""
    values: dict[int | None, float] = {}
    expected, unfinished = None, ""
    for one in records:
        name = metric.replace("/", f"{TTA}/") if one.run.kind == EVALUATE else metric
        expected = one.run.expected.get(name) if expected is None else expected
        values |= scores([one], name)
        if one.state != FINISHED and name in one.curves and not unfinished:
            iteration, value = one.curves[name][-1]
            unfinished = f"({value:.1f} at {iteration:,} of {one.run.iterations:,})"
    states = {one.status for one in records}
    status = "failed" if FAILED in states else "diverged" if DIVERGED in states else unfinished
    return Cell(values, expected, status or "-", "†" if any(one.run.name in shared for one in records) else "")


def _root(record: Record, known: Mapping[str, Record]) -> str:
    """The run whose first iterations a record rests on."""
    run = record.run
    if run.evaluates:
        return _root(known[run.evaluates], known) if run.evaluates in known else run.evaluates
    return str(run.trunk) if record.start else run.name


def _control(records: Sequence[Record]) -> tuple[list[tuple[str, ...]], list[str]]:
    """Rows and notes that compare a branch with the same run on its own: every stored number, and the final weights."""
    apart = next(one for one in records if one.run.recipe)
    pair = (next(one for one in records if one.run.name == apart.run.recipe), apart)
    if any(one.state != FINISHED for one in pair):
        return [(BOX, *(_cell([one], BOX).text() for one in pair), "not finished")], []
    equal = ("not equal", "equal")
    a, b = ({name: f"{value:.{DECIMALS}f}" for name, value in one.metrics.items()} for one in pair)
    rows: list[tuple[str, ...]] = [
        (name, a.get(name, "-"), b.get(name, "-"), equal[a.get(name) == b.get(name)]) for name in sorted(a | b)
    ]
    points, others = (
        {(name, at, round(y, DECIMALS)) for name, curve in one.curves.items() for at, y in curve} for one in pair
    )
    rows.append(("points of the curves", f"{len(points):,}", f"{len(others):,}", f"{len(points & others):,} equal"))
    ours, theirs = (one.weights_sha256 for one in pair)
    same = equal[ours == theirs] if ours and theirs else "-"
    rows.append(("final weights, SHA-256", ours[:12] or "-", theirs[:12] or "-", same))
    verdict = "equal" if a == b and points == others else "NOT equal"
    return rows, [f"All numbers are {verdict} to the last of the {DECIMALS} decimals that are stored."]


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


def as_latex(table: Table) -> str:
    """A table environment for the booktabs package. Not tabulate's, which escapes fewer signs, and no caption."""
    header, *rows = [f"{' & '.join(map(latex_text, row))} \\\\" for row in (table.header, *table.rows)]
    title, columns = latex_text(table.title), "l" + "c" * (len(table.header) - 1)
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{title}}}", rf"\begin{{tabular}}{{{columns}}}"]
    lines += [r"\toprule", header, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"]
    lines += [f"\n{{\\footnotesize {latex_text(note)}\\par}}" for note in table.notes]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


FORMATS = {"md": as_markdown, "csv": lambda table: tables.as_csv([table.header, *table.rows]), "tex": as_latex}
