"""Differences between runs over their seeds, and the sentence on them that a study's page begins with.

Intervals are of 95 %, by Student's t over the seeds. Nothing is said to be ahead or behind whose interval includes 0.
"""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from statistics import mean, stdev
from typing import NamedTuple

from scipy.stats import t, ttest_ind

from scratch_det.evaluation.metrics import INITS, METRICS, SCRATCH
from scratch_det.study import own
from scratch_det.study.records import DECIMALS, EPOCHS, FINISHED, Record
from scratch_det.study.run import TRAIN, Run

BOX = "bbox/AP"
Seeds = Mapping[int | None, float]  # a metric by seed


class Difference(NamedTuple):
    """Of two means.

    Attributes:
        value: NaN where there is nothing to compare.
        half: of the 95 % interval; NaN where there is one seed.
        pairs: of equal seeds, whose differences these are; 0 where the seeds are others, or there is one.
    """

    value: float
    half: float = math.nan
    pairs: int = 0

    @property
    def side(self) -> int:
        """1 or -1 where the interval is on that side of 0, else 0."""
        return int(math.copysign(abs(self.value) > self.half, self.value))

    def __str__(self) -> str:
        half = "" if math.isnan(self.half) else f" ± {self.half:.1f}"
        return "-" if math.isnan(self.value) else f"{round(self.value, 1) + 0.0:+.1f}{half}"  # never -0.0


def difference(ours: Seeds, theirs: Seeds) -> Difference:
    """Of pairs where two seeds are shared, else of the means by Welch's test."""
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if len(pairs) > 1:
        return Difference(mean(pairs), half_of(pairs), len(pairs))
    if min(len(ours), len(theirs)) > 1:
        low, high = ttest_ind([*ours.values()], [*theirs.values()], equal_var=False).confidence_interval()
        return Difference((low + high) / 2, (high - low) / 2)
    return Difference(mean(ours.values()) - mean(theirs.values()) if ours and theirs else math.nan)


def half_of(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean."""
    return float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def interval(values: Sequence[float]) -> str:
    """The mean, with half of its interval where there are several."""
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else "-"
    return f"{mean(values):.1f} ± {half_of(values):.1f}"


def scores(records: Sequence[Record], metric: str) -> dict[int | None, float]:
    """Of the finished ones."""
    return {seed_of(one.run): round(one.metrics[metric], DECIMALS) for one in records
            if one.state == FINISHED and math.isfinite(one.metrics.get(metric, math.nan))}  # fmt: skip


def epochs(records: Sequence[Record]) -> str:
    """How often the finished trainings saw an image, in the mean; empty where nobody says."""
    found = {one.metrics[EPOCHS] for one in records if one.run.kind == TRAIN and EPOCHS in one.metrics}
    return " or ".join(f"{number:,.0f}" if number >= 10 else f"{number:.2g}" for number in sorted(found))


def seed_of(run: Run) -> int | None:
    """None for the recipe's own."""
    return run.about.get("seeds", [None])[0] if run.seed is None else run.seed


def model_of(name: str) -> str:
    """..._R_50_FPN_... -> R50; empty for a name without a model."""
    found = re.search(r"_([RX])_(\d+)", name)
    return "".join(found.groups()) if found else ""


def row_of(run: Run) -> str:
    """The row of a matrix that a run is in; else, and of the random one, the initialisation."""
    return run.shown.split(", ")[0] if own.MATRIX in run.places and run.init != SCRATCH else run.init


def headlines(records: Sequence[Record]) -> list[str]:
    """A sentence for each pair of initialisations of a detector, random and another one, trained equally long.

    They are of the first table or figure that has such pairs; none where there is none.
    """
    for place in dict.fromkeys(place for one in records for place in one.run.places):
        trained: dict[tuple[str, str], dict[str, list[Record]]] = {}  # by detector and row, by length
        for one in sorted(records, key=lambda one: one.run.iterations):
            if place in one.run.places and one.run.kind == TRAIN and scores([one], BOX):
                length = f"{one.run.k}x" if one.run.k else f"{one.run.iterations:,} iterations"
                trained.setdefault((_detector(one.run), row_of(one.run)), {}).setdefault(length, []).append(one)
        found = []
        for (detector, row), theirs in trained.items():
            ours = trained.get((detector, SCRATCH), {}) if row != SCRATCH else {}
            pairs = {length: (ours[length], theirs[length]) for length in theirs if length in ours}
            if pairs and all(len({one.run.shown for one in both}) == 1 for pair in pairs.values() for both in pair):
                gaps = {length: difference(*(scores(both, BOX) for both in pair)) for length, pair in pairs.items()}
                found.append(
                    f"{detector}{': ' * bool(detector)}{_sentence(INITS[row][0] if row in INITS else row, gaps)}"
                )
        if found:
            return found
    return []


def _detector(run: Run) -> str:
    """What a run's name and label say of it besides initialisation and length."""
    if own.PLACE in run.places:  # of which nothing else is known
        return ""
    parts = [part for part in run.shown.split(", ") if part not in (run.init, row_of(run), "random", f"{run.k}x")]
    return ", ".join(dict.fromkeys(filter(None, (model_of(run.name), *parts))))


def _sentence(other: str, gaps: Mapping[str, Difference]) -> str:
    """On random initialisation beside the ``other``: their difference by length, the longest last."""
    lengths, behind = [*gaps], [length for length, gap in gaps.items() if gap.side < 0]
    first, last, end = lengths[0], lengths[-1], gaps[lengths[-1]]
    # From here on the mean is not below:
    reached = [last, *takewhile(lambda length: gaps[length].value >= 0, lengths[::-1])][-1]
    clearest = max(lengths, key=lambda length: abs(gaps[length].value) * abs(gaps[length].side))
    numbers = ", ".join(f"{gap} at {length}" for length, gap in gaps.items()
                        if length in (first, reached, last) or (gap.side and length == clearest))  # fmt: skip
    measure = f"In {METRICS[BOX].label}, scratch minus {other} is {numbers}"
    if math.isnan(end.half):
        return f"{measure}. One seed, so no interval: neither is said to be ahead."
    if end.side < 0:
        claim = f"scratch does not catch up with {other} by {last}"
    elif behind and end.value >= 0:
        claim = f"scratch catches up with {other} at {reached}"
        claim += f" and is ahead at {last}" * (end.side > 0 and reached != last)
    elif end.side > 0:
        claim = f"scratch is ahead of {other} at {last}"
    else:
        claim = f"scratch and {other} cannot be told apart at {last}"
    seeds = f"{end.pairs} pairs of equal seeds" if end.pairs else "seeds that are not the same"
    return f"{claim}. {measure} (95 % intervals, {seeds})."
