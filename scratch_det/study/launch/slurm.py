"""Runs as jobs of a SLURM cluster, submitted through submitit.

Beside what standing.py names, jobs/ then has NAME.slurm, the number of the job that is queued or goes on, and slurm/,
submitit's files: ID_TASK_log.out, what a task said, and ID_exit, the exit code of its srun.
"""

import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from scratch_det.distributed.ending import STOPPED, last_word
from scratch_det.distributed.stop import EXIT_PREEMPTED
from scratch_det.errors import UserError
from scratch_det.lock import try_lock
from scratch_det.progress import say_now
from scratch_det.study.experiment import SEARCH
from scratch_det.study.job import Job, shown_command
from scratch_det.study.launch.slurm_options import Options, shape
from scratch_det.study.standing import failure_file, jobs_folder, read_json
from scratch_det.study.study import Study
from scratch_det.textfile import write_atomically

SECONDS_BETWEEN_QUERIES = 10.0
SECONDS_FOR_AN_ANSWER = 60.0
SECONDS_TO_FOLLOW = 60  # what the other tasks get to end by themselves after the first one has
BEGIN_OF_LOG = "Starting with JobEnvironment"  # submitit's first words, once a start
TO_REQUEUE = (EXIT_PREEMPTED, 128 + signal.SIGUSR1)  # the latter: the signal came before the run listened


class Slurm:
    """One job of SLURM's a run, one task a process; what starts together is one array.

    A run that is preempted, reaches its time limit or is requeued by hand starts anew under its number, with --resume.
    """

    def __init__(self, study: Study, options: Options):
        """Raises UserError when a run of the study does not fit what ``options`` ask for."""
        self.study, self.options = study, options
        self.folder = (jobs_folder(study.out) / "slurm").absolute()
        self.shapes = {job.name: shape(job, study.gpus, options) for job in study.jobs}
        self.looked, self.answers, self.stopping = -float("inf"), True, False

    def command(self, job: Job) -> list[str]:
        """Of each task."""
        return job.command(self.study.out, self.study.backend, self.study.gpus if job.run.kind == SEARCH else 0)

    def describe(self, job: Job) -> str:
        """See ``Launcher``."""
        asked = {**self.shapes[job.name], **self.options.words, **self.options.more}
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in asked.items()]
        return f"# sbatch {shown_command(flags)}\nsrun {shown_command(self.command(job))}"

    def start(self, jobs: Sequence[Job]) -> None:
        """See ``Launcher``. Raises UserError when sbatch refuses."""
        with ExitStack() as locks:
            alike: dict[str, list[Job]] = {}
            for job in jobs:
                lock = try_lock(jobs_folder(self.study.out) / f"{job.name}.lock")
                if lock and not self._record(job).exists():
                    alike.setdefault(str(self.shapes[job.name]), []).append(job)
                if lock:
                    locks.enter_context(lock)
            for group in alike.values():
                self._submit(group)

    def running(self) -> set[str]:
        """See ``Launcher``."""
        numbers = self._numbers()
        if numbers and time.monotonic() - self.looked > SECONDS_BETWEEN_QUERIES:
            queued = self._queued()
            self.looked = time.monotonic()
            for job in self.study.jobs:
                if queued is not None and job.name in numbers and numbers[job.name] not in queued:
                    self._conclude(job, numbers.pop(job.name))
        return set(numbers)

    def stop(self) -> None:
        """See ``Launcher``; also what earlier starts of the study have submitted, and none of it is requeued."""
        if not self.stopping:
            self.stopping = True
            numbers = list(self._numbers().values())
            for number in numbers:
                _ask("scontrol", "update", f"JobId={number}", "Requeue=0")
            if numbers:
                _ask("scancel", "--state=PENDING", *numbers)
                _ask("scancel", "--signal=USR1", *numbers)

    def _submit(self, jobs: Sequence[Job]) -> None:
        """One job, or an array of jobs that ask for the same."""
        from submitit import SlurmExecutor  # here, because other launchers do without
        from submitit.core.utils import FailedJobError

        for job in jobs:
            failure_file(job, self.study.out).unlink(missing_ok=True)
        executor = SlurmExecutor(self.folder)
        executor.update_parameters(**self._parameters(self.shapes[jobs[0].name]))
        commands = [self.command(job) for job in jobs]
        try:
            with executor.batch():
                submitted = [executor.submit(os.execv, command[0], command) for command in commands]
        except FailedJobError as error:
            said = [line for line in str(error).splitlines() if line.startswith("sbatch: ")] or [str(error)]
            raise UserError(f"{said[-1]}; change the options: --slurm FILE") from None
        for job, submission in zip(jobs, submitted, strict=True):
            write_atomically(self._record(job), json.dumps({"id": submission.job_id}) + "\n")

    def _parameters(self, asked: dict[str, int]) -> dict[str, Any]:
        """Of submitit's executor; what it has a default of its own for is the cluster's here."""
        own_array = '${SLURM_ARRAY_TASK_ID:+"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"}'
        exit_file = f'{shlex.quote(str(self.folder))}/"${{NUMBER}}_exit"'
        setup = [f"NUMBER={own_array}", "NUMBER=${NUMBER:-$SLURM_JOB_ID}", f"rm -f {exit_file}"]
        if self.study.threads:
            setup.append(f"export OMP_NUM_THREADS={self.study.threads}")
        codes = "|".join(str(int(code)) for code in TO_REQUEUE)
        requeue = f"case $CODE in {codes}) scontrol requeue $SLURM_JOB_ID;; esac"
        cpus = (
            [f"--cpus-per-task={asked['cpus_per_task']}"] if "cpus_per_task" in asked else []
        )  # not sbatch's since 22.05
        return {
            "time": None,
            "wckey": None,
            "job_name": self.study.experiment,
            **asked,
            **self.options.words,
            "setup": [*setup, *self.options.setup],
            "teardown": ["CODE=$?", f"echo $CODE > {exit_file}", requeue, "exit $CODE"],
            "stderr_to_stdout": True,
            "srun_args": ["--kill-on-bad-exit=0", f"--wait={SECONDS_TO_FOLLOW}", *cpus],
            "additional_parameters": {
                "requeue": True,
                "signal": f"USR1@{self.options.signal_delay_s}",
                **self.options.more,
            },
        }

    def _queued(self) -> set[str] | None:
        """Numbers of this user's jobs that wait, go on or are about to end; None while SLURM does not answer."""
        said = _ask("squeue", "--array", "--noheader", f"--user={os.getuid()}", "--format=%i")
        if self.answers != (said is not None):
            self.answers = said is not None
            say_now("squeue answers again" if self.answers else "squeue does not answer; all jobs count as running")
        return None if said is None else set(said.split())

    def _conclude(self, job: Job, number: str) -> None:
        """Leave the reason of a failure, and forget the number."""
        code = _read(self.folder / f"{number}_exit").strip()
        if not job.result(self.study.out).exists() and (not code or int(code) not in (*STOPPED, *TO_REQUEUE)):
            said = _read(self.folder / f"{number}_0_log.out").rpartition(BEGIN_OF_LOG)[2]
            reason = last_word(said, int(code)) if code else f"SLURM ended job {number}: {_state(number)}"
            failure_file(job, self.study.out).write_text(reason + "\n")
        if read_json(self._record(job)).get("id") == number:  # another study.py may have started it anew
            self._record(job).unlink(missing_ok=True)

    def _numbers(self) -> dict[str, str]:
        """SLURM's number of each job that was not concluded yet, by name."""
        found = {job.name: read_json(self._record(job)).get("id") for job in self.study.jobs}
        return {name: number for name, number in found.items() if number}

    def _record(self, job: Job) -> Path:
        return jobs_folder(self.study.out) / f"{job.name}.slurm"


def _ask(*command: str) -> str | None:
    """What a program of SLURM's prints; None when it fails, as it does while the controller is away."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS_FOR_AN_ANSWER).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def _state(number: str) -> str:
    """SLURM's word for how a job ended, which it remembers for a few minutes."""
    words = (_ask("scontrol", "--oneliner", "show", "job", number) or "").split()
    found = [word.removeprefix("JobState=") for word in words if word.startswith("JobState=")]
    return found[0] if found else "it does not say why"


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
