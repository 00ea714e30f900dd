"""What the seeds of a study say: differences between runs, claims, the sentence on a page, and bands of curves.

Intervals are of 95 %, by Student's t over the seeds. Nothing is said to be ahead or behind whose interval includes 0.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from statistics import fmean, mean, stdev
from typing import NamedTuple

from scipy.stats import t, ttest_ind

from scratch_det.evaluation.metrics import INITS, METRICS, SCRATCH, colors_of
from scratch_det.study import own
from scratch_det.study.records import DECIMALS, EPOCHS, FINISHED, Curve, Record
from scratch_det.study.run import TRAIN, Claim, Run

BOX = "bbox/AP"
Seeds = Mapping[int | None, float]  # a metric by seed
CLAIMS_HEADER = ("box AP unless it says otherwise, in percent", "estimate", "n", "its interval excludes 0")
CLAIMS_NOTE = "±: half of the 95 % interval, by Student's t over n pairs of equal seeds."


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


def rows_of(records: Iterable[Record]) -> Callable[[Run], str]:
    """The row of a matrix that a run is in; else, and of the first random one of ``records``, the initialisation."""
    rows = {one.run.name: one.run.shown.split(", ")[0] for one in records if own.MATRIX in one.run.places}
    first = next((rows[one.run.name] for one in records if one.run.name in rows and one.run.init == SCRATCH), None)
    return lambda run: run.init if rows.get(run.name, first) == first else rows[run.name]


def line_colors(records: Sequence[Record], label: Callable[[Run], str]) -> dict[str, str]:
    """The colour of each line by its label; only the first random row of a matrix has random initialisation's."""
    row_of = rows_of(records)
    return colors_of({label(run): row_of(run) if run.init == SCRATCH else run.init
                      for run in (one.run for one in records)})  # fmt: skip


def grouped(records: Iterable[Record], key: Callable[[Record], str]) -> dict[str, list[Record]]:
    """By ``key``, both in the order of ``records``."""
    groups: dict[str, list[Record]] = {}
    for one in records:
        groups.setdefault(key(one), []).append(one)
    return groups


def stated(
    claims: Sequence[Claim], records: Sequence[Record]
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...], str]:
    """Header, rows and note: of each claim its estimate, interval, number of seeds, and verdict.

    A claim is a sum over runs of one seed, such as a difference between two of them, in which what the seed does to
    both is lost; taken over the seeds whose runs are all finished.
    """
    groups, rows = grouped(records, lambda one: one.run.repeats), list[tuple[str, ...]]()
    for claim in claims:
        terms = [(factor, scores(groups.get(name, ()), metric)) for factor, name, metric in claim.terms]
        seeds = sorted(set.intersection(*({*found} for _, found in terms)), key=str)
        values = {seed: sum(factor * found[seed] for factor, found in terms) for seed in seeds}
        gap = difference(values, dict.fromkeys(values, 0.0))
        verdict = ("yes" if gap.side else "no") if len(values) > 1 else ""
        rows.append((claim.text, str(gap), str(len(values)), verdict))
    return CLAIMS_HEADER, tuple(rows), CLAIMS_NOTE


def headlines(records: Sequence[Record]) -> list[str]:
    """A sentence for each pair of initialisations of a detector, random and another one, trained equally long.

    They are of the first table or figure that has such pairs; none where there is none.
    """
    row_of = rows_of(records)
    for place in dict.fromkeys(place for one in records for place in one.run.places):
        trained: dict[tuple[str, str], dict[str, list[Record]]] = {}  # by detector and row, by length
        for one in sorted(records, key=lambda one: one.run.iterations):
            if place in one.run.places and one.run.kind == TRAIN and scores([one], BOX):
                length = f"{one.run.k}x" if one.run.k else f"{one.run.iterations:,} iterations"
                trained.setdefault((_detector(one.run), row_of(one.run)), {}).setdefault(length, []).append(one)
        found = []
        for (detector, row), theirs in trained.items():
            is_random = any(one.run.init == SCRATCH for group in theirs.values() for one in group)
            ours = {} if is_random else trained.get((detector, SCRATCH), {})
            pairs = {length: (ours[length], theirs[length]) for length in theirs if length in ours}
            if pairs and all(len({one.run.shown for one in both}) == 1 for pair in pairs.values() for both in pair):
                gaps = {length: difference(*(scores(both, BOX) for both in pair)) for length, pair in pairs.items()}
                other = INITS[row][0] if row in INITS else row
                run = next(iter(ours.values()))[0].run
                first = run.shown.split(", ")[0] if own.MATRIX in run.places else SCRATCH
                found.append(f"{detector}{': ' * bool(detector)}{_sentence(first, other, gaps)}")
        if found:
            return found
    return []


def _detector(run: Run) -> str:
    """What a run's name and label say of it besides initialisation and length."""
    if own.PLACE in run.places:  # of which nothing else is known
        return ""
    parts = [part for part in run.shown.split(", ")[own.MATRIX in run.places :] if part not in (run.init, f"{run.k}x")]
    return ", ".join(dict.fromkeys(filter(None, (model_of(run.name), *parts))))


def _sentence(name: str, other: str, gaps: Mapping[str, Difference]) -> str:
    """On random initialisation, ``name``, beside the ``other``: their difference by length, the longest last."""
    lengths, behind = [*gaps], [length for length, gap in gaps.items() if gap.side < 0]
    first, last, end = lengths[0], lengths[-1], gaps[lengths[-1]]
    # From here on the mean is not below:
    reached = [last, *takewhile(lambda length: gaps[length].value >= 0, lengths[::-1])][-1]
    clearest = max(lengths, key=lambda length: abs(gaps[length].value) * abs(gaps[length].side))
    numbers = ", ".join(f"{gap} at {length}" for length, gap in gaps.items()
                        if length in (first, reached, last) or (gap.side and length == clearest))  # fmt: skip
    measure = f"In {METRICS[BOX].label}, {name} minus {other} is {numbers}"
    if math.isnan(end.half):
        return f"{measure}. One seed, so no interval: neither is said to be ahead."
    if end.side < 0:
        claim = f"{name} does not catch up with {other} by {last}"
    elif behind and end.value >= 0:
        claim = f"{name} catches up with {other} at {reached}"
        claim += f" and is ahead at {last}" * (end.side > 0 and reached != last)
    elif end.side > 0:
        claim = f"{name} is ahead of {other} at {last}"
    else:
        claim = f"{name} and {other} cannot be told apart at {last}"
    seeds = f"{end.pairs} pairs of equal seeds" if end.pairs else "seeds that are not the same"
    return f"{claim}. {measure} (95 % intervals, {seeds})."


# Curves ----------------------------------------------------------------------------------------------------------


class Band(NamedTuple):
    """The curves of a schedule's seeds, of so many: their mean, the lowest and the highest. ``run``: the first one."""

    run: Run
    mean: Curve
    low: Curve
    high: Curve
    seeds: int


def bands_of(records: Sequence[Record], metric: str, label: Callable[[Run], str]) -> list[Band]:
    """Of each schedule of each label, in the order of ``records``.

    The mean is over the seeds that every schedule with a finished one has finished, and the iterations that they have:
    a branch's mean over other seeds than its trunk's would not begin on the trunk's.
    """
    groups: dict[str, dict[str, dict[int | None, Record]]] = {}  # by label, schedule and seed
    for one in records:
        if metric in one.curves:
            groups.setdefault(label(one.run), {}).setdefault(one.run.shown, {})[one.run.seed] = one
    drawn, bands = {one.run.name for one in records if metric in one.curves}, []
    for schedules in (group.values() for group in groups.values()):
        done = [{seed for seed, one in seeds.items() if one.state == FINISHED} for seeds in schedules]
        finished = set.intersection(*filter(None, done)) if any(done) else set()
        for seeds in schedules:
            curves = {seed: own_part(one, metric, drawn) for seed, one in seeds.items()}
            chosen = finished & curves.keys() or {max(curves, key=lambda seed: len(curves[seed]))}
            points = [dict(curves[seed]) for seed in curves if seed in chosen]
            common = [iteration for iteration in points[0] if all(iteration in one for one in points)]
            mean, low, high = (
                tuple((x, pick([one[x] for one in points])) for x in common) for pick in (fmean, min, max)
            )
            bands.append(Band(next(iter(seeds.values())).run, mean, low, high, len(points)))
    return bands


def own_part(record: Record, metric: str, drawn: set[str]) -> Curve:
    """The curve after the branch point, from the trunk's last point on; all of it where the trunk is not drawn."""
    curve = record.curves[metric]
    if record.run.trunk not in drawn:
        return curve
    before = [point for point in curve if point[0] <= record.start]
    return (*before[-1:], *curve[len(before) :])
