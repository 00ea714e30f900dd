"""Rank and number of processes, from the environment variables of a launcher; and starting several processes.

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
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from scratch_det.distributed.stop import StopFlag, Stopped, signal_name, wanted_signals
from scratch_det.errors import UserError

if TYPE_CHECKING:  # torch is imported when processes meet: errors of the command line come before
    from torch.distributed import Store

MOST_PROCESSES = 64  # of a machine; more would be a slip of the keyboard that starts them all
FIRST_PORT, PORTS = 20_000, 12_000  # below Linux's ephemeral range, which begins at 32,768
MEETING_SECONDS = 300.0  # until all processes have to be started; slow file systems delay imports
SECONDS_TO_ANSWER = 2.0  # for a machine's port
SECONDS_TO_END = 10.0  # for the others to end by themselves after one has failed
SECONDS_BETWEEN_LOOKS = 0.1
CGROUP = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """The CPU cores that this process may use, by its affinity and quota; macOS only tells how many the machine has."""
    found = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    quotas = (lines[0].split() for lines in cgroup_files("cpu.max") if lines)  # microseconds of each period
    found += [int(quota) // int(period) for quota, period in quotas if quota != "max"]
    return max(1, min(found))  # rounded down: a thread more than the quota has is stopped again and again


def cgroup_files(name: str) -> Iterator[list[str]]:
    """Lines of file ``name`` of each cgroup (container, job; version 2) around this process; [] where it is missing."""
    for own in (line.removeprefix("0::/") for line in _lines(CGROUP) if line.startswith("0::/")):
        yield from (_lines(folder / name) for folder in (CGROUPS / own, *(CGROUPS / own).parents))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


@dataclass(frozen=True)
class World:
    """This process among all processes of a run.

    rank, size: of all machines; local_rank, local_size: of this machine. address, port: of the store where the
    processes meet. served: a launcher serves this store; otherwise rank 0 does.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    served: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the run folder and logs."""
        return self.rank == 0


ALONE = World()


VARIABLES = {  # torchrun's name -> also those of Open MPI, of MPICH and Intel MPI, of srun
    "RANK": ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"),
    "WORLD_SIZE": ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"),
    "LOCAL_RANK": ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"),
    "LOCAL_WORLD_SIZE": ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"),
}
HERE = ("127.0.0.1", "localhost")


def read_world(environment: Mapping[str, str]) -> World:
    """What the variables of torchrun (or ``launch``), mpirun or srun say; a single process without them.

    The first launcher that gives rank and size counts. What it leaves out is taken from the others, or follows where
    all processes are on one machine. A SLURM batch script runs outside ``srun``: it is a single process, however many
    tasks the job has. Raises UserError when variables are missing or contradict each other.
    """
    pairs = zip(VARIABLES["RANK"], VARIABLES["WORLD_SIZE"], strict=True)
    pair = next((pair for pair in pairs if environment.keys() >= {*pair}), ("RANK", "WORLD_SIZE"))
    if environment.get(pair[1]) in ("0", "1") or not environment.keys() & {*pair}:
        return ALONE
    found: dict[str, Any] = {key: next((environment[name] for name in names if name in environment), None)
                             for key, names in VARIABLES.items()}  # fmt: skip
    found |= {"RANK": environment.get(pair[0]), "WORLD_SIZE": environment.get(pair[1])}
    found |= {name: environment.get(name) for name in ("MASTER_ADDR", "MASTER_PORT")}
    by_srun = "SLURM_STEP_NUM_TASKS" in environment and not environment.keys() & {*VARIABLES["LOCAL_RANK"][:-1]}
    try:
        if by_srun:
            found["LOCAL_WORLD_SIZE"] = found["LOCAL_WORLD_SIZE"] or tasks_here(environment)
            found["MASTER_ADDR"] = found["MASTER_ADDR"] or first_host(environment.get("SLURM_STEP_NODELIST", ""))
        if found["WORLD_SIZE"] == found["LOCAL_WORLD_SIZE"] or found["MASTER_ADDR"] in HERE:
            found["LOCAL_RANK"] = found["LOCAL_RANK"] or found["RANK"]
            found["MASTER_ADDR"] = found["MASTER_ADDR"] or HERE[0]
        if pair[0] != "RANK":  # two jobs on one machine do not collide
            job = environment.get("SLURM_JOB_ID") or re.sub(r"\D", "", environment.get("PMIX_NAMESPACE", ""))
            found["MASTER_PORT"] = found["MASTER_PORT"] or FIRST_PORT + int(job or 0) % PORTS
        found["LOCAL_WORLD_SIZE"] = found["LOCAL_WORLD_SIZE"] or found["WORLD_SIZE"]
        if missing := [name for name, value in found.items() if value is None]:
            raise ValueError(f"{', '.join(missing)} missing")
        numbers = [int(found[name]) for name in (*VARIABLES, "MASTER_PORT")]
    except ValueError as error:
        said = ", ".join(f"{name}={value}" for name, value in found.items() if value is not None)
        raise UserError(
            f"the launcher's environment is incomplete ({error}): {said}; start with torchrun or srun, which set all, "
            "or with --num-gpus N, or give what is missing, such as mpirun -x MASTER_ADDR=HOST"
        ) from None
    rank, size, local_rank, local_size, port = numbers
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size and 0 < port < 65_536):
        raise UserError(f"the launcher's environment contradicts itself: {found}")
    served = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return World(rank, size, local_rank, local_size, found["MASTER_ADDR"], port, served)


def tasks_here(environment: Mapping[str, str]) -> str | None:
    """How many tasks of a SLURM step run on this node, of a list such as 4(x2),3; None where there is none."""
    tasks: list[str] = []  # of each node
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        count, _, repeat = part.partition("(x")
        tasks += [count] * int(repeat.rstrip(")") or 1)
    node = int(environment.get("SLURM_NODEID", 0))
    return tasks[node] or None if node < len(tasks) else None


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
    if not (0 <= num_gpus <= MOST_PROCESSES and 0 <= machine_rank < num_machines):
        raise UserError(
            f"--num-gpus {num_gpus} --num-machines {num_machines} --machine-rank {machine_rank}: expected 1 or more "
            f"processes and machines, at most {MOST_PROCESSES} processes a machine, and a rank from 0 to the number of "
            "machines - 1"
        )
    if world.size > 1 and asked not in (1, world.size):
        raise UserError(
            f"torchrun, mpirun or srun has started {world.size} processes, --num-gpus x --num-machines asks for "
            f"{asked}; use one of both: leave out the flags, or the launcher"
        )
    return asked > world.size


def launch(num_gpus: int, num_machines: int, machine_rank: int, dist_url: str) -> int:
    """Run this process's command line in ``num_gpus`` processes; returns 0, or the exit code of the first that failed.

    The flags are detectron2's; ``dist_url`` "auto" takes a free port, on one machine. Signals that stop a run are
    passed on. When one process fails, the others end too. Raises UserError for an invalid ``dist_url`` or a taken port,
    Stopped when a signal comes before there are processes.
    """
    num_processes, scheme, address, port = max(num_gpus, 1), "", "127.0.0.1", 0
    if dist_url != "auto" or num_machines > 1:
        with suppress(ValueError):  # no URL, or a port above 65,535
            url = urlparse(dist_url)
            scheme, address, port = url.scheme, url.hostname or "", url.port or 0
        if scheme != "tcp" or not address or not port:
            raise UserError(
                f"--dist-url is {dist_url}, expected tcp://HOST:PORT of the first of the {num_machines} machines"
            )
    # served by the launcher, so it outlives each of the processes
    stop = StopFlag()
    with stop.listening():
        store, port = open_store(address, port, machine_rank == 0, stop)
    if stop.requested:
        raise Stopped(stop)
    shared = {
        "WORLD_SIZE": num_processes * num_machines,
        "LOCAL_WORLD_SIZE": num_processes,
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", max(1, usable_cores() // num_processes)),
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
            processes.append(subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=environment))
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
    except (RuntimeError, OSError, UnicodeError) as error:  # the last: of a host's name with an empty or long part
        raise UserError(
            f"cannot {'open' if opens_it else 'reach'} {address}:{port} for the processes to meet "
            f"({str(error).splitlines()[0]}); give another: --dist-url tcp://HOST:PORT, MASTER_PORT, or torchrun's "
            "--master-port"
        ) from None
    return PrefixStore(f"run{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store), store.port


def announce_failure(store: "Store", rank: int | None, reason: str, code: int) -> None:
    """Write into the store that a process failed; ``rank`` None when it could not do so itself."""
    store.set("failure", json.dumps({"rank": rank, "reason": reason, "exit_code": code}))
