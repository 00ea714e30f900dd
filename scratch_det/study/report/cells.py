"""What one cell of a table says of one run, or of its repetitions with other seeds."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scratch_det.study.paper import SCRATCH
from scratch_det.study.records import DECIMALS, FAILED, FINISHED, Record
from scratch_det.study.run import EVALUATE, Run

Known = Mapping[str, Record]  # by the run's name


@dataclass(frozen=True)
class Cell:
    """A metric, such as "bbox/AP", of ``runs`` that differ in their seed alone."""

    runs: tuple[Run, ...]
    metric: str

    @property
    def expected(self) -> float | None:
        """What the paper reports, in percent."""
        found = (run.expected.get(metric_of(run, self.metric)) for run in self.runs)
        return next((value for value in found if value is not None), None)

    def values(self, known: Known) -> list[float]:
        """Of the finished runs, in percent."""
        done = [known[run.name] for run in self.runs if is_finished(run, known)]
        found = [outcome.metrics.get(metric_of(outcome.run, self.metric), math.nan) for outcome in done]
        return [round(value, DECIMALS) for value in found if math.isfinite(value)]

    def ours(self, known: Known, marked: set[str]) -> str:
        """The mean, with the deviation where there are several; how far it is where no run is finished."""
        if values := self.values(known):
            spread = f" ± {statistics.stdev(values):.1f} (n = {len(values)})" if len(values) > 1 else ""
            return f"{statistics.mean(values):.1f}{spread}{'†' if any(run.name in marked for run in self.runs) else ''}"
        there = [known[run.name] for run in self.runs if run.name in known]
        if any(outcome.state == FAILED for outcome in there):
            return "failed"
        for outcome in there:
            if outcome.state != FINISHED and (curve := outcome.curves.get(metric_of(outcome.run, self.metric))):
                iteration, value = curve[-1]
                return f"({value:.1f} at {iteration:,} of {outcome.run.iterations:,})"
        return "-"

    def beside_paper(self, known: Known, marked: set[str]) -> str:
        """The paper's number / ours / the difference."""
        values, expected = self.values(known), self.expected
        paper, ours = "-" if expected is None else f"{expected:.1f}", self.ours(known, marked)
        difference = signed(statistics.mean(values) - expected) if values and expected is not None else "-"
        return "-" if paper == ours == "-" else f"{paper} / {ours} / {difference}"


def metric_of(run: Run, metric: str) -> str:
    """The metric's name in the run's results: a run that evaluates another one does so with test aug."""
    return metric.replace("/", "_TTA/") if run.kind == EVALUATE else metric


def label_of_norm(run: Run) -> str:
    """What a run is called among norms, where two schedules of other places are among them."""
    if not run.shown.startswith(SCRATCH):
        return run.shown
    return "SyncBN" if run.name.endswith("syncbn") else "GN"


def is_finished(run: Run, known: Known) -> bool:
    return run.name in known and known[run.name].state == FINISHED


def signed(difference: float) -> str:
    return f"{round(difference, 1) + 0.0:+.1f}"  # never -0.0


def difference(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Of two means; with its standard error where both are of several seeds."""
    if not (ours and theirs):
        return "-"
    text = signed(statistics.mean(ours) - statistics.mean(theirs))
    if min(len(ours), len(theirs)) == 1:
        return text
    return f"{text} ± {math.sqrt(sum(statistics.variance(values) / len(values) for values in (ours, theirs))):.1f}"


def sharing(runs: Iterable[Run], known: Known) -> set[str]:
    """The finished ones among ``runs`` whose first iterations are also those of another one among them."""
    roots = {run.name: _root(known[run.name], known) for run in runs if is_finished(run, known)}
    count = Counter(roots.values())
    return {name for name, root in roots.items() if count[root] > 1}


def _root(outcome: Record, known: Known) -> str:
    """The run whose first iterations an outcome rests on."""
    run = outcome.run
    if run.evaluates:
        return _root(known[run.evaluates], known) if run.evaluates in known else run.evaluates
    return str(run.trunk) if outcome.shares else run.name
