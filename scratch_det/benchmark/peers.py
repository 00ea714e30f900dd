"""This repository's loop beside detectron2's own plain training script: same model, weights and images."""

import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from scratch_det import backends
from scratch_det.benchmark.loop import Pairs, in_both_orders, plan_training, time_pairs, two_runs
from scratch_det.config.choices import OPTIMIZERS, RESIZE, SGD, augmentation_name, optimizer_of
from scratch_det.data.dataset import TrainingSet, training_batches
from scratch_det.engine.loop import Run, iterate, timed
from scratch_det.errors import UserError

Gate = Callable[[Iterable[Any]], Iterator[Any]]


class Stepwise:
    """A training loop in a thread of its own that does one iteration a ``step``: up to its next wish for data.

    Loading counts as part of the iteration that it is for.
    """

    def __init__(self, loop: Callable[[Gate], object]):
        self.may_go, self.has_come = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None
        threading.Thread(target=self._run, args=(loop,), daemon=True).start()
        self._wait()

    def step(self) -> None:
        """One iteration; raises what the loop raised."""
        self.may_go.release()
        self._wait()

    def _wait(self) -> None:
        self.has_come.acquire()
        if self.error:
            raise self.error

    def _gate(self, batches: Iterable[Any]) -> Iterator[Any]:
        source = iter(batches)
        while True:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.has_come.release()
            self.may_go.acquire()
            yield next(source)

    def _run(self, loop: Callable[[Gate], object]) -> None:
        try:
            loop(self._gate)
            self.error = RuntimeError("the loop has ended")
        except BaseException as error:
            self.error = error
        self.has_come.release()


def loop_against_plain_script(config_file: str, overrides: list[str], pairs: int, script: Path | None) -> Pairs:
    """Time ``pairs`` iterations of both, data loading, records and console included, side by side, from random weights.

    script: detectron2's tools/plain_train_net.py, where it does not lie beside the package. Raises UserError for errors
    as a run does, or when there is no detectron2 or no script.
    """
    plan = plan_training(config_file, overrides, pairs, "detectron2")
    cfg, dataset = plan.cfg, TrainingSet(plan.cfg, plan.training)
    cfg.SOLVER.MAX_ITER = cfg.SOLVER.CHECKPOINT_PERIOD = 10**9  # iterations alone
    cfg.TEST.EVAL_PERIOD, cfg.MODEL.WEIGHTS = 0, ""
    if augmentation_name(cfg) != RESIZE or optimizer_of(cfg) != OPTIMIZERS[SGD]:
        raise UserError(
            "detectron2's script has no INPUT.AUGMENTATION or SOLVER.OPTIMIZER: leave both at their defaults"
        )
    backends.load(plan.backend)  # explains a detectron2 that does not work
    from scratch_det.backends.detectron2 import plain_script as plain

    path = plain.find_script(script)
    logging.getLogger("detectron2").setLevel(logging.WARNING)

    def time_half(pairs: int, ours_first: bool) -> Pairs:
        with two_runs(cfg, plan.backend) as (run, other):
            cfg.OUTPUT_DIR = str(other.run_dir.path / "plain")
            Path(cfg.OUTPUT_DIR).mkdir()
            ids = (dataset.image_id(position) for position in itertools.count())
            loops: list[Callable[[Gate], object]] = [
                lambda gate: train(run, dataset, gate),
                lambda gate: plain.train_plainly(cfg, other.state.model, path, ids, gate),
            ]
            begun = [Stepwise(loop) for loop in (loops if ours_first else reversed(loops))]
            ours, theirs = begun if ours_first else reversed(begun)
            return time_pairs(ours.step, theirs.step, pairs)

    return in_both_orders(time_half, pairs)


def train(run: Run, dataset: TrainingSet, gate: Gate) -> None:
    """The iterations of a run, without checkpoints and evaluations."""
    batches = timed(gate(training_batches(dataset, run.cfg, 0)))
    for iteration in range(run.cfg.SOLVER.MAX_ITER):
        iterate(run, iteration, batches)
