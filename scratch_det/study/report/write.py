"""The report of a study: DIR/report/, of a part of it DIR/report/PART/, and the study as data for results/.

What is there depends on what is in the run folders alone: it is the same, byte for byte, however often the study was
interrupted, and whatever was reported before. How long the runs took, and on what, is in study.json beside the data.

The data keep what got further in another folder, so a study may be made in parts, here and there.
"""

from collections.abc import Set
from dataclasses import replace
from pathlib import Path

from scratch_det.errors import UserError
from scratch_det.files import write_atomically
from scratch_det.study.experiments import of_place
from scratch_det.study.job import jobs_of
from scratch_det.study.records import INTERRUPTED, UNFINISHED, Record, collect, survey
from scratch_det.study.report.data import Data
from scratch_det.study.report.description import without_folders
from scratch_det.study.report.figures import DRAWINGS, draw, figures_of
from scratch_det.study.report.formats import FORMATS
from scratch_det.study.report.page import write_page
from scratch_det.study.report.run_page import read_runs
from scratch_det.study.report.tables import DIGITS, says_something, tables_of
from scratch_det.study.study import Study

REPORT = "report"


def write_report(study: Study, experiment: str, results: Path | None = None) -> list[Path]:
    """Write the report of ``experiment``, all of ``study`` or a part of it; its files, and those in ``results``.

    Raises UserError when the study has no such runs, when none of them has anything to show, or when ``results`` is no
    folder of this experiment's or of other data; DataError when its files are not as they were written.
    """
    if results:
        Data.of(results, experiment)  # refused before anything is written
    chosen = _chosen(study, experiment)
    outcomes = [_as_shown(outcome, study.out) for outcome in collect(chosen, study.out)]
    own = {run.name for run in of_place(experiment)}
    if not any(outcome.run.name in own and says_something(outcome) for outcome in outcomes):
        raise UserError(f"no run of {experiment} in {study.out} has anything to show yet; see study.py status")
    report = study.out / REPORT / ("" if experiment == study.experiment else experiment.replace("/", "-"))
    for folder in (report, *([results] if results else [])):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{folder} cannot be used: {error.strerror}; move away what is there, or name another"
            ) from None
    tables, page = tables_of(experiment, outcomes), report / "index.html"
    files = {report / f"{table.name}.{end}": write(table) for table in tables for end, write in FORMATS.items()}
    for path, text in files.items():
        write_atomically(path, text)
    drawn = draw(figures_of(experiment, outcomes), report)
    figures = {path.stem: path.read_text() for path in drawn if path.suffix == ".svg"}
    write_page(page, f"{experiment}: report", tables, outcomes, figures, read_runs(outcomes, study.out, page))
    _remove_earlier(report, {page, *files, *drawn}, study)
    data = Data.of(results, experiment).add(outcomes, study) if results else ()
    return [page, *files, *drawn, *data]


def _remove_earlier(report: Path, written: Set[Path], study: Study) -> None:
    """What an earlier report of fewer or other runs has left there; no other files."""
    places = {place.removeprefix(DIGITS) for job in study.jobs for place in job.run.places}
    names = places | set(DRAWINGS) | {job.name for job in study.jobs}
    for path in report.iterdir():
        if path.stem in names and path.suffix[1:] in (*FORMATS, "svg", "png") and path not in written:
            path.unlink()


def _chosen(study: Study, experiment: str) -> list[Record]:
    """Those of the experiment, and of the runs that it cannot do without; whether one has a process does not matter."""
    names = {job.name for job in jobs_of(of_place(experiment))}
    if names - {job.name for job in study.jobs}:
        raise UserError(f"--out {study.out} holds the study {study.experiment}, of which {experiment} is no part")
    return [one for one in survey(study.jobs, study.out, set()) if one.run.name in names]


def _as_shown(outcome: Record, out: Path) -> Record:
    """Without what differs between two starts of the same study."""
    state = UNFINISHED if outcome.state == INTERRUPTED else outcome.state
    return replace(outcome, state=state, error=without_folders(outcome.error, out))
