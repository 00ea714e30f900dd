"""What came of a study's runs, from their folders: what tables, figures and the report are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fvcore.common.config import CfgNode

from scratch_det.config import flatten
from scratch_det.errors import DataError
from scratch_det.files import completed
from scratch_det.study.experiment import PRETRAIN, SEARCH, TRAIN, Experiment
from scratch_det.study.standing import FINISHED, Standing, read_rows
from scratch_det.study.weights import weights_sha256

LOSS = "total_loss"
SCORES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "top1", "top5")  # of what is named task/score; not those by class
DECIMALS = 4  # in results/ and out of run folders, so that both give the same tables and figures

Curve = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Outcome:
    """What is known of one run.

    Attributes:
        run: which it is.
        state: as in ``standing``.
        start: completed iterations of the checkpoint that it branched off; 0 for a run of its own.
        iteration: how far it is.
        metrics: of its last evaluation, in percent: "bbox/AP", "segm/AP50", "bbox_TTA/AP", "classification/top1", ...
        curves: (completed iterations, value) of the same and of LOSS, those before ``start`` included.
        error: why it failed.
        weights_sha256: of a finished training whose model_final.pth is still there; see ``weights``.
        found: by a finished search, as "KEY VALUE, KEY VALUE".
    """

    run: Experiment
    state: str
    start: int
    iteration: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)
    error: str = ""
    weights_sha256: str = ""
    found: str = ""

    @property
    def shares(self) -> bool:
        """Whether other schedules' numbers come from the same first iterations as this one's."""
        return self.start > 0


def collect(standings: Sequence[Standing], out: Path) -> list[Outcome]:
    """The outcomes of a study in ``out``; of runs that have not begun too."""
    return [
        Outcome(
            run=standing.job.run,
            state=standing.state,
            start=standing.job.start,
            iteration=standing.iteration,
            metrics={name: round(value, DECIMALS) for name, value in standing.metrics.items() if _is_shown(name)},
            curves=read_curves(out / standing.job.name / "metrics.json", standing.job.run.iterations),
            error=standing.error,
            weights_sha256=_weights(standing, out),
            found=_found(standing, out),
        )
        for standing in standings
    ]


def read_curves(path: Path, last: int) -> dict[str, Curve]:
    """By name, of a run of ``last`` iterations; after a resume one may occur twice, of which the last one counts."""
    points: dict[str, dict[int, float]] = {}
    for row in read_rows(path):
        for name, value in row.items():
            if "iteration" in row and (name == LOSS or _is_shown(name)) and isinstance(value, int | float):
                points.setdefault(name, {})[completed(row, last)] = round(float(value), DECIMALS)
    return {name: tuple(sorted(found.items())) for name, found in sorted(points.items())}


def _weights(standing: Standing, out: Path) -> str:
    if standing.state != FINISHED or standing.job.run.kind not in (TRAIN, PRETRAIN):
        return ""
    return weights_sha256(out / standing.job.name / "checkpoints/model_final.pth")


def _found(standing: Standing, out: Path) -> str:
    if standing.state != FINISHED or standing.job.run.kind != SEARCH:
        return ""
    path = out / standing.job.name / "best.yaml"
    try:
        values = flatten(CfgNode.load_cfg(path.read_text()))
    except Exception as error:  # whatever yaml and yacs make of a file that was edited
        raise DataError(f"{path} is not as the search wrote it ({str(error).splitlines()[0]}); restore it") from None
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _is_shown(name: str) -> bool:
    return name.partition("/")[2] in SCORES
