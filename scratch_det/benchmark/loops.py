"""Training loops timed in turns in one process: this one beside its bare work, or beside detectron2's plain script."""

import itertools
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode

from scratch_det import backends
from scratch_det.benchmark.measure import Cost, Rounds, now, since, take_turns, timed
from scratch_det.config.choices import RESIZE, SGD
from scratch_det.data.dataset import Sample, TrainingSet
from scratch_det.data.loading import training_batches
from scratch_det.distributed.group import Group
from scratch_det.distributed.launch import ALONE
from scratch_det.distributed.stop import StopFlag
from scratch_det.engine.checkpointer import Checkpointer
from scratch_det.engine.loop import Metrics, Trainer
from scratch_det.engine.plan import Plan, Request, make_plan
from scratch_det.engine.run_dir import RunDir
from scratch_det.engine.state import State, build_state
from scratch_det.engine.writers import Run, start_writers
from scratch_det.errors import UserError

BATCHES = 20  # loaded before steps on them are timed


def in_both_orders(time_half: Callable[[Rounds, bool], list[list[Cost]]], rounds: Rounds) -> list[list[Cost]]:
    """Time two halves of the rounds: ``time_half(rounds, first_is_set_up_first)``.

    Of two equal ways in one process the one that was set up first has been up to 3 % slower.
    """
    times, seconds = rounds.times, rounds.seconds / 2
    first = time_half(rounds._replace(times=times - times // 2, seconds=seconds), True)
    second = time_half(rounds._replace(times=times // 2, seconds=seconds), False)
    return [one + other for one, other in zip(first, second, strict=True)]


def plan_training(config_file: str, overrides: list[str], backend: str) -> Plan:
    """The plan of a training in one process, with a seed. Raises UserError as a run does.

    The recipe's run folder and test sets do not matter: nothing is written there, and nothing is evaluated.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = [*overrides, "DATASETS.TEST", "()", "OUTPUT_DIR", folder]
        plan = make_plan(Request(config_file, words, backend))
    plan.cfg.SEED = max(plan.cfg.SEED, 0)
    return plan


def loaded_batches(plan: Plan) -> list[list[Sample]]:
    """The first batches of a training."""
    return list(itertools.islice(training_batches(TrainingSet(plan.cfg, plan.training), plan.cfg, 0), BATCHES))


@contextmanager
def two_trainers(cfg: CfgNode, backend_name: str) -> Iterator[list[Trainer]]:
    """Two trainers with the same weights, drawn from SEED, in temporary run folders."""
    backend, group, trainers = backends.load(backend_name), Group(ALONE, cfg.MODEL.DEVICE, StopFlag()), []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in ("first", "second"):
                run_dir = RunDir(Path(folder) / name)
                run_dir.create()
                state = build_state(cfg, backend, group.device)
                metrics = Metrics(start_writers(Run(run_dir, cfg, 0)), cfg.SOLVER.MAX_ITER, window=[])
                checkpoints = Checkpointer(run_dir.checkpoints)
                trainers.append(Trainer(cfg, backend, group, state, run_dir, checkpoints, metrics))
            yield trainers
        finally:
            for trainer in trainers:
                trainer.metrics.close("finished")


def loop_against_bare(plan: Plan, rounds: Rounds) -> list[list[Cost]]:
    """Time iterations of the loop, records included, each beside the bare work on the same batch.

    Both go through the same batches, which are loaded before, with two models of the same weights.
    """
    batches = loaded_batches(plan)

    def time_half(rounds: Rounds, loop_first: bool) -> list[list[Cost]]:
        with two_trainers(plan.cfg, plan.backend) as built:
            trainer, other = built if loop_first else reversed(built)
            count, feed = itertools.count(), itertools.cycle(batches)
            bare = bare_steps(other.backend, other.state, batches)
            return take_turns([lambda: trainer.run_iteration(next(count), feed), bare], rounds)

    return in_both_orders(time_half, rounds)


def bare_steps(backend: Any, state: State, batches: list[list[Sample]]) -> Callable[[], None]:
    """The work that every training loop does, on the next one of ``batches`` in a circle."""
    feed = itertools.cycle(batches)

    def step() -> None:
        state.optimizer.zero_grad()
        with state.forward():
            losses = backend.losses(state.model, next(feed))
        state.scaler.scale(sum(losses.values())).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        wait_for_gpu()

    return step


def wait_for_gpu() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def loop_against_plain_script(plan: Plan, rounds: Rounds, script: Path | None) -> list[list[Cost]]:
    """Time iterations of both, data loading, records and console included, side by side, from random weights.

    script: detectron2's tools/plain_train_net.py, where it does not lie beside the package. Raises UserError when there
    is no script, or it has no such training.
    """
    cfg, dataset = plan.cfg, TrainingSet(plan.cfg, plan.training)
    cfg.SOLVER.MAX_ITER = cfg.SOLVER.CHECKPOINT_PERIOD = 10**9  # only iterations
    cfg.TEST.EVAL_PERIOD, cfg.MODEL.WEIGHTS = 0, ""
    if cfg.INPUT.get("AUGMENTATION", RESIZE) != RESIZE or cfg.SOLVER.get("OPTIMIZER", SGD) != SGD:
        raise UserError("detectron2's script has no INPUT.AUGMENTATION or SOLVER.OPTIMIZER: keep the defaults of both")
    backends.load(plan.backend)  # explains a detectron2 that does not work
    from scratch_det.benchmark.peers import find_script, train_plainly

    path = find_script(script)
    logging.getLogger("detectron2").setLevel(logging.WARNING)

    def time_half(rounds: Rounds, ours_first: bool) -> list[list[Cost]]:
        costs: list[list[Cost]] = [[], []]
        with two_trainers(cfg, plan.backend) as (trainer, _):
            cfg.OUTPUT_DIR = str(trainer.run_dir.path / "plain")
            Path(cfg.OUTPUT_DIR).mkdir()
            numbers, batches = itertools.count(), training_batches(dataset, cfg, 0)

            def ours() -> None:  # without checkpoints and evaluations
                trainer.run_iteration(next(numbers), batches)
                wait_for_gpu()

            def gate(their_batches: Iterable[Any]) -> Iterator[Any]:
                """Their loop asks for a batch when an iteration is over; before or after each of theirs comes ours."""
                source = iter(their_batches)
                for in_reverse, counts in rounds.turns():
                    own = None if in_reverse else timed(ours)
                    began = now()
                    yield next(source)
                    wait_for_gpu()
                    pair = since(began), own or timed(ours)
                    for cost, found in zip(reversed(pair), costs, strict=True):
                        found += [cost] * counts

            if ours_first:
                ours()
            train_plainly(cfg, path, map(dataset.image_id, itertools.count()), gate)
        return costs

    return in_both_orders(time_half, rounds)
