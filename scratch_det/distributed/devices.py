"""The device of each process, and whether the devices of all processes fit together."""

import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from scratch_det.distributed.launch import ALONE, World
from scratch_det.errors import ConfigError, UserError, listed
from scratch_det.log import logger

NO_GPU = "MODEL.DEVICE is cuda, but no GPU is visible: using the CPU"
SHARE_GPUS = "SCRATCH_DET_SHARE_GPUS"  # processes may have the same GPU: for tests, with gloo, as NCCL refuses it


class Claim(NamedTuple):
    """What a process tells the others: its host, and the type of its device, with a GPU's UUID; or why it has none."""

    host: str
    device: str
    problem: str = ""


def pick_device(name: str, world: World = ALONE) -> torch.device:
    """MODEL.DEVICE, which becomes torch's current device.

    "cuda" is a visible GPU or, for a single process, the CPU on a machine without any. The processes of a machine take
    the visible GPUs in turn: a launcher shows a process all of them, or only its own.

    Raises ConfigError for a device that this process does not have.
    """
    if name.startswith("cuda") and not torch.cuda.is_available():
        if name != "cuda" or world.size > 1:
            asked = f"MODEL.DEVICE is {name}" + f" in {world.size} processes" * (world.size > 1)
            raise ConfigError(f"{asked}, but no GPU is visible; to train on the CPU give MODEL.DEVICE cpu")
        logger.warning(NO_GPU)
        return torch.device("cpu")
    own = f"cuda:{world.local_rank % torch.cuda.device_count()}" if name == "cuda" else name
    try:
        device = torch.zeros(0, device=own).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"MODEL.DEVICE is {name}, which this machine does not have ({reason})") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def claim(device: torch.device) -> Claim:
    """The claim of a process that has ``device``."""
    if device.type != "cuda":
        return Claim(platform.node(), device.type)
    unknown = f"{device.index} of process {os.getpid()}"  # of AMD's, in older versions of torch
    return Claim(platform.node(), f"GPU {getattr(torch.cuda.get_device_properties(device), 'uuid', unknown)}")


def check_claims(claims: Sequence[Claim]) -> None:
    """Raise UserError, the same in every process, unless all compute on the CPU or each one has a GPU of its own."""
    counts, kinds = Counter(one.device for one in claims), {one.device.partition(" ")[0] for one in claims}
    if problem := next((one.problem for one in claims if one.problem), ""):
        wrong = [one.problem == problem for one in claims]
    elif len(kinds) > 1:
        problem = "the processes compute on different devices; give all of them the same MODEL.DEVICE"
        wrong = [True] * len(claims)
    elif kinds == {"GPU"} and max(counts.values()) > 1 and not os.environ.get(SHARE_GPUS):
        problem = (
            f"{len(claims)} processes, but {len(counts)} GPUs: start one process a GPU, or train on the CPU: "
            "MODEL.DEVICE cpu"
        )
        wrong = [counts[one.device] > 1 for one in claims]
    else:
        return
    places = [f"process {rank} on {one.host}" + f": {one.device}" * bool(one.device)
              for rank, (one, is_wrong) in enumerate(zip(claims, wrong, strict=True)) if is_wrong]  # fmt: skip
    raise UserError("\n  ".join([problem, listed(places, separator="\n  ")]))


def check_machine(name: str, world: World) -> None:
    """Raise UserError for what the processes of this machine would find when they meet."""
    ranks = range(world.local_size)
    check_claims([claim(pick_device(name, replace(world, local_rank=rank))) for rank in ranks])
