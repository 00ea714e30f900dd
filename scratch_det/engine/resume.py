"""The checkpoint from which a run starts, and the changes that are allowed when a run is continued.

A run starts at its own newest checkpoint (--resume), at a checkpoint of another run (--branch-from, --switch-from), at
given weights, or at random. A continued run has to end as if it had been one run from the beginning. So a change may
only affect later iterations; a change that would have altered the completed iterations is a UserError.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from fvcore.common.config import CfgNode

from scratch_det.config.choices import RESIZE, SGD
from scratch_det.config.load import flatten, plain, set_key
from scratch_det.config.schedule import is_multi_step, learning_rate
from scratch_det.engine.checkpointer import REGULAR, Checkpointer, completed_iterations
from scratch_det.engine.plan import Plan, Request
from scratch_det.engine.run_dir import RunDir
from scratch_det.engine.state import State
from scratch_det.errors import UserError
from scratch_det.evaluation.metrics import format_table
from scratch_det.log import logger
from scratch_det.weights.convert import to_cascade
from scratch_det.weights.load import load_weights
from scratch_det.weights.locate import find_checkpoint
from scratch_det.weights.read import read_checkpoint

PROJECTS = {"INPUT.AUGMENTATION": RESIZE, "SOLVER.OPTIMIZER": SGD}  # the values without --project
EVALUATION = "evaluations from now on"
ROUNDING = "the same computation, last digits may differ"
EFFECTS = {  # keys, or sections ending in a dot, that do not affect the weights of completed iterations
    "OUTPUT_DIR": "the folder has moved",
    "DATALOADER.NUM_WORKERS": "speed only",
    "SOLVER.CHECKPOINT_PERIOD": "checkpoints from now on",
    "SOLVER.REFERENCE_WORLD_SIZE": "already counted in",
    **dict.fromkeys(("MODEL.DEVICE", "FLOAT32_PRECISION", "CUDNN_BENCHMARK"), ROUNDING),
    **dict.fromkeys(
        ("DATASETS.TEST", "TEST.", "INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST", "MODEL.RPN.PRE_NMS_TOPK_TEST",
         "MODEL.RPN.POST_NMS_TOPK_TEST", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "MODEL.ROI_HEADS.NMS_THRESH_TEST"),
        EVALUATION,
    ),
}  # fmt: skip
SWITCH = dict.fromkeys(  # further keys that a switch to a cascade may change
    ("MODEL.ROI_HEADS.NAME", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "MODEL.ROI_BOX_CASCADE_HEAD.",
     "MODEL.RPN.POST_NMS_TOPK_TRAIN"),
    "from the switch on",
)  # fmt: skip
SCHEDULE = ("SOLVER.MAX_ITER", "SOLVER.BASE_LR", "SOLVER.STEPS", "SOLVER.GAMMA", "SOLVER.WARMUP_ITERS",
            "SOLVER.WARMUP_FACTOR", "SOLVER.WARMUP_METHOD", "SOLVER.LR_SCHEDULER_NAME",
            "SOLVER.BASE_LR_END")  # fmt: skip
MOST_CHANGES = 4  # named in an error
BRANCH_HINT = ", and branch off a checkpoint before its first drop of the learning rate: --branch-from FILE"


class Change(NamedTuple):
    """One difference; ``rejected``: it would have altered the completed iterations."""

    what: str
    earlier: Any
    now: Any
    effect: str
    rejected: bool = False

    def __str__(self) -> str:
        return f"{self.what} was {self.earlier!r}, now {self.now!r}: {self.effect}"


def config_changes(earlier: CfgNode, now: CfgNode, completed: int, switch: bool = False) -> list[Change]:
    """The keys that differ, with their effect after ``completed`` iterations with config ``earlier``.

    switch: a cascade is trained after the completed iterations.
    """
    effects = EFFECTS | SWITCH if switch else EFFECTS
    old, new = PROJECTS | flatten(earlier), PROJECTS | flatten(now)
    first = first_other_rate(earlier, now, completed)

    def alters_a_rate(key: str) -> bool:
        """Whether this key alone changes the rate of a completed iteration."""
        alone = earlier.clone()
        set_key(alone, key, new[key])
        return first_other_rate(earlier, alone, completed) is not None

    guilty = set() if first is None else {key for key in SCHEDULE if alters_a_rate(key)} or {*SCHEDULE}
    changes = []
    for key, value in new.items():
        was: Any = old.get(key, value)
        if plain(value) == plain(was):
            continue
        known = (name for name in effects if key == name or (name.endswith(".") and key.startswith(name)))
        effect, rejected = "completed iterations were trained with the earlier value", True
        if name := next(known, None):
            effect, rejected = effects[name], False
        elif key in guilty:
            effect = f"the learning rate of iteration {first} would change"
        elif key in SCHEDULE:
            effect, rejected = "iterations still to come", False
        if isinstance(value, tuple) and isinstance(was, list):  # a config.yaml has lists
            was = tuple(was)
        changes.append(Change(key, was, value, effect, rejected))
    return changes


def first_other_rate(earlier: CfgNode, now: CfgNode, completed: int) -> int | None:
    """The first completed iteration whose learning rate differs between the two configs; None if there is none."""
    solvers = earlier.SOLVER, now.SOLVER
    if all(plain(flatten(earlier)[key]) == plain(flatten(now)[key]) for key in SCHEDULE):
        return None
    # After warm-up a multi-step rate is constant between two drops, so only the drops are compared.
    piecewise = is_multi_step(earlier) and is_multi_step(now)
    changing = max(s.WARMUP_ITERS for s in solvers) + 1 if piecewise else completed
    drops = {step for solver in solvers for step in solver.STEPS if step < completed}
    where_rates_change = sorted({*range(min(completed, changing)), *drops})
    return next((i for i in where_rates_change if learning_rate(earlier, i) != learning_rate(now, i)), None)


def environment_changes(earlier: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """Differences of two environment.json: data, backend, number of processes, versions."""
    changes = []
    for name in sorted(earlier["datasets"].keys() & now["datasets"].keys()):
        is_trained = name in earlier["trained_on"]
        effect = "other images from now on" if is_trained else EVALUATION
        for key in (key for key in now["datasets"][name] if key.endswith("_sha256")):
            old, new = (content["datasets"][name].get(key, "none")[:12] for content in (earlier, now))
            what = f"the {key.removesuffix('_sha256')} of {name} (sha256)"
            changes.append(Change(what, old, new, effect, rejected=is_trained))
    hint = f"another model; give --backend {earlier['backend']}"
    changes.append(Change("the backend", earlier["backend"], now["backend"], hint, rejected=True))
    effects = {"processes x accumulate": "the same images; other sampled proposals, another order of sums"}
    effects |= dict.fromkeys(("CPU threads", "torch", "torchvision", "detectron2"), ROUNDING)
    before, after = (
        {"processes x accumulate": f"{run['processes']} x {run['accumulate']}", "CPU threads": run["threads"]}
        | run["packages"]
        for run in (earlier, now)
    )
    changes += [Change(name, before.get(name), after.get(name), effect) for name, effect in effects.items()]
    return [change for change in changes if change.earlier != change.now]


def reject_changes(changes: Iterable[Change], what: str, completed: int, hint: str = "") -> None:
    """Raise UserError when one of ``changes`` would alter the completed iterations of ``what``."""
    lines = [f"  {change}" for change in changes if change.rejected]
    if lines:
        more = [f"  and {len(lines) - MOST_CHANGES} more"] if len(lines) > MOST_CHANGES else []
        head = f"{what} cannot be continued like this after {completed} iterations:"
        fix = f"  keep the earlier values, or start another run: OUTPUT_DIR PATH{hint}"
        raise UserError("\n".join([head, *lines[:MOST_CHANGES], *more, fix]))


class Origin(NamedTuple):
    """The checkpoint that a run starts from, the run that wrote it, and its number of completed iterations.

    is_branch: another run wrote it. is_switch: it has one box head, and the new run trains a cascade.
    """

    checkpoint: Path
    run: RunDir
    completed: int
    is_branch: bool = False
    is_switch: bool = False


def find_start(plan: Plan, checkpoints: Checkpointer, environment: dict[str, Any]) -> tuple[bool, Origin | None, int]:
    """Whether the run is finished or has reached --stop-at, its origin (None: it starts at iteration 0), and its SEED.

    A SEED of -1 becomes the seed of the run that is continued, else a new seed. Raises UserError if the start would
    alter completed iterations or train nothing.
    """
    cfg, run_dir = plan.cfg, plan.run_dir
    is_finished = plan.request.resume and run_dir.result.exists()
    origin = None if is_finished else find_origin(run_dir, checkpoints, plan.request)
    if cfg.SEED < 0:
        source = origin.run if origin else run_dir
        is_known = (origin or run_dir.holds_run()) and source.config.exists()
        cfg.SEED = source.read_config().SEED if is_known else int(np.random.SeedSequence().generate_state(1)[0] >> 1)
    if is_finished:
        report_finished(cfg, run_dir)
    is_paused = origin is not None and check_origin(plan, checkpoints, origin, environment)
    return is_finished or is_paused, origin, cfg.SEED


def find_origin(run_dir: RunDir, checkpoints: Checkpointer, request: Request) -> Origin | None:
    """With --resume the run's own newest valid checkpoint, else that of --branch-from or --switch-from, else None.

    A branch that has no checkpoint of its own yet starts again at the checkpoint of its parent. Raises UserError when
    the folder is not a branch of the given checkpoint, or when every checkpoint is damaged.
    """
    given, is_switch = request.branch_from or request.switch_from, bool(request.switch_from)
    parent = Path(given) if given else None
    if request.resume and (run_dir.holds_run() or (parent is None and run_dir.parent.exists())):
        recorded = json.loads(run_dir.parent.read_text()) if run_dir.parent.exists() else {}
        began = Path(recorded["checkpoint"]) if recorded else None
        if parent and began not in (parent.resolve(), (parent.parent / "checkpoints" / parent.name).resolve()):
            raise UserError(
                f"{start_flag(is_switch)} {parent}: {run_dir.path} holds a run that "
                f"{f'branched from {began}' if began else 'is not a branch'}; leave the flag out to continue it, or "
                "name another folder: OUTPUT_DIR PATH"
            )
        if own := checkpoints.newest_valid():
            return Origin(own, RunDir(run_dir.path, writes=False), completed_iterations(own) or 0)
        parent, is_switch = began, recorded.get("switch", False)
    elif request.resume and parent is None:
        logger.info(f"--resume: no run in {run_dir.path} yet, this starts it")
    if parent is None:
        return None
    checkpoint = find_checkpoint(parent)
    folder = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    run = RunDir(folder, writes=False)
    if not (checkpoint.is_file() and run.config.is_file() and run.environment.is_file()):
        raise UserError(
            f"{start_flag(is_switch)} {parent}: expected a checkpoint in the folder of its run, with config.yaml and "
            f"environment.json; {'no such file' if not checkpoint.is_file() else f'{folder} is no run folder'}"
        )
    if reason := Checkpointer(checkpoint.parent).damage(checkpoint.name):
        raise UserError(
            f"{start_flag(is_switch)} {checkpoint} is damaged ({reason}); branch off another checkpoint of {folder}, "
            "or move that folder away and make its run anew"
        )
    return Origin(checkpoint, run, completed_iterations(checkpoint) or 0, is_branch=True, is_switch=is_switch)


def start_flag(is_switch: bool) -> str:
    """The flag that names the checkpoint of another run."""
    return "--switch-from" if is_switch else "--branch-from"


def check_origin(plan: Plan, checkpoints: Checkpointer, origin: Origin, environment: dict[str, Any]) -> bool:
    """Log the checkpoint and every difference with its effect; returns whether --stop-at is already reached.

    Raises UserError for a difference that alters completed iterations, and for a start that would train nothing.
    """
    cfg, request, completed, checkpoint = plan.cfg, plan.request, origin.completed, origin.checkpoint
    max_iter = limit = cfg.SOLVER.MAX_ITER
    name = "SOLVER.MAX_ITER"
    if request.stop_at is not None and completed <= max_iter:
        limit, name = request.stop_at, "--stop-at"
    if completed > max_iter or (origin.is_branch and completed >= limit):
        raise UserError(
            f"{name} is {limit}, but {checkpoint} has {completed} completed iterations, so nothing would be trained; "
            "give a larger number, or an earlier checkpoint (--keep-at keeps it) and another folder: OUTPUT_DIR PATH"
        )
    earlier = origin.run.read_config()
    changes = environment_changes(json.loads(origin.run.environment.read_text()), environment)
    changes += config_changes(earlier, cfg, completed, origin.is_switch)
    hint = ""
    if origin.is_branch:
        changes = [change for change in changes if change.what != "OUTPUT_DIR"]
        rejected = {change.what for change in changes if change.rejected}
        if "MODEL.ROI_HEADS.NAME" in rejected:
            hint = "; a cascade goes on from a plain run with --switch-from"
        elif rejected <= set(SCHEDULE) and (first := first_other_rate(earlier, cfg, completed)):
            hint = f"; or branch off after {first} iterations or fewer"
    reject_changes(changes, str(checkpoint), completed, hint)
    if name == "--stop-at" and completed >= limit:
        if checkpoints.holds(limit):
            checkpoints.keep(limit)
        report_paused(plan.run_dir, completed, max_iter)
        return True
    logger.info(
        f"{'branching off' if origin.is_branch else 'resuming from'} {checkpoint}: {completed:,} of {max_iter:,} "
        f"iterations are done, the learning rate continues at {learning_rate(cfg, min(completed, max_iter - 1)):g}"
    )
    for change in changes:
        logger.warning(f"  {change}")
    for number in request.keep_at:
        if not origin.is_branch and number <= completed and not checkpoints.holds(number):
            logger.warning(f"--keep-at {number}: {completed} iterations are done, it was not kept")
    return False


def report_finished(cfg: CfgNode, run_dir: RunDir) -> None:
    """Log that the run is complete. Raises UserError when the recipe now describes another run."""
    result = json.loads(run_dir.result.read_text())
    completed = result["iteration"]
    if completed != cfg.SOLVER.MAX_ITER:
        raise UserError(
            f"{run_dir.path} holds a finished run of {completed} iterations, SOLVER.MAX_ITER is "
            f"{cfg.SOLVER.MAX_ITER}; name another folder: OUTPUT_DIR PATH{BRANCH_HINT if is_multi_step(cfg) else ''}"
        )
    changes = config_changes(run_dir.read_config(), cfg, completed)
    reject_changes(changes, f"the finished run in {run_dir.path}", completed)
    for change in changes:
        logger.warning(f"  {change.what} is {change.now!r}, was {change.earlier!r}: no effect, the run is finished")
    logger.info(f"{run_dir.path} holds a finished run of {completed} iterations; nothing to do")
    if "bbox" in result["metrics"]:
        logger.info("\n" + format_table(result["metrics"]))


def report_paused(run_dir: RunDir, completed: int, max_iter: int) -> None:
    """Record that the run has reached --stop-at, and log how to continue."""
    run_dir.set_status("paused", iteration=completed, max_iter=max_iter)
    logger.info(
        f"paused after {completed} of {max_iter} iterations (--stop-at); --resume without that flag, or with a larger "
        "number, goes on from there"
    )


def restore(cfg: CfgNode, backend: str, state: State, origin: Origin | None) -> list[dict[str, float]]:
    """Load the weights or the checkpoint into ``state``; returns the checkpoint's unfinished window of metrics.

    Raises UserError for a checkpoint that does not fit the recipe.
    """
    if origin is None:
        if cfg.MODEL.WEIGHTS:
            logger.info(load_weights(state.model, cfg.MODEL.WEIGHTS, backend, cfg))
        return []
    checkpoint = origin.checkpoint
    saved = read_checkpoint(checkpoint)
    try:
        if REGULAR.fullmatch(checkpoint.name) and (completed := saved["iteration"] + 1) != origin.completed:
            raise UserError(
                f"it was saved after {completed} iterations, not {origin.completed} as its name says; rename it"
            )
        if origin.is_switch:
            stages = len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS)
            saved |= {"model": to_cascade(saved["model"], backend, stages), "optimizer": None, "window": []}
            logger.info(
                f"switching to a cascade: {stages} stages begin as copies of the box head of {checkpoint}, their one "
                "box as the mean over its classes; momentum starts at 0"
            )
        state.load_state_dict(saved)
    except UserError as error:
        raise UserError(f"checkpoint {checkpoint}: {error}") from None
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"checkpoint {checkpoint} does not fit this recipe ({str(error).splitlines()[0]}); "
            "resume with the MODEL.* and SOLVER.* keys that the run was started with"
        ) from None
    return saved.get("window", [])
