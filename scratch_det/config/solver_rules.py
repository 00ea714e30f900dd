"""Rules on the schedule and the batch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from fvcore.common.config import CfgNode

from scratch_det.config.choice import Choice, known_choice
from scratch_det.config.curve import COSINE, is_cosine


@dataclass(frozen=True, kw_only=True)
class Optimizer(Choice):
    """``function`` is called with the recipe and the model; ``moments`` numbers are kept a weight."""

    moments: int


SGD = "SGD"  # the only one in detectron2, which has no key for it
OPTIMIZERS = {SGD: Optimizer("scratch_det.train.optimizer:build_sgd", moments=1)}  # by a project's SOLVER.OPTIMIZER


def optimizer_of(cfg: CfgNode) -> Optimizer:
    """What a recipe that passed ``known_optimizer`` trains with."""
    return OPTIMIZERS[cfg.SOLVER.get("OPTIMIZER", SGD)]


def known_optimizer(cfg: CfgNode) -> Iterator[str]:
    """See ``known_choice``."""
    yield from known_choice(cfg, "SOLVER.OPTIMIZER", cfg.SOLVER.get("OPTIMIZER", SGD), OPTIMIZERS)


def positive_numbers(cfg: CfgNode) -> Iterator[str]:
    solver = cfg.SOLVER
    for name in ("MAX_ITER", "IMS_PER_BATCH", "CHECKPOINT_PERIOD"):
        if solver[name] < 1:
            yield f"SOLVER.{name} is {solver[name]}, expected 1 or more"
    if not 0 < solver.BASE_LR < math.inf:
        yield f"SOLVER.BASE_LR is {solver.BASE_LR}, expected above 0; the paper's is 0.02 at batch 16"
    for name in ("MOMENTUM", "WEIGHT_DECAY"):
        if not 0 <= solver[name] < 1:
            yield f"SOLVER.{name} is {solver[name]}, expected 0 or more and below 1"
    if solver.NESTEROV and not solver.MOMENTUM:
        yield "SOLVER.NESTEROV is True with SOLVER.MOMENTUM 0; set SOLVER.MOMENTUM 0.9 or SOLVER.NESTEROV False"
    if not 0 < solver.GAMMA <= 1:
        yield f"SOLVER.GAMMA is {solver.GAMMA}, expected above 0 and at most 1; the paper's is 0.1"


def cosine_ends(cfg: CfgNode) -> Iterator[str]:
    end, base = cfg.SOLVER.BASE_LR_END, cfg.SOLVER.BASE_LR
    if end and not is_cosine(cfg):
        yield f"SOLVER.BASE_LR_END is {end}, which only SOLVER.LR_SCHEDULER_NAME {COSINE} reads; set it to 0"
    elif base > 0 and not 0 <= end <= base:
        yield f"SOLVER.BASE_LR_END is {end}, expected from 0 to SOLVER.BASE_LR {base}"


def drops_happen(cfg: CfgNode) -> Iterator[str]:
    steps, max_iter = tuple(cfg.SOLVER.STEPS), cfg.SOLVER.MAX_ITER
    if is_cosine(cfg):
        if steps:
            yield f'SOLVER.STEPS is {steps}, but {COSINE} has no drops; set SOLVER.STEPS "()"'
        return
    if any(later <= earlier for earlier, later in zip((0, *steps), steps, strict=False)):
        yield (
            f"SOLVER.STEPS is {steps}, expected positive and strictly increasing iterations; "
            f'set SOLVER.STEPS "{tuple(sorted({step for step in steps if step > 0}))}"'
        )
    late = [step for step in steps if step >= max_iter]
    if late and max_iter >= 1:
        kept = tuple(step for step in steps if step < max_iter)
        yield (
            f"SOLVER.STEPS has {', '.join(map(str, late))}, but training ends at SOLVER.MAX_ITER {max_iter}: "
            f'drop them (set SOLVER.STEPS "{kept}") or train longer'
        )


def warmup_ends(cfg: CfgNode) -> Iterator[str]:
    warmup, max_iter = cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.MAX_ITER
    if warmup < 0:
        yield f"SOLVER.WARMUP_ITERS is {warmup}, expected 0 or more"
    if warmup >= max_iter >= 1:
        yield (
            f"SOLVER.WARMUP_ITERS is {warmup}, as long as the run of SOLVER.MAX_ITER {max_iter}; "
            f"set SOLVER.WARMUP_ITERS {max_iter // 10} or train longer"
        )
    if not 0 <= cfg.SOLVER.WARMUP_FACTOR <= 1:
        yield f"SOLVER.WARMUP_FACTOR is {cfg.SOLVER.WARMUP_FACTOR}, expected a part of the learning rate from 0 to 1"


def clipping_is_known(cfg: CfgNode) -> Iterator[str]:
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if clip.ENABLED and clip.CLIP_TYPE not in ("value", "norm"):
        yield f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is '{clip.CLIP_TYPE}', expected 'value' or 'norm'"


def reference_world_size(cfg: CfgNode) -> Iterator[str]:
    reference, batch = cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.IMS_PER_BATCH
    if reference < 0 or (reference and batch % reference):
        yield (
            f"SOLVER.REFERENCE_WORLD_SIZE is {reference}, expected a number of processes that share "
            f"SOLVER.IMS_PER_BATCH {batch} evenly; set SOLVER.REFERENCE_WORLD_SIZE 0 to keep the batch in any number"
        )


def batch_divides(cfg: CfgNode, num_processes: int, accumulate: int) -> Iterator[str]:
    batch, parts = cfg.SOLVER.IMS_PER_BATCH, num_processes * accumulate
    if batch < 1 or batch % parts == 0:
        return
    processes = f"{num_processes} process{'es' if num_processes > 1 else ''}"
    if batch % num_processes:
        mend = f"--scale-to-batch {max(1, round(batch / parts)) * parts}"
    else:
        share = batch // num_processes
        mend = f"--accumulate {max(k for k in range(1, accumulate) if share % k == 0)}"
    yield (
        f"SOLVER.IMS_PER_BATCH is {batch} in total, which {processes}"
        f"{f' with --accumulate {accumulate}' if accumulate > 1 else ''} cannot share evenly; give {mend}"
    )
