"""A recipe at another batch: everything that depends on the batch changes with it, and the log says how."""

from fvcore.common.config import CfgNode

from scratch_det.config.defaults import flatten, set_key
from scratch_det.config.load import COMMAND_LINE, LoadedConfig
from scratch_det.config.rules import drops_happen, positive_numbers, reference_world_size
from scratch_det.config.schedule import BatchSettings, rescale
from scratch_det.errors import ConfigError, refuse
from scratch_det.tables import aligned

KEYS = {  # of the fields of BatchSettings
    "batch": "SOLVER.IMS_PER_BATCH",
    "base_lr": "SOLVER.BASE_LR",
    "max_iter": "SOLVER.MAX_ITER",
    "steps": "SOLVER.STEPS",
    "warmup_iters": "SOLVER.WARMUP_ITERS",
    "eval_period": "TEST.EVAL_PERIOD",
    "checkpoint_period": "SOLVER.CHECKPOINT_PERIOD",
    "base_lr_end": "SOLVER.BASE_LR_END",
}


def settle_batch(
    recipe: LoadedConfig, num_processes: int = 1, scale_to: int | None = None, accumulate: int = 1
) -> list[str]:
    """Rescale ``recipe.cfg`` in place as the command line and SOLVER.REFERENCE_WORLD_SIZE ask; lines for the log.

    num_processes, scale_to, accumulate: as in ``--num-gpus`` x ``--num-machines``, ``--scale-to-batch`` and
    ``--accumulate``; accumulation changes no key. Overrides are part of what is rescaled: the flag keeps the number of
    images that the run would see without it.
    Raises ConfigError, also when a batch was overridden and its learning rate was not. ``check_config`` comes after.
    """
    for flag, value in (("--scale-to-batch", scale_to), ("--accumulate", accumulate)):
        if value is not None and value < 1:
            raise ConfigError(f"{COMMAND_LINE}: {flag} is {value}, expected 1 or more")
    refuse_unscaled_rate(recipe)
    cfg, before = recipe.cfg, recipe.cfg.SOLVER.IMS_PER_BATCH
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
    return describe(recipe, before, num_processes, accumulate)


def refuse_unscaled_rate(recipe: LoadedConfig) -> None:
    """Raises ConfigError when the command line changes the batch and does not name the learning rate."""
    written, batch = recipe.file_cfg.SOLVER.IMS_PER_BATCH, recipe.cfg.SOLVER.IMS_PER_BATCH
    if batch == written or "SOLVER.BASE_LR" in recipe.overridden or min(batch, written) < 1:
        return
    rate = recipe.cfg.SOLVER.BASE_LR
    raise ConfigError(
        f"{COMMAND_LINE}: SOLVER.IMS_PER_BATCH is {batch}, the recipe's {written}, but SOLVER.BASE_LR is still "
        f"{rate:g}, expected {rate * batch / written:g} for {batch} images; give --scale-to-batch {batch} instead, "
        f"which scales the schedule too, or name the rate as well: SOLVER.BASE_LR {rate} keeps it"
    )


def honour_reference_world_size(cfg: CfgNode, num_processes: int) -> None:
    """Keep the images per process that ``cfg`` has in REFERENCE_WORLD_SIZE processes, as detectron2 does; 0: nothing.

    Raises ConfigError when these processes cannot share the batch evenly.
    """
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference in (0, num_processes):
        return
    refuse(reference_world_size(cfg))
    scale_to_batch(cfg, cfg.SOLVER.IMS_PER_BATCH // reference * num_processes)
    cfg.SOLVER.REFERENCE_WORLD_SIZE = num_processes


def scale_to_batch(cfg: CfgNode, batch: int) -> None:
    """``rescale`` in place. Raises ConfigError when ``cfg``'s schedule is no schedule, or none in so few iterations."""
    refuse([*positive_numbers(cfg), *drops_happen(cfg)])
    settings = batch_settings(cfg)
    try:
        scaled = rescale(settings, batch)
    except ValueError as error:
        raise ConfigError(
            f"SOLVER.STEPS {settings.steps} of SOLVER.MAX_ITER {settings.max_iter} at {settings.batch} images cannot "
            f"be scaled to {batch}: {error}; choose a smaller batch, or fewer SOLVER.STEPS"
        ) from None
    for field, key in KEYS.items():
        set_key(cfg, key, getattr(scaled, field))


def batch_settings(cfg: CfgNode) -> BatchSettings:
    values = flatten(cfg)
    return BatchSettings(**{field: values[key] for field, key in KEYS.items()})


def describe(recipe: LoadedConfig, before: int, num_processes: int, accumulate: int) -> list[str]:
    """Lines for the log: what the recipe's files say beside this run, or one line when nothing differs.

    before: the batch that ``recipe.cfg`` had before it was rescaled, in images.
    """
    written, run = batch_settings(recipe.file_cfg), batch_settings(recipe.cfg)
    shares = f"{num_processes} x {accumulate} x {run.batch // (num_processes * accumulate)}"
    if written == run:
        return [
            f"batch {run.batch} (processes x accumulate x images: {shares}), learning rate {run.base_lr:g}, "
            f"{run.max_iter:,} iterations, as in the recipe"
        ]
    reference = recipe.file_cfg.SOLVER.REFERENCE_WORLD_SIZE
    left = _column(written, f"{reference} x 1 x {written.batch // reference}" if reference > 0 else "-")
    right = _column(run, shares)
    rows = [("", "recipe", "this run"), *((label, text, right[label]) for label, text in left.items())]
    lines = aligned(rows)
    if before != run.batch:
        ratio = run.batch / before
        named = [key for key in KEYS.values() if key in recipe.overridden]
        lines.append(
            f"rescaled from {before} to {run.batch} images: learning rate x {ratio:g}, iterations x {1 / ratio:g}"
            + (f", the command line's {', '.join(named)} included" if named else "")
        )
    return lines


def _column(settings: BatchSettings, shares: str) -> dict[str, str]:
    return {
        "images an iteration": f"{settings.batch:,}",
        "processes x accumulate x images": shares,
        "learning rate": f"{settings.base_lr:g}",
        "iterations": f"{settings.max_iter:,}",
        "drops at": " ".join(f"{step:,}" for step in settings.steps) or "-",
        "warm-up iterations": f"{settings.warmup_iters:,}",
        "evaluation every": f"{settings.eval_period:,}" if settings.eval_period else "-",
        "checkpoint every": f"{settings.checkpoint_period:,}",
        "images in all": f"{settings.max_iter * settings.batch:,}",
    }
