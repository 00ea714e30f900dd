"""Where each run of a study stands, read from its folder; see ``scratch_det.engine.run_dir`` for that contract.

Beside the run folders DIR has study.json, what the study is, and jobs/: NAME.log, what a run's process said, NAME.lock,
held as long as it lives, and NAME.failed, why it ended, if it was not as it should. See also launch/queue.py.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import isfinite
from pathlib import Path
from typing import Any

from scratch_det.errors import DataError, UserError
from scratch_det.files import read_lines, write_atomically
from scratch_det.study.experiment import SEARCH
from scratch_det.study.job import Job

WAITING, READY, RUNNING, INTERRUPTED, FAILED, BLOCKED, FINISHED = (
    "waiting", "ready", "running", "interrupted", "failed", "blocked", "finished",
)  # fmt: skip
UNFINISHED = "unfinished"  # of a report: interrupted or running, as nobody asked whether it has a process
TAIL = 2**20  # bytes of a metrics.json in which its newest evaluation is looked for
MEND = "move the folder away, and study.py run makes it anew"
STATUS = "status.json"
MEND_STATUS = "remove this file, and study.py run continues the run"


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


def jobs_folder(out: Path) -> Path:
    return out / "jobs"


def failure_file(job: Job, out: Path) -> Path:
    return jobs_folder(out) / f"{job.name}.failed"


def write_failure(job: Job, out: Path, reason: str) -> None:
    """Leave why ``job`` failed. Raises UserError with the reason in it where the disk takes no more."""
    try:
        write_atomically(failure_file(job, out), reason + "\n")
    except OSError as error:
        raise UserError(
            f"{failure_file(job, out)} cannot be written ({error.strerror}): {job.name} failed: {reason}; make "
            "room, and give the same command again, which also looks after the runs that go on"
        ) from None


def survey(jobs: Sequence[Job], out: Path, running: set[str]) -> list[Standing]:
    """Where every job stands; ``running``: names of those that have a process."""
    found: dict[str, Standing] = {}
    for job in jobs:
        is_running, needed = job.name in running, [found[name] for name in job.needs if name in found]
        try:
            found[job.name] = look(job, out, is_running, needed)
        except DataError as error:  # a damaged folder keeps nobody else from going on
            found[job.name] = Standing(job, RUNNING if is_running else FAILED, error=str(error))
    return list(found.values())


def look(job: Job, out: Path, is_running: bool, needed: Sequence[Standing] = ()) -> Standing:
    """Where ``job`` stands; ``needed``: the jobs that it needs."""
    folder, failure, result = out / job.name, failure_file(job, out), read_json(job.result(out))
    if result and not is_running:  # whatever status.json says
        iteration = job.run.iterations if job.run.kind == SEARCH else number(result, "iteration", job.result(out))
        seconds = number(result, "seconds", job.result(out))
        return Standing(job, FINISHED, int(iteration or 0), newest_metrics(folder, result), seconds)
    status = read_json(folder / STATUS, MEND_STATUS)
    known = Standing(job, READY, _iteration(job, folder), newest_metrics(folder, result))
    if is_running:
        return replace(known, state=RUNNING, eta=number(status, "eta", folder / STATUS, MEND_STATUS))
    if missing := [path for path in job.inputs(out) if not path.exists()]:  # also of one that failed for lack of it
        reason = _hopeless(missing, needed, out)
        waits = f"waits for {', '.join(str(path.relative_to(out)) for path in missing)}"
        return replace(known, state=BLOCKED if reason else WAITING, error=reason or waits)
    if failure.exists():
        return replace(known, state=FAILED, error=failure.read_text(errors="replace").strip())
    if status.get("state") == "failed":  # while no study.py looked after it
        return replace(known, state=FAILED, error=str(status.get("error", "")))
    return replace(known, state=INTERRUPTED) if status else known


def newest_metrics(folder: Path, result: dict[str, Any]) -> dict[str, float]:
    """Of result.json, or else of the last evaluation in metrics.json: those that are numbers, by "task/name"."""
    if result:
        tasks = result.get("metrics")
        return {
            f"{task}/{name}": value
            for task, values in (tasks.items() if isinstance(tasks, dict) else ())
            if isinstance(values, dict)
            for name, value in values.items()
            if isinstance(value, int | float)
        }
    path = folder / "metrics.json"
    if not path.exists():
        return {}
    about = path.stat()
    return _newest_in(path, (about.st_mtime_ns, about.st_size))


@lru_cache(maxsize=256)
def _newest_in(path: Path, _changed: tuple[int, int]) -> dict[str, float]:
    """Read once after each change: a study is looked at twice a second, for weeks."""
    newest: dict[str, float] = {}
    for row in read_rows(path, TAIL):
        newest |= {name: value for name, value in row.items() if "/" in name and isinstance(value, int | float)}
    return newest


def read_rows(path: Path, most: int | None = None) -> list[dict[str, Any]]:
    """The lines of a metrics.json, those in its last ``most`` bytes; none where there is no file.

    One that was cut off is left out. Raises DataError when an iteration or a time is no number.
    """
    rows = list(read_lines(path, most))
    for row in rows:
        for key in ("iteration", "time"):
            number(row, key, path)
    return rows


def read_json(path: Path, mend: str = MEND) -> dict[str, Any]:
    """The object in a file; empty where there is no file. Raises DataError when something else is in it."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error}); {mend}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); {mend}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} holds {type(content).__name__}, expected an object; {mend}")
    return content


def number(content: dict[str, Any], key: str, path: Path, mend: str = MEND) -> float | None:
    """A number or nothing. Raises DataError when ``path``, where ``content`` is from, has something else there."""
    value = content.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value)):
        raise DataError(f"{path} has {key} {value!r}, expected a number; {mend}")
    return value


def _iteration(job: Job, folder: Path) -> int:
    """How far it is by its status.json, a search by those of its points."""
    folders = sorted(folder.glob("trial_*")) if job.run.kind == SEARCH else [folder]
    paths = [folder / STATUS for folder in folders]
    return sum(int(number(read_json(path, MEND_STATUS), "iteration", path, MEND_STATUS) or 0) for path in paths)


def _hopeless(missing: Sequence[Path], needed: Sequence[Standing], out: Path) -> str:
    """Why what is missing will not come; nothing when it still may."""
    if broken := [standing.job.name for standing in needed if standing.state in (FAILED, BLOCKED)]:
        return f"needs {', '.join(broken)}, which failed"
    for standing in needed:
        gone = [path for path in missing if path.is_relative_to(out / standing.job.name)]
        if gone and standing.state == FINISHED:
            return f"{standing.job.name} is finished, but {gone[0].name} is gone; move its folder away to make it anew"
    return ""
