"""The training loop, its metrics, and the report on a loss that is not finite."""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import nn

from scratch_det.backends import Backend
from scratch_det.data.dataset import Sample, SampleSet
from scratch_det.data.loading import training_batches
from scratch_det.distributed.group import Group
from scratch_det.distributed.stop import Stopped
from scratch_det.engine.checkpointer import Checkpointer
from scratch_det.engine.run_dir import RunDir
from scratch_det.engine.state import State, TrainingBackend, clip_gradients, set_learning_rate
from scratch_det.engine.writers import Writer
from scratch_det.errors import UserError
from scratch_det.log import Progress, clock, logger
from scratch_det.reading import read_series

PERIOD = 20  # iterations per line of metrics.json, as in detectron2
DIVERGENCE_REPORT = "nonfinite.json"
HISTORY = 50  # iterations of losses in the report
MOST_IMAGES = 8  # image ids in the message (the report lists all); images in a picture of the training
RISEN = 2.0  # total loss grown by this factor within HISTORY: the learning rate is probably too high
READ_LATE = ("cuda",)  # devices that compute while the host goes on
LOWER = "lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS, or set SOLVER.CLIP_GRADIENTS.ENABLED True"


class Metrics:
    """Collects scalars per iteration and writes the median of every 20 iterations (detectron2's line format).

    Args:
        writers: none on other ranks than 0.
        window: ``window`` of the checkpoint from which the run continues.
    """

    def __init__(self, writers: Sequence[Writer], max_iter: int, window: list[dict[str, float]]):
        self.writers, self.max_iter, self.window = writers, max_iter, window

    def add(self, iteration: int, scalars: dict[str, float]) -> dict[str, float] | None:
        """Add the scalars of one iteration; at the end of a window (and of training) write and return the medians."""
        self.window.append(scalars)
        if (iteration + 1) % PERIOD and iteration + 1 != self.max_iter:
            return None
        medians = {key: statistics.median(one[key] for one in self.window) for key in scalars}
        self.window.clear()
        medians["lr"] = scalars["lr"]
        if most := torch.cuda.max_memory_allocated():  # 0 where no GPU is used
            medians["max_mem"] = most / 2**20
        medians["eta_seconds"] = medians["time"] * (self.max_iter - iteration - 1)
        self.write(iteration, medians)
        return medians

    def write(self, iteration: int, scalars: dict[str, float]) -> None:
        """Write the scalars of one iteration."""
        for writer in self.writers:
            writer.scalars(iteration, scalars)

    def show(self, iteration: int, name: str, draw: Callable[[], Path]) -> None:
        """Draw a PNG and write it, on rank 0; where it cannot be drawn, the training goes on."""
        try:
            picture = draw().read_bytes() if self.writers else b""
        except Exception:
            return logger.exception(f"the picture {name} of iteration {iteration} could not be drawn")
        for writer in self.writers:
            writer.image(iteration, name, picture)

    def close(self, end: str) -> None:
        """Flush and close all writers; see ``Writer.close``."""
        for writer in self.writers:
            writer.close(end)


@dataclass
class Trainer:
    """One training run in one of its processes (ranks).

    accumulate: micro-batches per iteration in this process (gradient accumulation).
    score: what metrics.json calls the metric that model_best.pth is chosen by.
    unread: adds the metrics of the last iteration, see ``read_losses``; None once that is done.
    ended_early: why training ended before its last iteration; empty unless it did.
    """

    cfg: CfgNode
    backend: TrainingBackend
    group: Group
    state: State
    run_dir: RunDir
    checkpoints: Checkpointer
    metrics: Metrics
    accumulate: int = 1
    score: str = ""
    ended_early: str = ""
    unread: Callable[[], None] | None = None
    history: deque[dict[str, float]] = field(default_factory=lambda: deque(maxlen=HISTORY))

    def train(self, dataset: SampleSet, evaluate: Callable[[int], object], until: int) -> None:
        """Train from ``state.iteration`` until ``until`` iterations are completed, unless TEST.PATIENCE ends it before.

        until: MAX_ITER, or --stop-at.
        Calls ``evaluate(iteration)`` every TEST.EVAL_PERIOD iterations, except at MAX_ITER, and writes checkpoints.
        Raises Stopped, after a checkpoint, when one of the processes was asked to stop; UserError in all processes when
        a loss is not finite; DataError when an image cannot be read.
        """
        cfg, state = self.cfg, self.state
        group, max_iter, period = self.group, cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD
        batches = training_batches(dataset, cfg, state.iteration, group.world, self.accumulate, group.stop)
        with Progress("training", max_iter, state.iteration, say=None) as progress:
            for iteration in range(state.iteration, until):
                if self.has_stalled():  # also at the start of a run that was interrupted just then
                    self.ended_early = f"ended early: no higher {self.score} in {cfg.TEST.PATIENCE} evaluations"
                    logger.info(f"{self.ended_early} (TEST.PATIENCE), after {iteration} of {max_iter} iterations")
                    return self.save()
                if not self.run_iteration(iteration, batches):
                    if iteration:
                        self.save()
                    raise Stopped(group.stop)
                progress.advance(f"loss {self.history[-1]['total_loss']:.3f}" if self.history else "")
                completed = state.iteration
                if completed in {max_iter, *self.checkpoints.keep_at} or is_due(completed, period):
                    self.save()
                # After the checkpoint: a run that resumes from it repeats an evaluation that was interrupted.
                if is_due(completed, cfg.TEST.EVAL_PERIOD) and completed < max_iter:
                    self.read_losses()
                    with progress.paused("evaluating"):
                        evaluate(iteration)

    def has_stalled(self) -> bool:
        """Whether none of the last TEST.PATIENCE evaluations has a higher score than those before, by metrics.json.

        The same in all processes, and in a run that was resumed or is a branch: it has the lines of earlier iterations.
        """
        cfg = self.cfg
        if not (cfg.TEST.PATIENCE and is_due(self.state.iteration, cfg.TEST.EVAL_PERIOD)):
            return False
        series = read_series(self.run_dir.metrics, cfg.SOLVER.MAX_ITER) if self.group.is_main else {}
        scores = [score for _, score in series.get(self.score, ())]
        before, last = scores[: -cfg.TEST.PATIENCE], scores[-cfg.TEST.PATIENCE :]
        return self.group.any(bool(before) and max(last) <= max(before))

    def run_iteration(self, iteration: int, batches: Iterator[list[Sample]]) -> bool:
        """Run one iteration and add its metrics; returns False when the run was asked to stop before.

        A GPU computes while the host prepares the next iteration: there the losses are read one iteration late.
        """
        began = time.perf_counter()
        micro_batches = list(islice(batches, self.accumulate))  # fewer when it is asked to stop meanwhile
        # The processes agree before one of them begins: from then on it would wait for the others in a collective.
        if self.group.any(self.group.stop.requested):
            return False
        data_seconds = time.perf_counter() - began
        lr = set_learning_rate(self.state.optimizer, self.cfg, iteration)
        read = self.step(iteration, lr, micro_batches)
        self.read_losses()  # of the iteration before, on a GPU
        seconds = time.perf_counter() - began
        self.state.iteration += 1
        self.state.seconds += seconds
        if is_due(iteration, self.cfg.VIS_PERIOD):
            self.metrics.show(iteration, "training", partial(self.draw, micro_batches[0]))

        def add_metrics() -> None:
            scalars = {**read(), "lr": lr, "time": seconds, "data_time": data_seconds}
            if medians := self.metrics.add(iteration, scalars):
                max_iter, eta = self.cfg.SOLVER.MAX_ITER, medians["eta_seconds"]
                self.run_dir.set_status("training", iteration=iteration + 1, max_iter=max_iter, eta=eta)
                logger.info(log_line(iteration, max_iter, medians))

        self.unread = add_metrics
        if self.state.device.type not in READ_LATE:
            self.read_losses()
        return True

    def draw(self, batch: list[Sample]) -> Path:
        """Draw training.png: images as the model gets them, truth beside what it finds now. Takes no random number."""
        from scratch_det.engine.pictures import draw_training  # here: matplotlib takes 0.4 s

        batch = batch[:MOST_IMAGES]
        found = cast(Backend, self.backend).detect(self.state.model, batch)
        return draw_training(self.cfg, batch, found, self.state.iteration, self.run_dir.path / "training.png")

    def read_losses(self) -> None:
        """Add the metrics of the last iteration, unless that was done. Raises UserError when a loss is not finite."""
        unread, self.unread = self.unread, None
        if unread:
            unread()

    def step(self, iteration: int, lr: float, micro_batches: Sequence[list[Sample]]) -> Callable[[], dict[str, float]]:
        """One update of the weights, in all processes at once.

        Returns a function for every loss and ``total_loss``, averaged over micro-batches and processes. It raises
        UserError in all of them when a loss is not finite.
        """
        state, group, parts = self.state, self.group, len(micro_batches)
        state.optimizer.zero_grad()
        found = []
        for number, batch in enumerate(micro_batches):
            # Anchors and proposals are sampled with torch's generator. A seed for each micro-batch of each iteration
            # means that no random state has to be saved: a resumed run or a branch draws what the whole run draws.
            # Micro-batches are numbered across ranks, so 2 ranks x 1 and 1 rank x 2 get the same seeds.
            key = np.random.SeedSequence([self.cfg.SEED, iteration, group.rank * parts + number])
            torch.manual_seed(int(key.generate_state(1, np.uint64)[0] >> np.uint64(1)))
            with state.forward(synchronize=number == parts - 1):
                losses: dict[str, Any] = self.backend.losses(state.parallel, batch)
            losses["total_loss"] = sum(losses.values())
            state.scaler.scale(losses["total_loss"] / parts).backward()
            found.append({name: loss.detach() for name, loss in losses.items()})
        # Average before clipping, so that every rank clips the same gradient, and if one rank overflowed in float16,
        # all ranks skip this update. Clipping compares with a limit, so the loss scale has to be divided out before;
        # without clipping ``scaler.step`` does that. Without loss scaling it only calls optimizer.step().
        state.average_gradients(group)
        if self.cfg.SOLVER.CLIP_GRADIENTS.ENABLED:
            state.scaler.unscale_(state.optimizer)
            clip_gradients(self.cfg, state.model)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.average_weights()

        own = torch.stack([torch.stack(list(losses.values())) for losses in found]).mean(0)  # over micro-batches
        both = torch.stack([own, group.mean(own.clone())])  # over processes as well
        is_cuda = state.device.type == "cuda"  # of other devices nothing is waited for: their copy comes at once
        copy = both.to("cpu", non_blocking=is_cuda)
        done = torch.cuda.current_stream().record_event() if is_cuda else None

        def read() -> dict[str, float]:
            if done:
                done.synchronize()  # waits for the copy, not for what the GPU was told to do since then
            own_losses, losses = (dict(zip(found[0], values, strict=True)) for values in copy.tolist())
            if not math.isfinite(losses["total_loss"]):
                state.iteration = iteration  # completed ones
                raise self.divergence(iteration, lr, own_losses, [*chain(*micro_batches)])
            self.history.append(losses)
            return losses

        return read

    def checkpoint(self) -> dict[str, Any]:
        """The content of a checkpoint: the state, and the metrics that are not written yet."""
        return {**self.state.state_dict(), "window": self.metrics.window}

    def save(self) -> None:
        """Write a checkpoint of the completed iterations, by rank 0 only.

        Raises UserError, in all processes, when a weight is not finite: --resume would start from that checkpoint.
        """
        self.read_losses()
        completed, parameters = self.state.iteration, dict(self.state.model.named_parameters())
        sums = torch.stack([parameter.detach().sum() for parameter in parameters.values()])  # NaN and inf stay in a sum
        finite = sums.isfinite().tolist()
        if bad := [name for name, is_finite in zip(parameters, finite, strict=True) if not is_finite]:
            raise UserError(
                f"{len(bad)} weights are not finite after {completed} iterations, the first is {bad[0]}; "
                f"they are not saved\n  training diverged: {LOWER}; earlier checkpoints are kept"
            )
        if self.group.is_main:
            is_final = completed == self.cfg.SOLVER.MAX_ITER or bool(self.ended_early)
            self.checkpoints.save(self.checkpoint(), completed, is_final)

    def divergence(self, iteration: int, lr: float, own_losses: dict[str, float], batch: list[Sample]) -> UserError:
        """Write nonfinite.json and return the error that names the likely cause; called in all processes at once.

        ``own_losses`` and ``batch`` are the losses and samples of this process. Gradient norms are those of the newest
        gradients: where losses are read late, of the iteration after.
        """
        images = [{name: sample[name] for name in ("image_id", "position")} for sample in batch]
        own: dict[str, Any] = {"losses": json_numbers(own_losses), "images": images}
        processes = self.group.gather(own) or [own]
        totals = [process["losses"]["total_loss"] for process in processes]
        cause = likely_cause(totals, list(self.history), iteration, self.cfg.SOLVER.WARMUP_ITERS)
        report = {"iteration": iteration, "lr": lr, "likely_cause": cause, "processes": processes,
                  "gradient_norms": gradient_norms(self.state.model), "last_losses": list(self.history)}  # fmt: skip
        self.run_dir.write_json(DIVERGENCE_REPORT, report)
        ids = [str(image["image_id"]) for process in processes for image in process["images"]]
        message = (
            f"the loss is not finite at iteration {iteration} (learning rate {lr:g}): "
            f"{', '.join(f'{key} {value}' for key, value in own['losses'].items())}\n"
            f"  images: {', '.join(ids[:MOST_IMAGES])}{', ...' if len(ids) > MOST_IMAGES else ''}\n"
            f"  likely cause: {cause}\n  losses, gradient norms and images are in "
            f"{self.run_dir.path / DIVERGENCE_REPORT}; earlier checkpoints are kept"
        )
        return UserError(self.group.broadcast(message))  # only rank 0 has gathered the images of all ranks


def is_due(completed: int, period: int) -> bool:
    """Whether ``completed`` is a multiple of ``period``; always False for a period of 0."""
    return period > 0 and completed % period == 0


def likely_cause(totals: list[float | str], history: list[dict[str, float]], iteration: int, warmup_iters: int) -> str:
    """One sentence on a loss that is not finite.

    Args:
        totals: total loss of each process, as text if it is not finite.
        history: losses of the iterations before, averaged over processes.
    """
    before = [line["total_loss"] for line in history]
    bad = [str(rank) for rank, total in enumerate(totals) if isinstance(total, str)]
    if len(before) > 1 and before[-1] > RISEN * min(before):
        return f"training diverged, total_loss rose from {min(before):.3g} to {before[-1]:.3g} before: {LOWER}"
    if len(bad) < len(totals):
        return (
            f"only process {', '.join(bad)} of {len(totals)} has a loss that is not finite; "
            "check its images: boxes, masks, sizes"
        )
    if iteration < warmup_iters:
        return f"iteration {iteration} is within the warm-up of {warmup_iters}: {LOWER}"
    return f"the losses before did not rise; check the images; if they are correct, {LOWER}"


def gradient_norms(model: nn.Module) -> dict[str, float | str]:
    """Gradient norm of each part of the model, two levels deep ("backbone.body", "rpn.head")."""
    squares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            part = ".".join(name.split(".")[:2])
            squares[part] = squares.get(part, 0.0) + parameter.grad.float().square().sum().item()
    return json_numbers({part: math.sqrt(square) for part, square in squares.items()})


def json_numbers(values: dict[str, float]) -> dict[str, float | str]:
    """JSON supports neither NaN nor infinity: they become text."""
    return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}


def log_line(iteration: int, max_iter: int, medians: dict[str, float]) -> str:
    """The log line with the medians of one window."""
    losses = "  ".join(f"{key} {value:.4f}" for key, value in medians.items() if key.startswith("loss_"))
    return (
        f"iter {iteration + 1}/{max_iter}  eta {clock(medians['eta_seconds'])}  total_loss {medians['total_loss']:.4f}"
        f"  {losses}  lr {medians['lr']:.6f}  {medians['time']:.3f} s/iter  data {medians['data_time']:.3f} s"
        + (f"  max_mem: {medians['max_mem']:.0f}M" if "max_mem" in medians else "")
    )
