"""Steps as processes on this machine, each when those that it needs are done."""

import ctypes
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from graphlib import TopologicalSorter
from math import ceil
from pathlib import Path
from typing import IO

from scratch_det.distributed.stop import STOPPED, StopFlag, Stopped
from scratch_det.errors import UserError
from scratch_det.files import try_lock, write_atomically
from scratch_det.study.checks import gpus_here
from scratch_det.study.job import Step
from scratch_det.study.records import START_OF_LOG, jobs_folder, read_json

SECONDS_BETWEEN_LOOKS = 0.5
LOCK_TRIALS = 10  # a tenth of a second apart: study.py status holds the lock for a moment
PR_SET_PDEATHSIG = 1  # of prctl(2)
LIBC = ctypes.CDLL(None)


@contextmanager
def alone_in(out: Path, name: str) -> Iterator[IO[str]]:
    """Hold the lock of a folder: one launcher works on it. Raises UserError when another does.

    The processes that it starts hold the lock too: nobody starts a run a second time while it still ends.
    """
    for _ in range(LOCK_TRIALS):
        if lock := try_lock(out / name):
            with lock:
                yield lock
            return
        time.sleep(0.1)
    holder = read_holder(out / name)
    raise UserError(
        f"--out {out} is in use: process {holder.get('pid')} on {holder.get('host')} works on it, or what it has "
        "started still ends; wait for it, or stop it"
    )


def read_holder(path: Path) -> dict:
    """What the holder of a lock wrote into it; empty while it is being written."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def running_in(out: Path, name: str) -> list[str]:
    """Names of the runs that a launcher has processes of, at this moment."""
    if not (out / name).exists() or (lock := try_lock(out / name)) is None:
        return read_holder(out / name).get("running", [])
    lock.close()
    return []


@dataclass
class Process:
    """A step's process tree, the GPUs that it has, and how many of the places for runs."""

    step: Step
    popen: subprocess.Popen
    devices: list[str]
    places: int
    began: float = field(default_factory=time.time)


class Local:
    """At most ``places`` runs of ``gpus`` processes at once; the GPUs of this machine are shared out among them."""

    def __init__(self, out: Path, lock: IO[str], places: int = 1, gpus: int = 1, threads: int = 0):
        self.out, self.lock, self.places, self.gpus, self.threads = out, lock, places, gpus, threads
        self.devices = gpus_here()
        self.processes: list[Process] = []
        self.stop, self.asked = StopFlag(), False

    @staticmethod
    def command(step: Step) -> list[str]:
        """The command line that starts a step's processes."""
        return step.command()

    def run(self, steps: Sequence[Step], look: Callable[[set[str]], object]) -> None:
        """Start ``steps`` until no more can be started; what became of them is in the folders.

        A failed step keeps no other from going on; one that was preempted is started again. ``look`` is called with
        the names of the runs that have a process. Raises Stopped, when all processes have ended, after a signal.
        """
        by_name = {step.name: step for step in steps}
        order = TopologicalSorter({step.name: [name for name in step.needs if name in by_name] for step in steps})
        order.prepare()
        position = {name: number for number, name in enumerate(by_name)}
        waiting: list[Step] = []
        with self.stop.listening():
            while True:
                while ready := order.get_ready():
                    # In the given order: a trunk goes on before its branches.
                    waiting = sorted(
                        [*waiting, *(by_name[name] for name in ready)], key=lambda step: position[step.name]
                    )
                    order.done(*(step.name for step in waiting if step.is_done))
                    waiting = [step for step in waiting if not step.is_done]
                waiting = [step for step in waiting if all(path.exists() for path in step.inputs)]  # else it is blocked
                # A smaller one that slipped in would let the first one wait for ever.
                while waiting and not self.stop.requested and self.fits(waiting[0]):
                    self.start(waiting.pop(0))
                look({process.step.run for process in self.processes})
                if not self.processes and self.stop.requested:
                    raise Stopped(self.stop)
                if not self.processes and not waiting:
                    return
                time.sleep(SECONDS_BETWEEN_LOOKS)
                for step in self.ended():
                    if step.is_done:
                        order.done(step.name)
                    elif not (jobs_folder(self.out) / f"{step.file_name}.exit").exists():  # preempted
                        waiting.insert(0, step)

    def fits(self, step: Step) -> bool:
        """Whether there is room; a step that needs more than all places is let in alone."""
        free = self.places - sum(process.places for process in self.processes)
        return self.places_of(step) <= free and self.free_devices(step) is not None

    def places_of(self, step: Step) -> int:
        return min(ceil(step.processes / self.gpus), self.places)

    def free_devices(self, step: Step) -> list[str] | None:
        """GPUs for ``step``; None when too few are free."""
        needed = step.processes if self.devices and step.on_gpu else 0
        taken = {device for process in self.processes for device in process.devices}
        free = [device for device in self.devices if device not in taken]
        return free[:needed] if len(free) >= needed else None

    def environment(self, devices: Sequence[str]) -> dict[str, str]:
        own = {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if self.devices else {}
        if self.threads and not devices:
            own["OMP_NUM_THREADS"] = str(self.threads)
        return {**os.environ, **own}

    def start(self, step: Step) -> None:
        devices, command = self.free_devices(step) or [], self.command(step)
        jobs = jobs_folder(self.out)
        jobs.mkdir(parents=True, exist_ok=True)
        (jobs / f"{step.file_name}.exit").unlink(missing_ok=True)
        with open(jobs / f"{step.file_name}.log", "a") as log:
            log.write(f"{START_OF_LOG}{datetime.now():%Y-%m-%d %H:%M:%S}: {' '.join(command)}\n")
            log.flush()
            popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment(devices),
                pass_fds=[self.lock.fileno()],
                start_new_session=True,  # a terminal's Ctrl-C reaches this process, which passes it on once
                preexec_fn=_end_with_parent,
            )
        self.processes.append(Process(step, popen, devices, self.places_of(step)))
        self._sign()

    def ended(self) -> list[Step]:
        """The steps whose processes have ended since the last call; leaves the exit codes of those that failed."""
        if self.stop.requested and not self.asked:
            self.asked = True
            for process in self.processes:
                process.popen.terminate()
        ended = [process for process in self.processes if process.popen.poll() is not None]
        for process in ended:
            self.processes.remove(process)
            code = process.popen.returncode
            if not process.step.is_done and not self.was_stopped(process, code):
                write_exit_code(self.out, process.step, code)
        if ended:
            self._sign()
        return [process.step for process in ended]

    def was_stopped(self, process: Process, code: int) -> bool:
        """Whether a run was asked to stop, if only before it listened, and can be continued."""
        return code in STOPPED or (self.asked and code == -signal.SIGTERM)

    def _sign(self) -> None:
        """Write into the lock who holds it, and which runs have a process."""
        names = [process.step.run for process in self.processes]
        self.lock.seek(0)
        self.lock.truncate(0)
        self.lock.write(json.dumps({"host": platform.node(), "pid": os.getpid(), "running": names}) + "\n")
        self.lock.flush()


def write_exit_code(out: Path, step: Step, code: int) -> None:
    """Leave how ``step`` failed. Raises UserError when the disk is full."""
    path = jobs_folder(out) / f"{step.file_name}.exit"
    try:
        write_atomically(path, f"{code}\n")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): {step.name} failed with exit code {code}; make room, and "
            "give the same command again"
        ) from None


def _end_with_parent() -> None:
    """In a child: be sent SIGTERM, at which a run stops with a checkpoint, when the launcher is gone."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Torchrun(Local):
    """The same with torchrun between the launcher and a run's processes."""

    @staticmethod
    def command(step: Step) -> list[str]:
        if not step.processes:
            return step.command()
        _, *words = step.command(launches=False)
        several = ["--standalone", "--nproc-per-node", str(step.processes)]
        return [sys.executable, "-m", "torch.distributed.run", *several, *words]

    def was_stopped(self, process: Process, code: int) -> bool:
        """torchrun has an exit code of its own, so the run's last words to its folder count."""
        status = self.out / process.step.run / "status.json"
        is_its_own = status.exists() and status.stat().st_mtime >= process.began
        return super().was_stopped(process, code) or (is_its_own and read_json(status).get("state") == "stopped")
