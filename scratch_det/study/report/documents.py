"""README.md and docs/*.md show what is in results/, between two lines that say what:

<!-- results digits/table1 -->
<!-- end -->

docs/digits/ has the figures of results/digits/, and SOURCE: digests of the numbers and of the code that they were drawn
from, for other versions of matplotlib draw other bytes, and of the figures' files.
"""

import hashlib
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

from scratch_det.errors import UserError
from scratch_det.files import write_atomically
from scratch_det.study import samples
from scratch_det.study.experiments import of_place
from scratch_det.study.records import CURVES, RUNS, Record, load
from scratch_det.study.report.data import require_unedited
from scratch_det.study.report.formats import as_markdown
from scratch_det.study.report.tables import DIGITS, tables_of
from scratch_det.visualization import curves

BEGIN, END = re.compile(r"<!--\s*results\b(.*)-->\s*"), re.compile(r"<!--\s*end\s*-->\s*")
RESULTS, SOURCE = Path("results"), "SOURCE"
FOLDERS = ("digits", "paper")  # below results/, by experiment
DRAWN_BY = [
    *(Path(__file__).with_name(f"{name}.py") for name in ("figures", "drawings", "panels", "cells")),
    Path(curves.__file__),
    Path(samples.__file__),
]


def render(root: Path, check: bool = False) -> list[Path]:
    """Bring the documents of the repository in ``root`` up to date; the ones that were not, in ``check`` untouched.

    Raises UserError, before anything is written, when a marker names no experiment or has no end, or when there are no
    results for it.
    """
    contents = {path: path.read_text() for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]}
    load_once = cache(lambda name: _results(root / RESULTS / name))
    rendered = {path: rendered_text(text, path, load_once) for path, text in contents.items()}
    stale = [path for path, text in contents.items() if text != rendered[path]]
    for path in stale if not check else ():
        write_atomically(path, rendered[path])
    return [*stale, *_stale_figures(root, check, load_once)]


def _results(folder: Path) -> list[Record]:
    """Raises UserError when there are none, or when they were edited."""
    outcomes = load(folder)
    require_unedited(folder)
    return outcomes


def _stale_figures(root: Path, check: bool, results: Callable[[str], list[Record]]) -> list[Path]:
    """docs/NAME/SOURCE of each results/NAME whose figures are of other numbers or gone; drawn anew unless ``check``."""
    stale = []
    for name in FOLDERS:
        runs, source = root / RESULTS / name / RUNS, root / "docs" / name / SOURCE
        if not runs.exists():
            continue
        digests = [f"{_digest(runs, runs.with_name(CURVES))}  numbers", f"{_digest(*DRAWN_BY)}  drawings"]
        known = source.read_text().splitlines() if source.exists() else []
        drawn = {source.parent / Path(line.split()[-1]).name: line.split()[0] for line in known[2:]}  # "DIGEST  NAME"
        if known[:2] == digests and all(path.exists() and _digest(path) == was for path, was in drawn.items()):
            continue
        stale.append(source)
        if not check:
            from scratch_det.study.report.figures import draw, figures_of  # matplotlib takes a while

            paths = draw(figures_of(name, results(name)), source.parent)
            for old in drawn.keys() - {*paths, source}:
                old.unlink(missing_ok=True)
            write_atomically(source, "\n".join([*digests, *(f"{_digest(path)}  {path.name}" for path in paths)]) + "\n")
    return stale


def _digest(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def rendered_text(text: str, path: Path, results: Callable[[str], list[Record]]) -> str:
    """The text of ``path`` with the tables that its markers name; ``results`` of "digits" or "paper"."""
    lines, opened = [], 0
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        begin, end = BEGIN.fullmatch(line), END.fullmatch(line)
        if bool(begin) == bool(opened) and (begin or end):
            at = opened if begin else number
            raise UserError(f"{path}:{at}: {'no <!-- end --> follows' if begin else 'nothing begins before this end'}")
        if begin:
            opened = number
            try:
                shown = _tables(begin[1].strip(), results)
            except UserError as error:
                raise UserError(f"{path}:{number}: {error}") from None
            lines += [line.rstrip() + "\n\n", shown]
        elif end:
            opened = 0
            lines.append("\n" + line)
        elif not opened:
            lines.append(line)
    if opened:
        raise UserError(f"{path}:{opened}: no <!-- end --> follows")
    return "".join(lines)


def _tables(experiment: str, results: Callable[[str], list[Record]]) -> str:
    of_digits = any(place.startswith(DIGITS) for run in of_place(experiment) for place in run.places)
    tables = tables_of(experiment, results("digits" if of_digits else "paper"))
    return "\n".join(map(as_markdown, tables))
