"""One run: build, train, evaluate, draw, report."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import nn

from scratch_det import backends
from scratch_det.config import flatten, load_config
from scratch_det.data.coco import CocoDataset
from scratch_det.data.dataset import TrainingSet
from scratch_det.errors import ConfigError, UserError
from scratch_det.evaluation.inference import evaluate
from scratch_det.evaluation.tables import format_per_class, format_table, to_json_numbers
from scratch_det.progress import clock
from scratch_det.train.checkpoint import last_checkpoint, load_weights, read_checkpoint
from scratch_det.train.environment import describe
from scratch_det.train.log import log_to_file, logger
from scratch_det.train.loop import train
from scratch_det.train.metrics import Metrics, flat_metrics
from scratch_det.train.pictures import draw
from scratch_det.train.rundir import RunDir, write_atomically
from scratch_det.train.state import State


def train_and_evaluate(
    cfg: CfgNode, backend_name: str, training: list[CocoDataset], test: list[CocoDataset], run_dir: RunDir, resume: bool
) -> None:
    """Train to MAX_ITER, evaluate, draw, and leave the run folder that ``RunDir`` describes."""
    if resume and run_dir.result.exists():
        return report_finished(cfg, run_dir)
    settle_seed(cfg, run_dir)
    report_changes(cfg, run_dir)
    backend = backends.load(backend_name)
    dataset = TrainingSet(cfg, training)
    state = build_state(cfg, backend)
    restore(cfg, state, run_dir, resume)

    run_dir.create()
    log_to_file(run_dir.path / "log.txt")
    write_atomically(run_dir.config, cfg.dump())
    run_dir.write_json("environment.json", describe(backend_name, backend.library(), training + test))
    log_start(cfg, backend, state, dataset)
    training.clear()  # the parsed json; the data set keeps its own compact copy

    run_dir.set_status("training", iteration=state.iteration, max_iter=cfg.SOLVER.MAX_ITER)
    metrics = Metrics(run_dir, state.iteration, cfg.SOLVER.MAX_ITER)

    def evaluate_now(iteration: int) -> dict[str, Any]:
        run_dir.set_status("evaluating", iteration=state.iteration, max_iter=cfg.SOLVER.MAX_ITER)
        found = evaluate_all(cfg, backend, state.model, test, run_dir.path / "inference")
        if found:
            metrics.write(iteration, flat_metrics(found))
        return found

    try:
        train(cfg, backend, state, dataset, run_dir, metrics, evaluate_now)
        final = evaluate_now(cfg.SOLVER.MAX_ITER)
        finish(cfg, backend_name, state, test, run_dir, final)
    except BaseException as error:
        run_dir.fail(state.iteration, error)
        raise
    finally:
        metrics.close()


def evaluate_only(cfg: CfgNode, backend_name: str, test: list[CocoDataset], run_dir: RunDir, resume: bool) -> None:
    """Evaluate MODEL.WEIGHTS, or with ``resume`` the folder's last checkpoint; writes inference/ alone."""
    backend = backends.load(backend_name)
    state = build_state(cfg, backend)
    restore(cfg, state, run_dir, resume)
    if not cfg.MODEL.WEIGHTS and not state.iteration:
        logger.warning("MODEL.WEIGHTS is empty: this evaluates random weights")
    out = run_dir.path / "inference"
    metrics = evaluate_all(cfg, backend, state.model, test, out)
    result = {"backend": backend_name, "weights": cfg.MODEL.WEIGHTS, "metrics": to_json_numbers(metrics)}
    write_atomically(out / "result.json", json.dumps(result, indent=2) + "\n")
    logger.info(f"wrote {out}/result.json")


def settle_seed(cfg: CfgNode, run_dir: RunDir) -> None:
    """SEED -1 means: draw one, or take the one that this folder's run has drawn."""
    if cfg.SEED < 0 and run_dir.holds_run() and run_dir.config.exists():
        cfg.SEED = load_config(run_dir.config).cfg.SEED
    elif cfg.SEED < 0:
        cfg.SEED = int(np.random.SeedSequence().generate_state(1)[0] >> 1)


def report_changes(cfg: CfgNode, run_dir: RunDir) -> None:
    """Log the keys that have another value than when this folder's run was started."""
    if run_dir.holds_run() and run_dir.config.exists():
        earlier, now = flatten(load_config(run_dir.config).cfg), flatten(cfg)
        for key in (key for key in now if json.dumps(now[key]) != json.dumps(earlier[key])):
            logger.warning(f"{key} was {earlier[key]!r} when this run was started, now it is {now[key]!r}")


def build_state(cfg: CfgNode, backend: ModuleType) -> State:
    """The model with weights initialised from SEED, on its device, and everything that trains it."""
    if cfg.FLOAT32_PRECISION:
        torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    torch.manual_seed(max(cfg.SEED, 0))
    device = pick_device(cfg.MODEL.DEVICE)
    return State(cfg, backend.build(cfg).to(device), device)


def pick_device(name: str) -> torch.device:
    """MODEL.DEVICE; "cuda", detectron2's default, becomes the CPU on a machine without a GPU."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("MODEL.DEVICE is cuda, but no GPU is visible: using the CPU")
        return torch.device("cpu")
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"MODEL.DEVICE is {name}, which this machine does not have ({reason})") from None


def restore(cfg: CfgNode, state: State, run_dir: RunDir, resume: bool) -> None:
    """With ``resume``, continue from the last checkpoint; without one, start from MODEL.WEIGHTS or at random."""
    checkpoint = last_checkpoint(run_dir) if resume else None
    if checkpoint:
        try:
            state.load_state_dict(read_checkpoint(checkpoint))
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"checkpoint {checkpoint} does not fit this recipe ({str(error).splitlines()[0]}); "
                "resume with the MODEL.* and SOLVER.* keys that the run was started with"
            ) from None
        if state.iteration > cfg.SOLVER.MAX_ITER:
            raise UserError(
                f"checkpoint {checkpoint} has {state.iteration} iterations behind it, SOLVER.MAX_ITER is "
                f"{cfg.SOLVER.MAX_ITER}; raise it, or name another folder: OUTPUT_DIR PATH"
            )
        logger.info(f"resumed from {checkpoint}: {state.iteration} iterations are done")
    elif cfg.MODEL.WEIGHTS:
        logger.info(load_weights(state.model, Path(cfg.MODEL.WEIGHTS), backbone_prefix="backbone.body."))
    if resume and not checkpoint:
        logger.info(f"--resume: no checkpoint in {run_dir.path} yet, nothing to continue")


def log_start(cfg: CfgNode, backend: ModuleType, state: State, dataset: TrainingSet) -> None:
    """What is about to happen, in numbers."""
    parameters = list(state.model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    source = f"weights {cfg.MODEL.WEIGHTS}" if cfg.MODEL.WEIGHTS else "random initialisation"
    logger.info(
        f"{backend.library()}, torch {torch.__version__} on {state.device}, seed {cfg.SEED}; "
        f"{sum(p.numel() for p in parameters):,} parameters, {trainable:,} trainable, "
        + (f"{state.iteration} iterations behind them" if state.iteration else source)
    )
    batch, images = cfg.SOLVER.IMS_PER_BATCH, len(dataset)
    epochs = cfg.SOLVER.MAX_ITER * batch / images
    logger.info(f"{images:,} training images; {dataset.num_dropped:,} without objects left out")
    logger.info(
        f"{cfg.SOLVER.MAX_ITER:,} iterations x {batch} images = {epochs:.1f} epochs; "
        f"learning rate {cfg.SOLVER.BASE_LR:g}, drops at {cfg.SOLVER.STEPS}"
    )


def evaluate_all(
    cfg: CfgNode, backend: ModuleType, model: nn.Module, test: list[CocoDataset], out: Path
) -> dict[str, Any]:
    """Metrics by task; with several test sets, by their names first; nothing without a test set."""
    if len(test) == 1:
        return evaluate(backend, model, cfg, test[0], out)
    return {data.entry.name: evaluate(backend, model, cfg, data, out / data.entry.name) for data in test}


def finish(
    cfg: CfgNode, backend: str, state: State, test: list[CocoDataset], run_dir: RunDir, metrics: dict[str, Any]
) -> None:
    """Pictures, then result.json as the sign that the run is complete; a picture that fails does not undo the run."""
    try:
        draw(cfg, run_dir, test)
    except Exception:
        logger.exception("the pictures could not be drawn")
    result = {"backend": backend, "iteration": state.iteration, "seconds": round(state.seconds, 1)}
    run_dir.write_json("result.json", {**result, "metrics": to_json_numbers(metrics)})
    run_dir.set_status("finished", iteration=state.iteration, max_iter=cfg.SOLVER.MAX_ITER)
    if len(test) == 1:
        logger.info(f"per class:\n{format_per_class(metrics)}")
    pictures = "curves.png, predictions.png" if test else "curves.png"
    logger.info(f"trained {state.iteration} iterations in {clock(state.seconds)}; look at {run_dir.path}/: {pictures}")


def report_finished(cfg: CfgNode, run_dir: RunDir) -> None:
    """What --resume says of a run that is complete. Raises UserError when the recipe now asks for another length."""
    result = json.loads(run_dir.result.read_text())
    if result["iteration"] != cfg.SOLVER.MAX_ITER:
        raise UserError(
            f"{run_dir.path} holds a finished run of {result['iteration']} iterations, SOLVER.MAX_ITER is "
            f"{cfg.SOLVER.MAX_ITER}; name another folder: OUTPUT_DIR PATH"
        )
    logger.info(f"{run_dir.path} holds a finished run of {result['iteration']} iterations; nothing to do")
    if "bbox" in result["metrics"]:
        logger.info("\n" + format_table(result["metrics"]))
