"""What may change between the two parts of one run, and what that does.

A resumed run continues its past, and a branch takes over another run's. So a change may only touch what is still to
come: whatever shaped the completed iterations has to be as it was.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fvcore.common.config import CfgNode

from scratch_det.config import flatten, plain, set_key
from scratch_det.config.augmentation import RESIZE
from scratch_det.config.curve import is_cosine, learning_rate
from scratch_det.config.solver_rules import SGD

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
    changing = completed if is_cosine(earlier) or is_cosine(now) else max(s.WARMUP_ITERS for s in solvers) + 1
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
