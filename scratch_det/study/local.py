"""Runs steps as processes on this machine; each step starts when the steps that it needs are done."""

import ctypes
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from itertools import takewhile
from math import ceil
from pathlib import Path
from typing import IO, Any

from scratch_det.distributed.stop import STOPPED, StopFlag, Stopped
from scratch_det.engine.run_dir import Facts
from scratch_det.errors import DataError, UserError
from scratch_det.files import try_lock, write_atomically
from scratch_det.log import say_now
from scratch_det.reading import read_json
from scratch_det.study.records import START_OF_LOG
from scratch_det.study.run import Step, jobs_folder

SECONDS_BETWEEN_LOOKS = 0.5
LOCK_TRIALS = 10  # a tenth of a second apart: ``holder_of`` holds the lock for a moment
PR_SET_PDEATHSIG = 1  # of prctl(2)
LIBC = ctypes.CDLL(None)


@contextmanager
def alone_in(out: Path, name: str) -> Iterator[IO[str]]:
    """Hold the lock of a folder: one launcher works on it. Raises UserError when another does.

    The processes that it starts hold the lock too: no run is started a second time while it is still ending.
    """
    for _ in range(LOCK_TRIALS):
        if lock := try_lock(out / name):
            with lock:
                sign(lock)
                yield lock
            return
        time.sleep(0.1)
    if holder := holder_of(out / name):
        by = f"process {holder['pid']} on {holder['host']} works on it, or its runs are still ending"
        raise UserError(f"--out {out} is in use: {by}; wait for it, or stop it")
    raise UserError(f"--out {out} was in use until now, and its runs are ending; give the same command again")


def sign(lock: IO[str], running: Sequence[str] = ()) -> None:
    """Write into a lock who holds it, and which runs have a process."""
    with suppress(OSError):  # on a full disk the lock holds without it
        lock.seek(0)
        lock.truncate(0)
        lock.write(json.dumps({"host": platform.node(), "pid": os.getpid(), "running": list(running)}) + "\n")
        lock.flush()


def holder_of(path: Path) -> dict[str, Any]:
    """What the holder of a lock has written into it; empty when nobody holds it, or while it is being written."""
    if not path.exists():
        return {}
    if lock := try_lock(path):
        lock.close()
        return {}
    with suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return {}


def gpus_here() -> list[str]:
    """CUDA_VISIBLE_DEVICES where it is set, else 0 to n - 1 for the n NVIDIA devices of this machine.

    As CUDA has it, what follows a word that names no device, such as -1 or SLURM's NoDevFiles, is not visible.
    """
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return list(takewhile(re.compile(r"\s*(\d|GPU-|MIG-)").match, visible.split(",")))
    # A container may have only /dev/nvidia5: CUDA counts from 0, whatever the files are called.
    return [str(number) for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def require_gpus(steps: Sequence[Step], fix: str) -> None:
    """Raise UserError when a step needs more GPUs than this machine has; where it has none, the CPU does the work."""
    devices, largest = len(gpus_here()), max(steps, key=lambda step: step.processes * step.on_gpu)
    if largest.on_gpu and 0 < devices < largest.processes:
        source = "CUDA_VISIBLE_DEVICES names" if "CUDA_VISIBLE_DEVICES" in os.environ else "this machine has"
        raise UserError(f"{largest.name} needs {largest.processes} GPUs, and {source} {devices}; {fix}")


@dataclass
class Process:
    """The process tree of a step, and its GPUs."""

    step: Step
    popen: subprocess.Popen
    devices: list[str]
    began: float = field(default_factory=time.time)


class Local:
    """At most ``places`` runs of ``gpus`` processes at once; they share the GPUs of this machine."""

    def __init__(self, out: Path, lock: IO[str], places: int = 1, gpus: int = 1):
        self.out, self.lock, self.places, self.gpus = out, lock, places, gpus
        self.devices, self.processes = gpus_here(), list[Process]()
        self.stop, self.has_passed_on, self.has_warned = StopFlag(), False, False

    @staticmethod
    def command(step: Step) -> list[str]:
        """The command line that starts a step's processes."""
        return step.command()

    @classmethod
    def shown(cls, step: Step) -> str:
        """``command`` as it is typed."""
        threads = f"OMP_NUM_THREADS={step.threads} " * bool(step.threads and not (gpus_here() and step.on_gpu))
        return threads + shlex.join(cls.command(step))

    def run(self, steps: Sequence[Step], look: Callable[[set[str]], object]) -> None:
        """Start ``steps`` until no more can be started; the run folders hold the results.

        Other steps continue when one fails; a preempted step is started again. ``look`` is called with the names of the
        runs that have a process. Raises Stopped, when all processes have ended, after a signal.

        ``steps`` have passed ``require_gpus``: one that needs more GPUs than there are would never start, in silence.
        """
        by_name = {step.name: step for step in steps}
        waiting = [step for step in steps if not step.is_done]  # in the given order: a trunk before its branches
        with self.stop.listening():
            while True:
                busy = {process.step.name for process in self.processes}  # with a file, too: it may still evaluate
                to_come = {step.name for step in waiting} | busy
                for step in [] if self.stop.requested else list(waiting):
                    needs = [by_name[name] for name in step.needs if name in by_name]
                    is_ready = all((need.is_done and need.name not in busy)
                                   or (step.also_after_failures and need.name not in to_come)
                                   for need in needs) and all(path.exists() for path in step.inputs)  # fmt: skip
                    if not is_ready:
                        continue
                    if (devices := self.room_for(step)) is None:
                        break  # if smaller steps could overtake, this one might wait forever
                    waiting.remove(step)
                    self.start(step, devices)
                look({process.step.run for process in self.processes})
                if not self.processes and self.stop.requested:
                    raise Stopped(self.stop)
                if not self.processes:
                    return
                time.sleep(SECONDS_BETWEEN_LOOKS)
                waiting = [*self.ended(), *waiting]

    def room_for(self, step: Step) -> list[str] | None:
        """The GPUs for ``step``, none where the CPU does the work; None when it has to wait.

        A step that needs more than all places starts when no other step runs. Says once when only GPUs are missing.
        """
        taken = sum(self.places_of(process.step) for process in self.processes)
        if self.places_of(step) > self.places - taken:
            return None
        needed = step.processes if self.devices and step.on_gpu else 0
        in_use = {device for process in self.processes for device in process.devices}
        free = [device for device in self.devices if device not in in_use]
        if len(free) >= needed:
            return free[:needed]
        if not self.has_warned:
            self.has_warned = True
            say_now(f"fewer runs at once than --max-parallel {self.places}: {step.name} waits until enough of the "
                    f"{len(self.devices)} GPUs are free")  # fmt: skip
        return None

    def places_of(self, step: Step) -> int:
        return min(ceil(step.processes / self.gpus), self.places)

    def environment(self, step: Step, devices: Sequence[str]) -> dict[str, str]:
        own = {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if self.devices else {}
        threads = {"OMP_NUM_THREADS": str(step.threads)} if step.threads and not devices else {}
        return {**os.environ, **own, **threads}

    def start(self, step: Step, devices: list[str]) -> None:
        command = self.command(step)
        jobs_folder(self.out).mkdir(parents=True, exist_ok=True)
        for suffix in (".exit", ".sh"):  # of an earlier start, here or by SLURM
            step.file(self.out, suffix).unlink(missing_ok=True)
        with open(step.file(self.out, ".log"), "a") as log:
            log.write(f"{START_OF_LOG}{datetime.now():%Y-%m-%d %H:%M:%S}: {' '.join(command)}\n")
            log.flush()
            popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment(step, devices),
                pass_fds=[self.lock.fileno()],
                start_new_session=True,  # a terminal's Ctrl-C reaches this process, which passes it on once
                # SIGTERM, at which a run stops with a checkpoint, when the launcher is gone
                preexec_fn=partial(LIBC.prctl, PR_SET_PDEATHSIG, signal.SIGTERM),
            )
        self.processes.append(Process(step, popen, devices))
        sign(self.lock, [process.step.run for process in self.processes])

    def ended(self) -> list[Step]:
        """The stopped steps, which can go on, among those whose processes have ended since the last call.

        Passes on a request to stop, once, and leaves the exit code of each step that failed.
        """
        if self.stop.requested and not self.has_passed_on:
            self.has_passed_on = True
            for process in self.processes:
                process.popen.terminate()
        ended = [process for process in self.processes if process.popen.poll() is not None]
        if ended:
            self.processes = [process for process in self.processes if process not in ended]
            sign(self.lock, [process.step.run for process in self.processes])
        left = [process for process in ended if not process.step.is_done]
        stopped = [process.step for process in left if self.was_stopped(process)]
        for step, code in ((one.step, one.popen.returncode) for one in left if one.step not in stopped):
            path = step.file(self.out, ".exit")
            try:
                write_atomically(path, f"{code}\n")
            except OSError as error:  # a full disk, which may also be why the run failed: the others go on
                say_now(f"{step.name}: failed with exit code {code}, and {path} cannot be written "
                        f"({error.strerror}); make room there, and give the same command again")  # fmt: skip
        return stopped

    def was_stopped(self, process: Process) -> bool:
        """Whether a run was asked to stop, if only before it listened, and can be continued.

        torchrun has an exit code of its own, so the state that the run has left since its start counts too.
        """
        status, code, state = self.out / process.step.run / "status.json", process.popen.returncode, None
        if status.exists() and status.stat().st_mtime >= process.began:
            with suppress(DataError):  # a damaged file: the record says so
                state = read_json(status, Facts).get("state")
        return code in STOPPED or (self.has_passed_on and code == -signal.SIGTERM) or state == "stopped"


class Torchrun(Local):
    """Starts the processes of each run through torchrun."""

    @staticmethod
    def command(step: Step) -> list[str]:
        if not step.processes:
            return step.command()
        _, *words = step.command(launches=False)
        several = ["--standalone", "--nproc-per-node", str(step.processes)]
        return [sys.executable, "-m", "torch.distributed.run", *several, *words]
