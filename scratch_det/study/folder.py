"""Whether a run folder is what its study takes it for."""

from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import pairwise
from typing import Any

from scratch_det.config import flatten, plain
from scratch_det.engine.run_dir import RunDir
from scratch_det.errors import UserError
from scratch_det.study.job import Job
from scratch_det.study.recipe import recipe_of
from scratch_det.study.records import newest_metrics, read_json
from scratch_det.study.run import EVALUATE, PRETRAIN, SEARCH
from scratch_det.study.study import Study

# What a run settles itself, from its data and its machine, and what does not show in its numbers.
OWN = {"MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "MODEL.DEVICE", "MODEL.WEIGHTS",
       "OUTPUT_DIR", "DATALOADER.NUM_WORKERS", "SOLVER.CHECKPOINT_PERIOD", "SOLVER.REFERENCE_WORLD_SIZE"}  # fmt: skip
WEIGHTS, FINAL, BODY = "MODEL.WEIGHTS", "model_final.pth", "backbone.pth"


def check_folders(study: Study, jobs: Sequence[Job]) -> None:
    """Raise one UserError with a line for each run folder that another recipe made, or that was edited since."""
    if problems := [problem for job in jobs for problem in disagreements(study, job)]:
        raise UserError("\n  ".join([*problems, "move such a folder away, and study.py run makes it anew"]))


def disagreements(study: Study, job: Job) -> Iterator[str]:
    """What is wrong with the folder of ``job``, a line each; nothing where no run is in it yet."""
    run_dir = RunDir(study.out / job.name)
    if job.run.kind in (EVALUATE, SEARCH):
        yield from (_other_evaluation if job.run.kind == EVALUATE else _other_search)(study, job)
        return
    if not run_dir.holds_run():
        return
    try:
        made_with = flatten(run_dir.read_config())
    except Exception as error:  # missing, unreadable, or no YAML: whatever yacs makes of it
        yield f"{run_dir.config} is no run's configuration ({str(error).splitlines()[0]})"
        return
    yield from _other_recipe(run_dir, made_with, _recipe(study, job), job)
    yield from _other_circumstances(study, run_dir, job)
    yield from _other_beginning(study, run_dir, job)
    if run_dir.result.exists():
        yield from _edited_result(run_dir, job)


def _other_evaluation(study: Study, job: Job) -> Iterator[str]:
    path = job.result(study.out)
    asked = {"backend": study.backend, "weights": dict(pairwise(job.overrides(study.out))).get(WEIGHTS)}
    result = read_json(path)
    for key, value in asked.items() if result else ():
        if result.get(key) != value:
            yield f"{path} has {key} {result.get(key)!r}, its command {value!r}"
    if "weights_sha256" in result and not _is_of(result["weights_sha256"], study, job.run.evaluates, FINAL):
        yield f"{path} is of another {FINAL} than {job.run.evaluates} has"


def _other_search(study: Study, job: Job) -> Iterator[str]:
    """result.json repeats the best of the points."""
    path = job.result(study.out)
    points = [newest_metrics(one.parent, read_json(one)) for one in path.parent.glob("trial_*/result.json")]
    for name, value in newest_metrics(path.parent, read_json(path)).items():
        best = max((metrics[name] for metrics in points if name in metrics), default=value)
        if value != best:
            yield f"{path} says {name} {value}, the best of its points {best}"


def _other_recipe(run_dir: RunDir, made_with: Mapping[str, Any], wanted: Mapping[str, Any], job: Job) -> Iterator[str]:
    own = OWN | ({"SEED"} if wanted.get("SEED", 0) < 0 else set())
    for key, value in wanted.items():
        if key not in own and plain(made_with.get(key, value)) != plain(value):
            yield f"{run_dir.config} has {key} {plain(made_with[key])!r}, its recipe {plain(value)!r}"
    began, begins = made_with.get(WEIGHTS), wanted.get(WEIGHTS)
    if wanted and not job.start and bool(began) != bool(begins):  # from scratch, or not
        yield f"{run_dir.config} has {WEIGHTS} {began!r}, its recipe {begins!r}"


def _other_circumstances(study: Study, run_dir: RunDir, job: Job) -> Iterator[str]:
    """Another backend, and another number of processes where a recipe means one: BN's statistics are of each."""
    asked = {"backend": None if job.run.kind == PRETRAIN else study.backend, "processes": job.run.processes}
    environment = read_json(run_dir.environment)
    for key, value in asked.items():
        if value and environment.get(key, value) != value:
            yield f"{run_dir.environment} has {key} {environment[key]!r}, its command {value!r}"


def _other_beginning(study: Study, run_dir: RunDir, job: Job) -> Iterator[str]:
    """Weights of another width or file, a branch that is none or of another trunk, a run of its own that is one."""
    asked = dict(pairwise(job.run.flags)).get("--init-std")
    began = read_json(run_dir.environment).get("init_std")
    if began != (float(asked) if asked else None):
        yield f"{run_dir.environment} has init_std {began}, its command {asked}"
    if run_dir.parent.exists() != bool(job.start):
        found, wanted = ("is there", "a run of its own") if run_dir.parent.exists() else ("is missing", "a branch")
        yield f"{run_dir.parent} {found}, but {job.name} is {wanted} here"
    elif job.start:
        name = f"model_{job.start - 1:07d}.pth"
        if not _is_of(read_json(run_dir.parent).get("sha256"), study, job.run.trunk, name):
            yield f"{run_dir.parent} is of another {name} than {job.run.trunk} has"
    elif job.run.pretraining and (body := study.out / job.run.pretraining / BODY).exists():
        begun_with = read_json(run_dir.environment).get("weights_sha256")
        if begun_with and begun_with != sha256(body.read_bytes()).hexdigest():
            yield f"{run_dir.environment} is of another {BODY} than {job.run.pretraining} has"


def _is_of(digest: str | None, study: Study, run: str | None, checkpoint: str) -> bool:
    """Whether ``digest`` is that of a checkpoint of another run, if that still has or had one."""
    known = read_json(study.out / str(run) / "checkpoints/index.json").get("sha256", {}).get(checkpoint)
    return not known or digest in known


def _recipe(study: Study, job: Job) -> dict[str, Any]:
    """What has to be in config.yaml; nothing where a search's result is gone, from which the recipe was made."""
    return flatten(recipe_of(job, study)) if job.config(study.out).exists() else {}


def _edited_result(run_dir: RunDir, job: Job) -> Iterator[str]:
    """result.json repeats the last lines of metrics.json, and has its digest unless an older version wrote it."""
    result = read_json(run_dir.result)
    digest = sha256(run_dir.metrics.read_bytes()).hexdigest() if run_dir.metrics.exists() else ""
    if digest != result.get("metrics_json_sha256", digest):
        yield f"{run_dir.metrics} is not as the run wrote it: {run_dir.result} has another SHA-256 of it"
    if result.get("iteration") != job.run.iterations:
        yield f"{run_dir.result} says {result.get('iteration')!r} iterations, its recipe {job.run.iterations}"
    logged = newest_metrics(run_dir.path, {})
    if not logged:
        yield f"{run_dir.metrics} has no evaluation, which {run_dir.result} is to repeat"
        return
    for name, value in newest_metrics(run_dir.path, result).items():
        if logged.get(name) != value:
            yield f"{run_dir.result} says {name} {value}, the end of metrics.json {logged.get(name, 'nothing')}"
