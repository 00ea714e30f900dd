"""Two ways to do the same work, timed pair by pair in one process, so that a slow moment of the machine hits both.

Here: what the training loop costs beside the bare forward pass, backward pass and update. ``peers`` has another pair.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from fvcore.common.config import CfgNode

from scratch_det import backends
from scratch_det.data.dataset import Sample, TrainingSet, training_batches
from scratch_det.distributed.group import Group
from scratch_det.distributed.launch import ALONE
from scratch_det.distributed.stop import StopFlag
from scratch_det.engine.checkpointer import Checkpointer
from scratch_det.engine.loop import Run, iterate, timed
from scratch_det.engine.metrics import Metrics
from scratch_det.engine.plan import Plan, Request, make_plan
from scratch_det.engine.run_dir import RunDir
from scratch_det.engine.state import build_state, pick_device
from scratch_det.errors import UserError

WARMUP = 3  # pairs
BATCHES = 20


@dataclass(frozen=True)
class Pairs:
    """Seconds of both ways, pair by pair."""

    first: list[float]
    second: list[float]

    def overhead(self) -> float:
        """Median over the pairs of first / second - 1, in percent."""
        return 100 * (statistics.median(a / b for a, b in zip(self.first, self.second, strict=True)) - 1)

    def as_text(self, first: str, second: str) -> str:
        """Both medians with their quartiles, and the overhead."""
        lines = [f"{len(self.first)} pairs, median (quartiles) in ms"]
        for name, seconds in ((first, self.first), (second, self.second)):
            low, middle, high = (1000 * quartile for quartile in statistics.quantiles(seconds, n=4))
            lines.append(f"  {name:<40} {middle:8.2f} ({low:.2f} - {high:.2f})")
        lines.append(f"  {'overhead, median over the pairs':<40} {self.overhead():+8.2f} %")
        return "\n".join(lines)


def time_pairs(first: Callable[[], object], second: Callable[[], object], pairs: int) -> Pairs:
    """Call both ``pairs`` times, taking turns in who begins; WARMUP pairs before do not count."""
    times: tuple[list[float], list[float]] = [], []
    for number in range(-WARMUP, pairs):
        for which in (0, 1) if number % 2 else (1, 0):
            began = time.perf_counter()
            (first, second)[which]()
            if number >= 0:
                times[which].append(time.perf_counter() - began)
    return Pairs(*times)


def in_both_orders(time_half: Callable[[int, bool], Pairs], pairs: int) -> Pairs:
    """Time ``pairs`` in two halves: ``time_half(number, first_is_set_up_first)``.

    Of two equal ways in one process the one that was set up first has been up to 3 % slower.
    """
    one, other = time_half(pairs - pairs // 2, True), time_half(pairs // 2, False)
    return Pairs(one.first + other.first, one.second + other.second)


def plan_training(config_file: str, overrides: list[str], pairs: int, backend: str) -> Plan:
    """The plan of a training on one process, with a seed. Raises UserError for errors as a run does, and for few pairs.

    The recipe's folder and test sets do not matter: nothing is written there, and nothing is evaluated.
    """
    if pairs < 2:
        raise UserError(f"--pairs is {pairs}, expected 2 or more: a median of fewer says nothing")
    with tempfile.TemporaryDirectory() as folder:
        words = [*overrides, "DATASETS.TEST", "()", "OUTPUT_DIR", folder]
        plan = make_plan(Request(config_file, words, backend))
    plan.cfg.SEED = max(plan.cfg.SEED, 0)
    return plan


@contextmanager
def two_runs(cfg: CfgNode, backend_name: str) -> Iterator[list[Run]]:
    """Two runs of the same weights, which follow from SEED, in one process and in folders that are removed again."""
    backend, device, runs = backends.load(backend_name), pick_device(cfg.MODEL.DEVICE, ALONE), []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in ("first", "second"):
                run_dir = RunDir(Path(folder) / name)
                run_dir.create()
                group, state = Group(ALONE, device, StopFlag()), build_state(cfg, backend, device)
                metrics = Metrics(run_dir, 0, cfg.SOLVER.MAX_ITER, window=[])
                runs.append(Run(cfg, backend, group, state, run_dir, Checkpointer(run_dir.checkpoints), metrics))
            yield runs
        finally:
            for run in runs:
                run.metrics.close()


def loop_against_bare(config_file: str, overrides: list[str], pairs: int, backend: str = backends.AUTO) -> Pairs:
    """Time ``pairs`` iterations of the loop, records included, each beside the bare work on the same batch.

    Both go through the same batches, which are loaded before, with two models of the same weights. Raises UserError for
    errors as a run does.
    """
    plan = plan_training(config_file, overrides, pairs, backend)
    batches = list(itertools.islice(training_batches(TrainingSet(plan.cfg, plan.training), plan.cfg, 0), BATCHES))

    def time_half(pairs: int, loop_first: bool) -> Pairs:
        with two_runs(plan.cfg, plan.backend) as built:
            run, other = built if loop_first else reversed(built)
            count, feed, bare_feed = itertools.count(), timed(itertools.cycle(batches)), itertools.cycle(batches)
            return time_pairs(lambda: iterate(run, next(count), feed), lambda: bare(other, next(bare_feed)), pairs)

    return in_both_orders(time_half, pairs)


def bare(run: Run, batch: list[Sample]) -> None:
    """What no loop can do without."""
    state = run.state
    state.optimizer.zero_grad()
    with state.forward():
        losses = run.backend.losses(state.model, batch)
    state.scaler.scale(sum(losses.values())).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    if state.device.type == "cuda":
        torch.cuda.synchronize()
