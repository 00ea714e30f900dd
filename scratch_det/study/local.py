"""Runs steps as processes on this machine; each step starts when the steps that it needs are done."""

import ctypes
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from math import ceil
from pathlib import Path
from typing import IO

from scratch_det.distributed.stop import STOPPED, StopFlag, Stopped
from scratch_det.errors import DataError, UserError
from scratch_det.files import try_lock, write_atomically
from scratch_det.log import say_now
from scratch_det.study.records import START_OF_LOG, jobs_folder, read_json
from scratch_det.study.run import Step

SECONDS_BETWEEN_LOOKS = 0.5
LOCK_TRIALS = 10  # a tenth of a second apart: study.py status holds the lock for a moment
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
    holder = read_holder(out / name)
    raise UserError(
        f"--out {out} is in use: process {holder.get('pid')} on {holder.get('host')} works on it, or what it has "
        "started still ends; wait for it, or stop it"
    )


def sign(lock: IO[str], running: Sequence[str] = ()) -> None:
    """Write into a lock who holds it, and which runs have a process."""
    with suppress(OSError):  # on a full disk the lock holds without it
        lock.seek(0)
        lock.truncate(0)
        lock.write(json.dumps({"host": platform.node(), "pid": os.getpid(), "running": list(running)}) + "\n")
        lock.flush()


def read_holder(path: Path) -> dict:
    """The content of a lock, written by its holder; empty while it is being written."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def running_in(out: Path, name: str) -> list[str]:
    """Names of the runs that have running processes of a launcher."""
    if not (out / name).exists() or (lock := try_lock(out / name)) is None:
        return read_holder(out / name).get("running", [])
    lock.close()
    return []


@dataclass
class Process:
    """The process tree of a step, and its GPUs."""

    step: Step
    popen: subprocess.Popen
    devices: list[str]
    began: float = field(default_factory=time.time)


class Local:
    """At most ``places`` runs of ``gpus`` processes at once; they share the GPUs of this machine."""

    def __init__(self, out: Path, lock: IO[str], places: int = 1, gpus: int = 1, threads: int = 0):
        self.out, self.lock, self.places, self.gpus, self.threads = out, lock, places, gpus, threads
        self.devices, self.processes = gpus_here(), list[Process]()
        self.stop, self.asked = StopFlag(), False

    @staticmethod
    def command(step: Step) -> list[str]:
        """The command line that starts a step's processes."""
        return step.command()

    def run(self, steps: Sequence[Step], look: Callable[[set[str]], object]) -> None:
        """Start ``steps`` until no more can be started; the run folders hold the results.

        Other steps continue when one fails; a preempted step is started again. ``look`` is called with the names of the
        runs that have a process. Raises Stopped, when all processes have ended, after a signal, and UserError when
        nothing runs and the next step needs more GPUs than this machine has.
        """
        by_name, failed = {step.name: step for step in steps}, set[str]()
        waiting = [step for step in steps if not step.is_done]  # in the given order: a trunk before its branches
        with self.stop.listening():
            while True:
                ready = [
                    step
                    for step in waiting
                    if all(
                        by_name[name].is_done or (step.also_after_failures and name in failed)
                        for name in step.needs
                        if name in by_name
                    )
                    and all(path.exists() for path in step.inputs)
                ]
                # If smaller steps could overtake, the first one might wait forever.
                while ready and not self.stop.requested and self.fits(ready[0]):
                    waiting.remove(ready[0])
                    self.start(ready.pop(0))
                look({process.step.run for process in self.processes})
                if not self.processes and self.stop.requested:
                    raise Stopped(self.stop)
                if not self.processes and not ready:
                    return
                if not self.processes:  # all GPUs are free, and still they are too few
                    raise UserError(
                        f"{ready[0].name} needs {ready[0].processes} GPUs, and this machine has {len(self.devices)}; "
                        "give fewer, or show it more (CUDA_VISIBLE_DEVICES)"
                    )
                time.sleep(SECONDS_BETWEEN_LOOKS)
                waiting = [*self.ended(), *waiting]
                to_come = {step.name for step in waiting} | {process.step.name for process in self.processes}
                failed = {step.name for step in steps if not step.is_done and step.name not in to_come}

    def fits(self, step: Step) -> bool:
        """Whether ``step`` can start now; a step that needs more than all places starts when no other step runs."""
        free = self.places - sum(self.places_of(process.step) for process in self.processes)
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
        path = jobs_folder(self.out) / f"{step.file_name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        for ending in (".exit", ".sh"):  # of an earlier start, here or by SLURM
            path.with_suffix(ending).unlink(missing_ok=True)
        with open(path, "a") as log:
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
                # SIGTERM, at which a run stops with a checkpoint, when the launcher is gone
                preexec_fn=partial(LIBC.prctl, PR_SET_PDEATHSIG, signal.SIGTERM),
            )
        self.processes.append(Process(step, popen, devices))
        self._sign()

    def ended(self) -> list[Step]:
        """The stopped steps, which can go on, among those whose processes have ended since the last call.

        Leaves the exit code of each that failed.
        """
        if self.stop.requested and not self.asked:
            self.asked = True
            for process in self.processes:
                process.popen.terminate()
        ended = [process for process in self.processes if process.popen.poll() is not None]
        stopped = []
        for process in ended:
            step, code = process.step, process.popen.returncode
            self.processes.remove(process)
            self._sign()
            if self.was_stopped(process, code) and not step.is_done:
                stopped.append(step)
            elif not step.is_done:
                path = jobs_folder(self.out) / f"{step.file_name}.exit"
                try:
                    write_atomically(path, f"{code}\n")
                except OSError as error:  # a full disk, which may also be why the run failed: the others go on
                    say_now(
                        f"{step.name}: failed with exit code {code}, and {path} cannot be written ({error.strerror}); "
                        "make room there, and give the same command again"
                    )
        return stopped

    def was_stopped(self, process: Process, code: int) -> bool:
        """Whether a run was asked to stop, if only before it listened, and can be continued.

        torchrun has an exit code of its own, so the run's last words to its folder count too.
        """
        status = self.out / process.step.run / "status.json"
        is_its_own = status.exists() and status.stat().st_mtime >= process.began
        try:
            said = read_json(status).get("state") if is_its_own else ""
        except DataError:  # damaged: the record says so
            said = ""
        return code in STOPPED or (self.asked and code == -signal.SIGTERM) or said == "stopped"

    def _sign(self) -> None:
        sign(self.lock, [process.step.run for process in self.processes])


class Torchrun(Local):
    """Starts the processes of each run through torchrun."""

    @staticmethod
    def command(step: Step) -> list[str]:
        if not step.processes:
            return step.command()
        _, *words = step.command(launches=False)
        several = ["--standalone", "--nproc-per-node", str(step.processes)]
        return [sys.executable, "-m", "torch.distributed.run", *several, *words]


def gpus_here() -> list[str]:
    """CUDA_VISIBLE_DEVICES where it is set, else 0 to n - 1 for the n NVIDIA devices of this machine."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [word for word in visible.split(",") if word.strip()]
    # A container may have only /dev/nvidia5: CUDA counts from 0, whatever the files are called.
    return [str(number) for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def require_gpus(needed: dict[str, int], gpus: int, max_parallel: int, fix: str = "change --gpus or --only") -> None:
    """Raise UserError when this machine has GPUs, but fewer than may be needed at once; ``needed``: by run."""
    devices = len(gpus_here())
    source = "CUDA_VISIBLE_DEVICES names" if "CUDA_VISIBLE_DEVICES" in os.environ else "this machine has"
    largest = sorted(needed, key=lambda name: -needed[name])
    if devices and needed and needed[largest[0]] > devices:
        raise UserError(f"{largest[0]} needs {needed[largest[0]]} GPUs, and {source} {devices}; {fix}")
    at_once = min(sum(needed[name] for name in largest[:max_parallel]), max_parallel * gpus)
    if devices and at_once > devices:
        raise UserError(
            f"--max-parallel {max_parallel} with --gpus {gpus} needs {at_once} GPUs, and {source} {devices}; "
            f"give --max-parallel {max(1, devices // gpus)}, or fewer --gpus"
        )
