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
from itertools import zip_longest
from pathlib import Path

from scratch_det.errors import UserError
from scratch_det.files import write_atomically
from scratch_det.study.experiments import of_place
from scratch_det.study.records import CURVES, RUNS, Record, load
from scratch_det.study.report.figures import FIGURES, draw, figures_of
from scratch_det.study.report.tables import DIGITS, WHOLES, as_markdown, tables_of
from scratch_det.study.report.write import require_unedited

MARKER = re.compile(r"^<!--\s*(?:results\b(?P<experiment>.*?)|end)\s*-->", re.MULTILINE)
RESULTS, SOURCE = Path("results"), "SOURCE"


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
    for name in WHOLES:  # docs/NAME/SOURCE of those whose figures are of other numbers, changed or missing
        results, folder = root / RESULTS / name, root / "docs" / name
        source = folder / SOURCE
        if not (results / RUNS).exists() or (source.exists() and source.read_text() == _source(results, folder)):
            continue
        stale.append(source)
        if not check:
            figures = figures_of(name, records_of(name))
            for old in _figures(folder):
                old.unlink()
            draw(figures, folder)
            write_atomically(source, _source(results, folder))
    return stale


def _source(results: Path, figures: Path) -> str:
    """What SOURCE has to be: a line of digest and name for the numbers and for each figure."""
    numbers = b"".join((results / name).read_bytes() for name in (RUNS, CURVES))
    contents = {"numbers": numbers, **{path.name: path.read_bytes() for path in _figures(figures)}}
    return "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in contents.items())


def _figures(folder: Path) -> list[Path]:
    """The files in ``folder`` that ``draw`` may have written."""
    paths = [folder / f"{name}.{suffix}" for name in FIGURES for suffix in ("svg", "png")]
    return [path for path in paths if path.exists()]


def rendered_text(text: str, path: Path, records_of: Callable[[str], list[Record]]) -> str:
    """The text of ``path`` with the tables that its markers name."""
    parts, done, markers = [], 0, list(MARKER.finditer(text))
    for begin, end in zip_longest(markers[::2], markers[1::2]):
        where = f"{path}:{len(text[: begin.start()].splitlines()) + 1}"
        if begin["experiment"] is None:
            raise UserError(f"{where}: nothing begins before this end")
        if end is None or end["experiment"] is not None:
            raise UserError(f"{where}: no <!-- end --> follows")
        try:
            experiment = begin["experiment"].strip()
            is_digits = any(place.startswith(DIGITS) for run in of_place(experiment) for place in run.places)
            tables = tables_of(experiment, records_of("digits" if is_digits else "paper"))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        parts += [text[done : begin.end()], "\n\n", "\n".join(map(as_markdown, tables)), "\n"]
        done = end.start()
    return "".join([*parts, text[done:]])
