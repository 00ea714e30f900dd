"""The table of a matrix of initialisations: each one beside the random one, at equal iterations and at equal cost.

Cost is what Figure 2 counts, pixels seen, pre-training included.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import compress
from typing import NamedTuple

from scratch_det.evaluation.metrics import METRICS, SCRATCH
from scratch_det.study.experiments import pixels_seen, with_prefix
from scratch_det.study.paper import METRICS as PAPER_METRICS
from scratch_det.study.records import Record
from scratch_det.study.report.seeds import BOX, Seeds, difference, epochs, grouped, interval, scores
from scratch_det.study.run import Run

COMPARED = (BOX, "segm/AP")
NOTES = (
    "In percent. ±: half of the 95 % interval, by Student's t over n seeds; of a difference over pairs of equal seeds, "
    "where two runs or more share them. - random: the difference to random initialisation after as many iterations; "
    "- random, longest: to its longest training.",
    "Pixels: those that pre-training and training see. Random at that cost: the difference of box AP to the shortest "
    "training from random initialisation that sees as many pixels.",
    "The lengths of one initialisation and seed rest on the same first iterations.",
)


class Trained(NamedTuple):
    """All seeds of one initialisation in one column and length."""

    run: Run  # the first of them
    scores: Mapping[str, Seeds]  # by metric, of the finished ones
    epochs: str  # over the images of the column
    before: float  # pixels that its pre-training has seen, NaN where nobody says
    own: float

    @property
    def place(self) -> list[str]:
        """Column and length, if it has one: what it is compared in."""
        return self.run.shown.split(", ")[1:]

    @property
    def cost(self) -> float:
        return self.before + self.own


def matrix(records: Sequence[Record], known: Mapping[str, Record]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Header and rows: by column and length, in each the initialisations in the order of the file; no empty column.

    The first random one of a column is what the others are compared with.
    """
    groups = []
    for seeds in grouped(records, lambda one: one.run.shown).values():
        run, source = seeds[0].run, known.get(seeds[0].run.pretraining or "")
        found = {metric: scores(seeds, metric) for metric in PAPER_METRICS}
        groups.append(Trained(run, found, epochs(seeds), *pixels_seen(run, source.run if source else None)))
    metrics = [metric for metric in PAPER_METRICS if any(one.scores[metric] for one in groups)] or [BOX]
    columns = [one.place[0] for one in groups]
    groups.sort(key=lambda one: (columns.index(one.place[0]), one.run.iterations))
    gaps = [f"{METRICS[metric].label} - random" for metric in COMPARED if metric in metrics]
    gaps.append(f"{METRICS[BOX].label} - random, longest")
    labels = (METRICS[metric].label for metric in metrics)
    header = ["", *labels, "epochs", "n", *gaps, "pixels", "random at that cost"]
    rows = [_row(one, groups, metrics) for one in groups]
    used = [number == 0 or any(cells) for number, cells in enumerate(zip(*rows, strict=True))]
    return [*compress(header, used)], [tuple(compress(row, used)) for row in rows]


def _row(one: Trained, groups: Sequence[Trained], metrics: Sequence[str]) -> tuple[str, ...]:
    column = [other for other in groups if other.run.init == SCRATCH and other.place[0] == one.place[0]]
    equal = next((other for other in column if other.place == one.place), None)
    cells = [interval([*one.scores[metric].values()]) for metric in metrics]
    pixels = " + ".join(map(with_prefix, filter(None, (one.before, one.own))))
    gaps, at_cost = ["" for metric in COMPARED if metric in metrics], ""
    if equal is not one:
        theirs = equal.scores if equal else {metric: {} for metric in metrics}
        gaps = [str(difference(one.scores[metric], theirs[metric])) for metric in COMPARED if metric in metrics]
        nearest = min((other for other in column if other.cost >= one.cost), key=lambda other: other.cost, default=None)
        at_cost = "longer than any" if column and not math.isnan(one.cost) else "not known"
        if nearest:
            at_cost = f"{nearest.place[-1]}: {difference(one.scores[BOX], nearest.scores[BOX])}"
    longest = max(column, key=lambda other: other.run.iterations, default=one)  # the first such one, as above
    gaps.append("" if longest.place == one.place else str(difference(one.scores[BOX], longest.scores[BOX])))
    return (one.run.shown, *cells, one.epochs, str(max(map(len, one.scores.values()))), *gaps, pixels, at_cost)
