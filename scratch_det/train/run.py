"""One run: build, train, evaluate, draw, report."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from fvcore.common.config import CfgNode

from scratch_det import backends
from scratch_det.config.curve import is_cosine, learning_rate_line
from scratch_det.config.solver_rules import optimizer_of
from scratch_det.data.coco import collection_paused
from scratch_det.distributed.group import Group
from scratch_det.distributed.stop import StopFlag
from scratch_det.distributed.world import World
from scratch_det.errors import UserError
from scratch_det.evaluation.tables import format_per_class, format_table, to_json_numbers
from scratch_det.modeling.size import size_of
from scratch_det.progress import clock
from scratch_det.train import detection
from scratch_det.train.changes import config_changes
from scratch_det.train.checkpoint import sha256_of
from scratch_det.train.disk import FULL, check_free_space, checkpoint_bytes
from scratch_det.train.divergence import REPORT
from scratch_det.train.environment import describe
from scratch_det.train.evaluate import evaluate_all, evaluate_if_missing, evaluate_now
from scratch_det.train.log import log_to_file, logger
from scratch_det.train.loop import Run, train
from scratch_det.train.metrics import Metrics
from scratch_det.train.resume import (
    Origin,
    begin_branch,
    find_origin,
    refuse_changes,
    report_start,
    restore,
    settled_seed,
)
from scratch_det.train.rundir import RunDir
from scratch_det.train.start import Plan
from scratch_det.train.state import State, build_state, pick_device
from scratch_det.train.store import CheckpointStore
from scratch_det.weights.address import fetch
from scratch_det.weights.load import load_weights

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
        store = CheckpointStore(run_dir.checkpoints, request.keep_last, request.keep_at)
        start = find_start(plan, store) if group.is_main else None
        origin, cfg.SEED = group.broadcast(start)  # what the main process sees counts: file systems lag
        if origin is None:
            return
        environment = describe(plan, group.size)
        with collection_paused():
            dataset = task.training_set(cfg, plan.training)
            plan.training.clear()  # the parsed json; the data set keeps its own compact copy
        state = build_state(cfg, backend, device, request.init_std)
        window = restore(cfg, plan.backend, state, origin)
        report_start(cfg, environment, origin, state.iteration)
        check_disk(cfg, state, store)
        if origin.checkpoint and not origin.is_branch:
            warn_of_missed(request.keep_at, store, state.iteration)

        open_folder(run_dir, cfg, environment, origin, state.iteration)
        log_start(cfg, state, len(dataset), dataset.describe(), request.init_std)
        state.spread(group)
        metrics = Metrics(run_dir, state.iteration, cfg.SOLVER.MAX_ITER, window)
        run = Run(cfg, backend, group, state, run_dir, store, metrics, request.accumulate, task)
        with recording_failure(run):
            if not origin.is_switch:  # what the plain run did not evaluate, an untrained cascade cannot make up for
                evaluate_if_missing(run, plan.test)
            train(run, dataset, lambda iteration: evaluate_now(run, plan.test, iteration))
            final = evaluate_now(run, plan.test, cfg.SOLVER.MAX_ITER)
            if group.is_main:
                finish(run, plan.backend, plan.test, final)


def find_start(plan: Plan, store: CheckpointStore) -> tuple[Origin | None, int]:
    """Where the run starts, None when it is finished, and its SEED."""
    if plan.request.resume and plan.run_dir.result.exists():
        report_finished(plan.cfg, plan.run_dir)
        return None, plan.cfg.SEED
    request = plan.request
    parent = request.branch_from or request.switch_from
    origin = find_origin(
        plan.run_dir, store, request.resume, Path(parent) if parent else None, bool(request.switch_from)
    )
    return origin, settled_seed(plan.cfg, origin, plan.run_dir)


def evaluate_only(plan: Plan, world: World, stop: StopFlag) -> None:
    """Evaluate MODEL.WEIGHTS, or with --resume the folder's last checkpoint; writes inference/ alone."""
    cfg, run_dir, backend = plan.cfg, plan.run_dir, backends.load(plan.backend)
    device = pick_device(cfg.MODEL.DEVICE, world)
    with Group(world, device, stop) as group:
        own = plan.request.resume and group.is_main and CheckpointStore(run_dir.checkpoints).newest_valid()
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


def check_disk(cfg: CfgNode, state: State, store: CheckpointStore) -> None:
    """Raise UserError when this run's checkpoints will not fit."""
    size = size_of(state.model)
    solver, bytes_each = cfg.SOLVER, checkpoint_bytes(size.weights, size.trainable, optimizer_of(cfg).moments)
    check_free_space(
        store.folder, bytes_each, solver.MAX_ITER, solver.CHECKPOINT_PERIOD, store.keep_last, store.keep_at
    )


def warn_of_missed(keep_at: tuple[int, ...], store: CheckpointStore, completed: int) -> None:
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
        if isinstance(error, OSError) and error.errno in FULL:
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
            f"{cfg.SOLVER.MAX_ITER}; name another folder" + (": OUTPUT_DIR PATH" if is_cosine(cfg) else BRANCH)
        )
    cfg.SEED = settled_seed(cfg, Origin(), run_dir)
    changes = config_changes(run_dir.read_config(), cfg, result["iteration"])
    refuse_changes(changes, f"the finished run in {run_dir.path}", result["iteration"])
    for change in changes:
        logger.warning(f"  {change.what} is {change.now!r}, was {change.earlier!r}: no effect any more")
    logger.info(f"{run_dir.path} holds a finished run of {result['iteration']} iterations; nothing to do")
    if "bbox" in result["metrics"]:
        logger.info("\n" + format_table(result["metrics"]))
