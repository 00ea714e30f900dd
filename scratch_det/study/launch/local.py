"""Runs as processes on this machine."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO

from scratch_det.distributed.stop import STOPPED, last_word
from scratch_det.files import locked, try_lock
from scratch_det.study.job import Job
from scratch_det.study.launch.devices import gpus_here, gpus_needed
from scratch_det.study.launch.holders import holders, is_here, is_orphan, lock_file, sign
from scratch_det.study.launch.queue import Queue
from scratch_det.study.records import failure_file, jobs_folder, read_json, write_failure
from scratch_det.study.run import SEARCH
from scratch_det.study.study import Study


@dataclass
class Process:
    """A job's process; ``lock`` is held by it too, so that it counts as running when this launcher is gone."""

    job: Job
    popen: subprocess.Popen
    lock: IO[str]
    log: IO[str]
    log_start: int
    devices: list[str]
    began: float = field(default_factory=time.time)


class Local:
    """One process tree a job; the GPUs of this machine, where it has any, are shared out among them."""

    def __init__(self, study: Study):
        self.study, self.devices, self.queue = study, gpus_here(), Queue(study)
        self.processes: dict[str, Process] = {}
        self.asked: dict[str, int] | None = None  # processes by name

    def command(self, job: Job) -> list[str]:
        """The job's command line."""
        return job.command(self.study.out, self.study.backend, self.study.gpus)

    def describe(self, job: Job) -> str:
        """See ``Launcher``."""
        on_gpu = self.devices and gpus_needed(job, self.study)
        threads = "" if on_gpu or not self.study.threads else f"OMP_NUM_THREADS={self.study.threads} "
        return threads + shlex.join(self.command(job))

    def start(self, jobs: Sequence[Job]) -> set[str]:
        """See ``Launcher``; one for which too few GPUs are free is left for later, see ``require_gpus``."""
        return {job.name for job in jobs if self._start(job)}

    def _start(self, job: Job) -> bool:
        lock = try_lock(lock_file(job, self.study.out))
        if lock is None:
            return False
        with locked(jobs_folder(self.study.out) / "devices.lock"):  # until the GPUs are signed for
            devices = self._free_devices(job)
            if devices is None or self.queue.has(job):
                lock.close()
                return False
            sign(lock, devices)
        failure_file(job, self.study.out).unlink(missing_ok=True)
        log = open(jobs_folder(self.study.out) / f"{job.name}.log", "a+", errors="replace")  # noqa: SIM115 - the process has it
        start = log.tell()
        popen = subprocess.Popen(
            self.command(job),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=self._environment(devices),
            pass_fds=[lock.fileno()],
            start_new_session=True,  # so that a terminal's Ctrl-C reaches it once, through ``stop``
        )
        sign(lock, devices, popen.pid)
        self.processes[job.name] = Process(job, popen, lock, log, start, devices)
        return True

    def running(self) -> set[str]:
        """See ``Launcher``."""
        for name, process in list(self.processes.items()):
            if (code := process.popen.poll()) is not None:
                self._conclude(process, code)
                del self.processes[name]
        return {*self.processes, *self._others(), *self.queue.running()}

    def stop(self) -> set[str]:
        """See ``Launcher``."""
        own = {name: process.popen.pid for name, process in self.processes.items()}
        others = self._others()
        if self.asked is None:
            self.asked = {**{name: holder["pid"] for name, holder in others.items() if is_orphan(holder)}, **own}
            for pid in self.asked.values():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
        here = {name: holder["pid"] for name, holder in others.items() if is_here(holder)} | own
        return {name for name, pid in self.asked.items() if here.get(name) == pid}

    def _conclude(self, process: Process, code: int) -> None:
        """Leave the reason of a failure; a run that was asked to stop has not failed."""
        job, out = process.job, self.study.out
        process.log.seek(process.log_start)
        said = process.log.read()
        process.log.close()
        if not job.result(out).exists() and not self.was_stopped(process, code):
            write_failure(job, out, last_word(said, code))
        process.lock.close()

    def was_stopped(self, process: Process, code: int) -> bool:
        """Whether a run was asked to stop, if only before it listened, and can be continued."""
        return code in STOPPED or (process.job.name in (self.asked or ()) and code == -signal.SIGTERM)

    def _environment(self, devices: Sequence[str]) -> dict[str, str]:
        own = {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if self.devices else {}
        if self.study.threads and not devices:
            own["OMP_NUM_THREADS"] = str(self.study.threads)
        return {**os.environ, **own}

    def _free_devices(self, job: Job) -> list[str] | None:
        """Those for ``job``; None when too few are free."""
        needed = gpus_needed(job, self.study) if self.devices else 0
        taken = {device for process in self.processes.values() for device in process.devices}
        for holder in self._others().values():
            taken |= set(holder["devices"]) if is_here(holder) else set()
        free = [device for device in self.devices if device not in taken]
        return free[:needed] if len(free) >= needed else None

    def _others(self) -> dict[str, dict]:
        """Who holds the jobs that this launcher has not started."""
        return holders((job for job in self.study.jobs if job.name not in self.processes), self.study.out)


class Torchrun(Local):
    """The same with torchrun between the launcher and a run's processes; a search starts its own."""

    def was_stopped(self, process: Process, code: int) -> bool:
        """torchrun has an exit code of its own, so the run's last words to its folder count."""
        status = self.study.out / process.job.name / "status.json"
        is_its_own = status.exists() and status.stat().st_mtime >= process.began
        return super().was_stopped(process, code) or (is_its_own and read_json(status).get("state") == "stopped")

    def command(self, job: Job) -> list[str]:
        if job.run.kind == SEARCH:
            return super().command(job)
        _, *words = job.command(self.study.out, self.study.backend)
        processes = str(job.run.processes or self.study.gpus)
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, *words]
