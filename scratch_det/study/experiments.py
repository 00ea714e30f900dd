"""The paper's runs that this repository has recipes for: one entry a run, with its place and what the paper reports.

Runs of one model that differ in length alone share their beginning: the longest one is the trunk of the others, which
branch off where they first drop the learning rate.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from scratch_det.errors import UserError, did_you_mean
from scratch_det.schedule import kx_schedule, shared_prefix
from scratch_det.study import paper
from scratch_det.study.paper import PRETRAINED, SCRATCH

CONFIGS = Path("configs")


@dataclass(frozen=True)
class Experiment:
    """One training run.

    Attributes:
        name: also the recipe's.
        folder: the recipe's, below configs/.
        places: of the paper, such as "table1" or "figure4".
        shown: the row, column or curve there.
        init: SCRATCH or PRETRAINED.
        k: of the kx schedule; 0 for a run that follows none and has a ``length`` in iterations instead.
        expected: what the paper reports, in percent by metric; empty where it only shows a curve.
        trunk: the run whose checkpoint after ``branch_at`` iterations this one may start from.
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

    @property
    def config(self) -> Path:
        """The recipe, from the repository's root."""
        return CONFIGS / self.folder / f"{self.name}.yaml"

    @property
    def iterations(self) -> int:
        """Of the whole run, at 16 images each."""
        return self.length or kx_schedule(self.k).max_iter

    @property
    def branch_at(self) -> int:
        """Completed iterations of the trunk's checkpoint; 0 without a trunk."""
        return shared_prefix(kx_schedule(self.k), kx_schedule(find(self.trunk).k)) if self.trunk else 0


def experiments() -> list[Experiment]:
    """All runs, a trunk before its branches."""
    return [*_table1(), *_figure4(), *_train_aug(), *_small_data(), *_voc()]


def find(name: str) -> Experiment:
    """The run called ``name``. Raises UserError when there is none."""
    known = {experiment.name: experiment for experiment in experiments()}
    if name not in known:
        raise UserError(f"there is no experiment {name}{did_you_mean(name, list(known))}")
    return known[name]


def of_place(place: str) -> list[Experiment]:
    """The runs of a table or figure. Raises UserError when none has that place."""
    places = sorted({known for experiment in experiments() for known in experiment.places})
    if place not in places:
        raise UserError(f"no experiment of {place}{did_you_mean(place, places)}; there are {', '.join(places)}")
    return [experiment for experiment in experiments() if place in experiment.places]


def _kx_runs(
    stem: str, end: str, places: tuple[str, ...], init: str, expected: dict[int, dict]
) -> Iterator[Experiment]:
    """2x to 6x of one model: the 6x run and its branches."""
    trunk = f"{init}_{stem}_6x_{end}"
    for k in range(6, 1, -1):
        yield Experiment(
            name=f"{init}_{stem}_{k}x_{end}",
            places=places if k < 6 or "table1" not in places else (*places, "table2"),
            shown=f"{init}, {k}x",
            init=init,
            k=k,
            expected=expected.get(k, {}),
            trunk=None if k == 6 else trunk,
        )


def _table1() -> Iterator[Experiment]:
    for (depth, init), row in paper.TABLE1.items():
        expected = {k: {"bbox/AP": ap} for k, ap in row.items()}
        expected[6] = dict(zip(paper.METRICS, paper.TABLE2[depth, init], strict=True)) | expected[6]
        figure = "figure1" if depth == 50 else "figure3"
        yield from _kx_runs(f"mask_rcnn_R_{depth}_FPN", "gn", ("table1", figure), init, expected)


def _figure4() -> Iterator[Experiment]:
    for init in (SCRATCH, PRETRAINED):
        yield from _kx_runs("mask_rcnn_R_50_FPN", "syncbn", ("figure4",), init, {})


def _train_aug() -> Iterator[Experiment]:
    for depth in (50, 101):
        for init, k in ((SCRATCH, 9), (PRETRAINED, 6)):
            in_table3 = (depth, init) == (101, SCRATCH)
            yield Experiment(
                name=f"{init}_mask_rcnn_R_{depth}_FPN_{k}x_gn_train_aug",
                places=("figure5", "table3") if in_table3 else ("figure5",),
                shown=f"R{depth}, {init}, train aug",
                init=init,
                k=k,
                expected=dict(zip(paper.METRICS, paper.TABLE3["R101 train aug"], strict=True)) if in_table3 else {},
            )


def _small_data() -> Iterator[Experiment]:
    """35k images; what the paper reports holds for both initialisations with the hyper-parameters found for them."""
    found = {"bbox/AP": paper.IMAGES_35K}
    for name, init, k, expected in (
        ("pretrained_mask_rcnn_R_50_FPN_6x_gn_35k_old", PRETRAINED, 6, {}),
        ("pretrained_mask_rcnn_R_50_FPN_6x_gn_35k", PRETRAINED, 6, found),
        ("scratch_mask_rcnn_R_50_FPN_9x_gn_35k", SCRATCH, 9, found),
    ):
        with_old = ", hyper-parameters of 118k" if name.endswith("_old") else ""
        yield Experiment(name, ("figure7",), f"35k, {init}{with_old}", init, k, expected, folder="COCO-LowData")


def _voc() -> Iterator[Experiment]:
    for init, (length, mean_ap) in paper.VOC.items():
        yield Experiment(
            name=f"{init}_faster_rcnn_R_101_FPN_gn_{length // 1000}k",
            places=("voc",),
            shown=f"PASCAL VOC, {init}",
            init=init,
            k=0,
            expected={"bbox/AP50": mean_ap},
            folder="PascalVOC-Detection",
            length=length,
        )
