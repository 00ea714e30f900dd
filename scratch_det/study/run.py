"""One run of a study: a training, a pre-training, an evaluation or a search."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scratch_det.config.schedule import ITERATIONS_PER_X, kx_schedule, shared_prefix

CONFIGS = Path("configs")
SWITCH_BEFORE_END = 3  # of the kx schedule: the paper's last 270k iterations (section 5.1)
SCRATCH, PRETRAINED = "scratch", "pretrained"
TRAIN, PRETRAIN, SEARCH, EVALUATE = "train", "pretrain", "search", "evaluate"


@dataclass(frozen=True)
class Run:
    """One run: a training, a pre-training, an evaluation of another run's weights, or a search's trainings.

    Attributes:
        name: of its folder, and of its recipe unless ``recipe`` says otherwise.
        places: of the paper, such as "table1", or of a study that mirrors it, such as "digits/table1", or own.PLACE.
        shown: the row, column or curve there.
        init: SCRATCH or PRETRAINED.
        k: of the kx schedule; 0 for a run that follows none and has a ``length`` in iterations instead.
        expected: what the paper reports, in percent by metric; empty where it only shows a curve.
        trunk: the run of the same model whose checkpoint after ``branch_at`` iterations this one may start from.
        folder: the recipe's, below configs/; an absolute path where it is elsewhere.
        is_switch: it does start there, and goes on as a cascade.
        evaluates: the run whose final weights are evaluated; nothing is trained.
        per_x: iterations of 1x.
        seed: of a run that is repeated with others; None for what the recipe says.
        pretraining: the run whose backbone.pth it starts from.
        kind: TRAIN, PRETRAIN, SEARCH or EVALUATE: which tool it is.
        found_by: the search whose best values it is trained with.
        processes: how many it needs where their number shapes the result, as BN's does.
        flags: further words of its command.
        changes: to its recipe, "KEY", "VALUE", "KEY", ...
        grid: of a search: its file, see ``scratch_det.study.search``; points: how many runs that are.
        apply_to: of a search: recipes that get its best values.
    """

    name: str
    places: tuple[str, ...]
    shown: str
    init: str
    k: int
    expected: dict[str, float] = field(default_factory=dict)
    trunk: str | None = None
    folder: str = "COCO-InstanceSegmentation"
    length: int = 0
    is_switch: bool = False
    evaluates: str | None = None
    per_x: int = ITERATIONS_PER_X
    recipe: str = ""
    seed: int | None = None
    pretraining: str | None = None
    kind: str = TRAIN
    found_by: str | None = None
    processes: int | None = None
    flags: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    grid: str = ""
    points: int = 1
    apply_to: tuple[str, ...] = ()

    @property
    def config(self) -> Path:
        """The recipe, from the repository's root or as an absolute path."""
        return CONFIGS / self.folder / f"{self.recipe or self.name}.yaml"

    @property
    def iterations(self) -> int:
        """Of the whole run, of all points of a search."""
        return 0 if self.kind == EVALUATE else self.points * (self.length or kx_schedule(self.k, self.per_x).max_iter)

    def branch_at(self, trunk: "Run | None") -> int:
        """Completed iterations of the checkpoint of ``trunk`` that this run starts from; 0 without a trunk."""
        if trunk is None:
            return 0
        if self.is_switch:
            return self.iterations - SWITCH_BEFORE_END * self.per_x
        return shared_prefix(kx_schedule(self.k, self.per_x), kx_schedule(trunk.k, trunk.per_x))


def schedules(
    name: str,
    places: str,
    reported: Mapping[int, dict[str, float]],
    more: Mapping[int, str] | None = None,
    shown: str = "{init}, {k}x",
    **fields: Any,
) -> list[Run]:
    """Runs of one model that differ only in length, the longest first: the others branch off it.

    Args:
        name: begins with the initialisation, unless ``fields`` has it; has "{k}" where there are several.
        places: of all runs, separated by spaces; ``more``: of some, by k.
        reported: ``expected`` of each run, by k.
        fields: others of Run.
    """
    init, longest = fields.pop("init", name.partition("_")[0]), max(reported)
    return [
        Run(
            name=name.format(k=k),
            places=(*places.split(), *(more or {}).get(k, "").split()),
            shown=shown.format(init=init, k=k),
            init=init,
            k=k,
            expected=expected,
            **{"trunk": None if k == longest else name.format(k=longest), **fields},
        )
        for k, expected in reported.items()
    ]


def cascade_runs(
    plain: Run, test_aug: tuple[str, ...], reported: dict[str, float], reported_tta: dict[str, float], **fields: Any
) -> list[Run]:
    """``plain`` with a cascade, which from scratch follows plain training; and that, evaluated with test aug."""
    name, trunk = plain.name.replace("mask_rcnn", "cascade_mask_rcnn"), plain.name if plain.init == SCRATCH else None
    cascade = replace(plain, name=name, shown=f"{plain.shown}, cascade", expected=reported, trunk=trunk,
                      is_switch=trunk is not None, **fields)  # fmt: skip
    expected = {metric.replace("/", "_TTA/"): value for metric, value in reported_tta.items()}
    evaluation = replace(cascade, name=f"{name}_test_aug", recipe=name, changes=test_aug, expected=expected,
                         shown=f"{cascade.shown}, test aug", trunk=None, is_switch=False, pretraining=None,
                         kind=EVALUATE, evaluates=name)  # fmt: skip
    return [cascade, evaluation]
