"""The learning rate under a recipe: of one iteration, and of the whole run in one line."""

from fvcore.common.config import CfgNode

from scratch_det.schedule import cosine_lr_at, lr_at, warmup_at

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
