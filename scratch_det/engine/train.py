"""What a run was made with: versions, hardware, git state, data, command.

Evaluations of a run: when they are due, where their numbers go, which weights are the best.

One run: build, train, evaluate, draw, report.
"""

import json
import math
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from scratch_det import backends
from scratch_det.config import flatten
from scratch_det.config.choices import optimizer_of
from scratch_det.config.schedule import is_multi_step, learning_rate_line
from scratch_det.data.catalog import datasets_root
from scratch_det.data.coco import gc_paused
from scratch_det.distributed.group import Group
from scratch_det.distributed.launch import World
from scratch_det.distributed.stop import StopFlag, Stopped
from scratch_det.engine import detection
from scratch_det.engine.checkpointer import FINAL, Checkpointer, completed_iterations
from scratch_det.engine.loop import REPORT, Run, due, train
from scratch_det.engine.metrics import Metrics, is_evaluated
from scratch_det.engine.plan import Plan
from scratch_det.engine.resume import (
    Origin,
    begin_branch,
    config_changes,
    find_origin,
    refuse_changes,
    report_start,
    restore,
    settled_seed,
)
from scratch_det.engine.run_dir import DISK_FULL, RunDir, check_free_space, checkpoint_bytes
from scratch_det.engine.state import State, build_state, pick_device, size_of
from scratch_det.errors import UserError
from scratch_det.evaluation.coco import format_per_class, format_table, to_json_numbers
from scratch_det.files import sha256_of
from scratch_det.log import clock, log_to_file, logger
from scratch_det.weights.digest import weights_sha256
from scratch_det.weights.load import load_weights
from scratch_det.weights.locate import fetch

PACKAGES = ("scratch_det", "torch", "torchvision", "detectron2", "fvcore", "numpy", "faster-coco-eval", "pillow")


def describe(plan: Plan, processes: int) -> dict[str, Any]:
    """The content of environment.json."""
    data_sets = plan.training + plan.test
    return {
        "command": shlex.join([sys.executable, *sys.argv]),
        "datasets_root": str(datasets_root()),
        "backend": plan.backend,
        "library": backends.library(plan.backend),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "processes": processes,
        "accumulate": plan.request.accumulate,
        "init_std": plan.request.init_std,
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "git": _git_state(),
        "trained_on": [data.entry.name for data in plan.training],
        "datasets": {
            data.entry.name: {f"{data.described_by}_sha256": data.digest, "images": len(data.images)}
            for data in data_sets
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    """Commit and uncommitted changes of the checkout that holds this package; None outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, check=True, capture_output=True, text=True, errors="replace"
        ).stdout

    try:
        return {"commit": git("rev-parse", "HEAD").strip(), "diff": git("diff", "HEAD")}
    except (OSError, subprocess.CalledProcessError):
        return None


def evaluate_now(run: Run, test: list[Any], iteration: int) -> dict[str, Any]:
    """Evaluate the weights as they are; a run that is asked to stop meanwhile leaves a checkpoint first."""
    completed, max_iter, cfg = run.state.iteration, run.cfg.SOLVER.MAX_ITER, run.cfg
    if iteration < max_iter:
        cfg = cfg.clone()
        cfg.TEST.AUG.ENABLED = False  # many times the work: once, of the final weights
    run.run_dir.set_status("evaluating", iteration=completed, max_iter=max_iter)
    try:
        out = run.run_dir.path / "inference"
        found = evaluate_all(cfg, run.backend, run.state.model, test, out, run.group, run.task)
    except Stopped:
        run.save()
        raise
    if found:
        keep_if_best(run, found if len(test) == 1 else found[test[0].entry.name])
        run.metrics.write(iteration, flatten(found, "/"))  # last: the sign that this evaluation is done
    return found


def evaluate_if_missing(run: Run, test: list[Any]) -> None:
    """The evaluation of the checkpoint that the run continues from, if it was cut off after the checkpoint."""
    completed = run.state.iteration
    if test and 0 < completed < run.cfg.SOLVER.MAX_ITER and due(completed, run.cfg.TEST.EVAL_PERIOD):
        missing = run.group.is_main and not is_evaluated(run.run_dir.metrics, completed - 1)
        if run.group.any(missing):
            evaluate_now(run, test, completed - 1)


def keep_if_best(run: Run, metrics: dict[str, Any]) -> None:
    """With evaluations on the way, keep the weights of the best box AP, or the task's like, as model_best.pth."""
    task, name = run.task.BEST
    score = metrics[task][name]
    if run.cfg.TEST.EVAL_PERIOD > 0 and not math.isnan(score) and score > run.checkpoints.best_ap():
        run.checkpoints.save_best(run.content(), score, run.state.iteration)


def evaluate_all(
    cfg: CfgNode,
    backend: ModuleType,
    model: nn.Module,
    test: list[Any],
    out: Path,
    group: Group,
    task: ModuleType = detection,
) -> dict[str, Any]:
    """Metrics by task, in the main process; with several test sets, by their names first."""
    if len(test) == 1:
        return task.evaluate(backend, model, cfg, test[0], out, group)
    found = {data.entry.name: task.evaluate(backend, model, cfg, data, out / data.entry.name, group) for data in test}
    return found if group.is_main else {}


BRANCH = ", and branch off a checkpoint before its first drop of the learning rate: --branch-from FILE OUTPUT_DIR PATH"


def train_and_evaluate(plan: Plan, world: World, stop: StopFlag, task: ModuleType = detection) -> None:
    """Train to MAX_ITER, evaluate, draw, and leave the run folder that ``RunDir`` describes.

    Raises UserError, with nothing written, when the run cannot start like this; Stopped, after a checkpoint, when it
    was asked to stop.
    """
    cfg, run_dir, request = plan.cfg, plan.run_dir, plan.request
    run_dir.lock()
    backend = task.load(plan.backend)
    device = pick_device(cfg.MODEL.DEVICE, world)
    with Group(world, device, stop) as group:
        store = Checkpointer(run_dir.checkpoints, request.keep_last, request.kept)
        start = find_start(plan, store) if group.is_main else None
        origin, cfg.SEED = group.broadcast(start)  # what the main process sees counts: file systems lag
        if origin is None:
            return
        environment = describe(plan, group.size)
        with gc_paused():
            dataset = task.training_set(cfg, plan.training)
            plan.training.clear()  # the parsed json; the data set keeps its own compact copy
        state = build_state(cfg, backend, device, request.init_std)
        window = restore(cfg, plan.backend, state, origin)
        report_start(cfg, environment, origin, state.iteration)
        check_disk(cfg, state, store)
        if origin.checkpoint and not origin.is_branch:
            warn_of_missed(request.keep_at, store, state.iteration)
        until = cfg.SOLVER.MAX_ITER if request.stop_at is None else request.stop_at

        open_folder(run_dir, cfg, environment, origin, state.iteration)
        log_start(cfg, state, len(dataset), dataset.describe(), request.init_std)
        state.spread(group)
        metrics = Metrics(run_dir, state.iteration, cfg.SOLVER.MAX_ITER, window)
        run = Run(cfg, backend, group, state, run_dir, store, metrics, request.accumulate, task)
        with recording_failure(run):
            if not origin.is_switch:  # what the plain run did not evaluate, an untrained cascade cannot make up for
                evaluate_if_missing(run, plan.test)
            train(run, dataset, lambda iteration: evaluate_now(run, plan.test, iteration), until)
            if request.stop_at is not None:
                return report_paused(run_dir, state.iteration, cfg.SOLVER.MAX_ITER)
            final = evaluate_now(run, plan.test, cfg.SOLVER.MAX_ITER)
            if group.is_main:
                finish(run, plan.backend, plan.test, final)


def find_start(plan: Plan, store: Checkpointer) -> tuple[Origin | None, int]:
    """Where the run starts, None when it is finished or as far as --stop-at asks, and its SEED."""
    request, cfg = plan.request, plan.cfg
    if request.resume and plan.run_dir.result.exists():
        report_finished(cfg, plan.run_dir)
        return None, cfg.SEED
    parent = request.branch_from or request.switch_from
    origin = find_origin(
        plan.run_dir, store, request.resume, Path(parent) if parent else None, bool(request.switch_from)
    )
    cfg.SEED = settled_seed(cfg, origin, plan.run_dir)
    if request.stop_at is not None and is_far_enough(cfg, origin, request.stop_at):
        if store.holds(request.stop_at):
            store.keep(request.stop_at)
        report_paused(plan.run_dir, completed_iterations(origin.checkpoint), cfg.SOLVER.MAX_ITER)
        return None, cfg.SEED
    return origin, cfg.SEED


def is_far_enough(cfg: CfgNode, origin: Origin, stop_at: int) -> bool:
    """Whether the run has ``stop_at`` iterations behind it already.

    Raises UserError when its past is not the recipe's, or when it is a branch that would start there or later.
    """
    completed = completed_iterations(origin.checkpoint) if origin.checkpoint else None
    if completed is None or completed < stop_at:
        return False
    if origin.is_branch:
        raise UserError(
            f"--stop-at is {stop_at}, but {origin.checkpoint} has {completed} iterations behind it, so nothing would "
            "be trained; give a larger number, or branch off an earlier checkpoint"
        )
    refuse_changes(config_changes(origin.run.read_config(), cfg, completed), str(origin.checkpoint), completed)
    return True


def report_paused(run_dir: RunDir, completed: int, max_iter: int) -> None:
    """Record that the run has done what --stop-at asks for, and say how it goes on."""
    run_dir.set_status("paused", iteration=completed, max_iter=max_iter)
    logger.info(f"paused after {completed} of {max_iter} iterations (--stop-at); --resume goes on from there")


def evaluate_only(plan: Plan, world: World, stop: StopFlag) -> None:
    """Evaluate MODEL.WEIGHTS, or with --resume the folder's last checkpoint; writes inference/ alone."""
    cfg, run_dir, backend = plan.cfg, plan.run_dir, backends.load(plan.backend)
    device = pick_device(cfg.MODEL.DEVICE, world)
    with Group(world, device, stop) as group:
        own = plan.request.resume and group.is_main and Checkpointer(run_dir.checkpoints).newest_valid()
        weights = str(group.broadcast(own) or cfg.MODEL.WEIGHTS)
        if plan.request.resume and not weights:
            raise UserError(
                f"--resume: there is no checkpoint in {run_dir.checkpoints} to evaluate; give MODEL.WEIGHTS FILE"
            )
        model = build_state(cfg, backend, device).model
        if weights:
            logger.info(load_weights(model, weights, plan.backend, cfg))
        else:
            logger.warning("MODEL.WEIGHTS is empty: this evaluates random weights")
        out = run_dir.path / "inference"
        metrics = evaluate_all(cfg, backend, model, plan.test, out, group)
        if group.is_main:
            digest = sha256_of(fetch(weights)) if weights else None
            result = {"backend": plan.backend, "weights": weights, "weights_sha256": digest}
            result["metrics"] = to_json_numbers(metrics)
            run_dir.write_text(out / "result.json", json.dumps(result, indent=2) + "\n")
            logger.info(f"wrote {out}/result.json")


def check_disk(cfg: CfgNode, state: State, store: Checkpointer) -> None:
    """Raise UserError when this run's checkpoints will not fit."""
    size = size_of(state.model)
    solver, bytes_each = cfg.SOLVER, checkpoint_bytes(size.weights, size.trainable, optimizer_of(cfg).moments)
    check_free_space(
        store.folder, bytes_each, solver.MAX_ITER, solver.CHECKPOINT_PERIOD, store.keep_last, store.keep_at
    )


def warn_of_missed(keep_at: tuple[int, ...], store: Checkpointer, completed: int) -> None:
    """Say which checkpoints to keep are not there, though the run is past them."""
    for number in keep_at:
        if number <= completed and not store.holds(number):
            logger.warning(f"--keep-at {number}: {completed} iterations are done, it was not kept")


def open_folder(run_dir: RunDir, cfg: CfgNode, environment: dict[str, Any], origin: Origin, completed: int) -> None:
    """Take the run folder and write what the run is; from here on a failure is recorded in it."""
    run_dir.create()
    if run_dir.writes:
        log_to_file(run_dir.path / "log.txt")
        for path in () if completed else (run_dir.parent, run_dir.path / REPORT):  # of a start that got nowhere
            path.unlink(missing_ok=True)
    run_dir.write_text(run_dir.config, cfg.dump())
    earlier = json.loads(run_dir.environment.read_text()) if run_dir.environment.exists() else {}
    starts = [*earlier.pop("earlier_starts", []), earlier] if earlier else []
    begun_with = earlier.get("weights_sha256")
    if run_dir.writes and not completed:
        begun_with = sha256_of(fetch(cfg.MODEL.WEIGHTS)) if cfg.MODEL.WEIGHTS else None
    content = {**environment, "weights_sha256": begun_with, "earlier_starts": starts}
    run_dir.write_json(run_dir.environment.name, content)
    if origin.is_branch:  # last: its first lines of metrics make the folder a run's
        begin_branch(run_dir, origin, completed)
    run_dir.set_status("training", iteration=completed, max_iter=cfg.SOLVER.MAX_ITER)


@contextmanager
def recording_failure(run: Run) -> Iterator[None]:
    """Leave the reason in the run folder when this or another process of the run ends early."""
    run.group.on_failure(lambda reason: run.run_dir.record_end("failed", run.state.iteration, reason, reason))
    try:
        yield
    except BaseException as error:
        run.group.wait_for_cause(error)  # which is recorded, and not what follows from it
        run.run_dir.fail(run.state.iteration, error)
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            place = error.filename or run.run_dir.path
            raise UserError(f"disk full at {place} ({error.strerror}); free space and continue with --resume") from None
        raise
    finally:
        run.metrics.close()


def log_start(cfg: CfgNode, state: State, num_images: int, data: str, init_std: float | None) -> None:
    """What is about to happen, in numbers."""
    size = size_of(state.model)
    alike = "" if init_std is None else f", every layer alike from N(0, {init_std:g})"
    source = f"weights {cfg.MODEL.WEIGHTS}" if cfg.MODEL.WEIGHTS else f"random initialisation{alike}"
    logger.info(
        f"torch {torch.__version__} on {state.device}, seed {cfg.SEED}; "
        f"{size.parameters:,} parameters, {size.trainable:,} trainable, "
        + (f"{state.iteration} iterations behind them" if state.iteration else source)
    )
    logger.info(data)
    logger.info(learning_rate_line(cfg, num_images))


def finish(run: Run, backend: str, test: list[Any], metrics: dict[str, Any]) -> None:
    """What the task leaves, then result.json as the sign that the run is complete."""
    state, run_dir = run.state, run.run_dir
    run.task.conclude(run.cfg, run_dir, state, test)
    result = {"backend": backend, "iteration": state.iteration, "seconds": round(state.seconds, 1)}
    if run_dir.writes:
        result["metrics_json_sha256"] = sha256_of(run_dir.metrics)
        result["weights_sha256"] = weights_sha256(run.checkpoints.folder / FINAL)
    run_dir.write_json("result.json", {**result, "metrics": to_json_numbers(metrics)})
    run_dir.set_status("finished", iteration=state.iteration, max_iter=run.cfg.SOLVER.MAX_ITER)
    if len(test) == 1 and (table := format_per_class(metrics)):
        logger.info(f"per class:\n{table}")
    pictures = ", ".join(sorted(path.name for path in run_dir.path.glob("*.png")))
    logger.info(f"trained {state.iteration} iterations in {clock(state.seconds)}; look at {run_dir.path}/: {pictures}")


def report_finished(cfg: CfgNode, run_dir: RunDir) -> None:
    """What --resume says of a run that is complete. Raises UserError when the recipe now asks for another run."""
    result = json.loads(run_dir.result.read_text())
    if result["iteration"] != cfg.SOLVER.MAX_ITER:
        raise UserError(
            f"{run_dir.path} holds a finished run of {result['iteration']} iterations, SOLVER.MAX_ITER is "
            f"{cfg.SOLVER.MAX_ITER}; name another folder" + (BRANCH if is_multi_step(cfg) else ": OUTPUT_DIR PATH")
        )
    cfg.SEED = settled_seed(cfg, Origin(), run_dir)
    changes = config_changes(run_dir.read_config(), cfg, result["iteration"])
    refuse_changes(changes, f"the finished run in {run_dir.path}", result["iteration"])
    for change in changes:
        logger.warning(f"  {change.what} is {change.now!r}, was {change.earlier!r}: no effect any more")
    logger.info(f"{run_dir.path} holds a finished run of {result['iteration']} iterations; nothing to do")
    if "bbox" in result["metrics"]:
        logger.info("\n" + format_table(result["metrics"]))
