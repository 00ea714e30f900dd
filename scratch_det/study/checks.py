"""What is checked before anything of a study starts: run folders, data sets, processes and GPUs."""

import os
from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from scratch_det import backends
from scratch_det.config import flatten, load_config, plain
from scratch_det.data.catalog import lookup, lookup_folder
from scratch_det.engine.run_dir import RunDir
from scratch_det.errors import DataError, UserError
from scratch_det.study.job import Job, from_here
from scratch_det.study.records import read_json
from scratch_det.study.run import EVALUATE, PRETRAIN, SEARCH

# Keys that a run settles itself, from its data and its machine, or that do not show in its numbers.
NOT_COMPARED = {"MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "MODEL.DEVICE", "MODEL.WEIGHTS",
                "OUTPUT_DIR", "DATALOADER.NUM_WORKERS", "SOLVER.CHECKPOINT_PERIOD",
                "SOLVER.REFERENCE_WORLD_SIZE"}  # fmt: skip


def recipe_of(job: Job, out: Path, backend: str) -> CfgNode:
    """The recipe as the job's command changes it; before a search has written it, the one that it is made from."""
    found = job.config(out)
    config = found if found.exists() else from_here(job.run.config)
    return load_config(config, job.overrides(out), backends.defaults(backend)).cfg


def other_recipe(run_dir: RunDir, wanted: CfgNode) -> Iterator[str]:
    """Where the configuration of the run in a folder is not ``wanted``, a line each; nothing where no run is in it."""
    if not run_dir.holds_run():
        return
    try:
        made_with = flatten(run_dir.read_config())
    except Exception as error:  # missing, unreadable, or no YAML: whatever yacs makes of it
        yield f"{run_dir.config} is no run's configuration ({str(error).splitlines()[0]})"
        return
    ignored = NOT_COMPARED | ({"SEED"} if wanted.SEED < 0 else set())
    for key, value in flatten(wanted).items():
        if key not in ignored and plain(made_with.get(key, value)) != plain(value):
            yield f"{run_dir.config} has {key} {plain(made_with[key])!r}, its recipe {plain(value)!r}"
    began, begins = made_with.get("MODEL.WEIGHTS"), wanted.MODEL.WEIGHTS
    if not run_dir.parent.exists() and bool(began) != bool(begins):  # from scratch, or not; paths may differ
        yield f"{run_dir.config} has MODEL.WEIGHTS {began!r}, its recipe {begins!r}"


def disagreements(job: Job, out: Path, backend: str) -> Iterator[str]:
    """How the run in the folder of ``job`` is not the one that its command makes, a line each."""
    run_dir, run = RunDir(out / job.name), job.run
    if run.kind == EVALUATE:
        yield from _other_evaluation(job, out, backend)
        return
    if run.kind == SEARCH or not run_dir.holds_run():
        return
    if job.config(out).exists():  # else the search that found it is made anew
        yield from other_recipe(run_dir, recipe_of(job, out, backend))
    environment = read_json(run_dir.environment)
    init_std = dict(pairwise(run.flags)).get("--init-std")
    if environment.get("init_std") != (float(init_std) if init_std else None):
        yield f"{run_dir.environment} has init_std {environment.get('init_std')}, its command {init_std}"
    asked: dict[str, Any] = {"backend": None if run.kind == PRETRAIN else backend, "processes": run.processes}
    for key, value in asked.items():  # BN's statistics are of each process
        if value and environment.get(key, value) != value:
            yield f"{run_dir.environment} has {key} {environment[key]!r}, its command {value!r}"
    if run_dir.parent.exists() != bool(job.start):
        found, kind = ("is there", "a run of its own") if run_dir.parent.exists() else ("is missing", "a branch")
        yield f"{run_dir.parent} {found}, but {job.name} is {kind} here"
    elif job.start:
        yield from _other_file(run_dir.parent, "sha256", out / str(run.trunk), f"model_{job.start - 1:07d}.pth")
    elif run.pretraining:
        yield from _other_file(run_dir.environment, "weights_sha256", out / run.pretraining, "backbone.pth")
    result = read_json(run_dir.result)
    if result and result.get("iteration") != run.iterations:
        yield f"{run_dir.result} says {result.get('iteration')!r} iterations, its recipe {run.iterations}"


def _other_evaluation(job: Job, out: Path, backend: str) -> Iterator[str]:
    result = read_json(job.result(out))
    asked = {"backend": backend, "weights": dict(pairwise(job.overrides(out)))["MODEL.WEIGHTS"]}
    for key, value in asked.items() if result else ():
        if result.get(key) != value:
            yield f"{job.result(out)} has {key} {result.get(key)!r}, its command {value!r}"
    yield from _other_file(job.result(out), "weights_sha256", out / str(job.run.evaluates), "model_final.pth")


def _other_file(path: Path, key: str, source: Path, name: str) -> Iterator[str]:
    """A line when the run of ``path`` began with another file than ``source`` has now: that run was made anew since."""
    began_with, there = read_json(path).get(key), source / name
    known = read_json(source / "checkpoints/index.json").get("sha256", {}).get(name)
    if there.exists():  # which backbone.pth is, and no checkpoint
        known = [sha256(there.read_bytes()).hexdigest()]
    if began_with and known and began_with not in known:
        yield f"{path} is of another {name} than {source.name} has"


def check_folders(jobs: Sequence[Job], out: Path, backend: str) -> None:
    """Raise one UserError with a line for each run folder that another recipe or another checkpoint made."""
    if problems := [problem for job in jobs for problem in disagreements(job, out, backend)]:
        raise UserError("\n  ".join([*problems, "move such a folder away, and study.py run makes it anew"]))


def require_data(jobs: Sequence[Job], out: Path, backend: str) -> None:
    """Raise DataError when a data set of one of ``jobs`` that is not finished is not on this machine."""
    for job in jobs:
        if job.result(out).exists():
            continue
        datasets = recipe_of(job, out, backend).DATASETS
        look_up = lookup_folder if job.run.kind == PRETRAIN else lookup
        for name in (*(() if job.run.kind == EVALUATE else datasets.TRAIN), *datasets.TEST):
            try:
                look_up(name)
            except DataError as error:
                raise DataError(f"{job.name}: {error}") from None


def gpus_here() -> list[str]:
    """CUDA_VISIBLE_DEVICES where it is set, else 0 to n - 1 for the n NVIDIA devices of this machine."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [word for word in visible.split(",") if word.strip()]
    # A container may have /dev/nvidia5 alone: CUDA counts from 0, whatever the files are called.
    return [str(number) for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def require_even_shares(jobs: Sequence[Job], out: Path, backend: str, gpus: int) -> None:
    """Raise UserError when the processes of one of ``jobs`` cannot share the images of an iteration evenly."""
    for job in jobs:
        processes = job.run.processes or gpus
        if processes == 1 or job.run.kind == EVALUATE:
            continue  # no recipe has to be read
        solver = recipe_of(job, out, backend).SOLVER
        if solver.IMS_PER_BATCH % processes and solver.REFERENCE_WORLD_SIZE == 0:  # else it adapts to any number
            asked = f"it needs {processes} processes" if job.run.processes else f"--gpus {gpus}"
            raise UserError(
                f"{job.name} has {solver.IMS_PER_BATCH} images an iteration, which {processes} processes cannot share "
                f"evenly ({asked}); give a number that divides {solver.IMS_PER_BATCH}"
            )


def require_gpus(needed: dict[str, int], gpus: int, max_parallel: int) -> None:
    """Raise UserError when this machine has GPUs, but fewer than may be needed at once; ``needed``: by run."""
    devices = gpus_here()
    if not devices or not any(needed.values()):
        return
    source = "CUDA_VISIBLE_DEVICES names" if "CUDA_VISIBLE_DEVICES" in os.environ else "this machine has"
    name, most = max(needed.items(), key=lambda item: item[1])
    if most > len(devices):
        raise UserError(f"{name} needs {most} GPUs, and {source} {len(devices)}; change --gpus or --only")
    at_once = min(sum(sorted(needed.values(), reverse=True)[:max_parallel]), max_parallel * gpus)
    if at_once > len(devices):
        raise UserError(
            f"--max-parallel {max_parallel} with --gpus {gpus} needs {at_once} GPUs, and {source} {len(devices)}; "
            f"give --max-parallel {max(1, len(devices) // gpus)}, or fewer --gpus"
        )
