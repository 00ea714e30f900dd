"""A running study on the screen: one live table on a terminal, a line for every change elsewhere."""

import sys
import time
from collections.abc import Sequence, Set
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table

from scratch_det.evaluation.metrics import main_metrics
from scratch_det.log import clock, say_now
from scratch_det.study.records import BLOCKED, FAILED, FINISHED, RUNNING, Record, jobs_folder
from scratch_det.study.study import Study
from scratch_det.tables import aligned

HEADER = ("run", "state", "iteration", "AP", "eta", "")
SECONDS_BETWEEN_LINES = 60.0
SHOWN = [(name, metric.label.replace(" AP", "")) for name, metric in main_metrics().items()]  # below the header AP


class Board:
    """Context manager; ``show`` is called as often as one likes."""

    def __init__(self, study: Study, chosen: Set[str]):
        """``chosen``: names of the runs that the summary and its eta are of."""
        self.study, self.chosen = study, chosen
        self.live = Live(auto_refresh=False) if sys.stdout.isatty() else None
        self.states: dict[str, str] = {}
        self.began = self.last_line = time.monotonic()
        self.done_before: int | None = None  # iterations, when this start of the study began

    def __enter__(self) -> "Board":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.live:
            self.live.stop()

    def show(self, standings: Sequence[Record], tried: Set[str] = frozenset()) -> None:
        """Where everything stands now; those of ``tried`` that failed get no other trial."""
        line = self._line([standing for standing in standings if standing.run.name in self.chosen], tried)
        if self.live:
            self.live.update(_as_rich(standings, line), refresh=True)
            return
        for standing in standings:
            name, state = standing.run.name, standing.state
            if self.states.get(name, state) != state:
                say_now(f"{name}: {state}{'' if state == RUNNING else ' ' + ' '.join(_details(standing)).rstrip()}")
            self.states[name] = state
        if time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            say_now(line)

    def conclude(self, standings: Sequence[Record]) -> None:
        """What is worth knowing when nothing more happens."""
        for standing in standings:
            if standing.state != FINISHED:
                say_now(f"{standing.run.name}: {standing.state}: {standing.error}")
        if any(standing.state == FAILED for standing in standings):
            say_now(f"{jobs_folder(self.study.out)} has all that they said")
        say_now(summary(standings, self.study))

    def _line(self, standings: Sequence[Record], tried: Set[str]) -> str:
        """The summary, with the time that the rest takes at the speed since this start, all runs at once."""
        done = iterations_done(standings)
        if self.done_before is None:
            self.done_before = done
        fresh = done - self.done_before
        left = iterations_left(standings, tried)
        eta = (time.monotonic() - self.began) / fresh * left if fresh > 0 else None
        return summary(standings, self.study) + (f"; eta {clock(eta)}" if eta else "")


def as_text(standings: Sequence[Record], study: Study) -> str:
    """A table for ``study.py status``."""
    rows = [HEADER, *((standing.run.name, standing.state, *_details(standing)) for standing in standings)]
    left = eta_seconds(standings)
    apart = f"; {clock(left)} of training left, one run after the other" if left else ""
    return "\n".join([*aligned(rows), summary(standings, study) + apart])


def summary(standings: Sequence[Record], study: Study) -> str:
    """How many there are of each state, and the iterations."""
    states = [standing.state for standing in standings]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    total = sum(standing.run.iterations - standing.start for standing in standings)
    return f"{study.experiment}: {counts}; {iterations_done(standings):,} of {total:,} iterations"


def iterations_done(standings: Sequence[Record]) -> int:
    """Those that the jobs have trained themselves."""
    return sum(standing.iterations_done for standing in standings)


def iterations_left(standings: Sequence[Record], tried: Set[str]) -> int:
    """Those that are to come; none of what failed, when it is among ``tried``, nor of what needs it."""
    lost: set[str] = set()
    for one in standings:
        if (one.state == FAILED and one.run.name in tried) or (one.state == BLOCKED and lost):
            lost.add(one.run.name)
    going = [one for one in standings if one.run.name not in lost and one.state != FINISHED]
    return sum(one.iterations_left for one in going)


def eta_seconds(standings: Sequence[Record]) -> float | None:
    """Seconds that the iterations left take one after another, failed runs left out; None before one is finished."""
    done = [(s.seconds, s.iteration) for s in standings if s.state == FINISHED and s.seconds and s.iteration]
    if not done:
        return None
    pace = sum(seconds for seconds, _ in done) / sum(iterations for _, iterations in done)
    return pace * iterations_left(standings, tried={standing.run.name for standing in standings})


def _details(standing: Record) -> tuple[str, str, str, str]:
    """Iterations, AP, ETA, and what is wrong."""
    total = standing.run.iterations
    done = f"{standing.iteration:,}/{total:,}" if total else "-"
    scores = " ".join(f"{word} {standing.metrics[key]:.1f}" for key, word in SHOWN if key in standing.metrics)
    eta = clock(standing.eta) if standing.eta is not None else ""
    return done, scores, eta, standing.error


def _as_rich(standings: Sequence[Record], line: str) -> Group:
    """What is going on, and how many wait or are finished: a study has more runs than a terminal has lines."""
    table = Table(*HEADER, box=None)
    for standing in standings:
        if standing.state in (RUNNING, FAILED):
            table.add_row(standing.run.name, standing.state, *_details(standing))
    return Group(table, line)
