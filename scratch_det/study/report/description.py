"""What study.json in results/ says of a study: commands, versions, data and time, and nothing of this machine."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from scratch_det.study.job import ROOT, TOOLS, Job
from scratch_det.study.records import FINISHED, Record, read_json, read_rows
from scratch_det.study.report.run_page import MADE_WITH, load_environment
from scratch_det.study.run import SEARCH
from scratch_det.study.study import Study


class Made(TypedDict):
    """How a run was made: by which command, in how many seconds, and with what."""

    command: str
    seconds: float
    environment: dict[str, Any]


def made_of(study: Study, records: Sequence[Record]) -> dict[str, Made]:
    """Of the runs in one folder that have begun, by name."""
    jobs = {job.name: job for job in study.jobs}
    return {
        record.run.name: Made(
            command=_command_of(jobs[record.run.name], study),
            seconds=round(own_seconds(record, study.out), 1),
            environment={"study": _command(study), **_environment(_folders(record, study.out))},
        )
        for record in records
        if record.iteration or record.state == FINISHED
    }


def describe(outcomes: Sequence[Record], made: Mapping[str, Made]) -> dict[str, Any]:
    """How much was trained, and how each run was made; of environments that are alike, one.

    Iterations count of unfinished runs too. A cascade that goes on from another run saves nothing: it always does.
    ``run_hours`` are those of the runs added up: which of them ran at once is in no run folder.
    """
    begun = [one for one in outcomes if one.iteration]
    environments: list[dict[str, Any]] = []
    for about in made.values():
        if about["environment"] not in environments:
            environments.append(about["environment"])
    names = [one.run.name for one in outcomes if one.run.name in made]
    return {
        "iterations": sum(max(one.iteration - one.start, 0) for one in begun),
        "iterations_saved_by_sharing": sum(one.start for one in begun if not one.run.is_switch),
        "run_hours": round(sum(about["seconds"] for about in made.values()) / 3600, 2),
        "environments": environments,
        "runs": {name: {**made[name], "environment": environments.index(made[name]["environment"])} for name in names},
    }


def _command(study: Study) -> str:
    words = ["python", "tools/study.py", "run", study.experiment, "--out", "DIR", "--backend", study.backend]
    words += ["--gpus", str(study.gpus), *([] if study.share_prefix else ["--no-share-prefix"])]
    return (f"OMP_NUM_THREADS={study.threads} " if study.threads else "") + shlex.join(words)


def _command_of(job: Job, study: Study) -> str:
    """As it is started on any machine, from the repository's root."""
    words = job.arguments(Path("DIR"), study.backend, study.gpus)
    command = shlex.join(["python", f"tools/{TOOLS[job.run.kind]}", *words])
    return command.replace(f"{ROOT}/", "").replace(f"{Path.cwd()}/", "")


def _folders(record: Record, out: Path) -> list[Path]:
    """Where its trainings are: a search has several."""
    folder = out / record.run.name
    return sorted(folder.glob("trial_*")) if record.run.kind == SEARCH else [folder]


def own_seconds(record: Record, out: Path) -> float:
    """Of its finished trainings.

    A branch's result.json counts its trunk's iterations too; their share of the times in metrics.json is left out.
    """
    total = 0.0
    for folder in _folders(record, out):
        rows = [row for row in read_rows(folder / "metrics.json") if row.get("time") and "iteration" in row]
        ends = [0, *(row["iteration"] + 1 for row in rows)]
        spent = [(row["time"] * (end - begin), end) for row, begin, end in zip(rows, ends, ends[1:], strict=False)]
        own = sum(time for time, end in spent if end > record.start)
        share = own / sum(time for time, _ in spent) if record.start and spent else 1.0
        total += share * float(read_json(folder / "result.json").get("seconds") or 0.0)
    return total


def _environment(folders: Sequence[Path]) -> dict[str, Any]:
    """What a run was made with; of a search what its trainings agree on, or a list of what they have.

    Of checkouts the commit, and whether it was changed.
    """
    found = [load_environment(path) for folder in folders if (path := folder / "environment.json").exists()]
    alike = {key: _one_or_all([content.get(key) for content in found]) for key in (*MADE_WITH, "packages")}
    checkouts = [content["git"] for content in found if content["git"]]
    data = {name: about for content in found for name, about in content["datasets"].items()}
    changed = any(git.get("diff") for git in checkouts)
    return {**alike, "commit": _one_or_all([git["commit"] for git in checkouts]), "changed": changed, "datasets": data}


def _one_or_all(values: Sequence[Any]) -> Any:
    different = [value for position, value in enumerate(values) if value not in values[:position]]
    return different[0] if len(different) == 1 else different


def without_folders(error: str, out: Path) -> str:
    """Where a folder is differs between machines, what failed in it does not."""
    for folder in (out.resolve(), out, ROOT, Path.home()):
        if folder.parts:  # Path(".") has none
            error = re.sub(rf"(?<![\w./-]){re.escape(str(folder))}/", "", error)
    return error
