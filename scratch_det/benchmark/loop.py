"""Two ways to do the same work, timed pair by pair in one process, so that a slow moment of the machine hits both.

What the training loop costs beside the forward pass, the backward pass and the update.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from fvcore.common.config import CfgNode

from scratch_det import backends
from scratch_det.config import check_config, load_config
from scratch_det.data.catalog import lookup
from scratch_det.data.coco import read_coco
from scratch_det.data.dataset import Sample, TrainingSet, training_batches
from scratch_det.distributed.group import Group
from scratch_det.distributed.launch import ALONE
from scratch_det.distributed.stop import StopFlag
from scratch_det.engine.checkpointer import Checkpointer
from scratch_det.engine.datasets import settle_counts
from scratch_det.engine.loop import Run, iterate, timed
from scratch_det.engine.metrics import Metrics
from scratch_det.engine.run_dir import RunDir
from scratch_det.engine.state import build_state, pick_device
from scratch_det.errors import UserError

WARMUP = 3  # pairs


@dataclass(frozen=True)
class Pairs:
    """Seconds of both ways, pair by pair."""

    first: list[float]
    second: list[float]

    def overhead(self) -> float:
        """Median over the pairs of first / second - 1, in percent."""
        return 100 * (statistics.median(a / b for a, b in zip(self.first, self.second, strict=True)) - 1)

    def describe(self, first: str, second: str) -> str:
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
        order = (0, 1) if number % 2 else (1, 0)
        for which in order:
            began = time.perf_counter()
            (first, second)[which]()
            if number >= 0:
                times[which].append(time.perf_counter() - began)
    return Pairs(*times)


def in_both_orders(time_half: Callable[[int, bool], Pairs], pairs: int) -> Pairs:
    """``pairs`` in two halves: ``time_half(number, first_is_set_up_first)``.

    Of two equal ways in one process the one that was set up first has been up to 3 % slower.
    """
    one, other = time_half(pairs - pairs // 2, True), time_half(pairs // 2, False)
    return Pairs(one.first + other.first, one.second + other.second)


BATCHES = 20


def loop_against_bare(config_file: str, overrides: list[str], pairs: int, backend: str = backends.AUTO) -> Pairs:
    """Time ``pairs`` iterations of the loop, records included, each beside the bare work on the same batch.

    Both go through the same batches, which are loaded before, with two models of the same weights. Raises UserError for
    what a run would refuse.
    """
    backend = backends.choose(backend)
    cfg = load_recipe(config_file, overrides, pairs, backend)
    batches = list(itertools.islice(training_batches(training_set(cfg), cfg, 0), BATCHES))
    return in_both_orders(partial(_time, cfg, backend, batches), pairs)


def _time(cfg: CfgNode, backend: str, batches: list[list[Sample]], pairs: int, loop_first: bool) -> Pairs:
    """Time ``pairs``, the loop's model built first or second."""
    with tempfile.TemporaryDirectory() as folder:
        built = [new_run(cfg, Path(folder) / which, backend) for which in ("first", "second")]
        run, other = built if loop_first else reversed(built)
        count, feed = itertools.count(), timed(itertools.cycle(batches))
        bare_feed = itertools.cycle(batches)
        try:
            return time_pairs(lambda: iterate(run, next(count), feed), lambda: bare(other, next(bare_feed)), pairs)
        finally:
            run.metrics.close()
            other.metrics.close()


def load_recipe(config_file: str, overrides: list[str], pairs: int, backend: str) -> CfgNode:
    """The recipe, with a seed. Raises UserError for what a run would refuse, and for too few pairs."""
    if pairs < 2:
        raise UserError(f"--pairs is {pairs}, expected 2 or more: a median of fewer says nothing")
    cfg = load_config(config_file, overrides, backends.defaults(backend)).cfg
    check_config(cfg)
    backends.check_keys(backend, cfg)
    cfg.SEED = max(cfg.SEED, 0)
    return cfg


def training_set(cfg: CfgNode) -> TrainingSet:
    """The recipe's training images. Sets the numbers of classes and keypoints, as a run does."""
    data = [read_coco(lookup(name), cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON) for name in cfg.DATASETS.TRAIN]
    settle_counts(cfg, data[0])
    return TrainingSet(cfg, data)


def new_run(cfg: CfgNode, folder: Path, backend_name: str) -> Run:
    """A run in one process; the weights follow from SEED."""
    backend = backends.load(backend_name)
    device = pick_device(cfg.MODEL.DEVICE, ALONE)
    run_dir = RunDir(folder)
    run_dir.create()
    metrics = Metrics(run_dir, 0, cfg.SOLVER.MAX_ITER, window=[])
    group, state = Group(ALONE, device, StopFlag()), build_state(cfg, backend, device)
    return Run(cfg, backend, group, state, run_dir, Checkpointer(run_dir.checkpoints), metrics)


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
