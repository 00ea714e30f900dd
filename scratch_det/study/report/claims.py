"""What the text of a study says in numbers: each is a sum over runs of one seed, with its interval over the seeds.

A sum over runs of one seed, such as a difference between two of them, loses what the seed does to both.
"""

from collections.abc import Mapping, Sequence

from scratch_det.study.records import Record
from scratch_det.study.report.differences import difference, scores
from scratch_det.study.run import Claim

HEADER = ("box AP unless it says otherwise, in percent", "estimate", "n", "its interval excludes 0")
NOTE = "±: half of the 95 % interval, by Student's t over n pairs of equal seeds."


def values_of(claim: Claim, records: Mapping[str, Sequence[Record]]) -> dict[int | None, float]:
    """The sum by seed, of the seeds whose runs are all finished; ``records``: the repetitions by the run's name."""
    terms = [(factor, scores(records.get(name, ()), metric)) for factor, name, metric in claim.terms]
    seeds = set.intersection(*({*found} for _, found in terms))
    return {seed: sum(factor * found[seed] for factor, found in terms) for seed in sorted(seeds, key=str)}


def rows(claims: Sequence[Claim], records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Estimate with its interval, number of seeds, and the verdict; of claims with a finished seed."""
    groups: dict[str, list[Record]] = {}
    for one in records:
        groups.setdefault(one.run.repeats, []).append(one)
    found = list[tuple[str, ...]]()
    for claim in claims:
        if values := values_of(claim, groups):
            gap = difference(values, dict.fromkeys(values, 0.0))
            verdict = ("yes" if gap.side else "no") if len(values) > 1 else ""
            found.append((claim.text, str(gap), str(len(values)), verdict))
    return found
