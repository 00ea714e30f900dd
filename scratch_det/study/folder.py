"""Whether a run folder is what its study takes it for."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from scratch_det import backends
from scratch_det.config import flatten, load_config, plain
from scratch_det.errors import UserError
from scratch_det.study.experiment import EVALUATE, SEARCH
from scratch_det.study.job import Job
from scratch_det.study.standing import newest_metrics, read_json
from scratch_det.study.study import Study
from scratch_det.train.rundir import RunDir

# What a run settles itself, from its data and its machine, and what does not show in its numbers.
OWN = {"MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "MODEL.DEVICE", "MODEL.WEIGHTS",
       "OUTPUT_DIR", "DATALOADER.NUM_WORKERS", "SOLVER.CHECKPOINT_PERIOD", "SOLVER.REFERENCE_WORLD_SIZE"}  # fmt: skip


def check_folders(study: Study, jobs: Sequence[Job]) -> None:
    """Raise one UserError with a line for each run folder that another recipe made, or that was edited since."""
    if problems := [problem for job in jobs for problem in disagreements(study, job)]:
        raise UserError("\n  ".join([*problems, "move such a folder away, and study.py run makes it anew"]))


def disagreements(study: Study, job: Job) -> Iterator[str]:
    """What is wrong with the folder of ``job``, a line each; nothing where no run is in it yet."""
    run_dir = RunDir(study.out / job.name)
    if job.run.kind in (SEARCH, EVALUATE) or not run_dir.holds_run():
        return
    try:
        made_with = flatten(run_dir.read_config())
    except Exception as error:  # missing, unreadable, or no YAML: whatever yacs makes of it
        yield f"{run_dir.config} is no run's configuration ({str(error).splitlines()[0]})"
        return
    for key, value in _recipe(study, job).items():
        if plain(made_with.get(key, value)) != plain(value):
            yield f"{run_dir.config} has {key} {plain(made_with[key])!r}, its recipe {plain(value)!r}"
    yield from _other_beginning(run_dir, job)
    if run_dir.result.exists():
        yield from _edited_result(run_dir, job)


def _other_beginning(run_dir: RunDir, job: Job) -> Iterator[str]:
    """Random weights of another width, a branch that is none, or a run of its own that is a branch."""
    asked = dict(pairwise(job.run.flags)).get("--init-std")
    began = read_json(run_dir.environment).get("init_std")
    if began != (float(asked) if asked else None):
        yield f"{run_dir.environment} has init_std {began}, its command {asked}"
    if run_dir.parent.exists() != bool(job.start):
        found, wanted = ("is there", "a run of its own") if run_dir.parent.exists() else ("is missing", "a branch")
        yield f"{run_dir.parent} {found}, but {job.name} is {wanted} here"


def _recipe(study: Study, job: Job) -> dict[str, object]:
    """What has to be in config.yaml; nothing where a search's result is gone, from which the recipe was made."""
    config = job.config(study.out)
    if not config.exists():
        return {}
    recipe = load_config(config, [*job.run.changes, *job.overrides(study.out)], backends.defaults(study.backend))
    own = OWN | ({"SEED"} if recipe.cfg.SEED < 0 else set())
    return {key: value for key, value in flatten(recipe.cfg).items() if key not in own}


def _edited_result(run_dir: RunDir, job: Job) -> Iterator[str]:
    """result.json repeats the last lines of metrics.json."""
    result = read_json(run_dir.result)
    if result.get("iteration") != job.run.iterations:
        yield f"{run_dir.result} says {result.get('iteration')} iterations, its recipe {job.run.iterations}"
    logged = newest_metrics(run_dir.path, {})
    if not logged:
        yield f"{run_dir.metrics} has no evaluation, which {run_dir.result} is to repeat"
    for name, value in newest_metrics(run_dir.path, result).items():
        if logged.get(name, value) != value:
            yield f"{run_dir.result} says {name} {value}, the end of metrics.json {logged[name]}"
