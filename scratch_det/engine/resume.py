"""What may change between the two parts of one run, and what that does.

A resumed run continues its past, and a branch takes over another run's. So a change may only touch what is still to
come: whatever shaped the completed iterations has to be as it was.

Where a run starts: at its own last checkpoint, at another run's (a branch), at given weights, or at random.
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
from scratch_det.engine.checkpointer import Checkpointer
from scratch_det.engine.metrics import keep_lines
from scratch_det.engine.run_dir import RunDir
from scratch_det.engine.state import State
from scratch_det.errors import UserError
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
    first = first_other_rate(earlier, now, completed)
    guilty = _guilty(earlier, now, completed) if first is not None else set()
    old, new = PROJECTS | flatten(earlier), PROJECTS | flatten(now)
    return [
        _judge(key, _like(value, old[key]), value, first if key in guilty else None, effects)
        for key, value in new.items()
        if plain(value) != plain(old.get(key, value))
    ]


def _guilty(earlier: CfgNode, now: CfgNode, completed: int) -> set[str]:
    """The keys that change a completed iteration's learning rate by themselves; all of them when it takes several."""
    alone = set()
    for key in SCHEDULE:
        one = earlier.clone()
        set_key(one, key, flatten(now)[key])
        if first_other_rate(earlier, one, completed) is not None:
            alone.add(key)
    return alone or set(SCHEDULE)


def first_other_rate(earlier: CfgNode, now: CfgNode, completed: int) -> int | None:
    """The first of the completed iterations whose learning rate would have been another one; None when all agree."""
    solvers = earlier.SOLVER, now.SOLVER
    if all(plain(flatten(earlier)[key]) == plain(flatten(now)[key]) for key in SCHEDULE):
        return None
    piecewise = is_multi_step(earlier) and is_multi_step(now)
    changing = max(s.WARMUP_ITERS for s in solvers) + 1 if piecewise else completed
    drops = {step for solver in solvers for step in solver.STEPS}
    where_rates_change = sorted({*range(min(completed, changing)), *drops})  # between these the rates are constant
    passed = (i for i in where_rates_change if i < completed)
    return next((i for i in passed if learning_rate(earlier, i) != learning_rate(now, i)), None)


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
    old, new = (f"{content['processes']} x {content['accumulate']}" for content in (earlier, now))
    if old != new:
        yield Change("processes x accumulate", old, new, "the same images; proposals sampled otherwise, sums reordered")
    if earlier["threads"] != now["threads"]:
        yield Change("CPU threads", earlier["threads"], now["threads"], ROUNDING)
    for name in ("torch", "torchvision", "detectron2"):
        old, new = (content["packages"].get(name) for content in (earlier, now))
        if old != new:
            yield Change(name, old, new, ROUNDING)


def _judge(key: str, earlier: Any, now: Any, first_other: int | None, effects: dict[str, str]) -> Change:
    for known, effect in effects.items():
        if key == known or (known.endswith(".") and key.startswith(known)):
            return Change(key, earlier, now, effect)
    if key in SCHEDULE:
        if first_other is None:
            return Change(key, earlier, now, "iterations still to come")
        return Change(key, earlier, now, f"the learning rate of iteration {first_other} would be another one", True)
    return Change(key, earlier, now, "completed iterations were trained with the earlier value", refused=True)


def _like(value: Any, earlier: Any) -> Any:
    """``earlier`` with the brackets of ``value``: a file has no tuples."""
    return tuple(earlier) if isinstance(value, tuple) and isinstance(earlier, list) else earlier


MOST_CHANGES = 4  # named in a refusal


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run starts from, and the run that wrote it; both None for a run from its beginning.

    is_branch: it is another run's. is_switch: and has one box head, where this one trains a cascade.
    """

    checkpoint: Path | None = None
    run: RunDir | None = None
    is_branch: bool = False
    is_switch: bool = False


def find_origin(
    run_dir: RunDir, store: Checkpointer, resume: bool, branch_from: Path | None = None, switch: bool = False
) -> Origin:
    """With ``resume`` the run's own newest valid checkpoint; else ``branch_from``, a ``switch`` or not; else nothing.

    A branch that has no checkpoint of its own yet begins again at its parent's. Raises UserError when the folder is
    not a branch of ``branch_from``, or when no checkpoint is left undamaged.
    """
    if resume and run_dir.holds_run():
        branch_from, switch = _recorded_parent(run_dir, branch_from, switch)
        if own := store.newest_valid():
            return Origin(own, RunDir(run_dir.path, writes=False))
    elif resume and not branch_from and run_dir.parent.exists():  # a branch that was cut off at once
        branch_from, switch = _recorded_parent(run_dir, None, switch)
    elif resume and not branch_from:
        logger.info(f"--resume: no run in {run_dir.path} yet, this starts it")
    if not branch_from:
        return Origin()
    checkpoint = find_checkpoint(branch_from)
    folder = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    parent = RunDir(folder, writes=False)
    flag = "--switch-from" if switch else "--branch-from"
    if not (checkpoint.is_file() and parent.config.is_file() and parent.environment.is_file()):
        raise UserError(
            f"{flag} {branch_from}: expected a checkpoint in the folder of its run, with config.yaml and "
            f"environment.json; {'no such file' if not checkpoint.is_file() else f'{folder} is no run folder'}"
        )
    if reason := Checkpointer(checkpoint.parent).damage(checkpoint.name):
        raise UserError(
            f"{flag} {checkpoint} is damaged ({reason}); branch off another checkpoint of {folder}, or "
            "move that folder away and make its run anew"
        )
    return Origin(checkpoint, parent, is_branch=True, is_switch=switch)


def _recorded_parent(run_dir: RunDir, branch_from: Path | None, switch: bool) -> tuple[Path | None, bool]:
    """The checkpoint that this folder's run branched from, and whether it was a switch.

    Raises UserError when ``branch_from`` names another.
    """
    parent = json.loads(run_dir.parent.read_text()) if run_dir.parent.exists() else {}
    recorded = Path(parent["checkpoint"]) if parent else None
    inside = branch_from.parent / "checkpoints" / branch_from.name if branch_from else None
    if branch_from and inside and recorded not in (branch_from.resolve(), inside.resolve()):
        raise UserError(
            f"{'--switch-from' if switch else '--branch-from'} {branch_from}: {run_dir.path} holds a run that "
            + (f"branched from {recorded}" if recorded else "is not a branch")
            + "; leave the flag out to continue it, or name another folder: OUTPUT_DIR PATH"
        )
    return recorded, parent.get("switch", False)


def settled_seed(cfg: CfgNode, origin: Origin, run_dir: RunDir) -> int:
    """SEED; -1 means the one of the run that this one continues, else a new one."""
    source = origin.run or (run_dir if run_dir.holds_run() else None)
    if cfg.SEED >= 0:
        return cfg.SEED
    if source and source.config.exists():
        return source.read_config().SEED
    return int(np.random.SeedSequence().generate_state(1)[0] >> 1)


def restore(cfg: CfgNode, backend: str, state: State, origin: Origin) -> list[dict[str, float]]:
    """Fill ``state`` and return the unfinished window of metrics that belongs to it.

    Raises UserError for a checkpoint of another backend, one that does not fit, or one beyond MAX_ITER.
    """
    if origin.checkpoint is None:
        if cfg.MODEL.WEIGHTS:
            logger.info(load_weights(state.model, cfg.MODEL.WEIGHTS, backend, cfg))
        return []
    saved = read_checkpoint(origin.checkpoint)
    scheme = scheme_of(saved.get("model", {}))
    if scheme and scheme.library != backend:
        raise UserError(
            f"checkpoint {origin.checkpoint} is of the {scheme.library} backend, this is {backend}: only the one that "
            f"began a run can continue it; give --backend {scheme.library}"
        )
    if origin.is_branch and origin.run:
        refuse_other_model(origin, cfg, saved["iteration"] + 1)
    if origin.is_switch:
        saved = switched(saved, backend, len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS), origin.checkpoint)
    try:
        state.load_state_dict(saved)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"checkpoint {origin.checkpoint} does not fit this recipe ({str(error).splitlines()[0]}); "
            "resume with the MODEL.* and SOLVER.* keys that the run was started with"
        ) from None
    if state.iteration > cfg.SOLVER.MAX_ITER:
        raise UserError(
            f"checkpoint {origin.checkpoint} has {state.iteration} iterations behind it, SOLVER.MAX_ITER is "
            f"{cfg.SOLVER.MAX_ITER}; raise it, or name another folder: OUTPUT_DIR PATH"
        )
    if origin.is_branch and state.iteration == cfg.SOLVER.MAX_ITER:
        raise UserError(
            f"{origin.checkpoint} has all of SOLVER.MAX_ITER {cfg.SOLVER.MAX_ITER} iterations behind it, so nothing "
            "would be trained; give an earlier checkpoint, which --keep-at keeps, or a longer schedule"
        )
    return saved.get("window", [])


def refuse_other_model(origin: Origin, cfg: CfgNode, completed: int) -> None:
    """Raise UserError when the keys of the model are not those of the run that the checkpoint is from."""
    changes = config_changes(origin.run.read_config(), cfg, completed, origin.is_switch)
    other_model = [change for change in changes if change.what.startswith("MODEL.")]
    heads = not origin.is_switch and any(change.what == "MODEL.ROI_HEADS.NAME" for change in other_model)
    hint = "; a cascade goes on from a plain run with --switch-from" if heads else ""
    refuse_changes(
        other_model, f"{'--switch-from' if origin.is_switch else '--branch-from'} {origin.checkpoint}", completed, hint
    )


def switched(saved: dict[str, Any], backend: str, stages: int, checkpoint: Path) -> dict[str, Any]:
    """A plain detector's checkpoint as that of a cascade: its weights go to the stages, momentum starts anew."""
    try:
        model = to_cascade(saved["model"], backend, stages)
    except UserError as problem:
        raise UserError(f"--switch-from {checkpoint}: {problem}") from None
    logger.info(
        f"switching to a cascade: {stages} stages begin as copies of the box head of {checkpoint}, their one box as "
        "the mean over its classes; momentum starts at 0"
    )
    return {**saved, "model": model, "optimizer": None, "window": []}


def report_start(cfg: CfgNode, environment: dict[str, Any], origin: Origin, completed: int) -> None:
    """Log what is continued and every difference with its effect; raises UserError for one that alters the past."""
    if origin.run is None or origin.checkpoint is None:
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


def refuse_changes(changes: Iterable[Change], what: str, completed: int, hint: str = "") -> None:
    """Raise UserError when one of ``changes`` would alter the completed iterations of ``what``."""
    lines = [f"  {change}" for change in changes if change.refused]
    if lines:
        more = [f"  and {len(lines) - MOST_CHANGES} more"] if len(lines) > MOST_CHANGES else []
        head = f"{what} cannot be continued like this after {completed} iterations:"
        mend = f"  keep the earlier values, or start another run: OUTPUT_DIR PATH{hint}"
        raise UserError("\n".join([head, *lines[:MOST_CHANGES], *more, mend]))


def begin_branch(run_dir: RunDir, origin: Origin, completed: int) -> None:
    """Record the parent, and take over what it wrote about the shared iterations."""
    if origin.checkpoint and origin.run and run_dir.writes:
        digest = sha256_of(origin.checkpoint)
        content = {
            "checkpoint": str(origin.checkpoint.resolve()),
            "sha256": digest,
            "completed_iterations": completed,
            "switch": origin.is_switch,
        }
        run_dir.write_json(run_dir.parent.name, content)
        keep_lines(origin.run.metrics, run_dir.metrics, completed)
