"""The report of a study in DIR/report/, of a part of it in DIR/report/PART/: tables, figures, one page.

It depends on the run folders alone: it is the same, byte for byte, however often the study was interrupted, and
whatever was reported before. How long the runs took, and on what machine, is in study.json of a results folder.
"""

import re
from collections.abc import Set
from dataclasses import replace
from pathlib import Path

from scratch_det.errors import UserError
from scratch_det.files import write_atomically
from scratch_det.study.experiments import of_place
from scratch_det.study.job import ROOT, jobs_of
from scratch_det.study.records import INTERRUPTED, UNFINISHED, collect, survey
from scratch_det.study.report.figures import FIGURES, draw, figures_of
from scratch_det.study.report.page import read_runs, write_page
from scratch_det.study.report.results import read_results, write_results
from scratch_det.study.report.tables import DIGITS, FORMATS, has_something_to_show, tables_of
from scratch_det.study.study import Study

REPORT = "report"


def write_report(study: Study, experiment: str, results: Path | None = None) -> list[Path]:
    """Write the report of ``experiment``, all of ``study`` or a part of it, and ``results``; returns the files.

    Raises UserError, before anything is written, when the study has no such runs, when none of them has anything to
    show, or when ``results`` is another experiment's or of other data; DataError for damaged files.
    """
    earlier = read_results(results, experiment) if results else ({}, {})
    runs = of_place(experiment)
    names = {job.name for job in jobs_of(runs)}  # those that the experiment's own need included
    if names - {job.name for job in study.jobs}:
        raise UserError(f"--out {study.out} holds the study {study.experiment}, of which {experiment} is no part")
    # Without what differs between two starts of the same study: which runs have a process, and where the folder is.
    chosen = [one for one in survey(study.jobs, study.out, {}) if one.run.name in names]
    records = [
        replace(one, state=UNFINISHED if one.state == INTERRUPTED else one.state, error=_relative(one.error, study.out))
        for one in collect(chosen, study.out)
    ]
    if not any(one.run.name in {run.name for run in runs} and has_something_to_show(one) for one in records):
        raise UserError(f"no run of {experiment} in {study.out} has anything to show yet; see study.py status")
    report = study.out / REPORT / ("" if experiment == study.experiment else experiment.replace("/", "-"))
    for folder in (report, *([results] if results else [])):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{folder} cannot be used: {error.strerror}; move away what is there, or name another"
            ) from None
    data = write_results(records, earlier, study, experiment, results) if results else ()
    tables, page = tables_of(experiment, records), report / "index.html"
    files = {report / f"{table.name}.{suffix}": text(table) for table in tables for suffix, text in FORMATS.items()}
    for path, content in files.items():
        write_atomically(path, content)
    drawn = draw(figures_of(experiment, records), report)
    figures = {path.stem: path.read_text() for path in drawn if path.suffix == ".svg"}
    write_page(page, f"{experiment}: report", tables, records, figures, read_runs(records, study.out, page))
    _remove_earlier(report, {page, *files, *drawn}, study)
    return [page, *files, *drawn, *data]


def _remove_earlier(report: Path, written: Set[Path], study: Study) -> None:
    """Remove files of an earlier report that had other runs; no files with other names."""
    places = {place.removeprefix(DIGITS) for job in study.jobs for place in job.run.places}
    names = places | set(FIGURES) | {job.name for job in study.jobs}
    for path in report.iterdir():
        if path.stem in names and path.suffix[1:] in (*FORMATS, "svg", "png") and path not in written:
            path.unlink()


def _relative(error: str, out: Path) -> str:
    """``error`` without the folders that differ between machines."""
    for folder in (out.resolve(), out, ROOT, Path.home()):
        if folder.parts:  # Path(".") has none
            error = re.sub(rf"(?<![\w./-]){re.escape(str(folder))}/", "", error)
    return error
