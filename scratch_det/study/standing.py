"""Where each run of a study stands, read from its folder; see ``scratch_det.train.rundir`` for that contract.

Beside the run folders DIR has study.json, what the study is, and jobs/: NAME.log, what a run's process said, NAME.lock,
held as long as it lives, and NAME.failed, why it ended, if it was not as it should. See also launch/slurm.py.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scratch_det.study.experiment import SEARCH
from scratch_det.study.job import Job

WAITING, READY, RUNNING, INTERRUPTED, FAILED, BLOCKED, FINISHED = (
    "waiting", "ready", "running", "interrupted", "failed", "blocked", "finished",
)  # fmt: skip


@dataclass(frozen=True)
class Standing:
    """A job at one moment.

    Attributes:
        iteration: completed ones of the whole run, those before a branch included.
        metrics: the newest AP and so on, in percent, by names such as "bbox/AP".
        seconds: spent on training so far, where the run says so; eta: seconds that are left, by its own estimate.
        error: the last words of a failed one; of a waiting or blocked one what it waits for.
    """

    job: Job
    state: str
    iteration: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    eta: float | None = None
    error: str = ""

    @property
    def is_settled(self) -> bool:
        """Whether nothing more happens to it in this start of the study."""
        return self.state in (FINISHED, FAILED, BLOCKED)


def jobs_folder(out: Path) -> Path:
    return out / "jobs"


def failure_file(job: Job, out: Path) -> Path:
    return jobs_folder(out) / f"{job.name}.failed"


def survey(jobs: Sequence[Job], out: Path, running: set[str]) -> list[Standing]:
    """Where every job stands; ``running``: names of those that have a process."""
    found: dict[str, Standing] = {}
    for job in jobs:
        found[job.name] = look(job, out, job.name in running, [found[name] for name in job.needs if name in found])
    return list(found.values())


def look(job: Job, out: Path, is_running: bool, needed: Sequence[Standing] = ()) -> Standing:
    """Where ``job`` stands; ``needed``: the jobs that it needs."""
    folder, failure = out / job.name, failure_file(job, out)
    status = read_json(folder / "status.json")
    result = read_json(job.result(out)) if job.result(out).suffix == ".json" else {}
    known = Standing(job, READY, int(status.get("iteration") or 0), newest_metrics(folder, result))
    if is_running:
        return replace(known, state=RUNNING, eta=status.get("eta"))
    if job.result(out).exists():
        iteration = job.run.iterations if job.run.kind == SEARCH else result.get("iteration", known.iteration)
        return replace(known, state=FINISHED, iteration=iteration, seconds=result.get("seconds"))
    if failure.exists():
        return replace(known, state=FAILED, error=failure.read_text().strip())
    if missing := [path for path in job.inputs(out) if not path.exists()]:
        broken = [standing.job.name for standing in needed if standing.state in (FAILED, BLOCKED)]
        return replace(known, state=BLOCKED if broken else WAITING, error=_reason(broken, missing, out))
    return replace(known, state=INTERRUPTED) if status else known


def newest_metrics(folder: Path, result: dict[str, Any]) -> dict[str, float]:
    """Of result.json, or else of the last evaluation in metrics.json: those that are numbers, by "task/name"."""
    if result:
        return {
            f"{task}/{name}": value
            for task, values in result.get("metrics", {}).items()
            if isinstance(values, dict)
            for name, value in values.items()
            if isinstance(value, int | float)
        }
    newest: dict[str, float] = {}
    for row in read_rows(folder / "metrics.json"):
        newest |= {name: value for name, value in row.items() if "/" in name and isinstance(value, int | float)}
    return newest


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.json; one that was cut off is left out, and so is everything where there is no file."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def read_json(path: Path) -> dict[str, Any]:
    """An object in a file; empty where there is none, or something else."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _reason(broken: list[str], missing: list[Path], out: Path) -> str:
    if broken:
        return f"needs {', '.join(broken)}, which failed"
    return f"waits for {', '.join(str(path.relative_to(out)) for path in missing)}"
