"""What study.json in results/ says of a study: commands, versions, data and time, and nothing of this machine."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from scratch_det.study.experiment import SEARCH
from scratch_det.study.job import ROOT, TOOLS, Job, shown_command
from scratch_det.study.report.run_page import MADE_WITH
from scratch_det.study.standing import Standing, read_json, read_rows
from scratch_det.study.study import Study


def describe(study: Study, standings: Sequence[Standing], experiment: str) -> dict[str, Any]:
    """With what and by which commands the runs were made, how long they took, and what sharing has saved.

    ``run_hours`` are those of the runs added up: which of them ran at once is in no run folder.
    """
    seconds = {standing.job.name: own_seconds(standing, study.out) for standing in standings}
    begun = [standing for standing in standings if standing.iteration]
    return {
        "experiment": experiment,
        "command": _command(study),
        "commands": {standing.job.name: _command_of(standing.job, study) for standing in standings},
        "environment": _environment(folder for standing in standings for folder in _folders(standing, study.out)),
        "iterations": sum(max(standing.iteration - standing.job.start, 0) for standing in begun),
        "iterations_saved_by_sharing": sum(standing.job.start for standing in begun),
        "run_hours": round(sum(seconds.values()) / 3600, 2),
        "seconds": {name: round(value, 1) for name, value in seconds.items() if value},
    }


def _command(study: Study) -> str:
    words = ["python", "tools/study.py", "run", study.experiment, "--out", "DIR", "--backend", study.backend]
    words += ["--gpus", str(study.gpus), *([] if study.share_prefix else ["--no-share-prefix"])]
    return (f"OMP_NUM_THREADS={study.threads} " if study.threads else "") + shown_command(words)


def _command_of(job: Job, study: Study) -> str:
    """As it is started on any machine, from the repository's root."""
    words = job.arguments(Path("DIR"), study.backend, study.gpus)
    return shown_command(["python", f"tools/{TOOLS[job.run.kind]}", *words]).replace(f"{ROOT}/", "")


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
