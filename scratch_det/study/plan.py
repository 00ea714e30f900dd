"""What an experiment costs before it is started: iterations, GPU hours and disk."""

import csv
from collections.abc import Sequence
from typing import Any

from scratch_det.config import load_config
from scratch_det.config.choices import model_name
from scratch_det.engine.run_dir import checkpoint_bytes
from scratch_det.errors import UserError
from scratch_det.study.experiments import of_place
from scratch_det.study.job import ROOT, Job, Step, jobs_of
from scratch_det.study.run import EVALUATE, PRETRAIN, SEARCH, Run
from scratch_det.tables import aligned

MODELS = ROOT / "results" / "models.csv"
KEPT = 5  # checkpoints of a run: the last three, the best and the final one, as train_net.py has it
HEADER = ("run", "what it is", "starts at", "trains", "needs")


def as_text(experiment: str, share_prefix: bool, gpus: int, seconds_per_iter: float | None) -> str:
    """The plan as a table with totals. Raises UserError for an unknown experiment and for numbers that are none."""
    if gpus < 1 or (seconds_per_iter is not None and not 0 < seconds_per_iter < 1e6):
        raise UserError(f"--gpus {gpus} --seconds-per-iter {seconds_per_iter}: expected numbers above 0")
    runs = of_place(experiment)
    jobs, apart = jobs_of(runs, share_prefix), sum(job.iterations for job in jobs_of(runs, share_prefix=False))
    iterations = sum(job.iterations for job in jobs)
    rows = [HEADER, *(_row(job) for job in jobs)]
    kinds = [what_it_is(job) for job in jobs]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    lines = [*aligned(rows), "", f"{len(jobs)} runs: {counts}"]
    lines.append(f"iterations: {iterations:,}" + _saving(jobs, iterations, apart))
    if seconds_per_iter:
        hours = iterations * seconds_per_iter / 3600
        shown = f"{gpus} GPU{'s' * (gpus > 1)}"
        digits = 0 if hours >= 10 else 1
        lines.append(
            f"time: {hours:,.{digits}f} h on {shown} one run after the other, {hours * gpus:,.{digits}f} GPU hours"
        )
    else:
        lines.append("time: --seconds-per-iter S --gpus N tells GPU hours")
    lines.append(f"disk: about {disk_bytes(jobs) / 1e9:,.1f} GB of checkpoints{_unmeasured(jobs)}")
    return "\n".join(lines)


def graph_entry(step: Step) -> dict[str, Any]:
    """A step for other programs: start ``command`` when ``needs`` are done; ``output`` is there in the end."""
    return {
        "name": step.name,
        "command": step.command(),
        "needs": list(step.needs),
        "output": str(step.outputs[0]),
        "gpus": step.processes if step.on_gpu else 0,
    }


def what_it_is(job: Job) -> str:
    """A word or two for a job's place among the others."""
    if job.run.kind in (PRETRAIN, SEARCH, EVALUATE):
        return {PRETRAIN: "pre-training", SEARCH: "search", EVALUATE: "evaluation"}[job.run.kind]
    if job.start:
        return "switch" if job.run.is_switch else "branch"
    return "trunk" if job.keep_at else "run"


def disk_bytes(jobs: Sequence[Job]) -> int:
    """About what the checkpoints take when all has run; models are measured in results/models.csv, with 80 classes."""
    sizes = parameters()
    kept = {job.name: 0 if job.run.kind == EVALUATE else job.run.points * (KEPT + len(job.keep_at)) for job in jobs}
    return sum(kept[job.name] * checkpoint_bytes(*2 * [sizes.get(model_of(job.run), 0)]) for job in jobs)


def _unmeasured(jobs: Sequence[Job]) -> str:
    sizes = parameters()
    count = sum(model_of(job.run) not in sizes for job in jobs)
    return f"; {count} of the runs not counted, as {MODELS.name} has no such model" if count else ""


def parameters() -> dict[str, int]:
    """Of each model in results/models.csv, by its name there."""
    with MODELS.open(encoding="utf-8", newline="") as lines:
        return {row["model"]: int(row["parameters"]) for row in csv.DictReader(lines)}


def model_of(run: Run) -> str:
    """The name that results/models.csv has for the recipe's model."""
    return model_name(load_config(ROOT / run.config, run.changes).cfg)


def _row(job: Job) -> tuple[str, ...]:
    return job.name, what_it_is(job), f"{job.start:,}", f"{job.iterations:,}", ", ".join(job.needs)


def _saving(jobs: Sequence[Job], iterations: int, apart: int) -> str:
    if iterations == apart:
        return "" if any(job.start for job in jobs) else ", every run on its own"
    return f" with shared prefixes, {apart:,} as separate runs ({iterations / apart:.0%})"
