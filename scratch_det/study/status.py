"""The state of a study on the screen: one live table on a terminal, a line for every change elsewhere."""

import sys
import time
from collections.abc import Collection, Sequence
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


class Screen:
    """Context manager that shows the records of a running study; ``show`` is called as often as one likes."""

    def __init__(self, study: Study, chosen: Collection[str]):
        """``chosen``: names of the runs that the summary and its eta are of."""
        self.study, self.chosen = study, chosen
        self.live = Live(auto_refresh=False) if sys.stdout.isatty() else None
        self.states: dict[str, str] = {}
        self.began = self.last_line = time.monotonic()
        self.done_before: int | None = None  # iterations, when this start of the study began

    def __enter__(self) -> "Screen":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.live:
            self.live.stop()

    def show(self, records: Sequence[Record]) -> None:
        line = self._line([record for record in records if record.run.name in self.chosen])
        if self.live:  # what goes on or failed alone: a study has more runs than a terminal has lines
            table = Table(*HEADER, box=None)
            for record in records:
                if record.state in (RUNNING, FAILED):
                    table.add_row(*_row(record))
            self.live.update(Group(table, line), refresh=True)
            return
        for record in records:
            name, state = record.run.name, record.state
            if self.states.get(name, state) != state:
                say_now(f"{name}: {state}{'' if state == RUNNING else ' ' + ' '.join(_row(record)[2:]).rstrip()}")
            self.states[name] = state
        if time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            say_now(line)

    def conclude(self, records: Sequence[Record]) -> bool:
        """Say what is worth knowing when nothing more happens; whether all of the chosen runs are finished."""
        mine = [record for record in records if record.run.name in self.chosen]
        for record in mine:
            if record.state != FINISHED:
                say_now(f"{record.run.name}: {record.state}: {record.error}")
        if any(record.state == FAILED for record in mine):
            say_now(f"{jobs_folder(self.study.out)} has all that they said")
        say_now(summary(mine, self.study))
        return all(record.state == FINISHED for record in mine)

    def _line(self, records: Sequence[Record]) -> str:
        """The summary, with the time that the rest takes at the speed since this start, all runs at once."""
        done = sum(record.iterations_done for record in records)
        if self.done_before is None:
            self.done_before = done
        fresh, left = done - self.done_before, iterations_left(records)
        eta = (time.monotonic() - self.began) / fresh * left if fresh > 0 else None
        return summary(records, self.study) + (f"; eta {clock(eta)}" if eta else "")


def as_text(records: Sequence[Record], study: Study) -> str:
    """A table for ``study.py status``, with the time left at the pace of the finished runs, one after the other."""
    done = [(one.seconds, one.iteration) for one in records if one.state == FINISHED and one.seconds and one.iteration]
    left = iterations_left(records) * sum(s for s, _ in done) / sum(i for _, i in done) if done else 0
    apart = f"; {clock(left)} of training left, one run after the other" if left else ""
    return "\n".join([*aligned([HEADER, *map(_row, records)]), summary(records, study) + apart])


def summary(records: Sequence[Record], study: Study) -> str:
    """How many runs there are of each state, and the iterations."""
    states = [record.state for record in records]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    done, total = sum(one.iterations_done for one in records), sum(one.run.iterations - one.start for one in records)
    return f"{study.experiment}: {counts}; {done:,} of {total:,} iterations"


def iterations_left(records: Sequence[Record]) -> int:
    """Those that are to come without another start: none of what failed, nor of what needs it."""
    return sum(record.iterations_left for record in records if record.state not in (FAILED, BLOCKED, FINISHED))


def _row(record: Record) -> tuple[str, ...]:
    total = record.run.iterations
    done = f"{record.iteration:,}/{total:,}" if total else "-"
    scores = " ".join(f"{word} {record.metrics[key]:.1f}" for key, word in SHOWN if key in record.metrics)
    eta = clock(record.eta) if record.eta is not None else ""
    return record.run.name, record.state, done, scores, eta, record.error
