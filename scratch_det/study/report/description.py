"""What study.json in results/ says of a study: commands, versions, data and time, and nothing of this machine."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scratch_det.study.experiment import SEARCH
from scratch_det.study.job import ROOT, TOOLS, Job, shown_command
from scratch_det.study.outcome import Outcome
from scratch_det.study.report.run_page import MADE_WITH
from scratch_det.study.standing import FINISHED, Standing, read_json, read_rows
from scratch_det.study.study import Study


def describe_part(study: Study, standings: Sequence[Standing]) -> dict[str, Any]:
    """With what and by which command one folder's runs were made, those that have begun, and how long each took."""
    begun = [standing for standing in standings if standing.iteration or standing.state == FINISHED]
    return {
        "command": _command(study),
        "environment": _environment(folder for standing in begun for folder in _folders(standing, study.out)),
        "seconds": {standing.job.name: round(own_seconds(standing, study.out), 1) for standing in begun},
    }


def describe_all(study: Study, outcomes: Sequence[Outcome], parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of ``outcomes``, which were made in ``parts``: the commands, and how much was trained.

    Iterations count of unfinished runs too. ``run_hours`` are those of the runs added up: which of them ran at once is
    in no run folder.
    """
    begun = [outcome for outcome in outcomes if outcome.iteration]
    of_runs = {outcome.run.name for outcome in outcomes}
    return {
        "commands": {job.name: _command_of(job, study) for job in study.jobs if job.name in of_runs},
        "iterations": sum(max(outcome.iteration - outcome.start, 0) for outcome in begun),
        "iterations_saved_by_sharing": sum(outcome.start for outcome in begun),
        "run_hours": round(sum(seconds for part in parts for seconds in part["seconds"].values()) / 3600, 2),
        "parts": parts,
    }


def _command(study: Study) -> str:
    words = ["python", "tools/study.py", "run", study.experiment, "--out", "DIR", "--backend", study.backend]
    words += ["--gpus", str(study.gpus), *([] if study.share_prefix else ["--no-share-prefix"])]
    return (f"OMP_NUM_THREADS={study.threads} " if study.threads else "") + shown_command(words)


def _command_of(job: Job, study: Study) -> str:
    """As it is started on any machine, from the repository's root."""
    words = job.arguments(Path("DIR"), study.backend, study.gpus)
    command = shown_command(["python", f"tools/{TOOLS[job.run.kind]}", *words])
    return command.replace(f"{ROOT}/", "").replace(f"{Path.cwd()}/", "")


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
    alike = {key: _one_or_all([content.get(key) for content in found]) for key in (*MADE_WITH, "packages")}
    checkouts = [content["git"] for content in found if content.get("git")]
    data = {name: about for content in found for name, about in content.get("datasets", {}).items()}
    changed = any(git.get("diff") for git in checkouts)
    return {**alike, "commit": _one_or_all([git["commit"] for git in checkouts]), "changed": changed, "datasets": data}


def _one_or_all(values: Sequence[Any]) -> Any:
    different = [value for position, value in enumerate(values) if value not in values[:position]]
    return different[0] if len(different) == 1 else different


def without_folders(error: str, out: Path) -> str:
    """Where a folder is differs between machines, what failed in it does not."""
    for folder in (out.resolve(), out, ROOT, Path.home()):
        error = error.replace(f"{folder}/", "") if folder.parts else error  # Path(".") has none
    return error
