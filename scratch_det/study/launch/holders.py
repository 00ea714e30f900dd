"""Who has a job on some machine: the process that holds jobs/NAME.lock has written there what it is."""

import json
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

from scratch_det.files import try_lock
from scratch_det.study.job import Job
from scratch_det.study.records import jobs_folder


def lock_file(job: Job, out: Path) -> Path:
    return jobs_folder(out) / f"{job.name}.lock"


def sign(lock: IO[str], devices: Sequence[str], pid: int | None = None) -> None:
    """Write into a lock that is held: who has started the run, its process and its GPUs, on which machine."""
    holder = {"host": platform.node(), "runner": os.getpid(), "pid": pid, "devices": list(devices)}
    lock.truncate(0)
    lock.write(json.dumps(holder) + "\n")
    lock.flush()


def holders(jobs: Iterable[Job], out: Path) -> dict[str, dict]:
    """What ``sign`` wrote, of those whose lock is held, by name; empty where it is held only to look or to submit."""
    return {job.name: _signed(lock_file(job, out)) for job in jobs if _is_locked(lock_file(job, out))}


def is_here(holder: dict) -> bool:
    """Whether its process is one of this machine's."""
    return holder.get("host") == platform.node()


def is_orphan(holder: dict) -> bool:
    """Whether its process is here and the study.py that has started it is gone; one that lives looks after it."""
    if not is_here(holder) or holder["pid"] is None:
        return False
    try:
        os.kill(holder["runner"], 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False


def _signed(path: Path) -> dict:
    """Its content; empty also while it is being written."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    lock = try_lock(path)
    if lock:
        lock.close()
    return lock is None
