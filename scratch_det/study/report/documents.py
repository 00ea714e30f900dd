"""README.md and docs/*.md show what is in results/, between two lines that say what:

<!-- results digits/table1 -->
<!-- end -->

docs/digits/ has the figures of results/digits/, and SOURCE, a digest of the numbers that they were drawn from: other
versions of matplotlib draw other bytes.
"""

import hashlib
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

from scratch_det.errors import UserError
from scratch_det.study.experiments import of_place
from scratch_det.study.outcome import CURVES, RUNS, Outcome, load
from scratch_det.study.report.formats import as_markdown
from scratch_det.study.report.tables import DIGITS, tables_of
from scratch_det.textfile import write_atomically

BEGIN, END = re.compile(r"<!--\s*results\b(.*)-->\s*"), re.compile(r"<!--\s*end\s*-->\s*")
RESULTS = Path("results")


def render(root: Path, check: bool = False) -> list[Path]:
    """Bring the documents of the repository in ``root`` up to date; the ones that were not, in ``check`` untouched.

    Raises UserError, before anything is written, when a marker names no experiment or has no end, or when there are no
    results for it.
    """
    contents = {path: path.read_text() for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]}
    load_once = cache(lambda name: load(root / RESULTS / name))
    rendered = {path: rendered_text(text, path, load_once) for path, text in contents.items()}
    stale = [path for path, text in contents.items() if text != rendered[path]]
    for path in stale if not check else ():
        write_atomically(path, rendered[path])
    return [*stale, *_stale_figures(root, check)]


def _stale_figures(root: Path, check: bool) -> list[Path]:
    """docs/NAME/SOURCE of each results/NAME whose figures are of other numbers; drawn anew unless ``check``."""
    stale = []
    for runs in sorted((root / RESULTS).glob(f"*/{RUNS}")):
        name, source = runs.parent.name, root / "docs" / runs.parent.name / "SOURCE"
        digest = hashlib.sha256(runs.read_bytes() + runs.with_name(CURVES).read_bytes()).hexdigest() + "\n"
        if source.exists() and source.read_text() == digest:
            continue
        stale.append(source)
        if not check:
            from scratch_det.study.report.figures import draw  # matplotlib takes a while

            draw(name, load(runs.parent), source.parent)
            write_atomically(source, digest)
    return stale


def rendered_text(text: str, path: Path, results: Callable[[str], list[Outcome]]) -> str:
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


def _tables(experiment: str, results: Callable[[str], list[Outcome]]) -> str:
    of_digits = any(place.startswith(DIGITS) for run in of_place(experiment) for place in run.places)
    tables = tables_of(experiment, results("digits" if of_digits else "paper"))
    return "\n".join(map(as_markdown, tables))
