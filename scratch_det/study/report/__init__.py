"""What is written from the records of a study: its report, and the documents of this repository.

The report is in DIR/report/, that of a part of the study in DIR/report/PART/: tables, figures, one page. It depends
only on the run folders: it is the same, byte for byte, however often the study was interrupted, and whatever was
reported before.

Tables of results/ stand in README.md and docs/*.md, each between two lines that name its experiment, or one of
studies/:

<!-- results digits/table1 -->
<!-- end -->

docs/digits/ has the figures and the page of results/digits/ (docs/NAME/ of results/NAME/, by studies/NAME.yaml), and
SOURCE: SHA-256 of the numbers that they were drawn from, and of each figure. Remove SOURCE to draw them anew from the
same numbers, such as with another style.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import zip_longest
from pathlib import Path

from scratch_det.errors import UserError
from scratch_det.files import ROOT, sha256_of, write_atomically
from scratch_det.reading import read_json
from scratch_det.study import own
from scratch_det.study import records as stored
from scratch_det.study.experiments import jobs_of, of_place
from scratch_det.study.records import CURVES, RUNS, Record
from scratch_det.study.report.figures import FIGURES, draw, figures_of
from scratch_det.study.report.page import Folders, read_folders, study_page
from scratch_det.study.report.results import read_results, with_made, write_results
from scratch_det.study.report.tables import DIGITS, FORMATS, WHOLES, as_markdown, has_something_to_show, tables_of
from scratch_det.study.study import DESCRIPTION, Study

MARKER = re.compile(r"^<!--\s*(?:results\b(?P<experiment>.*?)|end)\s*-->", re.MULTILINE)


def write_report(study: Study, experiment: str, results: Path | None = None) -> list[Path]:
    """Write the report of ``experiment``, all of ``study`` or a part of it, and ``results``; returns the files.

    Raises UserError, before anything is written, when the study has no such runs, when none of them has anything to
    show, or when ``results`` is another experiment's or of other data; DataError for damaged files.
    """
    earlier = read_results(results, experiment) if results else {}
    runs = of_place(experiment)  # and those that they need:
    shown, names = {run.name for run in runs}, {job.name for job in jobs_of(runs)}
    if names - {job.name for job in study.jobs}:
        raise UserError(f"--out {study.out} holds the study {study.experiment}, of which {experiment} is no part")
    known = [one for one in stored.survey(study.jobs, study.out, {}) if one.run.name in names]
    records = [with_made(_without_machine(one, study.out), study) for one in stored.collect(known, study.out)]
    if not any(one.run.name in shown and has_something_to_show(one) for one in records):
        raise UserError(f"no run of {experiment} in {study.out} has anything to show yet; see scratch-det study status")
    report = study.out / "report" / ("" if experiment == study.experiment else experiment.replace("/", "-"))
    report.mkdir(parents=True, exist_ok=True)
    data = write_results(records, earlier, study, experiment, results) if results else ()
    tables, page = tables_of(experiment, records), report / "index.html"
    files = {report / f"{table.name}.{suffix}": text(table) for table in tables for suffix, text in FORMATS.items()}
    for path, content in files.items():
        write_atomically(path, content)
    drawn = draw(figures_of(experiment, records), report)
    figures = {path.stem: path.read_text() for path in drawn if path.suffix == ".svg"}
    folders = read_folders(records, study.out, page)
    write_atomically(page, study_page(f"{experiment}: report", tables, records, figures, folders))
    # Remove what an earlier report of more runs left; keep files with other names, which are not ours.
    named = {name.removeprefix(DIGITS) for job in study.jobs for name in (job.name, *job.run.places)}
    old = {report / f"{name}.{suffix}" for name in {*named, own.CLAIMS} for suffix in FORMATS}
    for path in {*old, *_figures_in(report)} - {*files, *drawn}:
        path.unlink(missing_ok=True)
    return [page, *files, *drawn, *data]


def _without_machine(record: Record, out: Path) -> Record:
    """``record`` without what differs between machines and starts of a study: running processes, and folders' paths."""
    error = record.error
    for folder in (out.resolve(), out, ROOT, Path.home()):
        if folder.parts:  # Path(".") has none
            error = re.sub(rf"(?<![\w./-]){re.escape(str(folder))}/", "", error)
    return replace(record, error=error, state=stored.UNFINISHED if record.state == stored.INTERRUPTED else record.state)


# Documents of this repository ------------------------------------------------------------------------------------


def render(root: Path, check: bool = False) -> list[Path]:
    """Bring the documents of the repository in ``root`` up to date, unless ``check``; returns those that were not.

    Raises UserError, before anything is written, when a marker names no experiment or has no end, or when there are no
    results for it or they were edited.
    """

    @cache
    def records_of(name: str) -> list[Record]:
        folder = root / "results" / name
        if (folder / DESCRIPTION).exists():
            return [*read_results(folder, name).values()]
        return stored.load(folder, () if name in WHOLES else of_place(name))

    contents = {path: path.read_text() for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]}
    rendered = {path: rendered_text(text, path, records_of) for path, text in contents.items()}
    stale = [path for path, text in contents.items() if text != rendered[path]]
    for path in stale if not check else ():
        write_atomically(path, rendered[path])
    for name in (*WHOLES, *(path.stem for path in sorted(own.STUDIES.glob("*.yaml")))):
        results, folder = root / "results" / name, root / "docs" / name
        source, page = folder / "SOURCE", folder / "index.html"
        if not (results / RUNS).exists():
            continue
        records = records_of(name)
        if not source.exists() or source.read_text() != _source(results, folder):
            stale.append(source)
            if check:
                continue
            drawn = figures_of(name, records)
            for old in _figures_in(folder):
                old.unlink()
            draw(drawn, folder, ["svg"])
            write_atomically(source, _source(results, folder))
        figures = {path.stem: path.read_text() for path in _figures_in(folder) if path.suffix == ".svg"}
        text = study_page(f"{name}: report", tables_of(name, records), records, figures, Folders())
        if not page.exists() or page.read_text() != text:
            stale.append(page)
            if not check:
                write_atomically(page, text)
    return stale


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
            tables = tables_of(experiment, records_of(whole_of(experiment)))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        parts += [text[done : begin.end()], "\n\n", "\n".join(map(as_markdown, tables)), "\n"]
        done = end.start()
    return "".join([*parts, text[done:]])


def whole_of(experiment: str) -> str:
    """The experiment whose results have those of ``experiment``: "paper", "digits", or the file of runs itself."""
    if own.file_of(experiment):
        return experiment
    is_digits = any(place.startswith(DIGITS) for run in of_place(experiment) for place in run.places)
    return "digits" if is_digits else "paper"


def tables_from(results: Path | None, experiment: str) -> str:
    """The tables of ``experiment`` as Markdown, from a results folder; results/NAME of this repository by default.

    Raises UserError where it has no results.
    """
    whole = whole_of(experiment)
    folder = results or ROOT / "results" / Path(whole).stem
    if not (about := folder / DESCRIPTION).exists():
        raise UserError(f"{folder} has no results of {whole}; name their folder, --results FOLDER")
    kept = str(read_json(about, fix=stored.RESTORE).get("experiment"))
    if Path(whole_of(kept)).stem != Path(whole).stem:
        raise UserError(f"{folder} has the results of {kept}, not of {experiment}; name another --results FOLDER")
    records = read_results(folder, kept)
    return "\n".join(map(as_markdown, tables_of(experiment, [*records.values()])))


def _source(results: Path, folder: Path) -> str:
    """What SOURCE has to be: a line of digest and name for the numbers and for each figure."""
    numbers = hashlib.sha256(b"".join((results / name).read_bytes() for name in (RUNS, CURVES))).hexdigest()
    digests = {"numbers": numbers, **{path.name: sha256_of(path) for path in _figures_in(folder)}}
    return "".join(f"{digest}  {name}\n" for name, digest in digests.items())


def _figures_in(folder: Path) -> list[Path]:
    """The files in ``folder`` that ``draw`` may have written."""
    paths = [folder / f"{name}.{suffix}" for name in FIGURES for suffix in ("svg", "png")]
    return [path for path in paths if path.exists()]
