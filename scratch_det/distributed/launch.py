"""Rank and number of processes, from torchrun's and SLURM's environment variables; and starting several processes.

No other module reads these variables.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlparse

from scratch_det.distributed.stop import StopFlag, Stopped, signal_name, wanted_signals
from scratch_det.errors import UserError

if TYPE_CHECKING:  # torch is imported when processes meet: errors of the command line come before
    from torch.distributed import Store

FIRST_PORT, PORTS = 20_000, 12_000  # below Linux's ephemeral range, which begins at 32,768
MEETING_SECONDS = 300.0  # until all processes have to be started; slow file systems delay imports
SECONDS_TO_ANSWER = 2.0  # for a machine's port
SECONDS_TO_END = 10.0  # for the others to end by themselves after one has failed
SECONDS_BETWEEN_LOOKS = 0.1


def usable_cores() -> int:
    """The CPU cores that this process may use; macOS only tells how many the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class World:
    """This process among all processes of a run.

    rank, size: of all machines; local_rank, local_size: of this machine. address, port: of the store where the
    processes meet. served: a launcher serves this store; otherwise rank 0 does. by_srun: SLURM started the processes,
    perhaps each with a GPU of its own.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    served: bool = False
    by_srun: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the run folder and logs."""
        return self.rank == 0


ALONE = World()


def read_world(environment: Mapping[str, str]) -> World:
    """What the variables of torchrun (or ``launch``) or srun say; a single process without them.

    A SLURM batch script runs outside ``srun``: it is a single process, however many tasks the job has. Raises UserError
    when variables are missing or contradict each other.
    """
    try:
        if "RANK" in environment and "WORLD_SIZE" in environment:
            world = _from_torchrun(environment) if int(environment["WORLD_SIZE"]) > 1 else ALONE
        elif int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            world = _from_slurm(environment)
        else:
            return ALONE
    except (LookupError, ValueError) as error:
        raise UserError(
            f"the launcher's environment is incomplete ({type(error).__name__}: {error}); expected RANK, WORLD_SIZE, "
            "MASTER_ADDR and MASTER_PORT as torchrun sets them, or SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID "
            "and SLURM_STEP_NODELIST as srun sets them"
        ) from None
    if not (0 <= world.rank < world.size and 0 <= world.local_rank < world.local_size <= world.size):
        raise UserError(f"the launcher's environment contradicts itself: {world}")
    return world


def _from_torchrun(environment: Mapping[str, str]) -> World:
    return World(
        rank=int(environment["RANK"]),
        size=int(environment["WORLD_SIZE"]),
        local_rank=int(environment["LOCAL_RANK"]),
        local_size=int(environment.get("LOCAL_WORLD_SIZE", environment["WORLD_SIZE"])),
        address=environment["MASTER_ADDR"],
        port=int(environment["MASTER_PORT"]),
        served=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _from_slurm(environment: Mapping[str, str]) -> World:
    """srun starts one process per task. The port depends on the job, so that two jobs on one node do not collide."""
    size = int(environment["SLURM_STEP_NUM_TASKS"])
    tasks: list[int] = []  # of each node; written like 4(x2),3
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", str(size)).split(","):
        count, _, repeat = part.partition("(x")
        tasks += [int(count)] * int(repeat.rstrip(")") or 1)
    return World(
        rank=int(environment["SLURM_PROCID"]),
        size=size,
        local_rank=int(environment["SLURM_LOCALID"]),
        local_size=tasks[int(environment.get("SLURM_NODEID", 0))],
        address=environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
        port=int(environment.get("MASTER_PORT", FIRST_PORT + int(environment.get("SLURM_JOB_ID", 0)) % PORTS)),
        by_srun=True,
    )


def first_host(nodelist: str) -> str:
    """The first host of a SLURM host list: gpu003 of ``gpu[003-006,010],cpu1``."""
    found = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodelist)
    if not found:
        raise ValueError(f"{nodelist!r} is no SLURM host list")
    return "".join(part or "" for part in found.groups())


def several_to_launch(world: World, num_gpus: int, num_machines: int, machine_rank: int) -> bool:
    """Whether the flags ask this process to start others.

    Raises UserError when flags contradict each other, or the launcher that started this process.
    """
    asked = max(num_gpus, 1) * num_machines
    if num_gpus < 0 or num_machines < 1 or not 0 <= machine_rank < num_machines:
        raise UserError(
            f"--num-gpus {num_gpus} --num-machines {num_machines} --machine-rank {machine_rank}: expected 1 or more "
            "processes and machines, and a rank from 0 to the number of machines - 1"
        )
    if world.size > 1 and asked not in (1, world.size):
        raise UserError(
            f"torchrun or srun has started {world.size} processes, --num-gpus x --num-machines asks for {asked}; "
            "use one of both: leave out the flags, or the launcher"
        )
    return asked > world.size


def launch(num_gpus: int, num_machines: int, machine_rank: int, dist_url: str) -> int:
    """Run this process's command line in ``num_gpus`` processes; returns 0, or the exit code of the first that failed.

    The flags are detectron2's; ``dist_url`` "auto" takes a free port, on one machine. Signals that stop a run are
    passed on. When one process fails, the others end too. Raises UserError for an invalid ``dist_url`` or a taken port,
    Stopped when a signal comes before there are processes.
    """
    num_processes, address, port = max(num_gpus, 1), "127.0.0.1", 0
    if dist_url != "auto" or num_machines > 1:
        url = urlparse(dist_url)
        if url.scheme != "tcp" or not url.hostname or not url.port:
            raise UserError(
                f"--dist-url is {dist_url}, expected tcp://HOST:PORT of the first of the {num_machines} machines"
            )
        address, port = url.hostname, url.port
    # served by the launcher, so it outlives each of the processes
    stop = StopFlag()
    with stop.listening():
        store, port = open_store(address, port, machine_rank == 0, stop)
    shared = {
        "WORLD_SIZE": num_processes * num_machines,
        "LOCAL_WORLD_SIZE": num_processes,
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // num_processes)),
    }
    processes: list[subprocess.Popen] = []

    def pass_on(number: int, _frame: object) -> None:
        for process in processes:
            if number != signal.SIGINT and process.poll() is None:  # Ctrl-C reaches them from the terminal
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in wanted_signals()}
    try:
        for local_rank in range(num_processes):
            own = {"RANK": machine_rank * num_processes + local_rank, "LOCAL_RANK": local_rank}
            environment = os.environ | {name: str(value) for name, value in (shared | own).items()}
            processes.append(subprocess.Popen([sys.executable, *sys.argv], env=environment))
        return _wait(processes, store, machine_rank * num_processes)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: list[subprocess.Popen], store: "Store", first_rank: int) -> int:
    """Wait for all, after the first failure only for ``SECONDS_TO_END``. Returns the first failure's exit code, or 0.

    A process that a signal ended could not report it: it is printed here, and written into the store for the others.
    """
    code, deadline = 0, float("inf")
    while True:
        codes = [process.poll() for process in processes]
        failed = next((rank for rank, found in enumerate(codes, first_rank) if found), None)
        if failed is not None and not code:
            code, deadline = codes[failed - first_rank] or 0, time.monotonic() + SECONDS_TO_END
            if code < 0:
                reason, code = f"process {failed} was ended by {signal_name(-code)}", 128 - code
                print(f"error: {reason}", file=sys.stderr, flush=True)
                with suppress(RuntimeError):  # the store may be gone with the machine that serves it
                    announce_failure(store, None, reason, code)
        if None not in codes:
            return code
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(SECONDS_BETWEEN_LOOKS)


def open_store(address: str, port: int, opens_it: bool, stop: StopFlag) -> tuple["Store", int]:
    """The store where the processes meet, served or connected to, and its port; port 0 takes a free one.

    Its keys have a prefix for this start: torchrun uses the same store, also when it starts the processes again after a
    failure. Raises UserError when the address cannot be served or reached, Stopped when ``stop`` is requested.
    """
    from torch.distributed import PrefixStore, TCPStore

    deadline = time.monotonic() + MEETING_SECONDS
    try:
        socket.getaddrinfo(address, port)  # a name that stands for nothing; TCPStore would try for minutes
        while not opens_it:  # TCPStore would wait, too, but not see a request to stop
            try:
                socket.create_connection((address, port), SECONDS_TO_ANSWER).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
            if stop.requested:
                raise Stopped(stop)
            time.sleep(SECONDS_BETWEEN_LOOKS)
        timeout = timedelta(seconds=MEETING_SECONDS)
        store = TCPStore(address, port, is_master=opens_it, wait_for_workers=False, timeout=timeout)
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"cannot {'open' if opens_it else 'reach'} {address}:{port} for the processes to meet "
            f"({str(error).splitlines()[0]}); give another: --dist-url tcp://HOST:PORT, MASTER_PORT, or torchrun's "
            "--master-port"
        ) from None
    return PrefixStore(f"run{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store), store.port


def announce_failure(store: "Store", rank: int | None, reason: str, code: int) -> None:
    """Write into the store that a process failed; ``rank`` None when it could not do so itself."""
    store.set("failure", json.dumps({"rank": rank, "reason": reason, "exit_code": code}))
