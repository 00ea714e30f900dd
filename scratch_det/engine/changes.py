"""The changes that are allowed when a run is continued. Never imports torch: a finished run is reported at once.

A continued run has to end as if it had been one run from the beginning. So a change may only affect later iterations; a
change that would have altered the completed iterations is a UserError.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from fvcore.common.config import CfgNode

from scratch_det.config.choices import RESIZE, SGD
from scratch_det.config.load import flatten, plain, set_key
from scratch_det.config.schedule import is_multi_step, learning_rate
from scratch_det.engine.run_dir import ANEW, Facts, RunDir
from scratch_det.errors import UserError
from scratch_det.evaluation.metrics import format_table
from scratch_det.log import logger
from scratch_det.reading import read_json

PROJECTS = {"INPUT.AUGMENTATION": RESIZE, "SOLVER.OPTIMIZER": SGD}  # the values without --project
EVALUATION = "evaluations from now on"
OTHER_ORDER = "some have gained their first object or lost their last one, so other images come from now on"
ROUNDING = "the same computation, last digits may differ"
EFFECTS = {  # keys, or sections ending in a dot, that do not affect the weights of completed iterations
    "OUTPUT_DIR": "the folder has moved",
    "DATASETS.CLASS_NAMES": "names only",
    "DATALOADER.NUM_WORKERS": "speed only",
    "SOLVER.CHECKPOINT_PERIOD": "checkpoints from now on",
    "MODEL_EMA.": "only the average of the weights changes, from now on",
    "SOLVER.REFERENCE_WORLD_SIZE": "already counted in",
    "WRITERS": "what is written from now on",
    "VIS_PERIOD": "pictures from now on",
    **dict.fromkeys(("MODEL.DEVICE", "MODEL.CHANNELS_LAST", "MODEL.COMPILE", "FLOAT32_PRECISION", "CUDNN_BENCHMARK"),
                    ROUNDING),
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
NEEDED = (*SCHEDULE, "SEED")  # of a run that continues
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
    """Differences of two environment.json: data, backend, number of processes, versions.

    A json may change whose images and categories are the same in the same order: one that was repaired.
    """
    changes = []
    for name in sorted(earlier["datasets"].keys() & now["datasets"].keys()):
        is_trained = name in earlier["trained_on"]
        old, new = (content["datasets"][name] for content in (earlier, now))
        is_repaired = old.get("images_sha256") == new.get("images_sha256") is not None
        effect = "other annotations of the same images from now on" if is_repaired else "other images from now on"
        effect = effect if is_trained else EVALUATION
        effects = {"used_images_sha256": OTHER_ORDER} if is_trained and is_repaired else {}
        for key in (key for key in new if key.endswith("_sha256") and key in old):
            what = f"the {key.removesuffix('_sha256').replace('_', ' ')} of {name} (sha256)"
            was, now_is = (str(content[key])[:12] for content in (old, new))
            rejected = is_trained and not is_repaired
            changes.append(Change(what, was, now_is, effects.get(key, effect), rejected))
        if "objects" in old:
            changes.append(Change(f"the objects of {name}", old["objects"], new.get("objects"), effect))
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
    if lines := [f"  {change}" for change in changes if change.rejected]:
        more = [f"  and {len(lines) - MOST_CHANGES} more"] if len(lines) > MOST_CHANGES else []
        head = f"{what} cannot be continued like this after {completed} iterations:"
        fix = f"  keep the earlier values, or start another run: OUTPUT_DIR PATH{hint}"
        raise UserError("\n".join([head, *lines[:MOST_CHANGES], *more, fix]))


def report_finished(cfg: CfgNode, run_dir: RunDir) -> None:
    """Log that the run is complete. Raises UserError when the recipe now describes another run.

    A SEED of -1 becomes the seed of the run.
    """
    earlier = run_dir.read_config(NEEDED)
    cfg.SEED = earlier.SEED if cfg.SEED < 0 else cfg.SEED
    result = read_json(run_dir.result, Facts, ANEW)
    completed, ended_early = result.get("iteration") or 0, result.get("ended_early")
    if not ended_early and completed != cfg.SOLVER.MAX_ITER:
        raise UserError(
            f"{run_dir.path} holds a finished run of {completed} iterations, SOLVER.MAX_ITER is "
            f"{cfg.SOLVER.MAX_ITER}; name another folder: OUTPUT_DIR PATH{BRANCH_HINT if is_multi_step(cfg) else ''}"
        )
    changes = config_changes(earlier, cfg, completed)
    reject_changes(changes, f"the finished run in {run_dir.path}", completed)
    for change in changes:
        logger.warning(f"  {change.what} is {change.now!r}, was {change.earlier!r}: no effect, the run is finished")
    logger.info(f"{run_dir.path} holds a finished run of {completed} iterations; nothing to do")
    if ended_early:
        final = run_dir.checkpoints / "model_final.pth"
        logger.info(f"  {ended_early}; to go on: --branch-from {final} TEST.PATIENCE 0 OUTPUT_DIR PATH")
    if "bbox" in result.get("metrics", ()):
        logger.info("\n" + format_table(result["metrics"]))
