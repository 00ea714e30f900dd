"""The report of a study: DIR/report/, and the study as data for results/.

What is in DIR/report/ depends on the numbers of the runs alone: it is the same, byte for byte, however often the study
was interrupted. How long it took, and on what, is in study.json beside the data.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scratch_det.errors import UserError
from scratch_det.study.experiment import SEARCH
from scratch_det.study.experiments import of_place
from scratch_det.study.job import ROOT, jobs_of, shown_command
from scratch_det.study.outcome import CURVES, RUNS, Outcome, collect, save
from scratch_det.study.report.figures import draw, figures_of
from scratch_det.study.report.formats import FORMATS
from scratch_det.study.report.page import write_page
from scratch_det.study.report.run_page import read_runs
from scratch_det.study.report.tables import says_something, tables_of
from scratch_det.study.standing import INTERRUPTED, Standing, read_json, read_rows, survey
from scratch_det.study.study import DESCRIPTION, Study
from scratch_det.textfile import write_atomically

UNFINISHED = "unfinished"
MADE_WITH = ("backend", "library", "python", "platform", "packages", "processes", "threads", "gpus")


def write_report(study: Study, experiment: str, results: Path | None = None) -> list[Path]:
    """Write the report of ``experiment``, all of ``study`` or a part of it; its files, and those in ``results``.

    Raises UserError when the study has no such runs, or when none of them has anything to show.
    """
    if results and results.exists() and not results.is_dir():
        raise UserError(f"--results {results} is a file; name a folder")
    chosen = _chosen(study, experiment)
    outcomes = [_as_shown(outcome, study.out) for outcome in collect(chosen, study.out)]
    if not any(map(says_something, outcomes)):
        raise UserError(f"no run of {experiment} in {study.out} has anything to show yet; see study.py status")
    report = study.out / "report"
    report.mkdir(exist_ok=True)
    files = {
        report / f"{table.name}.{end}": write(table)
        for table in tables_of(experiment, outcomes)
        for end, write in FORMATS.items()
    }
    for path, text in files.items():
        write_atomically(path, text)
    page = report / "index.html"
    title, runs = f"{experiment}: report", read_runs(outcomes, study.out, page)
    write_page(page, title, tables_of(experiment, outcomes), outcomes, figures_of(experiment, outcomes), runs)
    written = [page, *files, *draw(experiment, outcomes, report)]
    if results is None:
        return written
    save(outcomes, results)
    write_atomically(results / DESCRIPTION, json.dumps(_description(study, chosen, experiment), indent=2) + "\n")
    return [*written, results / RUNS, results / CURVES, results / DESCRIPTION]


def _chosen(study: Study, experiment: str) -> list[Standing]:
    """Those of the experiment, and of the runs that it cannot do without; whether one has a process does not matter."""
    names = {job.name for job in jobs_of(of_place(experiment))}
    if names - {job.name for job in study.jobs}:
        raise UserError(f"--out {study.out} holds the study {study.experiment}, of which {experiment} is no part")
    return [standing for standing in survey(study.jobs, study.out, set()) if standing.job.name in names]


def _as_shown(outcome: Outcome, out: Path) -> Outcome:
    """Without what differs between two starts of the same study."""
    state = UNFINISHED if outcome.state == INTERRUPTED else outcome.state  # nobody asked whether it has a process
    return replace(outcome, state=state, error=_without_folders(outcome.error, out))


def _without_folders(error: str, out: Path) -> str:
    """Where a folder is differs between machines, what failed in it does not."""
    for folder in (out.resolve(), out, ROOT, Path.home()):
        error = error.replace(f"{folder}/", "") if folder.parts else error  # Path(".") has none
    return error


def _description(study: Study, standings: Sequence[Standing], experiment: str) -> dict[str, Any]:
    """With what and by which command the runs were made, how long they took, and what sharing has saved."""
    seconds = {standing.job.name: own_seconds(standing, study.out) for standing in standings}
    begun = [standing for standing in standings if standing.iteration]
    return {
        "experiment": experiment,
        "command": _command(study),
        "environment": _environment(folder for standing in standings for folder in _folders(standing, study.out)),
        "iterations": sum(max(standing.iteration - standing.job.start, 0) for standing in begun),
        "iterations_saved_by_sharing": sum(standing.job.start for standing in begun),
        "hours": round(sum(seconds.values()) / 3600, 2),
        "seconds": {name: round(value, 1) for name, value in seconds.items() if value},
    }


def _command(study: Study) -> str:
    words = ["python", "tools/study.py", "run", study.experiment, "--out", "DIR", "--backend", study.backend]
    words += ["--gpus", str(study.gpus), *([] if study.share_prefix else ["--no-share-prefix"])]
    return (f"OMP_NUM_THREADS={study.threads} " if study.threads else "") + shown_command(words)


def _folders(standing: Standing, out: Path) -> list[Path]:
    """Where its trainings are: a search has several."""
    folder = out / standing.job.name
    return sorted(folder.glob("trial_*")) if standing.job.run.kind == SEARCH else [folder]


def own_seconds(standing: Standing, out: Path) -> float:
    """Of its finished trainings.

    A branch's result.json counts its trunk's iterations too; their share of the times in metrics.json is left out.
    """
    total = 0.0
    for folder in _folders(standing, out):
        rows = [row for row in read_rows(folder / "metrics.json") if row.get("time") and "iteration" in row]
        ends = [0, *(row["iteration"] + 1 for row in rows)]
        spent = [(row["time"] * (end - begin), end) for row, begin, end in zip(rows, ends, ends[1:], strict=False)]
        own = sum(time for time, end in spent if end > standing.job.start)
        share = own / sum(time for time, _ in spent) if standing.job.start and spent else 1.0
        total += share * float(read_json(folder / "result.json").get("seconds") or 0.0)
    return total


def _environment(folders: Iterable[Path]) -> dict[str, Any]:
    """What the runs agree on, or a list of what they have; of checkouts the commits, and whether one was changed."""
    found = [content for folder in folders if (content := read_json(folder / "environment.json"))]
    alike = {key: _one_or_all([content.get(key) for content in found]) for key in MADE_WITH}
    checkouts = [content["git"] for content in found if content.get("git")]
    data = {name: about for content in found for name, about in content.get("datasets", {}).items()}
    changed = any(git.get("diff") for git in checkouts)
    return {**alike, "commit": _one_or_all([git["commit"] for git in checkouts]), "changed": changed, "datasets": data}


def _one_or_all(values: Sequence[Any]) -> Any:
    different = [value for position, value in enumerate(values) if value not in values[:position]]
    return different[0] if len(different) == 1 else different
