"""Runs as processes on this machine."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from scratch_det.distributed.ending import STOPPED, last_word
from scratch_det.errors import UserError
from scratch_det.lock import try_lock
from scratch_det.study.experiment import SEARCH
from scratch_det.study.job import Job, shown_command
from scratch_det.study.standing import failure_file, jobs_folder, read_json
from scratch_det.study.study import Study


@dataclass
class Process:
    """A job's process; ``lock`` is held by it too, so that it counts as running when this launcher is gone."""

    job: Job
    popen: subprocess.Popen
    lock: IO[str]
    log: IO[str]
    log_start: int
    devices: tuple[str, ...]
    began: float = field(default_factory=time.time)


class Local:
    """One process tree a job; the GPUs of this machine, where it has any, are shared out among them."""

    def __init__(self, study: Study):
        self.study, self.devices = study, gpus_here()
        self.processes: dict[str, Process] = {}
        self.stopping = False

    def command(self, job: Job) -> list[str]:
        """The job's command line."""
        return job.command(self.study.out, self.study.backend, self.study.gpus)

    def describe(self, job: Job) -> str:
        """See ``Launcher``."""
        return shown_command(self.command(job))

    def start(self, jobs: Sequence[Job]) -> None:
        """See ``Launcher``. Raises UserError when the machine has too few GPUs for one of them."""
        for job in jobs:
            self._start(job)

    def _start(self, job: Job) -> None:
        lock = try_lock(self._lock_file(job))
        if lock is None:
            return
        failure_file(job, self.study.out).unlink(missing_ok=True)
        log = open(jobs_folder(self.study.out) / f"{job.name}.log", "a+", errors="replace")  # noqa: SIM115 - the process has it
        start, devices = log.tell(), self._free_devices(job)
        popen = subprocess.Popen(
            self.command(job),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=self._environment(devices),
            pass_fds=[lock.fileno()],
        )
        self.processes[job.name] = Process(job, popen, lock, log, start, devices)

    def running(self) -> set[str]:
        """See ``Launcher``."""
        for name, process in list(self.processes.items()):
            if (code := process.popen.poll()) is not None:
                self._conclude(process, code)
                del self.processes[name]
        others = (job for job in self.study.jobs if job.name not in self.processes)
        return {*self.processes, *(job.name for job in others if self._is_locked(job))}

    def stop(self) -> None:
        """See ``Launcher``."""
        if not self.stopping:
            self.stopping = True
            for process in self.processes.values():
                process.popen.terminate()

    def _conclude(self, process: Process, code: int) -> None:
        """Leave the reason of a failure; a run that was asked to stop has not failed."""
        job, out = process.job, self.study.out
        process.log.seek(process.log_start)
        said = process.log.read()
        process.log.close()
        if not job.result(out).exists() and not self.was_stopped(process, code):
            failure_file(job, out).write_text(last_word(said, code) + "\n")
        process.lock.close()

    def was_stopped(self, process: Process, code: int) -> bool:
        """Whether a run was asked to stop, and can be continued."""
        return code in STOPPED

    def _environment(self, devices: tuple[str, ...]) -> dict[str, str]:
        own = {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}
        if self.study.threads:
            own["OMP_NUM_THREADS"] = str(self.study.threads)
        return {**os.environ, **own}

    def _free_devices(self, job: Job) -> tuple[str, ...]:
        if not self.devices:
            return ()
        needed = job.run.processes or self.study.gpus
        taken = {device for process in self.processes.values() for device in process.devices}
        free = [device for device in self.devices if device not in taken]
        if len(free) < needed:
            raise UserError(
                f"{job.name} needs {needed} GPUs, but {len(free)} of this machine's {len(self.devices)} are free; give "
                "fewer with --gpus or --max-parallel"
            )
        return tuple(free[:needed])

    def _lock_file(self, job: Job) -> Path:
        return jobs_folder(self.study.out) / f"{job.name}.lock"

    def _is_locked(self, job: Job) -> bool:
        if not self._lock_file(job).exists():
            return False
        lock = try_lock(self._lock_file(job))
        if lock:
            lock.close()
        return lock is None


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


def gpus_here() -> list[str]:
    """CUDA_VISIBLE_DEVICES where it is set, else the numbers of NVIDIA's devices on this machine."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [word for word in visible.split(",") if word.strip()]
    return sorted((path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")), key=int)
