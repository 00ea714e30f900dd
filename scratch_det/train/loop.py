"""The training loop."""

import math
import time
from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np
import torch
from fvcore.common.config import CfgNode

from scratch_det.data.dataset import Sample, TrainingSet, training_batches
from scratch_det.errors import UserError
from scratch_det.progress import Progress
from scratch_det.train.checkpoint import FINAL, checkpoint_name, save_checkpoint
from scratch_det.train.log import logger
from scratch_det.train.metrics import Metrics, as_line
from scratch_det.train.optimizer import clip_gradients, set_learning_rate
from scratch_det.train.rundir import RunDir
from scratch_det.train.state import State


def train(
    cfg: CfgNode,
    backend: ModuleType,
    state: State,
    dataset: TrainingSet,
    run_dir: RunDir,
    metrics: Metrics,
    evaluate: Callable[[int], object],
) -> None:
    """Train from ``state.iteration`` to MAX_ITER.

    Calls ``evaluate(iteration)`` every TEST.EVAL_PERIOD iterations, the last one excepted, and leaves model_final.pth.
    Raises UserError when a loss is not finite, DataError when an image cannot be read.
    """
    max_iter = cfg.SOLVER.MAX_ITER
    batches = timed(training_batches(dataset, cfg, state.iteration))
    with Progress("training", max_iter, state.iteration, say=None) as progress:
        for iteration in range(state.iteration, max_iter):
            began = time.perf_counter()
            batch, data_seconds = next(batches)
            lr = set_learning_rate(state.optimizer, cfg, iteration)
            torch.manual_seed(seed_of(cfg.SEED, iteration))
            losses = step(cfg, backend, state, batch)
            check_finite(losses, iteration, lr, batch)
            seconds = time.perf_counter() - began
            state.advance(seconds)

            scalars = {**losses, "lr": lr, "time": seconds, "data_time": data_seconds}
            if medians := metrics.add(iteration, scalars):
                run_dir.set_status("training", iteration=state.iteration, max_iter=max_iter, eta=medians["eta_seconds"])
                logger.info(as_line(iteration, max_iter, medians))
            progress.advance(f"loss {losses['total_loss']:.3f}")

            if state.iteration == max_iter:
                save_checkpoint(run_dir, FINAL, state.state_dict())
            elif due(state.iteration, cfg.SOLVER.CHECKPOINT_PERIOD):
                save_checkpoint(run_dir, checkpoint_name(iteration), state.state_dict())
            if due(state.iteration, cfg.TEST.EVAL_PERIOD) and state.iteration < max_iter:
                evaluate(iteration)


def step(cfg: CfgNode, backend: ModuleType, state: State, batch: list[Sample]) -> dict[str, float]:
    """One update of the weights; returns every loss and ``total_loss`` as numbers."""
    with state.autocast():
        losses = backend.losses(state.model, batch)
    losses["total_loss"] = sum(losses.values())
    state.optimizer.zero_grad()
    state.scaler.scale(losses["total_loss"]).backward()
    if cfg.SOLVER.CLIP_GRADIENTS.ENABLED:
        state.scaler.unscale_(state.optimizer)
        clip_gradients(cfg, state.model)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    return dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True))


def seed_of(seed: int, iteration: int) -> int:
    """Seed of torch's generators (proposal and anchor sampling) in one iteration: a function of both numbers alone."""
    return int(np.random.SeedSequence([seed, iteration]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def due(completed: int, period: int) -> bool:
    """Whether a multiple of ``period`` is completed; a period of 0 is never."""
    return period > 0 and completed % period == 0


def timed(items: Iterator[list[Sample]]) -> Iterator[tuple[list[Sample], float]]:
    """Each item with the seconds that waiting for it took."""
    while True:
        began = time.perf_counter()
        try:
            item = next(items)
        except StopIteration:
            return
        yield item, time.perf_counter() - began


def check_finite(losses: dict[str, float], iteration: int, lr: float, batch: list[Sample]) -> None:
    """Stop at the first loss that is not a number."""
    if not math.isfinite(losses["total_loss"]):
        parts = ", ".join(f"{key} {value}" for key, value in losses.items())
        images = ", ".join(str(sample["image_id"]) for sample in batch)
        raise UserError(
            f"the loss is not finite at iteration {iteration} (learning rate {lr:g}): {parts}\n  images: {images}\n"
            "  training diverged: lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS, or set "
            "SOLVER.CLIP_GRADIENTS.ENABLED True; earlier checkpoints are kept"
        )
