"""One run from its plan to result.json: build, train, evaluate, draw, report."""

import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from hashlib import sha256
from importlib.metadata import distributions
from itertools import chain
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

import torch
from fvcore.common.config import CfgNode
from torch import nn

from scratch_det import backends
from scratch_det.config.choices import choice_of
from scratch_det.config.load import flatten
from scratch_det.config.schedule import learning_rate_line
from scratch_det.data.catalog import datasets_root
from scratch_det.data.dataset import SampleSet, TrainingSet, first_image
from scratch_det.distributed.group import Group
from scratch_det.distributed.launch import World
from scratch_det.distributed.stop import StopFlag, Stopped
from scratch_det.engine import classification
from scratch_det.engine.checkpointer import FINAL, Checkpointer
from scratch_det.engine.cpu import cpu_notices, keep_freed_memory
from scratch_det.engine.loop import DIVERGENCE_REPORT, Metrics, Trainer, is_due
from scratch_det.engine.plan import DETECTION, Plan
from scratch_det.engine.resume import Origin, find_start, report_paused, restore
from scratch_det.engine.run_dir import DISK_FULL, RunDir, checkpoint_bytes, is_evaluated, keep_lines
from scratch_det.engine.state import State, TrainingBackend, build_state, size_of
from scratch_det.engine.writers import Run, start_writers
from scratch_det.errors import UserError
from scratch_det.evaluation import inference
from scratch_det.evaluation.metrics import EMA, format_per_class, main_score, to_json_numbers
from scratch_det.files import sha256_of, write_atomically
from scratch_det.log import clock, log_to_file, logger
from scratch_det.weights.load import load_weights
from scratch_det.weights.locate import fetch, split_part
from scratch_det.weights.origin import AVERAGE
from scratch_det.weights.read import weights_sha256

PACKAGES = ("scratch_det", "torch", "torchvision", "detectron2", "fvcore", "numpy", "hotcoco", "pillow")
SAVE_DIFF, MOST_DIFF = "SCRATCH_DET_SAVE_DIFF", 1_000_000  # characters


class Task(NamedTuple):
    """What differs between the detection and the classification that pre-trains a backbone.

    best: the task and name of the metric that selects model_best.pth.
    load: what builds the model and computes losses, by the backend's name.
    training_set: samples by stream position, of the config and the data sets.
    evaluate: metrics in percent by task + suffix and name on one test set, on rank 0; empty elsewhere. May write into
        its folder + suffix. Raises Stopped when the run was asked to stop.
    conclude: writes what a complete run leaves beside its checkpoints, metrics and result.json; on rank 0.
    picture: ``module:function`` of the config, the run and its test sets, which draws what an evaluation has found.
    """

    best: tuple[str, str]
    load: Callable[[str], TrainingBackend]
    training_set: Callable[[CfgNode, list[Any]], SampleSet]
    evaluate: Callable[[Any, nn.Module, CfgNode, Any, Path, Group, str], dict[str, dict[str, float]]]
    conclude: Callable[[CfgNode, RunDir, State], None]
    picture: str = ""


def train_and_evaluate(plan: Plan, world: World, stop: StopFlag) -> None:
    """Train to MAX_ITER or --stop-at, evaluate, draw, and leave the run folder that ``run_dir`` describes.

    Raises UserError, with nothing written, when the run cannot start like this; Stopped, after a checkpoint, when it
    was asked to stop.
    """
    cfg, run_dir, request, test = plan.cfg, plan.run_dir, plan.request, plan.test
    max_iter, task = cfg.SOLVER.MAX_ITER, task_of(plan)
    run_dir.lock()
    backend = task.load(plan.backend)
    with closing(run_dir), Group(world, cfg.MODEL.DEVICE, stop) as group:
        if group.device.type == "cpu":
            keep_freed_memory()
            for notice in cpu_notices(world.local_size, cfg.SOLVER.AMP.ENABLED):
                logger.warning(notice)
        checkpoints = Checkpointer(run_dir.checkpoints, request.keep_last, request.kept)
        environment = describe_environment(plan, group.size)
        start = find_start(plan, checkpoints, environment) if group.is_main else None
        is_done, origin, cfg.SEED = group.broadcast(start)  # rank 0 decides: others may see old files
        if is_done:
            return
        image = first_image(cfg, plan.training) if cfg.MODEL.WEIGHTS and not origin else None
        dataset = task.training_set(cfg, plan.training)
        plan.training.clear()  # lists of images; the data set keeps arrays
        state = build_state(cfg, backend, group.device, request.init_std)
        window = restore(cfg, plan.backend, state, origin, image)
        size = size_of(state.model)
        each = checkpoint_bytes(cfg, size.weights, size.trainable)
        checkpoints.check_space(each, max_iter, cfg.SOLVER.CHECKPOINT_PERIOD)
        open_folder(run_dir, cfg, environment, origin, state.iteration)
        alike = "" if request.init_std is None else f", every layer from N(0, {request.init_std:g})"
        source = f"weights {cfg.MODEL.WEIGHTS}" if cfg.MODEL.WEIGHTS else f"random initialisation{alike}"
        precision = ", mixed precision" if cfg.SOLVER.AMP.ENABLED else ""
        logger.info(
            f"torch {torch.__version__} on {group.device}{precision}, seed {cfg.SEED}; "
            f"{size.parameters:,} parameters, {size.trainable:,} trainable, "
            + (f"continuing after {state.iteration} iterations" if state.iteration else source)
        )
        logger.info(dataset.description)
        logger.info(learning_rate_line(cfg, len(dataset)))
        state.spread(group)
        writers = start_writers(Run(run_dir, cfg, state.iteration, (environment["git"] or {}).get("commit")))
        metrics = Metrics(writers, max_iter, window)
        score = "/".join([*[data.entry.name for data in test[:1] if len(test) > 1], *task.best])
        trainer = Trainer(cfg, backend, group, state, run_dir, checkpoints, metrics, request.accumulate, score)
        evaluate = partial(evaluate_now, trainer, task, test)
        with recording_failure(trainer):
            completed = state.iteration
            # Was the run interrupted between a checkpoint and its evaluation? Then evaluate now; but not after
            # --switch-from, because the stages of the cascade are not trained yet.
            is_expected = 0 < completed < max_iter and is_due(completed, cfg.TEST.EVAL_PERIOD)
            is_expected &= not (origin and origin.is_switch)
            is_missing = group.is_main and not is_evaluated(run_dir.metrics, completed - 1)
            if test and is_expected and group.any(is_missing):
                evaluate(completed - 1)
            trainer.train(dataset, evaluate, max_iter if request.stop_at is None else request.stop_at)
            if request.stop_at is not None and not trainer.ended_early:
                return report_paused(run_dir, state.iteration, max_iter)
            final = evaluate(state.iteration - 1 if trainer.ended_early else max_iter, is_final=True)
            if group.is_main:
                task.conclude(cfg, run_dir, state)
                finish(trainer, plan.backend, test, final, len(dataset))


def evaluate_only(plan: Plan, world: World, stop: StopFlag) -> None:
    """Evaluate MODEL.WEIGHTS, or with --resume the last checkpoint in the folder.

    Writes only inference/ or, in the folder of a run with other test sets, inference_NAMES/.
    """
    cfg, run_dir, backend = plan.cfg, plan.run_dir, backends.load(plan.backend)
    with Group(world, cfg.MODEL.DEVICE, stop) as group:
        own = plan.request.resume and group.is_main and Checkpointer(run_dir.checkpoints).newest_valid()
        weights = str(group.broadcast(own) or cfg.MODEL.WEIGHTS)
        model = build_state(cfg, backend, group.device).model
        logger.info(load_weights(model, weights, plan.backend, cfg, to_evaluate=True))
        test = tuple(cfg.DATASETS.TEST)  # a run's own inference/ stays
        is_own = not run_dir.holds_run() or tuple(run_dir.read_config().DATASETS.TEST) == test
        name = "inference" if is_own else "_".join(("inference", *test))
        name += EMA * (split_part(weights)[1] == AVERAGE)
        metrics = evaluate_all(DETECT, cfg, backend, {"": model}, plan.test, run_dir.path / name, group)
        if group.is_main:
            result = {"backend": plan.backend, "weights": weights, "weights_sha256": sha256_of(fetch(weights)),
                      "datasets": list(test), "classes": list(cfg.DATASETS.CLASS_NAMES)}  # fmt: skip
            run_dir.write_json(f"{name}/result.json", {**result, "metrics": to_json_numbers(metrics)})
            logger.info(f"wrote {run_dir.path / name}/result.json")


def evaluate_now(
    trainer: Trainer, task: Task, test: list[Any], iteration: int, is_final: bool = False
) -> dict[str, Any]:
    """Evaluate the current weights, write the metrics, and save the weights if they are the best so far.

    If the run is asked to stop meanwhile, or the evaluation fails, it writes a checkpoint before the error goes on.
    """
    cfg, completed = trainer.cfg, trainer.state.iteration
    if not is_final:
        cfg = cfg.clone()
        cfg.TEST.AUG.ENABLED = False  # TTA is expensive, so it runs only on the final weights
    trainer.run_dir.set_status("evaluating", iteration=completed, max_iter=cfg.SOLVER.MAX_ITER)
    out = trainer.run_dir.path / "inference"
    try:
        found = evaluate_all(task, cfg, trainer.backend, trainer.state.evaluated(), test, out, trainer.group)
    except (Stopped, Exception):
        trainer.save()
        raise
    if found:
        named = flatten(found, "/")
        score = named.get(trainer.score, math.nan)  # without annotations there is nothing to score by
        best = trainer.checkpoints.best_ap() if cfg.TEST.EVAL_PERIOD > 0 else math.inf  # one evaluation has no best
        if not math.isnan(score) and score > best:
            trainer.checkpoints.save_best(trainer.checkpoint(), score, completed)
        trainer.metrics.write(iteration, named)  # marks this evaluation as complete
    if task.picture and test:
        trainer.metrics.show(iteration, "predictions", lambda: resolve_name(task.picture)(cfg, trainer.run_dir, test))
    return found


def evaluate_all(
    task: Task, cfg: CfgNode, backend: Any, models: dict[str, nn.Module], test: list[Any], out: Path, group: Group
) -> dict[str, Any]:
    """Metrics by task; with several test sets, by name of the set and task. Empty on other ranks than 0.

    models: by what ends the names of their tasks and folders.
    """

    def metrics(data: Any, folder: Path) -> dict[str, Any]:
        parts = (task.evaluate(backend, model, cfg, data, folder, group, end) for end, model in models.items())
        return dict(chain.from_iterable(part.items() for part in parts))

    if len(test) == 1:
        return metrics(test[0], out)
    found = {data.entry.name: metrics(data, out / data.entry.name) for data in test}
    return found if group.is_main else {}


def open_folder(
    run_dir: RunDir, cfg: CfgNode, environment: dict[str, Any], origin: Origin | None, completed: int
) -> None:
    """Create the run folder and write config and environment; from here on failures are recorded in the folder."""
    if not run_dir.writes:
        return
    run_dir.create()
    log_to_file(run_dir.path / "log.txt")
    if not completed:
        for path in (run_dir.parent, run_dir.path / DIVERGENCE_REPORT):  # from a failed start
            path.unlink(missing_ok=True)
    write_atomically(run_dir.config, cfg.dump())
    earlier = run_dir.read_environment() if run_dir.environment.exists() else {}
    starts = [*earlier.pop("earlier_starts", []), earlier] if earlier else []
    begun_with = earlier.get("weights_sha256")
    if not completed:
        begun_with = sha256_of(fetch(cfg.MODEL.WEIGHTS)) if cfg.MODEL.WEIGHTS else None
    history = {"weights_sha256": begun_with, "earlier_starts": starts}
    run_dir.write_json(run_dir.environment.name, {**environment, **history})
    if origin and origin.is_branch:  # record the parent, copy its metrics of the shared iterations
        parent = {"checkpoint": str(origin.checkpoint.resolve()), "sha256": sha256_of(origin.checkpoint),
                  "completed_iterations": completed, "switch": origin.is_switch}  # fmt: skip
        run_dir.write_json(run_dir.parent.name, parent)
        keep_lines(origin.run.metrics, run_dir.metrics, completed)  # last: a folder with metrics counts as a run
    run_dir.set_status("training", iteration=completed, max_iter=cfg.SOLVER.MAX_ITER)


@contextmanager
def recording_failure(trainer: Trainer) -> Iterator[None]:
    """Record the reason in the run folder when this or another process of the run fails."""
    run_dir, state, group = trainer.run_dir, trainer.state, trainer.group
    end = "failed"
    if group.watch:
        group.watch.record = lambda reason: run_dir.record_failure(state.iteration, reason)
    try:
        yield
        end = "finished" if run_dir.result.exists() else "paused"
    except BaseException as error:
        group.wait_for_cause(error)  # record the first failure, not the ones it caused
        end = run_dir.record_failure(state.iteration, error)
        if isinstance(error, OSError):
            place = error.filename = error.filename or str(run_dir.path)  # a stream's error has no name
            cause = f"disk full at {place} ({error.strerror}); free space" if error.errno in DISK_FULL else ""
            if run_dir.writes and not run_dir.path.is_dir():
                cause = f"OUTPUT_DIR {run_dir.path} is gone, or its disk is; restore it"
            if cause:
                raise UserError(f"{cause} and continue with --resume") from None
        raise
    finally:
        trainer.metrics.close(end)


def finish(trainer: Trainer, backend: str, test: list[Any], metrics: dict[str, Any], images: int) -> None:
    """Write result.json, which marks the run as complete, and log a summary; on rank 0."""
    state, run_dir = trainer.state, trainer.run_dir
    result = {"backend": backend, "iteration": state.iteration, "seconds": round(state.seconds, 1),
              "epochs": round(state.iteration * trainer.cfg.SOLVER.IMS_PER_BATCH / images, 2),
              "classes": list(trainer.cfg.DATASETS.CLASS_NAMES)}  # fmt: skip
    digests = {"metrics_json_sha256": sha256_of(run_dir.metrics),
               "weights_sha256": weights_sha256(run_dir.checkpoints / FINAL)}  # fmt: skip
    early = {"ended_early": trainer.ended_early} if trainer.ended_early else {}
    run_dir.write_json(run_dir.result.name, {**result, **early, **digests, "metrics": to_json_numbers(metrics)})
    run_dir.set_status("finished", iteration=state.iteration, max_iter=trainer.cfg.SOLVER.MAX_ITER, **early)
    of_model = {task: scores for task, scores in metrics.items() if EMA not in task}  # a table that fits a screen
    if len(test) == 1 and (table := format_per_class(of_model)):
        logger.info(f"per class:\n{table}")
    pictures = ", ".join(sorted(path.name for path in run_dir.path.glob("*.png")))
    logger.info(f"trained {state.iteration} iterations in {clock(state.seconds)}; look at {run_dir.path}/: {pictures}")


def draw_curves(cfg: CfgNode, run_dir: RunDir, _state: State) -> None:
    """Draw curves.png. An error in drawing is only logged: the run is still complete."""
    try:
        from scratch_det.visualization import curves  # here: matplotlib takes 0.4 s, and no iteration needs it

        curves.draw_curves(run_dir.metrics, cfg.SOLVER.MAX_ITER, run_dir.path / "curves.png", title=str(run_dir.path))
    except Exception:
        logger.exception("the curves could not be drawn")


def leave_backbone(cfg: CfgNode, run_dir: RunDir, state: State) -> None:
    """Write backbone.pth and draw curves.png."""
    classification.save_backbone(run_dir.path, state)
    draw_curves(cfg, run_dir, state)


DETECT = Task(main_score("bbox"), backends.load, TrainingSet, inference.evaluate, draw_curves,
              "scratch_det.engine.pictures:draw_found")  # fmt: skip


def task_of(plan: Plan) -> Task:
    """Detection, or the pre-training that the recipe names."""
    if plan.task == DETECTION:
        return DETECT
    method = resolve_name(choice_of(plan.cfg, "MODEL.PRETRAINING").function)
    return Task(main_score("classification"), lambda _: method, method.FolderSet, method.evaluate, leave_backbone)


def describe_environment(plan: Plan, processes: int) -> dict[str, Any]:
    """The content of environment.json: versions, hardware, git state, data, command."""
    return {
        "command": shlex.join(sys.orig_argv), "datasets_root": str(datasets_root()),
        "backend": plan.backend, "library": backends.library(plan.backend),
        "python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: next((found.version for found in distributions(name=name)), None) for name in PACKAGES},
        "processes": processes, "accumulate": plan.request.accumulate, "init_std": plan.request.init_std,
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "git": git_state(), "trained_on": [data.entry.name for data in plan.training],
        "datasets": {data.entry.name: data.recorded(plan.cfg) for data in plan.training + plan.test},
    }  # fmt: skip


def git_state() -> dict[str, Any] | None:
    """Commit and a digest of uncommitted changes of the checkout that holds this package; None outside a checkout.

    With SAVE_DIFF in the environment the changes themselves too, up to MOST_DIFF: they may hold what nobody else is to
    see, and a run folder is often shown to others.
    """

    def git(*arguments: str) -> str:
        command, here = ["git", *arguments], Path(__file__).parent
        return subprocess.run(command, cwd=here, check=True, capture_output=True, text=True, errors="replace").stdout

    try:
        diff = git("diff", "HEAD")
        saved = {"diff": diff} if os.environ.get(SAVE_DIFF) and len(diff) <= MOST_DIFF else {}
        return {
            "commit": git("rev-parse", "HEAD").strip(),
            "changes": diff and sha256(diff.encode()).hexdigest(),
            **saved,
        }
    except (OSError, subprocess.CalledProcessError):
        return None
