"""The device of each process, and whether the devices of all processes fit together."""

import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch

from scratch_det.distributed.launch import ALONE, World
from scratch_det.errors import ConfigError, UserError
from scratch_det.log import logger

NO_GPU = (
    "MODEL.DEVICE is cuda, but no GPU is visible: using the CPU, where recipes as small as "
    "configs/Digits/quickstart.yaml train in minutes and those for COCO would take months"
)
SHARE_GPUS = "SCRATCH_DET_SHARE_GPUS"  # processes may have the same GPU: for tests, with gloo, as NCCL refuses it


def pick_device(name: str, world: World = ALONE, no_gpu: str = NO_GPU) -> torch.device:
    """MODEL.DEVICE, which becomes torch's current device.

    "cuda" is a visible GPU or, for a single process, the CPU on a machine without any. The processes of a machine take
    the visible GPUs in turn: a launcher shows a process all of them, or only its own. no_gpu: the notice of the CPU.

    Raises ConfigError for a device that this process does not have.
    """
    if name.startswith("cuda") and not torch.cuda.is_available():
        if name != "cuda" or world.size > 1:
            asked = f"MODEL.DEVICE is {name}" + f" in {world.size} processes" * (world.size > 1)
            raise ConfigError(f"{asked}, but no GPU is visible; the CPU is MODEL.DEVICE cpu")
        logger.warning(no_gpu)
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


def identity(device: torch.device) -> str:
    """The type of ``device`` or, of a GPU, its UUID, which tells whether two processes have the same one."""
    if device.type != "cuda":
        return device.type
    unknown = f"{device.index} of process {os.getpid()} on {platform.node()}"  # of AMD's, in older versions of torch
    return f"GPU {getattr(torch.cuda.get_device_properties(device), 'uuid', unknown)}"


def check_devices(found: Sequence[tuple[str, str]]) -> None:
    """Raise UserError, the same in every process, unless all compute on the CPU or each one has a GPU of its own.

    found: of each process its host, and its device's ``identity`` or why it has none.
    """
    counts, may_share = Counter(device for _, device in found), os.environ.get(SHARE_GPUS)
    wrong = [f"process {rank} on {host}: {device}" for rank, (host, device) in enumerate(found)
             if not device.startswith("GPU") or (counts[device] > 1 and not may_share)]  # fmt: skip
    if wrong and counts.keys() != {"cpu"}:
        raise UserError("\n  ".join([f"{len(found)} processes need a GPU each, or MODEL.DEVICE cpu:", *wrong]))


def check_machine(name: str, world: World) -> torch.device:
    """The first process's device; raises UserError for what this machine's processes would find when they meet."""
    devices = [pick_device(name, replace(world, local_rank=rank)) for rank in range(world.local_size)]
    check_devices([(platform.node(), identity(device)) for device in devices])
    return devices[0]
