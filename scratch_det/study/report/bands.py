"""The curves of the seeds of each schedule: their mean and range, of a branch the part after its trunk."""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

from scratch_det.study.records import FINISHED, Curve, Record
from scratch_det.study.report.differences import row_of
from scratch_det.study.run import Run


class Band(NamedTuple):
    """The curves of a schedule's seeds, of so many: their mean, the lowest and the highest. ``run``: the first one."""

    run: Run
    mean: Curve
    low: Curve
    high: Curve
    seeds: int


def bands_of(records: Sequence[Record], metric: str, label: Callable[[Run], str] = row_of) -> list[Band]:
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
