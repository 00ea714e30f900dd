"""The GPUs of this machine, how many a job needs of them, and whether its processes can share its images."""

import os
from collections.abc import Sequence
from pathlib import Path

from scratch_det.errors import UserError
from scratch_det.study.job import Job
from scratch_det.study.recipe import recipe_of
from scratch_det.study.run import EVALUATE
from scratch_det.study.study import Study


def gpus_here() -> list[str]:
    """CUDA_VISIBLE_DEVICES where it is set, else the numbers of NVIDIA's devices on this machine."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [word for word in visible.split(",") if word.strip()]
    return sorted((path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")), key=int)


def gpus_needed(job: Job, study: Study) -> int:
    """One a process; none where the recipe's MODEL.DEVICE is cpu."""
    return 0 if recipe_of(job, study).MODEL.DEVICE == "cpu" else job.run.processes or study.gpus


def require_even_shares(jobs: Sequence[Job], study: Study) -> None:
    """Raise UserError when the processes of one of ``jobs`` cannot share the images of an iteration evenly."""
    for job in jobs:
        processes = job.run.processes or study.gpus
        if processes == 1 or job.run.kind == EVALUATE:
            continue  # no recipe has to be read
        solver = recipe_of(job, study).SOLVER
        batch, adapts = solver.IMS_PER_BATCH, solver.REFERENCE_WORLD_SIZE > 0  # to any number of processes
        if batch % processes and not adapts:
            mend = f"it needs {processes} processes" if job.run.processes else f"--gpus {study.gpus}"
            raise UserError(
                f"{job.name} has {batch} images an iteration, which {processes} processes cannot share evenly "
                f"({mend}); give a number that divides {batch}"
            )


def require_gpus(jobs: Sequence[Job], study: Study, max_parallel: int) -> None:
    """Raise UserError when this machine has GPUs, but fewer than ``jobs`` may need at once."""
    devices = gpus_here()
    needed = {job.name: gpus_needed(job, study) for job in jobs} if devices else {}
    if not any(needed.values()):
        return
    (most, greatest), here = max(needed.items(), key=lambda item: item[1]), _there_are(devices)
    if greatest > len(devices):
        raise UserError(f"{most} needs {greatest} GPUs, and {here}; change --gpus or --only")
    largest = sorted(needed.values(), reverse=True)[:max_parallel]
    if (at_once := min(sum(largest), max_parallel * study.gpus)) > len(devices):
        raise UserError(
            f"--max-parallel {max_parallel} with --gpus {study.gpus} needs {at_once} GPUs, and {here}; "
            f"give --max-parallel {max(1, len(devices) // study.gpus)}, or fewer --gpus"
        )


def _there_are(devices: Sequence[str]) -> str:
    source = "CUDA_VISIBLE_DEVICES names" if "CUDA_VISIBLE_DEVICES" in os.environ else "this machine has"
    return f"{source} {len(devices)}"
