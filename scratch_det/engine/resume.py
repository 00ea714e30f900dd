"""Where a run starts, and what may differ from the run that it continues.

A run starts at its own newest checkpoint (--resume), at a checkpoint of another run (--branch-from, --switch-from), at
given weights, or at random. Whatever is continued has to end as if it had been one run from the beginning. So a change
may only touch what is still to come; a change of what shaped the completed iterations is a UserError.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode

from scratch_det.config import flatten, plain, set_key
from scratch_det.config.choices import RESIZE, SGD
from scratch_det.config.schedule import is_multi_step, learning_rate
from scratch_det.engine.checkpointer import Checkpointer, completed_iterations
from scratch_det.engine.plan import Plan, Request
from scratch_det.engine.run_dir import RunDir, keep_lines
from scratch_det.engine.state import State
from scratch_det.errors import UserError
from scratch_det.evaluation.coco import format_table
from scratch_det.files import sha256_of
from scratch_det.log import logger
from scratch_det.weights.load import load_weights, to_cascade
from scratch_det.weights.locate import find_checkpoint
from scratch_det.weights.names import scheme_of
from scratch_det.weights.read import read_checkpoint

PROJECTS = {"INPUT.AUGMENTATION": RESIZE, "SOLVER.OPTIMIZER": SGD}  # what is meant without --project
EVALUATION = "evaluations from now on"
ROUNDING = "the same computation, last digits may differ"
EFFECTS = {  # keys, or sections ending in a dot, that do not shape the weights of completed iterations
    "OUTPUT_DIR": "the folder has moved",
    "DATALOADER.NUM_WORKERS": "speed only",
    "SOLVER.CHECKPOINT_PERIOD": "checkpoints from now on",
    "SOLVER.REFERENCE_WORLD_SIZE": "already counted in",
    "MODEL.DEVICE": ROUNDING,
    "FLOAT32_PRECISION": ROUNDING,
    "CUDNN_BENCHMARK": ROUNDING,
    "DATASETS.TEST": EVALUATION,
    "TEST.": EVALUATION,
    "INPUT.MIN_SIZE_TEST": EVALUATION,
    "INPUT.MAX_SIZE_TEST": EVALUATION,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": EVALUATION,
    "MODEL.RPN.POST_NMS_TOPK_TEST": EVALUATION,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": EVALUATION,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": EVALUATION,
}
SWITCH = dict.fromkeys(  # what a switch to a cascade may change besides
    ("MODEL.ROI_HEADS.NAME", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "MODEL.ROI_BOX_CASCADE_HEAD.",
     "MODEL.RPN.POST_NMS_TOPK_TRAIN"),
    "from the switch on",
)  # fmt: skip
SCHEDULE = ("SOLVER.MAX_ITER", "SOLVER.BASE_LR", "SOLVER.STEPS", "SOLVER.GAMMA", "SOLVER.WARMUP_ITERS",
            "SOLVER.WARMUP_FACTOR", "SOLVER.WARMUP_METHOD", "SOLVER.LR_SCHEDULER_NAME",
            "SOLVER.BASE_LR_END")  # fmt: skip
BRANCH_FLAG, SWITCH_FLAG = "--branch-from", "--switch-from"
MOST_CHANGES = 4  # named in an error
BRANCH_HINT = ", and branch off a checkpoint before its first drop of the learning rate: --branch-from FILE"


@dataclass(frozen=True)
class Change:
    """One difference: ``refused`` when completed iterations would have been others with it."""

    what: str
    earlier: Any
    now: Any
    effect: str
    refused: bool = False

    @property
    def is_schedule(self) -> bool:
        """Whether it is one of the keys that the learning rate follows from."""
        return self.what in SCHEDULE

    def __str__(self) -> str:
        return f"{self.what} was {self.earlier!r}, now {self.now!r}: {self.effect}"


def config_changes(earlier: CfgNode, now: CfgNode, completed: int, switch: bool = False) -> list[Change]:
    """The keys that differ, as far as they matter after ``completed`` iterations under ``earlier``.

    switch: from then on a cascade is trained.
    """
    effects = EFFECTS | SWITCH if switch else EFFECTS
    old, new = PROJECTS | flatten(earlier), PROJECTS | flatten(now)
    first, guilty = first_other_rate(earlier, now, completed), set(SCHEDULE)
    if first is not None:  # name the keys that change a completed rate by themselves, or all where it takes several
        alone = {key: earlier.clone() for key in SCHEDULE}
        for key, cfg in alone.items():
            set_key(cfg, key, new[key])
        guilty = {key for key, cfg in alone.items() if first_other_rate(earlier, cfg, completed) is not None} or guilty
    changes = []
    for key, value in new.items():
        was = old.get(key, value)
        if plain(value) == plain(was):
            continue
        if isinstance(value, tuple) and isinstance(was, list):  # a config.yaml has no tuples
            was = tuple(was)
        known = (name for name in effects if key == name or (name.endswith(".") and key.startswith(name)))
        if name := next(known, None):
            changes.append(Change(key, was, value, effects[name]))
        elif key not in SCHEDULE:
            effect = "completed iterations were trained with the earlier value"
            changes.append(Change(key, was, value, effect, refused=True))
        elif first is None or key not in guilty:
            changes.append(Change(key, was, value, "iterations still to come"))
        else:
            effect = f"the learning rate of iteration {first} would be another one"
            changes.append(Change(key, was, value, effect, refused=True))
    return changes


def first_other_rate(earlier: CfgNode, now: CfgNode, completed: int) -> int | None:
    """The first of the completed iterations whose learning rate would have been another one; None when all agree."""
    solvers = earlier.SOLVER, now.SOLVER
    if all(plain(flatten(earlier)[key]) == plain(flatten(now)[key]) for key in SCHEDULE):
        return None
    # After warm-up a multi-step rate is constant between two drops, so it is enough to look at the drops.
    piecewise = is_multi_step(earlier) and is_multi_step(now)
    changing = max(s.WARMUP_ITERS for s in solvers) + 1 if piecewise else completed
    drops = {step for solver in solvers for step in solver.STEPS if step < completed}
    where_rates_change = sorted({*range(min(completed, changing)), *drops})
    return next((i for i in where_rates_change if learning_rate(earlier, i) != learning_rate(now, i)), None)


def environment_changes(earlier: dict[str, Any], now: dict[str, Any]) -> Iterator[Change]:
    """Differences of two environment.json: data, backend, number of processes, versions."""
    for name in sorted(earlier["datasets"].keys() & now["datasets"].keys()):
        for key in (key for key in now["datasets"][name] if key.endswith("_sha256")):
            old, new = (content["datasets"][name].get(key, "none") for content in (earlier, now))
            if old != new:
                trained = name in earlier["trained_on"]
                effect = "other images from now on" if trained else EVALUATION
                what = f"the {key.removesuffix('_sha256')} of {name} (sha256)"
                yield Change(what, old[:12], new[:12], effect, refused=trained)
    if earlier["backend"] != now["backend"]:
        yield Change("the backend", earlier["backend"], now["backend"], "another model", refused=True)
    (old, before), (new, after) = (
        (
            f"{content['processes']} x {content['accumulate']}",
            {"CPU threads": content["threads"], **content["packages"]},
        )
        for content in (earlier, now)
    )
    if old != new:
        yield Change("processes x accumulate", old, new, "the same images; proposals sampled otherwise, sums reordered")
    for name in ("CPU threads", "torch", "torchvision", "detectron2"):
        if before.get(name) != after.get(name):
            yield Change(name, before.get(name), after.get(name), ROUNDING)


def refuse_changes(changes: Iterable[Change], what: str, completed: int, hint: str = "") -> None:
    """Raise UserError when one of ``changes`` would alter the completed iterations of ``what``."""
    lines = [f"  {change}" for change in changes if change.refused]
    if lines:
        more = [f"  and {len(lines) - MOST_CHANGES} more"] if len(lines) > MOST_CHANGES else []
        head = f"{what} cannot be continued like this after {completed} iterations:"
        fix = f"  keep the earlier values, or start another run: OUTPUT_DIR PATH{hint}"
        raise UserError("\n".join([head, *lines[:MOST_CHANGES], *more, fix]))


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run starts from, and the run that wrote it.

    is_branch: it is another run's. is_switch: and has one box head, where this one trains a cascade.
    """

    checkpoint: Path
    run: RunDir
    is_branch: bool = False
    is_switch: bool = False

    @property
    def flag(self) -> str:
        """What gives the checkpoint of a branch."""
        return SWITCH_FLAG if self.is_switch else BRANCH_FLAG


def find_start(plan: Plan, checkpoints: Checkpointer) -> tuple[bool, Origin | None, int]:
    """Whether the run is finished or as far as --stop-at asks, where it starts (None: from its beginning), its SEED.

    A SEED of -1 means the one of the run that this one continues, else a new one.
    """
    request, cfg, run_dir = plan.request, plan.cfg, plan.run_dir
    is_finished = request.resume and run_dir.result.exists()
    origin = None if is_finished else find_origin(run_dir, checkpoints, request)
    if cfg.SEED < 0:
        source = origin.run if origin else run_dir
        if (origin or run_dir.holds_run()) and source.config.exists():
            cfg.SEED = source.read_config().SEED
        else:
            cfg.SEED = int(np.random.SeedSequence().generate_state(1)[0] >> 1)
    if is_finished:
        report_finished(cfg, run_dir)
        return True, None, cfg.SEED
    completed = completed_iterations(origin.checkpoint) if origin else 0
    if origin is None or request.stop_at is None or not completed or completed < request.stop_at:
        return False, origin, cfg.SEED
    if origin.is_branch:
        raise UserError(
            f"--stop-at is {request.stop_at}, but {origin.checkpoint} has {completed} iterations behind it, so nothing "
            "would be trained; give a larger number, or branch off an earlier checkpoint"
        )
    refuse_changes(config_changes(origin.run.read_config(), cfg, completed), str(origin.checkpoint), completed)
    if checkpoints.holds(request.stop_at):
        checkpoints.keep(request.stop_at)
    report_paused(run_dir, completed, cfg.SOLVER.MAX_ITER)
    return True, None, cfg.SEED


def find_origin(run_dir: RunDir, checkpoints: Checkpointer, request: Request) -> Origin | None:
    """With --resume the run's own newest valid checkpoint; else the one to branch off or to switch from; else nothing.

    A branch that has no checkpoint of its own yet begins again at its parent's. Raises UserError when the folder is
    not a branch of the checkpoint that is given, or when no checkpoint is left undamaged.
    """
    given, is_switch = request.branch_from or request.switch_from, bool(request.switch_from)
    parent = Path(given) if given else None
    if request.resume and (run_dir.holds_run() or (parent is None and run_dir.parent.exists())):
        parent, is_switch = _recorded_parent(run_dir, parent, is_switch)
        if own := checkpoints.newest_valid():
            return Origin(own, RunDir(run_dir.path, writes=False))
    elif request.resume and parent is None:
        logger.info(f"--resume: no run in {run_dir.path} yet, this starts it")
    if parent is None:
        return None
    checkpoint = find_checkpoint(parent)
    folder = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    origin = Origin(checkpoint, RunDir(folder, writes=False), is_branch=True, is_switch=is_switch)
    if not (checkpoint.is_file() and origin.run.config.is_file() and origin.run.environment.is_file()):
        raise UserError(
            f"{origin.flag} {parent}: expected a checkpoint in the folder of its run, with config.yaml and "
            f"environment.json; {'no such file' if not checkpoint.is_file() else f'{folder} is no run folder'}"
        )
    if reason := Checkpointer(checkpoint.parent).damage(checkpoint.name):
        raise UserError(
            f"{origin.flag} {checkpoint} is damaged ({reason}); branch off another checkpoint of {folder}, or "
            "move that folder away and make its run anew"
        )
    return origin


def _recorded_parent(run_dir: RunDir, given: Path | None, is_switch: bool) -> tuple[Path | None, bool]:
    """The checkpoint that this folder's run branched from, and whether it was a switch.

    Raises UserError when ``given`` is another one.
    """
    parent = json.loads(run_dir.parent.read_text()) if run_dir.parent.exists() else {}
    recorded = Path(parent["checkpoint"]) if parent else None
    if given and recorded not in (given.resolve(), (given.parent / "checkpoints" / given.name).resolve()):
        raise UserError(
            f"{SWITCH_FLAG if is_switch else BRANCH_FLAG} {given}: {run_dir.path} holds a run that "
            + (f"branched from {recorded}" if recorded else "is not a branch")
            + "; leave the flag out to continue it, or name another folder: OUTPUT_DIR PATH"
        )
    return recorded, parent.get("switch", False)


def report_finished(cfg: CfgNode, run_dir: RunDir) -> None:
    """What --resume says of a run that is complete. Raises UserError when the recipe now asks for another run."""
    result = json.loads(run_dir.result.read_text())
    completed = result["iteration"]
    if completed != cfg.SOLVER.MAX_ITER:
        raise UserError(
            f"{run_dir.path} holds a finished run of {completed} iterations, SOLVER.MAX_ITER is "
            f"{cfg.SOLVER.MAX_ITER}; name another folder: OUTPUT_DIR PATH{BRANCH_HINT if is_multi_step(cfg) else ''}"
        )
    changes = config_changes(run_dir.read_config(), cfg, completed)
    refuse_changes(changes, f"the finished run in {run_dir.path}", completed)
    for change in changes:
        logger.warning(f"  {change.what} is {change.now!r}, was {change.earlier!r}: no effect any more")
    logger.info(f"{run_dir.path} holds a finished run of {completed} iterations; nothing to do")
    if "bbox" in result["metrics"]:
        logger.info("\n" + format_table(result["metrics"]))


def report_paused(run_dir: RunDir, completed: int, max_iter: int) -> None:
    """Record that the run has done what --stop-at asks for, and say how it goes on."""
    run_dir.set_status("paused", iteration=completed, max_iter=max_iter)
    logger.info(f"paused after {completed} of {max_iter} iterations (--stop-at); --resume goes on from there")


def restore(cfg: CfgNode, backend: str, state: State, origin: Origin | None) -> list[dict[str, float]]:
    """Fill ``state`` and return the unfinished window of metrics that belongs to it.

    Raises UserError for a checkpoint of another backend, one that does not fit, or one beyond MAX_ITER.
    """
    if origin is None:
        if cfg.MODEL.WEIGHTS:
            logger.info(load_weights(state.model, cfg.MODEL.WEIGHTS, backend, cfg))
        return []
    checkpoint, max_iter = origin.checkpoint, cfg.SOLVER.MAX_ITER
    saved = read_checkpoint(checkpoint)
    scheme = scheme_of(saved.get("model", {}))
    if scheme and scheme.library != backend:
        raise UserError(
            f"checkpoint {checkpoint} is of the {scheme.library} backend, this is {backend}: only the one that "
            f"began a run can continue it; give --backend {scheme.library}"
        )
    if origin.is_branch:  # before the weights are loaded: an error names the keys, not the shapes of tensors
        completed = saved["iteration"] + 1
        changes = config_changes(origin.run.read_config(), cfg, completed, origin.is_switch)
        changes = [change for change in changes if change.what.startswith("MODEL.")]
        heads = not origin.is_switch and any(change.what == "MODEL.ROI_HEADS.NAME" for change in changes)
        hint = "; a cascade goes on from a plain run with --switch-from" if heads else ""
        refuse_changes(changes, f"{origin.flag} {checkpoint}", completed, hint)
    if origin.is_switch:
        stages = len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS)
        try:
            saved |= {"model": to_cascade(saved["model"], backend, stages), "optimizer": None, "window": []}
        except UserError as problem:
            raise UserError(f"{origin.flag} {checkpoint}: {problem}") from None
        logger.info(
            f"switching to a cascade: {stages} stages begin as copies of the box head of {checkpoint}, their one box "
            "as the mean over its classes; momentum starts at 0"
        )
    try:
        state.load_state_dict(saved)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"checkpoint {checkpoint} does not fit this recipe ({str(error).splitlines()[0]}); "
            "resume with the MODEL.* and SOLVER.* keys that the run was started with"
        ) from None
    if state.iteration > max_iter:
        raise UserError(
            f"checkpoint {checkpoint} has {state.iteration} iterations behind it, SOLVER.MAX_ITER is {max_iter}; "
            "raise it, or name another folder: OUTPUT_DIR PATH"
        )
    if origin.is_branch and state.iteration == max_iter:
        raise UserError(
            f"{checkpoint} has all of SOLVER.MAX_ITER {max_iter} iterations behind it, so nothing would be trained; "
            "give an earlier checkpoint, which --keep-at keeps, or a longer schedule"
        )
    return saved.get("window", [])


def report_changes(cfg: CfgNode, environment: dict[str, Any], origin: Origin | None, completed: int) -> None:
    """Log what is continued and every difference with its effect; raises UserError for one that alters the past."""
    if origin is None:
        return
    earlier = origin.run.read_config()
    changes = config_changes(earlier, cfg, completed, origin.is_switch)
    changes += environment_changes(json.loads(origin.run.environment.read_text()), environment)
    if origin.is_branch:
        changes = [change for change in changes if change.what != "OUTPUT_DIR"]
    first = first_other_rate(earlier, cfg, completed)
    only_rates = all(change.is_schedule for change in changes if change.refused)
    hint = f"; or branch off after {first} iterations or fewer" if origin.is_branch and first and only_rates else ""
    refuse_changes(changes, str(origin.checkpoint), completed, hint)
    verb = "branching off" if origin.is_branch else "resuming from"
    logger.info(
        f"{verb} {origin.checkpoint}: {completed:,} of {cfg.SOLVER.MAX_ITER:,} iterations are done, "
        f"the learning rate continues at {learning_rate(cfg, min(completed, cfg.SOLVER.MAX_ITER - 1)):g}"
    )
    for change in changes:
        logger.warning(f"  {change}")


def begin_branch(run_dir: RunDir, origin: Origin, completed: int) -> None:
    """Record the parent, and take over what it wrote about the shared iterations."""
    if run_dir.writes:
        parent = {
            "checkpoint": str(origin.checkpoint.resolve()),
            "sha256": sha256_of(origin.checkpoint),
            "completed_iterations": completed,
            "switch": origin.is_switch,
        }
        run_dir.write_json(run_dir.parent.name, parent)
        keep_lines(origin.run.metrics, run_dir.metrics, completed)
