"""The checkpoint from which a run starts, and loading it.

A run starts at its own newest checkpoint (--resume), at a checkpoint of another run (--branch-from, --switch-from), at
given weights, or at random. What may then differ from the earlier run stands in ``changes``.
"""

from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from fvcore.common.config import CfgNode
from torch import Tensor

from scratch_det.config.schedule import learning_rate
from scratch_det.engine import changes
from scratch_det.engine.checkpointer import REGULAR, Checkpointer, completed_iterations
from scratch_det.engine.plan import Plan, Request
from scratch_det.engine.run_dir import ANEW, Parent, RunDir
from scratch_det.engine.state import Saved, State
from scratch_det.errors import UserError
from scratch_det.log import logger
from scratch_det.reading import read_json
from scratch_det.weights.convert import to_cascade
from scratch_det.weights.load import load_weights
from scratch_det.weights.locate import find_checkpoint
from scratch_det.weights.origin import AVERAGE
from scratch_det.weights.read import read_checkpoint


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
    if plan.is_finished:
        changes.report_finished(cfg, run_dir)
        return True, None, cfg.SEED
    origin = find_origin(run_dir, checkpoints, plan.request)
    if cfg.SEED < 0:
        source = origin.run if origin else run_dir
        is_known = (origin or run_dir.holds_run()) and source.config.exists()
        drawn = int(np.random.SeedSequence().generate_state(1)[0] >> 1)
        cfg.SEED = source.read_config(changes.NEEDED).SEED if is_known else drawn
    return origin is not None and check_origin(plan, checkpoints, origin, environment), origin, cfg.SEED


def find_origin(run_dir: RunDir, checkpoints: Checkpointer, request: Request) -> Origin | None:
    """With --resume the run's own newest valid checkpoint, else that of --branch-from or --switch-from, else None.

    A branch that has no checkpoint of its own yet starts again at the checkpoint of its parent. Raises UserError when
    the folder is not a branch of the given checkpoint, or when every checkpoint is damaged.
    """
    given, is_switch = request.branch_from or request.switch_from, bool(request.switch_from)
    parent = Path(given) if given else None
    if request.resume and (run_dir.holds_run() or (parent is None and run_dir.parent.exists())):
        recorded = read_json(run_dir.parent, Parent, ANEW) if run_dir.parent.exists() else {}
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
    earlier = origin.run.read_config(changes.NEEDED)
    found = changes.environment_changes(origin.run.read_environment(), environment)
    found += changes.config_changes(earlier, cfg, completed, origin.is_switch)
    hint = ""
    if origin.is_branch:
        found = [change for change in found if change.what != "OUTPUT_DIR"]
        rejected = {change.what for change in found if change.rejected}
        if "MODEL.ROI_HEADS.NAME" in rejected:
            hint = "; a cascade goes on from a plain run with --switch-from"
        elif rejected <= set(changes.SCHEDULE) and (first := changes.first_other_rate(earlier, cfg, completed)):
            hint = f"; or branch off after {first} iterations or fewer"
    changes.reject_changes(found, str(checkpoint), completed, hint)
    if name == "--stop-at" and completed >= limit:
        if checkpoints.holds(limit):
            checkpoints.keep(limit)
        report_paused(plan.run_dir, completed, max_iter)
        return True
    logger.info(
        f"{'branching off' if origin.is_branch else 'resuming from'} {checkpoint}: {completed:,} of {max_iter:,} "
        f"iterations are done, the learning rate continues at {learning_rate(cfg, min(completed, max_iter - 1)):g}"
    )
    for change in found:
        logger.warning(f"  {change}")
    for number in request.keep_at:
        if not origin.is_branch and number <= completed and not checkpoints.holds(number):
            logger.warning(f"--keep-at {number}: {completed} iterations are done, it was not kept")
    return False


def report_paused(run_dir: RunDir, completed: int, max_iter: int) -> None:
    """Record that the run has reached --stop-at, and log how to continue."""
    run_dir.set_status("paused", iteration=completed, max_iter=max_iter)
    logger.info(
        f"paused after {completed} of {max_iter} iterations (--stop-at); --resume without that flag, or with a larger "
        "number, goes on from there"
    )


def restore(
    cfg: CfgNode, backend: str, state: State, origin: Origin | None, image: Tensor | None = None
) -> list[dict[str, float]]:
    """Load the weights or the checkpoint into ``state``; returns the checkpoint's unfinished window of metrics.

    image: one to train on, for ``load_weights``.

    Raises UserError for a checkpoint that does not fit the recipe.
    """
    if origin is None:
        if cfg.MODEL.WEIGHTS:
            logger.info(load_weights(state.model, cfg.MODEL.WEIGHTS, backend, cfg, image))
        return []
    checkpoint = origin.checkpoint
    saved = read_checkpoint(checkpoint)
    try:
        msgspec.convert(saved, Saved)
        if REGULAR.fullmatch(checkpoint.name) and (completed := saved["iteration"] + 1) != origin.completed:
            raise UserError(
                f"it was saved after {completed} iterations, not {origin.completed} as its name says; rename it"
            )
        if origin.is_switch:
            stages = len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS)
            saved |= {key: to_cascade(saved[key], backend, stages) for key in ("model", AVERAGE) if key in saved}
            saved |= {"optimizer": None, "window": []}
            logger.info(
                f"switching to a cascade: {stages} stages begin as copies of the box head of {checkpoint}, their one "
                "box as the mean over its classes; momentum starts at 0"
            )
        state.load_state_dict(saved)
    except UserError as error:
        raise UserError(f"checkpoint {checkpoint}: {error}") from None
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"checkpoint {checkpoint} does not fit this recipe ({str(error).splitlines()[0]}); "
            "resume with the MODEL.* and SOLVER.* keys that the run was started with"
        ) from None
    return saved.get("window", [])
