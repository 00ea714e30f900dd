"""What a training on the CPU asks of its machine: memory that is kept between steps, free cores, fast bfloat16."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch

from scratch_det.distributed.launch import usable_cores

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # of x86 and ARM, as torch.cpu.get_capabilities names them


def keep_freed_memory() -> None:
    """Make glibc keep what this process frees, for the next step; other C libraries have no ``mallopt``.

    By default the memory of every large tensor goes back to the kernel, which clears it, page by page, when the next
    step asks for it: 13,800 page faults a step of the quickstart. Workers that are forked later do the same.
    """
    with suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never


def cpu_notices(processes: int, bfloat16: bool) -> Iterator[str]:
    """What will make a training slow: cores that others use, and bfloat16 that the CPU only emulates.

    processes: of this training on this machine. The load is that of all cores, so where this process may use only some
    of them (a SLURM job) it says nothing.
    """
    cores, busy, threads = os.cpu_count() or 1, os.getloadavg()[0], torch.get_num_threads()
    if usable_cores() == cores and threads > 1 and busy + threads * processes > cores + 0.5:
        yield (
            f"{threads * processes} threads will train on {cores} cores, where {busy:.1f} others were running in the "
            "last minute; a step waits for its slowest thread and can take several times as long: wait for the other "
            f"programs, or set OMP_NUM_THREADS={max(1, int(cores - busy) // processes)}"
        )
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch cannot tell
    if bfloat16 and capabilities and not any(capabilities.get(name) for name in BFLOAT16):
        yield (
            f"SOLVER.AMP.ENABLED is True, but the CPU ({capabilities.get('cpu_name', 'unknown')}) has no bfloat16 "
            f"({', '.join(BFLOAT16)}): a step may be slower than in float32; set SOLVER.AMP.ENABLED False"
        )
