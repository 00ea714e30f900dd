"""Which process this is and how many there are: the one place that reads launchers' environment variables."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from scratch_det.errors import UserError

FIRST_PORT, PORTS = 20_000, 12_000  # below Linux's ephemeral range, which begins at 32,768


@dataclass(frozen=True)
class World:
    """This process among all processes of a run.

    Attributes:
        rank, size: number of this process (from 0) and number of processes, over all machines.
        local_rank, local_size: the same on this machine.
        address, port: where the processes meet.
        served: the meeting point is kept open by a launcher; otherwise the process of rank 0 opens it.
        by_srun: SLURM started the processes, perhaps each with a GPU of its own.
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
        """Whether this process writes the run folder and speaks."""
        return self.rank == 0


ALONE = World()


def read_world(environment: Mapping[str, str]) -> World:
    """The world as torchrun (or ``launch``) or srun describe it; a single process when neither does.

    A SLURM batch script runs outside ``srun``: it is a single process, however many tasks the job has. Raises UserError
    when the variables contradict each other.
    """
    try:
        if "RANK" in environment and "WORLD_SIZE" in environment:
            world = _from_torchrun(environment)
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
    size = int(environment["WORLD_SIZE"])
    if size == 1:
        return ALONE
    return World(
        rank=int(environment["RANK"]),
        size=size,
        local_rank=int(environment["LOCAL_RANK"]),
        local_size=int(environment.get("LOCAL_WORLD_SIZE", size)),
        address=environment["MASTER_ADDR"],
        port=int(environment["MASTER_PORT"]),
        served=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _from_slurm(environment: Mapping[str, str]) -> World:
    """srun starts one process a task. The port follows from the job, so that two jobs on one node do not collide."""
    rank, size = int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"])
    default_port = FIRST_PORT + int(environment.get("SLURM_JOB_ID", 0)) % PORTS
    return World(
        rank=rank,
        size=size,
        local_rank=int(environment["SLURM_LOCALID"]),
        local_size=_tasks_here(environment, size),
        address=environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
        port=int(environment.get("MASTER_PORT", default_port)),
        by_srun=True,
    )


def _tasks_here(environment: Mapping[str, str], size: int) -> int:
    """This node's entry of SLURM_STEP_TASKS_PER_NODE, which is written like 4(x2),3."""
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", str(size)).split(","):
        count, _, repeat = part.partition("(x")
        counts += [int(count)] * int(repeat.rstrip(")") or 1)
    return counts[int(environment.get("SLURM_NODEID", 0))]


def first_host(nodelist: str) -> str:
    """The first name of a SLURM host list: ``gpu[003-006,010],cpu1`` begins with gpu003."""
    found = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodelist)
    if not found:
        raise ValueError(f"{nodelist!r} is no SLURM host list")
    return "".join(part or "" for part in found.groups())
