"""The recipe of a job as its command changes it, and whether the data that it names are on disk."""

from collections.abc import Sequence

from fvcore.common.config import CfgNode

from scratch_det import backends
from scratch_det.config import load_config
from scratch_det.data.catalog import lookup, lookup_folder
from scratch_det.errors import DataError
from scratch_det.study.job import Job, from_here
from scratch_det.study.run import EVALUATE, PRETRAIN
from scratch_det.study.study import Study


def recipe_of(job: Job, study: Study) -> CfgNode:
    """Until a search has written the recipe, the one that it is made from."""
    found = job.config(study.out)
    config = found if found.exists() else from_here(job.run.config)
    return load_config(config, job.overrides(study.out), backends.defaults(study.backend)).cfg


def require_data(jobs: Sequence[Job], study: Study) -> None:
    """Raise DataError when a data set of one of ``jobs`` that is not finished is not on this machine."""
    for job in jobs:
        if job.result(study.out).exists():
            continue
        datasets = recipe_of(job, study).DATASETS
        look_up = lookup_folder if job.run.kind == PRETRAIN else lookup
        for name in (*(() if job.run.kind == EVALUATE else datasets.TRAIN), *datasets.TEST):
            try:
                look_up(name)
            except DataError as error:
                raise DataError(f"{job.name}: {error}") from None
