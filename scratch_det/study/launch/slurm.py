"""Runs as jobs of a SLURM cluster, submitted through submitit.

Beside what standing.py names, jobs/ then has what queue.py keeps there, and slurm/, submitit's files: ID_TASK_log.out,
what a task said, and ID_exit, the exit code of its srun.
"""

import io
import os
import shlex
import time
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr
from dataclasses import replace
from typing import Any
from uuid import uuid4

from scratch_det.errors import UserError
from scratch_det.files import try_lock
from scratch_det.log import say_now
from scratch_det.study.job import Job
from scratch_det.study.launch.devices import gpus_needed
from scratch_det.study.launch.holders import holders, lock_file
from scratch_det.study.launch.queue import TO_REQUEUE, Queue, ask
from scratch_det.study.launch.slurm_options import Options, shape
from scratch_det.study.records import failure_file
from scratch_det.study.run import SEARCH
from scratch_det.study.study import Study

SECONDS_BETWEEN_TRIALS = 30.0  # of a submission that did not come through
SECONDS_TO_FOLLOW = 60  # what the other tasks get to end by themselves after the first one has
PASSING = ("nable to contact", "timed out", "temporarily", "Zero Bytes", "standby mode", "MaxSubmitJob")  # of sbatch's


class NotNow(Exception):
    """sbatch could not submit, for a reason that passes."""


class Slurm:
    """One job of SLURM's a run, one task a process; what starts together is one array.

    A run that is preempted, reaches its time limit or is requeued by hand starts anew under its number, with --resume.
    """

    def __init__(self, study: Study, options: Options):
        """Raises UserError when a run of the study does not fit what ``options`` ask for."""
        self.study, self.options, self.queue = study, options, Queue(study)
        on_cpu = replace(options, gpus_per_node=0)
        self.shapes = {
            job.name: shape(job, study.gpus, options if gpus_needed(job, study) else on_cpu) for job in study.jobs
        }
        self.next_trial, self.complaint = -float("inf"), ""
        self.asked: dict[str, str] | None = None  # SLURM's numbers by name

    def command(self, job: Job) -> list[str]:
        """Of each task."""
        return job.command(self.study.out, self.study.backend, self.study.gpus if job.run.kind == SEARCH else 0)

    def describe(self, job: Job) -> str:
        """See ``Launcher``."""
        asked = {**self.shapes[job.name], **self.options.words, **self._more()}
        flags = [f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}") for key, value in asked.items()]
        return f"# sbatch {shlex.join(flags)}\nsrun {shlex.join(self.command(job))}"

    def start(self, jobs: Sequence[Job]) -> set[str]:
        """See ``Launcher``; what cannot be submitted now is left for later. Raises UserError when sbatch refuses."""
        started: set[str] = set()
        if time.monotonic() < self.next_trial:
            return started
        try:
            with ExitStack() as locks:
                for group in self._alike(jobs, locks):
                    self._submit(group)
                    started |= {job.name for job in group}
            self.complaint = ""
        except NotNow as error:
            self.next_trial = time.monotonic() + SECONDS_BETWEEN_TRIALS
            self.queue.look()  # whether it has come through after all
            if str(error) != self.complaint:
                self.complaint = str(error)
                say_now(f"{error}; trying again every {SECONDS_BETWEEN_TRIALS:.0f} seconds")
        return started

    def running(self) -> set[str]:
        """See ``Launcher``."""
        return {*self.queue.running(), *holders(self.study.jobs, self.study.out)}

    def stop(self) -> set[str]:
        """See ``Launcher``; also what earlier starts of the study have submitted, and none of it is requeued."""
        numbers = self.queue.numbers()
        if self.asked is None:
            for number in numbers.values():
                ask("scontrol", "update", f"JobId={number}", "Requeue=0")
            if numbers:
                ask("scancel", "--state=PENDING", *numbers.values())
                ask("scancel", "--signal=USR1", *numbers.values())
            self.asked = numbers
        return {name for name, number in self.asked.items() if numbers.get(name) == number}

    def _alike(self, jobs: Sequence[Job], locks: ExitStack) -> list[list[Job]]:
        """Those that nobody else has, locked, in groups that ask for the same."""
        alike: dict[str, list[Job]] = {}
        for job in jobs:
            lock = try_lock(lock_file(job, self.study.out))
            if lock and not self.queue.has(job):
                alike.setdefault(str(self.shapes[job.name]), []).append(job)
            if lock:
                locks.enter_context(lock)
        return list(alike.values())

    def _submit(self, jobs: Sequence[Job]) -> None:
        """One job, or an array of jobs that ask for the same."""
        from submitit import SlurmExecutor  # here, because other launchers do without
        from submitit.core.utils import FailedJobError

        for job in jobs:
            failure_file(job, self.study.out).unlink(missing_ok=True)
        name = f"{self.study.experiment}-{uuid4().hex[:12]}"
        executor = SlurmExecutor(self.queue.folder)
        executor.update_parameters(**self._parameters(self.shapes[jobs[0].name], name))
        commands = [self.command(job) for job in jobs]
        self.queue.announce(jobs, name)
        try:
            with redirect_stderr(io.StringIO()), executor.batch():  # submitit repeats there what the error has
                submitted = [executor.submit(os.execv, command[0], command) for command in commands]
        except FailedJobError as error:
            said = [line for line in str(error).splitlines() if line.startswith("sbatch: ")] or [str(error)]
            if any(words in str(error) for words in PASSING):
                raise NotNow(said[-1]) from None
            self.queue.withdraw(jobs)
            raise UserError(f"{said[-1]}; change the options: --slurm FILE") from None
        for job, submission in zip(jobs, submitted, strict=True):
            self.queue.record(job, submission.job_id)

    def _more(self) -> dict[str, str | bool]:
        """sbatch's options that submitit does not know."""
        return {"requeue": True, "signal": f"USR1@{self.options.signal_delay_s}", **self.options.more}

    def _parameters(self, asked: dict[str, int], name: str) -> dict[str, Any]:
        """Of submitit's executor; what it has a default of its own for is the cluster's here."""
        own_array = '${SLURM_ARRAY_TASK_ID:+"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"}'
        exit_file = f'{shlex.quote(str(self.queue.folder))}/"${{NUMBER}}_exit"'
        setup = [f"NUMBER={own_array}", "NUMBER=${NUMBER:-$SLURM_JOB_ID}", f"rm -f {exit_file}"]
        if self.study.threads and "gpus_per_node" not in asked:
            setup.append(f"export OMP_NUM_THREADS={self.study.threads}")
        codes = "|".join(str(int(code)) for code in TO_REQUEUE)
        requeue = f"case $CODE in {codes}) scontrol requeue $SLURM_JOB_ID;; esac"
        cpus = (
            [f"--cpus-per-task={asked['cpus_per_task']}"] if "cpus_per_task" in asked else []
        )  # not sbatch's since 22.05
        return {
            "time": None,
            "wckey": None,
            "job_name": name,
            **asked,
            **self.options.words,
            "setup": [*setup, *self.options.setup],
            "teardown": ["CODE=$?", f"echo $CODE > {exit_file}", requeue, "exit $CODE"],
            "stderr_to_stdout": True,
            "srun_args": ["--kill-on-bad-exit=0", f"--wait={SECONDS_TO_FOLLOW}", *cpus],
            "additional_parameters": self._more(),
        }
