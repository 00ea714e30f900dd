"""Tables of results/ in README.md and docs/*.md, each between two lines that name its experiment:

<!-- results digits/table1 -->
<!-- end -->

docs/digits/ has the figures of results/digits/, and SOURCE: SHA-256 of the numbers that they were drawn from, and of
each figure. Remove SOURCE to draw them anew from the same numbers, such as with another style.
"""

import hashlib
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

from scratch_det.errors import UserError
from scratch_det.files import write_atomically
from scratch_det.study.experiments import of_place
from scratch_det.study.records import CURVES, RUNS, Record, load
from scratch_det.study.report.figures import draw, figures_of
from scratch_det.study.report.results import require_unedited
from scratch_det.study.report.tables import DIGITS, as_markdown, tables_of

BEGIN, END = re.compile(r"<!--\s*results\b(.*)-->\s*"), re.compile(r"<!--\s*end\s*-->\s*")
RESULTS, SOURCE = Path("results"), "SOURCE"
FOLDERS = ("digits", "paper")  # below results/ and docs/, by experiment

Load = Callable[[str], list[Record]]  # the records of results/NAME


def render(root: Path, check: bool = False) -> list[Path]:
    """Bring the documents of the repository in ``root`` up to date, unless ``check``; returns those that were not.

    Raises UserError, before anything is written, when a marker names no experiment or has no end, or when there are no
    results for it or they were edited.
    """

    @cache
    def records_of(name: str) -> list[Record]:
        records = load(root / RESULTS / name)
        require_unedited(root / RESULTS / name)
        return records

    contents = {path: path.read_text() for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]}
    rendered = {path: rendered_text(text, path, records_of) for path, text in contents.items()}
    stale = [path for path, text in contents.items() if text != rendered[path]]
    for path in stale if not check else ():
        write_atomically(path, rendered[path])
    return [*stale, *_stale_figures(root, check, records_of)]


def _stale_figures(root: Path, check: bool, records_of: Load) -> list[Path]:
    """docs/NAME/SOURCE of each results/NAME whose figures are of other numbers, changed or missing."""
    stale = []
    for name in FOLDERS:
        runs, source = root / RESULTS / name / RUNS, root / "docs" / name / SOURCE
        if not runs.exists():
            continue
        numbers = f"{_digest(runs, runs.with_name(CURVES))}  numbers"
        known, *lines = source.read_text().splitlines() if source.exists() else [""]
        drawn = {
            source.with_name(Path(figure).name): digest
            for digest, _, figure in (line.partition("  ") for line in lines)
        }
        if known == numbers and all(path.exists() and _digest(path) == digest for path, digest in drawn.items()):
            continue
        stale.append(source)
        if not check:
            paths = draw(figures_of(name, records_of(name)), source.parent)
            for old in drawn.keys() - {*paths, source}:
                old.unlink(missing_ok=True)
            write_atomically(source, "\n".join([numbers, *(f"{_digest(path)}  {path.name}" for path in paths)]) + "\n")
    return stale


def _digest(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def rendered_text(text: str, path: Path, records_of: Load) -> str:
    """The text of ``path`` with the tables that its markers name."""
    lines, opened = [], 0  # the line of the marker that has no end yet
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        begin, end = BEGIN.fullmatch(line), END.fullmatch(line)
        if begin and opened:
            break
        if end and not opened:
            raise UserError(f"{path}:{number}: nothing begins before this end")
        if begin:
            opened = number
            try:
                experiment = begin[1].strip()
                is_digits = any(place.startswith(DIGITS) for run in of_place(experiment) for place in run.places)
                tables = tables_of(experiment, records_of("digits" if is_digits else "paper"))
            except UserError as error:
                raise UserError(f"{path}:{number}: {error}") from None
            lines += [line.rstrip() + "\n\n", "\n".join(map(as_markdown, tables)), "\n"]
        elif end:
            opened = 0
        if not begin and not opened:
            lines.append(line)
    if opened:
        raise UserError(f"{path}:{opened}: no <!-- end --> follows")
    return "".join(lines)
