"""What the text of a study says in numbers: each is a sum over runs of one seed, with its interval over the seeds.

Intervals are of 95 %, by Student's t. A sum over runs of one seed, such as a difference between two of them, loses what
the seed does to both.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import mean

from scratch_det.study.records import Record
from scratch_det.study.report.differences import half_of, scores
from scratch_det.study.run import Claim

HEADER = ("in percent", "estimate", "95 % interval", "n", "excludes 0")


def values_of(claim: Claim, records: Mapping[str, Sequence[Record]]) -> dict[int | None, float]:
    """The sum by seed, of the seeds whose runs are all finished; ``records``: the repetitions by the run's name."""
    terms = [(factor, scores(records.get(name, ()), metric)) for factor, name, metric in claim.terms]
    seeds = set.intersection(*({*found} for _, found in terms))
    return {seed: sum(factor * found[seed] for factor, found in terms) for seed in sorted(seeds, key=str)}


def rows(claims: Sequence[Claim], records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Estimate, interval, number of seeds, whether the interval is on one side of 0; of claims with a finished seed."""
    groups: dict[str, list[Record]] = {}
    for one in records:
        groups.setdefault(one.run.repeats, []).append(one)
    found = list[tuple[str, ...]]()
    for claim in claims:
        if not (values := [*values_of(claim, groups).values()]):
            continue
        middle, half = mean(values), half_of(values) if len(values) > 1 else math.nan
        bounds = "-" if math.isnan(half) else f"{middle - half:+.1f} to {middle + half:+.1f}"
        is_apart = "" if math.isnan(half) else "yes" if abs(middle) > half else "no"
        found.append((claim.text, f"{middle:+.1f}", bounds, str(len(values)), is_apart))
    return found
