"""The paper's learning-rate schedules as plain arithmetic (section 4 of *Rethinking ImageNet Pre-training*).

The kx lengths are iterations at a total batch of 16 images; ``rescale`` counts them in another batch. Their learning
rate is a function of the iteration alone, never of the length of the run, so two runs that differ only in length are
the same run up to their first differing drop. A cosine has no such beginning to share: its length shapes every rate.

The learning rate under a recipe: of one iteration, and of the whole run in one line.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fvcore.common.config import CfgNode

ITERATIONS_PER_X = 90_000  # "1x", about 12 epochs of train2017
TAILS = (6, 2)  # ninths of 1x after the drops: the last 60k and the last 20k iterations
ONE_X_STEPS = (6, 8)  # ninths, again 60k and 80k, but from the start: 1x predates the rule above


@dataclass(frozen=True)
class Schedule:
    """A run of ``max_iter`` iterations whose learning rate drops at each iteration of ``steps``."""

    max_iter: int
    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_steps(self.steps)
        if self.max_iter < 1 or any(step >= self.max_iter for step in self.steps):
            raise ValueError(f"steps {self.steps} must lie inside a run of {self.max_iter} >= 1 iterations")


@dataclass(frozen=True)
class BatchSettings:
    """What depends on the batch: images in an iteration over all processes, and lengths in such iterations.

    A period of 0 means never.
    """

    batch: int
    base_lr: float
    max_iter: int
    steps: tuple[int, ...]
    warmup_iters: int
    eval_period: int
    checkpoint_period: int
    base_lr_end: float = 0.0


def rescale(settings: BatchSettings, batch: int) -> BatchSettings:
    """The same training with ``batch`` images in an iteration: as many images are seen, in all and between two drops.

    The learning rate grows with the batch (the linear rule of Goyal et al. 2017, *Accurate, Large Minibatch SGD*);
    counts of iterations shrink with it, warm-up included, rounded as in detectron2's DefaultTrainer.auto_scale_workers.
    But a period never becomes 0, which would turn it off. Raises ValueError when rounding lets two drops, or a drop
    and an end of the run, fall together.
    """
    if settings.batch < 1 or batch < 1:
        raise ValueError(f"a batch must have 1 or more images, not {min(settings.batch, batch)}")
    ratio = batch / settings.batch
    run = Schedule(round(settings.max_iter / ratio), tuple(round(step / ratio) for step in settings.steps))
    return replace(
        settings,
        batch=batch,
        base_lr=settings.base_lr * ratio,
        base_lr_end=settings.base_lr_end * ratio,
        max_iter=run.max_iter,
        steps=run.steps,
        warmup_iters=round(settings.warmup_iters / ratio),
        eval_period=_rescale_period(settings.eval_period, ratio),
        checkpoint_period=_rescale_period(settings.checkpoint_period, ratio),
    )


def _rescale_period(period: int, ratio: float) -> int:
    return max(1, round(period / ratio)) if period > 0 else period


def kx_schedule(k: int, per_x: int = ITERATIONS_PER_X) -> Schedule:
    """The paper's ``k``x schedule: ``k * per_x`` iterations, of which the last 2/3 and 2/9 of 1x have lower rates.

    With the paper's 90k iterations in 1x it drops for the last 60k and again for the last 20k.
    """
    if k < 1 or per_x < 9 or per_x % 9:
        raise ValueError(f"a kx schedule needs k >= 1 and a multiple of 9 iterations in 1x, not {k} and {per_x}")
    unit, max_iter = per_x // 9, k * per_x
    if k == 1:
        return Schedule(max_iter, tuple(unit * step for step in ONE_X_STEPS))
    return Schedule(max_iter, tuple(max_iter - unit * tail for tail in TAILS))


def lr_at(
    iteration: int,
    *,
    base_lr: float,
    steps: Sequence[int],
    gamma: float,
    warmup_iters: int,
    warmup_factor: float,
    warmup_method: str = "linear",
) -> float:
    """The learning rate of iteration ``iteration`` (from 0), with the meaning of detectron2's WarmupMultiStepLR."""
    if iteration < 0 or base_lr <= 0 or gamma <= 0:
        raise ValueError(f"iteration {iteration} must be >= 0, base_lr {base_lr} and gamma {gamma} above 0")
    _check_steps(steps)
    drops = bisect_right(steps, iteration)  # a step counts from its own iteration on
    return base_lr * warmup_at(iteration, warmup_iters, warmup_factor, warmup_method) * gamma**drops


def cosine_lr_at(
    iteration: int,
    *,
    base_lr: float,
    base_lr_end: float,
    max_iter: int,
    warmup_iters: int,
    warmup_factor: float,
    warmup_method: str = "linear",
) -> float:
    """The learning rate of iteration ``iteration`` (from 0), with the meaning of detectron2's WarmupCosineLR.

    Half a cosine from ``base_lr`` at iteration 0 to ``base_lr_end`` at ``max_iter``. Warm-up takes the place of its
    first ``warmup_iters``: from a part of ``base_lr`` up to where the cosine is then.
    """
    if iteration < 0 or not 0 <= base_lr_end <= base_lr:
        raise ValueError(f"iteration {iteration} must be >= 0, base_lr_end {base_lr_end} from 0 to base_lr {base_lr}")
    at_end = warmup_at(iteration, warmup_iters, 0.0, warmup_method)  # how far warm-up is
    where = max(iteration, warmup_iters) / max_iter
    cosine = base_lr_end + (base_lr - base_lr_end) * (1 + math.cos(math.pi * where)) / 2
    return base_lr * warmup_factor * (1 - at_end) + cosine * at_end


def warmup_at(iteration: int, warmup_iters: int, warmup_factor: float, method: str = "linear") -> float:
    """The factor on the learning rate: ``warmup_factor`` at iteration 0, 1 from ``warmup_iters`` on."""
    if method not in ("linear", "constant"):
        raise ValueError(f"warm-up method must be 'linear' or 'constant', not {method!r}")
    if warmup_iters < 0 or not 0 <= warmup_factor <= 1:
        raise ValueError(f"warm-up needs iterations >= 0 and a factor in [0, 1], not {warmup_iters}, {warmup_factor}")
    if iteration >= warmup_iters:
        return 1.0
    if method == "constant":
        return warmup_factor
    progress = iteration / warmup_iters
    return warmup_factor * (1 - progress) + progress


def shared_prefix(a: Schedule, b: Schedule) -> int:
    """How many first iterations ``a`` and ``b`` have in common: up to the earliest drop that only one of them has."""
    differing_drops = set(a.steps) ^ set(b.steps)
    return min({a.max_iter, b.max_iter} | differing_drops)


def _check_steps(steps: Sequence[int]) -> None:
    """Drops are positive and strictly increasing."""
    if any(later <= earlier for earlier, later in zip((0, *steps), steps, strict=False)):
        raise ValueError(f"steps must be positive and strictly increasing, not {tuple(steps)}")


COSINE = "WarmupCosineLR"  # detectron2's name


def learning_rate(cfg: CfgNode, iteration: int) -> float:
    """SOLVER.*'s rate of an iteration, counted from 0."""
    solver = cfg.SOLVER
    warmup = {name: solver[name.upper()] for name in ("warmup_iters", "warmup_factor", "warmup_method")}
    if is_cosine(cfg):
        end, max_iter = solver.BASE_LR_END, solver.MAX_ITER
        return cosine_lr_at(iteration, base_lr=solver.BASE_LR, base_lr_end=end, max_iter=max_iter, **warmup)
    return lr_at(iteration, base_lr=solver.BASE_LR, steps=solver.STEPS, gamma=solver.GAMMA, **warmup)


def is_cosine(cfg: CfgNode) -> bool:
    """Whether the rate falls along a cosine, and so depends on SOLVER.MAX_ITER at every iteration."""
    return cfg.SOLVER.LR_SCHEDULER_NAME == COSINE


def learning_rate_line(cfg: CfgNode, num_images: int | None = None) -> str:
    """Warm-up, every drop or the cosine, and the end: ``0.00667 -> 0.02 over 500 it, 0.002 from 210,000, ...``.

    num_images: of the training set, for the number of epochs. ``cfg`` has passed ``check_config``.
    """
    solver = cfg.SOLVER
    parts = [_beginning(cfg)]
    if is_cosine(cfg):
        parts.append(f"along a cosine to {_rate(solver.BASE_LR_END)}")
    for drops, step in enumerate(solver.STEPS, start=1):
        parts.append(f"{_rate(solver.BASE_LR * solver.GAMMA**drops)} from {step:,}")
    epochs = f" ({solver.MAX_ITER * solver.IMS_PER_BATCH / num_images:.1f} epochs)" if num_images else ""
    return f"learning rate {', '.join(parts)}, end {solver.MAX_ITER:,}{epochs}"


def _beginning(cfg: CfgNode) -> str:
    solver = cfg.SOLVER
    base = _rate(solver.BASE_LR)
    first = _rate(solver.BASE_LR * warmup_at(0, solver.WARMUP_ITERS, solver.WARMUP_FACTOR, solver.WARMUP_METHOD))
    if not solver.WARMUP_ITERS:
        return base
    if solver.WARMUP_METHOD == "constant":
        return f"{first} for {solver.WARMUP_ITERS:,} it, then {base}"
    return f"{first} -> {base} over {solver.WARMUP_ITERS:,} it"


def _rate(value: float) -> str:
    return f"{value:.3g}"
