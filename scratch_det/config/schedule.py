"""Learning rates: the paper's kx schedules, the learning rate of an iteration, and a recipe at another batch size.

The kx lengths (section 4 of *Rethinking ImageNet Pre-training*) are iterations at a total batch of 16 images. Their
learning rate depends only on the iteration, never on the length of the run, so two runs that differ only in length are
the same run up to their first differing drop. A cosine has no such common beginning: every rate depends on its length.
"""

import math
from bisect import bisect_right
from itertools import pairwise
from pkgutil import resolve_name
from typing import Any, NamedTuple

from fvcore.common.config import CfgNode

from scratch_det.config.choices import COSINE, LR_SCHEDULES, MULTI_STEP
from scratch_det.config.load import COMMAND_LINE, LoadedConfig, flatten
from scratch_det.config.rules import check_schedule, reference_world_size
from scratch_det.errors import ConfigError, raise_problems
from scratch_det.tables import aligned

ITERATIONS_PER_X = 90_000  # "1x", about 12 epochs of train2017
TAILS = (6, 2)  # ninths of 1x after the drops: the last 60k and the last 20k iterations
MOST_EPOCHS = 1e6
ONE_X_STEPS = (6, 8)  # ninths of 1x before the drops, at 60k and 80k: 1x is older than the rule above


class Schedule(NamedTuple):
    """A run of ``max_iter`` iterations whose learning rate drops at each iteration of ``steps``."""

    max_iter: int
    steps: tuple[int, ...]


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


def length_schedule(length: int, in_proportion: bool = False) -> Schedule:
    """A run of ``length`` iterations that is no kx schedule, which the paper has for small data and PASCAL VOC.

    It does not say where their rates drop: above 2x for the last 60k and 20k iterations, as in a kx schedule, and in
    shorter runs, or ``in_proportion`` in all, after 2/3 and 8/9, the proportions of 1x.
    """
    if length > 2 * ITERATIONS_PER_X and not in_proportion:
        return Schedule(length, tuple(length - tail * ITERATIONS_PER_X // 9 for tail in TAILS))
    return Schedule(length, tuple(round(length * step / 9) for step in ONE_X_STEPS))


def shared_prefix(a: Schedule, b: Schedule) -> int:
    """How many first iterations ``a`` and ``b`` share: up to the earliest drop that only one of them has."""
    return min({a.max_iter, b.max_iter} | (set(a.steps) ^ set(b.steps)))


def learning_rate(cfg: CfgNode, iteration: int) -> float:
    """The rate of an iteration, counted from 0. ``cfg`` has passed ``check_config``: nothing is checked here."""
    return resolve_name(LR_SCHEDULES[cfg.SOLVER.LR_SCHEDULER_NAME].function)(cfg.SOLVER, iteration)


def multi_step(solver: CfgNode, iteration: int) -> float:
    """detectron2's WarmupMultiStepLR: the rate is multiplied by GAMMA from each iteration of STEPS on."""
    drops = bisect_right(solver.STEPS, iteration)
    return solver.BASE_LR * warmup(solver, iteration, solver.WARMUP_FACTOR) * solver.GAMMA**drops


def cosine(solver: CfgNode, iteration: int) -> float:
    """detectron2's WarmupCosineLR: half a cosine from BASE_LR at iteration 0 to BASE_LR_END at MAX_ITER.

    Warm-up takes the place of its first WARMUP_ITERS: from a part of BASE_LR up to where the cosine is then.
    """
    progress = warmup(solver, iteration, 0.0)
    angle = math.pi * (max(iteration, solver.WARMUP_ITERS) / solver.MAX_ITER)
    rate = solver.BASE_LR_END + (solver.BASE_LR - solver.BASE_LR_END) * (1 + math.cos(angle)) / 2
    return solver.BASE_LR * solver.WARMUP_FACTOR * (1 - progress) + rate * progress


def warmup(solver: CfgNode, iteration: int, first: float) -> float:
    """The factor on the learning rate: ``first`` at iteration 0, 1 from WARMUP_ITERS on."""
    if iteration >= solver.WARMUP_ITERS:
        return 1.0
    if solver.WARMUP_METHOD == "constant":
        return first
    progress = iteration / solver.WARMUP_ITERS
    return first * (1 - progress) + progress


def is_multi_step(cfg: CfgNode) -> bool:
    """Whether the rate is constant between warm-up and drops; else it may depend on MAX_ITER at every iteration."""
    return cfg.SOLVER.LR_SCHEDULER_NAME == MULTI_STEP


def learning_rate_line(cfg: CfgNode, num_images: int | None = None) -> str:
    """Warm-up, every drop or the curve, and the end: ``0.00667 -> 0.02 over 500 it, 0.002 from 210,000, ...``.

    num_images: of the training set, for the number of epochs. ``cfg`` has passed ``check_config``.
    """
    solver = cfg.SOLVER
    base, first = f"{solver.BASE_LR:.3g}", f"{learning_rate(cfg, 0):.3g}"
    if not solver.WARMUP_ITERS:
        parts = [base]
    elif solver.WARMUP_METHOD == "constant":
        parts = [f"{first} for {solver.WARMUP_ITERS:,} it, then {base}"]
    else:
        parts = [f"{first} -> {base} over {solver.WARMUP_ITERS:,} it"]
    if is_multi_step(cfg):
        parts += [f"{learning_rate(cfg, step):.3g} from {step:,}" for step in solver.STEPS]
    else:
        curve = "along a cosine" if solver.LR_SCHEDULER_NAME == COSINE else f"by {solver.LR_SCHEDULER_NAME}"
        parts.append(f"{curve} to {learning_rate(cfg, solver.MAX_ITER):.3g}")
    epochs = f" ({solver.MAX_ITER * solver.IMS_PER_BATCH / num_images:.1f} epochs)" if num_images else ""
    return f"learning rate {', '.join(parts)}, end {solver.MAX_ITER:,}{epochs}"


BATCH_KEYS = ("SOLVER.IMS_PER_BATCH", "SOLVER.BASE_LR", "SOLVER.BASE_LR_END", "SOLVER.MAX_ITER", "SOLVER.STEPS",
              "SOLVER.WARMUP_ITERS", "TEST.EVAL_PERIOD", "SOLVER.CHECKPOINT_PERIOD")  # fmt: skip


def settle_batch(
    recipe: LoadedConfig,
    num_processes: int = 1,
    scale_to: int | None = None,
    accumulate: int = 1,
    trial: int | None = None,
    epochs: float | None = None,
    images: int = 0,
) -> list[str]:
    """Rescale ``recipe.cfg`` in place as flags and SOLVER.REFERENCE_WORLD_SIZE ask; returns lines for the log.

    num_processes, scale_to, accumulate: ``--num-gpus`` x ``--num-machines``, ``--scale-to-batch`` and ``--accumulate``;
    accumulation changes no key. Overrides are rescaled too: ``scale_to`` keeps the number of images in all. trial: the
    iterations of ``--trial``, whatever the batch. epochs: of ``--epochs``, over the ``images`` that are trained on.
    Raises ConfigError, also when the batch was overridden and its learning rate was not. Call ``check_config`` after.
    """
    for flag, value in (("--scale-to-batch", scale_to), ("--accumulate", accumulate)):
        if value is not None and value < 1:
            raise ConfigError(f"{COMMAND_LINE}: {flag} is {value}, expected 1 or more")
    cfg, before, written = recipe.cfg, recipe.cfg.SOLVER.IMS_PER_BATCH, recipe.file_cfg.SOLVER.IMS_PER_BATCH
    if before != written and "SOLVER.BASE_LR" not in recipe.overridden and min(before, written) >= 1:
        rate = cfg.SOLVER.BASE_LR
        raise ConfigError(
            f"{COMMAND_LINE}: SOLVER.IMS_PER_BATCH is {before}, the recipe's {written}, but SOLVER.BASE_LR is still "
            f"{rate:g}, expected {rate * before / written:g} for {before} images; give --scale-to-batch {before} "
            f"instead, which scales the schedule too, or name the rate as well: SOLVER.BASE_LR {rate} keeps it"
        )
    honour_reference_world_size(cfg, num_processes)
    if scale_to is not None:
        reference, batch = cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.IMS_PER_BATCH
        if reference and batch != scale_to:
            raise ConfigError(
                f"{COMMAND_LINE}: --scale-to-batch is {scale_to}, but SOLVER.REFERENCE_WORLD_SIZE makes the batch "
                f"{batch} in {num_processes} process{'es' if num_processes > 1 else ''}; "
                "leave out one of the two: the flag, or set SOLVER.REFERENCE_WORLD_SIZE 0"
            )
        scale_to_batch(cfg, scale_to)
    counted = [] if epochs is None else [set_epochs(recipe, epochs, images)]
    if trial is not None:
        shorten(cfg, trial)
    return counted + _batch_lines(recipe, before, num_processes, accumulate)


def honour_reference_world_size(cfg: CfgNode, num_processes: int) -> None:
    """Keep the images per process of REFERENCE_WORLD_SIZE processes, as detectron2 does; 0 keeps the batch instead.

    Raises ConfigError when these processes cannot share the batch evenly.
    """
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference in (0, num_processes):
        return
    raise_problems(reference_world_size(cfg))
    scale_to_batch(cfg, cfg.SOLVER.IMS_PER_BATCH // reference * num_processes)
    cfg.SOLVER.REFERENCE_WORLD_SIZE = num_processes


def scale_to_batch(cfg: CfgNode, batch: int) -> None:
    """Change ``cfg`` to ``batch`` images per iteration, with as many images in all and between two drops as before.

    The learning rate grows with the batch (the linear rule of Goyal et al. 2017, *Accurate, Large Minibatch SGD*);
    numbers of iterations shrink with it, warm-up included, rounded as in detectron2's auto_scale_workers.
    But a period never becomes 0, which would turn it off.
    Raises ConfigError for an invalid schedule, and when two drops, or a drop and the end of the run, are the same
    iteration after rounding.
    """
    check_schedule(cfg)
    solver, ratio = cfg.SOLVER, batch / cfg.SOLVER.IMS_PER_BATCH
    max_iter, steps = round(solver.MAX_ITER / ratio), tuple(round(step / ratio) for step in solver.STEPS)
    if any(later <= earlier for earlier, later in pairwise((0, *steps, max_iter))):
        raise ConfigError(
            f"SOLVER.STEPS {solver.STEPS} of SOLVER.MAX_ITER {solver.MAX_ITER} at {solver.IMS_PER_BATCH} images cannot "
            f"be scaled to {batch}: rounded they are {steps} of {max_iter} iterations, which do not increase from 0; "
            "choose a smaller batch, or fewer SOLVER.STEPS"
        )
    solver.IMS_PER_BATCH, solver.MAX_ITER, solver.STEPS = batch, max_iter, steps
    solver.BASE_LR, solver.BASE_LR_END = solver.BASE_LR * ratio, solver.BASE_LR_END * ratio
    solver.WARMUP_ITERS = round(solver.WARMUP_ITERS / ratio)
    for section, period in ((cfg.TEST, "EVAL_PERIOD"), (solver, "CHECKPOINT_PERIOD")):
        if section[period] > 0:
            section[period] = max(1, round(section[period] / ratio))


def set_length(cfg: CfgNode, iterations: int) -> None:
    """Change ``cfg`` to so many iterations: in a longer run drops stay as far from the end, in a shorter in proportion.

    The first is the paper's rule for its schedules, see ``kx_schedule``. Warm-up takes half of the run at most.
    """
    solver, before = cfg.SOLVER, max(cfg.SOLVER.MAX_ITER, 1)
    added, ratio = iterations - before, min(iterations / before, 1)
    steps = {step + added if added > 0 else round(step * ratio) for step in solver.STEPS} - {0, iterations}
    solver.MAX_ITER, solver.STEPS = iterations, tuple(sorted(steps))
    solver.WARMUP_ITERS = min(solver.WARMUP_ITERS, iterations // 2)


def set_epochs(recipe: LoadedConfig, epochs: float, images: int) -> str:
    """Change ``recipe.cfg`` to a run of ``epochs`` passes over ``images``, see ``set_length``; returns a line on it.

    Raises ConfigError for an invalid schedule, and when the command line sets its length as well.
    """
    if named := [key for key in ("SOLVER.MAX_ITER", "SOLVER.STEPS") if key in recipe.overridden]:
        raise ConfigError(f"{COMMAND_LINE}: --epochs sets {' and '.join(named)}, too; leave out the flag or the keys")
    if not 0 < epochs < MOST_EPOCHS:
        raise ConfigError(f"{COMMAND_LINE}: --epochs is {epochs:g}, expected a number above 0, such as 12")
    check_schedule(recipe.cfg)
    batch = recipe.cfg.SOLVER.IMS_PER_BATCH
    set_length(recipe.cfg, iterations := math.ceil(epochs * images / batch))
    return f"--epochs {epochs:g} of {images:,} training images at {batch} each: {iterations:,} iterations"


def shorten(cfg: CfgNode, iterations: int) -> None:
    """Change ``cfg`` to a trial of so many iterations, see ``set_length``, with one evaluation, at the end.

    Raises ConfigError for less than one iteration, and for more than the run has.
    """
    if iterations < 1:
        raise ConfigError(f"{COMMAND_LINE}: --trial is {iterations}, expected 1 or more iterations")
    if iterations > cfg.SOLVER.MAX_ITER:
        fix = "a trial is no longer than the run; --epochs N or SOLVER.MAX_ITER N trains longer"
        raise ConfigError(
            f"{COMMAND_LINE}: --trial is {iterations}, above SOLVER.MAX_ITER {cfg.SOLVER.MAX_ITER}: {fix}"
        )
    set_length(cfg, iterations)
    cfg.TEST.EVAL_PERIOD, cfg.TEST.PATIENCE, cfg.SOLVER.CHECKPOINT_PERIOD = 0, 0, iterations


def _batch_lines(recipe: LoadedConfig, before: int, num_processes: int, accumulate: int) -> list[str]:
    """Lines for the log: keys of this run beside those of the recipe's files, or one line when none differs.

    before: the batch that ``recipe.cfg`` had before it was rescaled, in images.
    """
    files, run = flatten(recipe.file_cfg), flatten(recipe.cfg)
    batch, reference = run["SOLVER.IMS_PER_BATCH"], files["SOLVER.REFERENCE_WORLD_SIZE"]
    shares = f"{num_processes} x {accumulate} x {batch // (num_processes * accumulate)}"
    if not (differing := [key for key in BATCH_KEYS if files[key] != run[key]]):
        return [
            f"batch {batch} (processes x accumulate x images: {shares}), learning rate {run['SOLVER.BASE_LR']:g}, "
            f"{run['SOLVER.MAX_ITER']:,} iterations, as in the recipe"
        ]
    in_files = f"{reference} x 1 x {files['SOLVER.IMS_PER_BATCH'] // reference}" if reference > 0 else "-"
    images = (_text(keys["SOLVER.MAX_ITER"] * keys["SOLVER.IMS_PER_BATCH"]) for keys in (files, run))
    rows: list[tuple[str, ...]] = [("", "recipe", "this run")]
    rows += [(key, _text(files[key]), _text(run[key])) for key in differing]
    rows += [("processes x accumulate x images", in_files, shares), ("images in all", *images)]
    lines = aligned(rows)
    if before != batch:
        ratio = batch / before
        named = [key for key in BATCH_KEYS if key in recipe.overridden]
        lines.append(
            f"rescaled from {before} to {batch} images: learning rate x {ratio:g}, iterations x {1 / ratio:g}"
            + (f", the command line's {', '.join(named)} included" if named else "")
        )
    return lines


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_text, value)) or "-"
    return f"{value:g}" if isinstance(value, float) else f"{value:,}"
