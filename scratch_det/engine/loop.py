"""When a loss is not finite: what is needed to find out why, saved before the run ends.

The training loop.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from scratch_det.data.dataset import Sample, TrainingSet, training_batches
from scratch_det.distributed.group import Group
from scratch_det.distributed.stop import Stopped
from scratch_det.engine import detection
from scratch_det.engine.checkpointer import Checkpointer
from scratch_det.engine.metrics import Metrics, as_line
from scratch_det.engine.optimizer import clip_gradients, set_learning_rate
from scratch_det.engine.run_dir import RunDir
from scratch_det.engine.state import State
from scratch_det.errors import UserError
from scratch_det.log import Progress, logger

REPORT = "nonfinite.json"
MOST_LINES = 50  # iterations of losses kept
MOST_IMAGES = 8  # named in the message; the report has all
LOWER = "lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS, or set SOLVER.CLIP_GRADIENTS.ENABLED True"
RISEN = 2.0  # a loss that has grown by this factor within the last iterations speaks for the learning rate


@dataclass(frozen=True)
class Moment:
    """When it happened; ``history``: the losses of the iterations before, averaged over processes."""

    iteration: int
    lr: float
    warmup_iters: int
    history: list[dict[str, float]]


def report_divergence(
    run_dir: RunDir, group: Group, model: nn.Module, moment: Moment, own_losses: dict[str, float], batch: list[Sample]
) -> UserError:
    """Write nonfinite.json and return the error that names the likely cause; called in all processes at once.

    ``own_losses`` and ``batch`` are those of this process.
    """
    own = {
        "losses": {key: _plain(value) for key, value in own_losses.items()},
        "images": [{"image_id": sample["image_id"], "position": sample["position"]} for sample in batch],
    }
    processes = group.gather(own) or [own]
    cause = likely_cause([one["losses"]["total_loss"] for one in processes], moment)
    report = {
        "iteration": moment.iteration,
        "lr": moment.lr,
        "likely_cause": cause,
        "processes": processes,
        "gradient_norms": gradient_norms(model),
        "last_losses": moment.history,
    }
    run_dir.write_json(REPORT, report)
    images = [image["image_id"] for one in processes for image in one["images"]]
    named = ", ".join(map(str, images[:MOST_IMAGES])) + (", ..." if len(images) > MOST_IMAGES else "")
    parts = ", ".join(f"{key} {value}" for key, value in own["losses"].items())
    message = (
        f"the loss is not finite at iteration {moment.iteration} (learning rate {moment.lr:g}): {parts}\n"
        f"  images: {named}\n  likely cause: {cause}\n"
        f"  losses, gradient norms and images are in {run_dir.path / REPORT}; earlier checkpoints are kept"
    )
    return UserError(group.broadcast(message))  # only the main process knows of all images


def likely_cause(totals: list[float | str], moment: Moment) -> str:
    """One sentence; ``totals`` are the processes' total losses, as text where they are not finite."""
    before = [line["total_loss"] for line in moment.history]
    bad = [rank for rank, total in enumerate(totals) if isinstance(total, str)]
    if len(before) > 1 and before[-1] > RISEN * min(before):
        return f"training diverged, total_loss rose from {min(before):.3g} to {before[-1]:.3g} before: {LOWER}"
    if len(bad) < len(totals):
        ranks = ", ".join(map(str, bad))
        return f"only process {ranks} of {len(totals)} has it, so look at its images: boxes, masks, sizes"
    if moment.iteration < moment.warmup_iters:
        return f"iteration {moment.iteration} is within the warm-up of {moment.warmup_iters}: {LOWER}"
    return f"the losses before did not rise, so look at the images; if they are sound, {LOWER}"


def gradient_norms(model: nn.Module) -> dict[str, float | str]:
    """Norm of the gradient of each part of the model, two levels deep ("backbone.body", "rpn.head")."""
    squares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            part = ".".join(name.split(".")[:2])
            squares[part] = squares.get(part, 0.0) + parameter.grad.float().square().sum().item()
    return {part: _plain(math.sqrt(square)) for part, square in squares.items()}


def _plain(value: float) -> float | str:
    """JSON has no NaN: as text."""
    return value if math.isfinite(value) else str(value)


@dataclass
class Run:
    """One run, as one of its processes holds it.

    accumulate: parts that an iteration's share is worked off in. task: ``detection``, or a module with its contract.
    """

    cfg: CfgNode
    backend: ModuleType
    group: Group
    state: State
    run_dir: RunDir
    checkpoints: Checkpointer
    metrics: Metrics
    accumulate: int = 1
    task: ModuleType = detection
    history: deque[dict[str, float]] = field(default_factory=lambda: deque(maxlen=MOST_LINES))

    def content(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {**self.state.state_dict(), "window": self.metrics.window}

    def save(self) -> None:
        """Write a checkpoint of the completed iterations; the main process does, the others go on.

        Raises UserError, in all processes, when a weight is not finite: such a checkpoint would be the newest.
        """
        if bad := [name for name, value in self.state.model.named_parameters() if not value.isfinite().all()]:
            raise UserError(
                f"{len(bad)} weights are not finite after {self.state.iteration} iterations, the first is {bad[0]}; "
                f"they are not saved\n  training diverged: {LOWER}; earlier checkpoints are kept"
            )
        if self.group.is_main:
            final = self.state.iteration == self.cfg.SOLVER.MAX_ITER
            self.checkpoints.save(self.content(), self.state.iteration, final)


def train(run: Run, dataset: TrainingSet, evaluate: Callable[[int], object], until: int) -> None:
    """Train from ``run.state.iteration`` until ``until`` iterations are completed, MAX_ITER or those of --stop-at.

    Calls ``evaluate(iteration)`` every TEST.EVAL_PERIOD iterations, MAX_ITER excepted, and leaves a checkpoint.
    Raises Stopped, after a checkpoint, when a process of the group was asked to stop; UserError in all processes when a
    loss is not finite; DataError when an image cannot be read.
    """
    cfg, state, max_iter = run.cfg, run.state, run.cfg.SOLVER.MAX_ITER
    batches = timed(training_batches(dataset, cfg, state.iteration, run.group.world, run.accumulate))
    with Progress("training", max_iter, state.iteration, say=None) as progress:
        for iteration in range(state.iteration, until):
            total_loss, stopping = iterate(run, iteration, batches)
            progress.advance(f"loss {total_loss:.3f}")
            if stopping or state.iteration == max_iter or wants_checkpoint(run):
                run.save()
            if stopping and state.iteration < until:
                raise Stopped(run.group.stop)
            if due(state.iteration, cfg.TEST.EVAL_PERIOD) and state.iteration < max_iter:
                evaluate(iteration)


def iterate(run: Run, iteration: int, batches: Iterator[tuple[list[Sample], float]]) -> tuple[float, bool]:
    """One iteration and its record; returns the total loss and whether the run has to stop."""
    began = time.perf_counter()
    parts, data_seconds = zip(*(next(batches) for _ in range(run.accumulate)), strict=True)
    lr = set_learning_rate(run.state.optimizer, run.cfg, iteration)
    losses, stopping = step(run, iteration, lr, parts)
    seconds = time.perf_counter() - began
    run.state.advance(seconds)

    scalars = {**losses, "lr": lr, "time": seconds, "data_time": sum(data_seconds)}
    if medians := run.metrics.add(iteration, scalars):
        max_iter, eta = run.cfg.SOLVER.MAX_ITER, medians["eta_seconds"]
        run.run_dir.set_status("training", iteration=run.state.iteration, max_iter=max_iter, eta=eta)
        logger.info(as_line(iteration, max_iter, medians))
    return losses["total_loss"], stopping


def step(run: Run, iteration: int, lr: float, parts: tuple[list[Sample], ...]) -> tuple[dict[str, float], bool]:
    """One update of the weights, in all processes at once.

    Returns every loss and ``total_loss``, averaged over parts and processes, and whether one of them has to stop.
    Raises UserError in all of them when a loss is not finite.
    """
    state, group = run.state, run.group
    found = [backward(run, iteration, parts, number) for number in range(len(parts))]
    state.average_gradients(group)
    if run.cfg.SOLVER.CLIP_GRADIENTS.ENABLED:
        state.scaler.unscale_(state.optimizer)
        clip_gradients(run.cfg, state.model)
    state.scaler.step(state.optimizer)
    state.scaler.update()

    own = torch.stack([torch.stack(list(losses.values())) for losses in found]).mean(0)
    *means, stopping = group.mean(torch.cat([own, own.new_tensor([group.stop.requested])])).tolist()
    losses = dict(zip(found[0], means, strict=True))
    if not math.isfinite(losses["total_loss"]):
        moment = Moment(iteration, lr, run.cfg.SOLVER.WARMUP_ITERS, list(run.history))
        own_losses = dict(zip(losses, own.tolist(), strict=True))
        batch = [sample for part in parts for sample in part]
        raise report_divergence(run.run_dir, group, state.model, moment, own_losses, batch)
    run.history.append(losses)
    return losses, stopping > 0


def backward(run: Run, iteration: int, parts: tuple[list[Sample], ...], number: int) -> dict[str, Tensor]:
    """Add the gradients of one part; with the last one the processes average theirs. Returns the part's losses."""
    torch.manual_seed(seed_of(run.cfg.SEED, iteration, run.group.rank * len(parts) + number))
    with run.state.forward(synchronize=number == len(parts) - 1):
        losses = run.backend.losses(run.state.parallel, parts[number])
    losses["total_loss"] = sum(losses.values())
    if number == 0:
        run.state.optimizer.zero_grad()
    run.state.scaler.scale(losses["total_loss"] / len(parts)).backward()
    return {name: loss.detach() for name, loss in losses.items()}


def seed_of(seed: int, iteration: int, part: int = 0) -> int:
    """Seed of torch's generators (proposal and anchor sampling) for one part of an iteration's batch.

    A function of the three numbers alone; parts count through all processes, so 2 processes and 2 accumulated parts
    draw the same.
    """
    return int(np.random.SeedSequence([seed, iteration, part]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def wants_checkpoint(run: Run) -> bool:
    """Whether the completed iterations are a multiple of SOLVER.CHECKPOINT_PERIOD or were named by --keep-at."""
    completed = run.state.iteration
    return due(completed, run.cfg.SOLVER.CHECKPOINT_PERIOD) or completed in run.checkpoints.keep_at


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
