"""A study as text: its cost, its progress, and a live view while it runs.

A live table on a terminal, a line for every change elsewhere.
"""

import csv
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack

from rich.console import Group
from rich.live import Live
from rich.table import Table

from scratch_det.config import load_config
from scratch_det.config.choices import model_name
from scratch_det.engine.run_dir import checkpoint_bytes
from scratch_det.errors import UserError
from scratch_det.evaluation.metrics import main_metrics
from scratch_det.log import clock, say_now
from scratch_det.study.experiments import of_place
from scratch_det.study.job import ROOT, Job, jobs_of
from scratch_det.study.records import BLOCKED, FAILED, FINISHED, RUNNING, Record, jobs_folder
from scratch_det.study.run import EVALUATE, PRETRAIN, SEARCH
from scratch_det.study.study import Study
from scratch_det.tables import aligned

MODELS = ROOT / "results" / "models.csv"
KEPT = 5  # checkpoints of a run: the last three, the best and the final one, as train_net.py has it
PLAN_HEADER = ("run", "what it is", "starts at", "trains", "needs")
KINDS = {PRETRAIN: "pre-training", SEARCH: "search", EVALUATE: "evaluation"}
HEADER = ("run", "state", "iteration", "AP", "eta", "")
SECONDS_BETWEEN_LINES = 60.0
SHOWN = [(name, metric.label.replace(" AP", "")) for name, metric in main_metrics().items()]  # below the header AP


def plan_text(experiment: str, share_prefix: bool, gpus: int, seconds_per_iter: float | None) -> str:
    """The plan as a table with totals. Raises UserError for an unknown experiment and for invalid numbers.

    The checkpoints' size is about right: models are measured in results/models.csv, with 80 classes.
    """
    if gpus < 1 or (seconds_per_iter is not None and not 0 < seconds_per_iter < 1e6):
        raise UserError(f"--gpus {gpus} --seconds-per-iter {seconds_per_iter}: expected numbers above 0")
    runs = of_place(experiment)
    jobs = jobs_of(runs, share_prefix)
    iterations, apart = (sum(job.iterations for job in each) for each in (jobs, jobs_of(runs, share_prefix=False)))
    kinds = [_what_it_is(job) for job in jobs]
    rows = [
        (job.name, kind, f"{job.start:,}", f"{job.iterations:,}", ", ".join(job.needs))
        for job, kind in zip(jobs, kinds, strict=True)
    ]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    saving = "" if any(job.start for job in jobs) else ", every run on its own"
    if iterations != apart:
        saving = f" with shared prefixes, {apart:,} as separate runs ({iterations / apart:.0%})"
    cost = "time: --seconds-per-iter S --gpus N tells GPU hours"
    if seconds_per_iter:
        hours = iterations * seconds_per_iter / 3600
        shown, digits = f"{gpus} GPU{'s' * (gpus > 1)}", 0 if hours >= 10 else 1
        cost = f"time: {hours:,.{digits}f} h on {shown} one run after the other, {hours * gpus:,.{digits}f} GPU hours"
    with MODELS.open(encoding="utf-8", newline="") as lines:
        measured = {row["model"]: int(row["parameters"]) for row in csv.DictReader(lines)}
    disk, unmeasured = 0, 0
    for job in jobs:
        model = model_name(load_config(ROOT / job.run.config, job.run.changes).cfg)
        kept = 0 if job.run.kind == EVALUATE else job.run.points * (KEPT + len(job.keep_at))
        disk += kept * checkpoint_bytes(measured.get(model, 0), measured.get(model, 0))
        unmeasured += model not in measured
    missing = f"; {unmeasured} of the runs not counted, as {MODELS.name} has no such model" if unmeasured else ""
    return "\n".join([
        *aligned([PLAN_HEADER, *rows]),
        "",
        f"{len(jobs)} runs: {counts}",
        f"iterations: {iterations:,}{saving}",
        cost,
        f"disk: about {disk / 1e9:,.1f} GB of checkpoints{missing}",
    ])  # fmt: skip


def _what_it_is(job: Job) -> str:
    """The role of a job in one or two words, such as trunk or branch."""
    if job.start:
        return "switch" if job.run.is_switch else "branch"
    return KINDS.get(job.run.kind, "trunk" if job.keep_at else "run")


class Screen(ExitStack):
    """Context manager that shows the records of a running study; ``show`` may be called any number of times."""

    def __init__(self, study: Study, chosen: Collection[str]):
        """``chosen``: names of the runs that the summary and its ETA cover."""
        super().__init__()
        self.study, self.chosen = study, chosen
        self.live = self.enter_context(Live(auto_refresh=False)) if sys.stdout.isatty() else None
        self.states: dict[str, str] = {}
        self.began = self.last_line = time.monotonic()
        self.done_before: int | None = None  # iterations, when this start of the study began

    def show(self, records: Sequence[Record]) -> None:
        mine = [record for record in records if record.run.name in self.chosen]
        # The time that the rest takes at the speed since this start, all runs at once.
        done, now = sum(record.iterations_done for record in mine), time.monotonic()
        if self.done_before is None:
            self.done_before = done
        line = summary(mine, self.study)
        if (fresh := done - self.done_before) > 0 and (left := iterations_left(mine)):
            line += f"; eta {clock((now - self.began) / fresh * left)}"
        if self.live:  # only running and failed runs: a study has more runs than a terminal has lines
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
        if now - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = now
            say_now(line)

    def conclude(self, records: Sequence[Record]) -> bool:
        """Print the summary at the end; returns whether all chosen runs are finished."""
        mine = [record for record in records if record.run.name in self.chosen]
        unfinished = [record for record in mine if record.state != FINISHED]
        for record in unfinished:
            say_now(f"{record.run.name}: {record.state}: {record.error}")
        if any(record.state == FAILED for record in unfinished):
            say_now(f"{jobs_folder(self.study.out)} has all that they said")
        say_now(summary(mine, self.study))
        return not unfinished


def status_text(records: Sequence[Record], study: Study) -> str:
    """A table for ``study.py status``, with the time left at the pace of the finished runs, one after the other."""
    done = [(one.seconds, one.iteration) for one in records if one.state == FINISHED and one.seconds and one.iteration]
    left = iterations_left(records) * sum(s for s, _ in done) / sum(i for _, i in done) if done else 0
    apart = f"; {clock(left)} of training left, one run after the other" if left else ""
    return "\n".join([*aligned([HEADER, *map(_row, records)]), summary(records, study) + apart])


def summary(records: Sequence[Record], study: Study) -> str:
    """The number of runs in each state, and the iterations."""
    states = [record.state for record in records]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    done, total = sum(one.iterations_done for one in records), sum(one.run.iterations - one.start for one in records)
    return f"{study.experiment}: {counts}; {done:,} of {total:,} iterations"


def iterations_left(records: Sequence[Record]) -> int:
    """Iterations that this start will still train: without failed runs and the runs that need them."""
    going_on = [record for record in records if record.state not in (FAILED, BLOCKED, FINISHED)]
    return sum(record.run.iterations - record.start - record.iterations_done for record in going_on)


def _row(record: Record) -> tuple[str, ...]:
    total = record.run.iterations
    done = f"{record.iteration:,}/{total:,}" if total else "-"
    scores = " ".join(f"{word} {record.metrics[key]:.1f}" for key, word in SHOWN if key in record.metrics)
    eta = clock(record.eta) if record.eta is not None else ""
    return record.run.name, record.state, done, scores, eta, record.error
