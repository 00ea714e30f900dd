"""Checks before a study starts: run folders, data sets, processes and GPUs."""

import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from scratch_det import backends
from scratch_det.config import flatten, load_config, plain
from scratch_det.data.catalog import lookup, lookup_folder
from scratch_det.engine.run_dir import RunDir
from scratch_det.errors import DataError, UserError
from scratch_det.files import sha256_of
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
    run_dir, run, result = RunDir(out / job.name), job.run, job.result(out)
    if run.kind == SEARCH or not (result.exists() if run.kind == EVALUATE else run_dir.holds_run()):
        return
    asked: dict[str, Any] = {"backend": backend}  # recorded by the run at its start
    if run.kind == EVALUATE:
        asked["weights"] = dict(pairwise(job.overrides(out)))["MODEL.WEIGHTS"]
        notes, source = result, out / str(run.evaluates) / "checkpoints/model_final.pth"
    else:
        notes, source = run_dir.environment, out / str(run.pretraining) / "backbone.pth"
        init_std = dict(pairwise(run.flags)).get("--init-std")
        asked = {"init_std": float(init_std) if init_std else None, **({} if run.kind == PRETRAIN else asked)}
        if run.processes:  # BN's statistics are of each process
            asked["processes"] = run.processes
        if job.config(out).exists():  # else the search that found it is made anew
            yield from other_recipe(run_dir, recipe_of(job, out, backend))
        if run_dir.parent.exists() != bool(job.start):
            found, kind = ("is there", "a run of its own") if run_dir.parent.exists() else ("is missing", "a branch")
            yield f"{run_dir.parent} {found}, but {job.name} is {kind} here"
    written = read_json(notes)
    for key, value in asked.items():
        if written.get(key, value) != value:
            yield f"{notes} has {key} {written[key]!r}, its command {value!r}"
    began_with = written.get("weights_sha256")
    if job.start:
        notes, source = run_dir.parent, job.parent(out)
        began_with = read_json(notes).get("sha256")
    known = read_json(source.with_name("index.json")).get("sha256", {}).get(source.name)
    if source.name == "backbone.pth" and source.exists():  # has no index
        known = [sha256_of(source)]
    if began_with and known and began_with not in known:  # the run that wrote it was repeated since
        yield f"{notes} is of another {source.name} than {source.relative_to(out).parts[0]} has"


def check_folders(jobs: Sequence[Job], out: Path, backend: str) -> None:
    """Raise one UserError with a line for each run folder that another recipe or another checkpoint made."""
    if problems := [problem for job in jobs for problem in disagreements(job, out, backend)]:
        raise UserError("\n  ".join([*problems, "move such a folder away, and study.py run makes it anew"]))


def gpus_here() -> list[str]:
    """CUDA_VISIBLE_DEVICES where it is set, else 0 to n - 1 for the n NVIDIA devices of this machine."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [word for word in visible.split(",") if word.strip()]
    # A container may have only /dev/nvidia5: CUDA counts from 0, whatever the files are called.
    return [str(number) for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def require_even_shares(jobs: Sequence[Job], out: Path, backend: str, gpus: int) -> None:
    """Raise UserError when the processes of one of ``jobs`` cannot share the images of an iteration evenly."""
    for job in jobs:
        processes = job.run.processes or gpus
        solver = recipe_of(job, out, backend).SOLVER
        uneven = solver.IMS_PER_BATCH % processes and solver.REFERENCE_WORLD_SIZE == 0  # else it adapts to any number
        if uneven and job.run.kind != EVALUATE:
            asked = f"it needs {processes} processes" if job.run.processes else f"--gpus {gpus}"
            raise UserError(
                f"{job.name} has {solver.IMS_PER_BATCH} images an iteration, which {processes} processes cannot share "
                f"evenly ({asked}); give a number that divides {solver.IMS_PER_BATCH}"
            )


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
