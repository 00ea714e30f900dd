"""Which of a study's jobs SLURM has, and how those ended that it has no longer.

jobs/NAME.slurm has "id", the number of the job that is queued or goes on. Before the submission it has "name" and
"task" instead, by which the number is found if study.py is killed before it learns it. "where" is the user and the
cluster: asked elsewhere, SLURM does not know of it, which does not mean that it has ended.
"""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from scratch_det.distributed.stop import EXIT_PREEMPTED, STOPPED, last_word
from scratch_det.files import try_lock, write_atomically
from scratch_det.log import say_now
from scratch_det.study.job import Job
from scratch_det.study.launch.holders import lock_file
from scratch_det.study.launch.slurm_options import SECONDS_FOR_AN_ANSWER
from scratch_det.study.records import jobs_folder, read_json, write_failure
from scratch_det.study.study import Study

SECONDS_BETWEEN_QUERIES = 10.0
BEGIN_OF_LOG = "Starting with JobEnvironment"  # submitit's first words, once a start
TO_REQUEUE = (EXIT_PREEMPTED, 128 + signal.SIGUSR1)  # the latter: the signal came before the run listened


class Queue:
    """SLURM's queue, as far as it is a study's."""

    def __init__(self, study: Study):
        self.study, self.folder = study, (jobs_folder(study.out) / "slurm").absolute()
        self.looked, self.answers = -float("inf"), True
        self._where = ""

    def has(self, job: Job) -> bool:
        """Whether it was submitted, or is about to be, and was not concluded yet."""
        return self._record(job).exists()

    def numbers(self) -> dict[str, str]:
        """SLURM's number of each job that was not concluded yet, by name."""
        found = {job.name: read_json(self._record(job)) for job in self.study.jobs}
        return {name: about["id"] for name, about in found.items() if "id" in about and self._is_ours(about)}

    def running(self) -> set[str]:
        """Names of the jobs that SLURM has, by a look that is not too old."""
        if any(map(self.has, self.study.jobs)) and time.monotonic() - self.looked > SECONDS_BETWEEN_QUERIES:
            self.look()
        return {job.name for job in self.study.jobs if self.has(job)}

    def look(self) -> None:
        """Conclude what SLURM has no longer, and learn the numbers that nobody has written down."""
        queued = self._queued()
        self.looked = time.monotonic()
        if queued is None:
            return
        for job in self.study.jobs:
            record = read_json(self._record(job))
            if not self._is_ours(record):
                continue
            if "id" in record and record["id"] not in queued:
                self._conclude(job, record["id"])
            elif "name" in record:
                self._find(job, record, queued)

    def announce(self, jobs: Sequence[Job], name: str) -> None:
        """They are about to be submitted under ``name``, more than one as an array."""
        for task, job in enumerate(jobs):
            suffix = f"_{task}" if len(jobs) > 1 else ""
            write_atomically(
                self._record(job), json.dumps({"name": name, "task": suffix, "where": self.where()}) + "\n"
            )

    def record(self, job: Job, number: str) -> None:
        """It was submitted."""
        write_atomically(self._record(job), json.dumps({"id": number, "where": self.where()}) + "\n")

    def withdraw(self, jobs: Sequence[Job]) -> None:
        """They were not."""
        for job in jobs:
            self._record(job).unlink(missing_ok=True)

    def where(self) -> str:
        """This user on this cluster; empty while SLURM is silent."""
        if not self._where and (lines := ask("scontrol", "show", "config")) is not None:
            name = re.search(r"^ClusterName\s*=\s*(\S+)", lines, re.MULTILINE)
            self._where = f"{os.getuid()}@{name[1] if name else ''}"
        return self._where

    def _is_ours(self, record: dict[str, str]) -> bool:
        return record.get("where", "") in ("", self.where())

    def _queued(self) -> dict[str, str] | None:
        """Names by numbers of this user's jobs that wait, go on or are about to end; None while SLURM is silent."""
        said = ask("squeue", "--array", "--noheader", f"--user={os.getuid()}", "--format=%i %j")
        if self.answers != (said is not None):
            self.answers = said is not None
            silent = f"squeue does not answer; all jobs with {jobs_folder(self.study.out)}/NAME.slurm count as running"
            say_now("squeue answers again" if self.answers else silent)
        return None if said is None else dict(line.partition(" ")[::2] for line in said.splitlines())

    def _find(self, job: Job, record: dict[str, str], queued: dict[str, str]) -> None:
        """Its number, or else forget that it was to be submitted; nothing while another study.py submits it."""
        lock = try_lock(lock_file(job, self.study.out))
        if lock is None:
            return
        with lock:
            if read_json(self._record(job)) != record:
                return
            numbers = [number for number, name in queued.items() if name == record["name"]]
            if found := [number for number in numbers if number.endswith(record["task"])]:
                self.record(job, found[0])
            else:
                self.withdraw([job])

    def _conclude(self, job: Job, number: str) -> None:
        """Leave the reason of a failure, and forget the number."""
        code = _read(self.folder / f"{number}_exit").strip()
        if not job.result(self.study.out).exists() and (not code or int(code) not in (*STOPPED, *TO_REQUEUE)):
            said = _read(self.folder / f"{number}_0_log.out").rpartition(BEGIN_OF_LOG)[2]
            reason = last_word(said, int(code)) if code else f"SLURM ended job {number}: {_state(number)}"
            write_failure(job, self.study.out, reason)
        if read_json(self._record(job)).get("id") == number:  # another study.py may have started it anew
            self._record(job).unlink(missing_ok=True)

    def _record(self, job: Job) -> Path:
        return jobs_folder(self.study.out) / f"{job.name}.slurm"


def ask(*command: str) -> str | None:
    """What a program of SLURM's prints; None when it fails, as it does while the controller is away."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS_FOR_AN_ANSWER).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def _state(number: str) -> str:
    """SLURM's word for how a job ended, which it remembers for a few minutes."""
    words = (ask("scontrol", "--oneliner", "show", "job", number) or "").split()
    found = [word.removeprefix("JobState=") for word in words if word.startswith("JobState=")]
    return found[0] if found else "it does not say why"


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
