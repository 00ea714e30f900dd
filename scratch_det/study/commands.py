"""The commands of scratch-det study, and a study as text: its cost, its state, and its progress while it runs."""

import csv
import json
import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from scratch_det import backends
from scratch_det.config.choices import model_name
from scratch_det.config.load import load_config
from scratch_det.distributed.launch import usable_cores
from scratch_det.engine.run_dir import checkpoint_bytes
from scratch_det.errors import UserError, counted
from scratch_det.evaluation.metrics import main_metrics
from scratch_det.files import ROOT
from scratch_det.log import Progress, clock, say_now
from scratch_det.study import own
from scratch_det.study.experiments import find, jobs_of, of_place, samples_table
from scratch_det.study.local import Local, Torchrun, alone_in, gpus_here, holder_of, require_gpus
from scratch_det.study.records import BLOCKED, FAILED, FINISHED, INTERRUPTED, READY, RUNNING, Record, survey
from scratch_det.study.run import EVALUATE, EXIT_SOME_FAILED, PRETRAIN, SEARCH, TRAIN, Job, jobs_folder
from scratch_det.study.slurm import Slurm, squeue
from scratch_det.study.study import DESCRIPTION, LOCK, Study, study_in
from scratch_det.tables import aligned

STUDIES = Path("output/studies")
FIGURE2 = ("pretrained_mask_rcnn_R_50_FPN_2x_gn", "scratch_mask_rcnn_R_50_FPN_6x_gn")
SLURM = "slurm"
LAUNCHERS = {"local": Local, "torchrun": Torchrun}  # and SLURM
# Places for which the paper shows curves, and no numbers.
ONLY_CURVES = {"figure1", "figure3", "figure4", "figure6", "figure7", "figure8"}
MODELS = ROOT / "results" / "models.csv"
KEPT = 5  # checkpoints of a run: the last three, the best and the final one, as scratch-det train has it
KINDS = {PRETRAIN: "pre-training", SEARCH: "search", EVALUATE: "evaluation"}
LIST_HEADER = ("experiment", "place", "iterations", "shared prefix", "reported")
PLAN_HEADER = ("run", "what it is", "starts at", "trains", "needs")
STATUS_HEADER = ("run", "state", "iteration", "AP", "eta", "")
SHOWN = [(name, metric.label.replace(" AP", "")) for name, metric in main_metrics().items()]  # below the header AP


def folder_of(experiment: str) -> Path:
    """The folder of a study when --out is not given: output/studies/digits-table1; for a file only its name."""
    return STUDIES / (own.file_of(experiment) or Path(experiment.replace("/", "-"))).stem


def list_runs(experiment: str) -> None:
    """A row for each run; a run whose trunk is not among them counts in full, also with a shared prefix."""
    runs = of_place(experiment)
    by_name, mains = {run.name: run for run in runs}, main_metrics()
    spent = [run.iterations - run.branch_at(by_name.get(run.trunk or "")) for run in runs]
    rows = []
    for run, own_iterations in zip(runs, spent, strict=True):
        reported = ", ".join(f"{mains[name].label} {value}" for name, value in run.expected.items() if name in mains)
        is_shown = ONLY_CURVES.intersection(run.places) and not run.changes and run.kind == TRAIN
        reported = reported or ("a curve" if is_shown else "-")
        rows.append((run.name, ", ".join(run.places), f"{run.iterations:,}", f"{own_iterations:,}", reported))
    rows.append(("all", f"{len(runs)} runs", f"{sum(run.iterations for run in runs):,}", f"{sum(spent):,}", ""))
    print("\n".join(aligned([LIST_HEADER, *rows])))


def samples(config_file: list[str] | None) -> None:
    print(samples_table(config_file or [str(find(name).config) for name in FIGURE2]))


def plan(
    experiment: str, share_prefix: bool, gpus: int, seconds_per_iter: float | None, as_json: bool, out: Path | None
) -> None:
    """The cost as text, or the graph as JSON; with ``out`` the study is begun there, for status and report."""
    if not as_json:
        print(plan_text(experiment, share_prefix, gpus, seconds_per_iter))
        return
    study = Study(experiment, out or folder_of(experiment), share_prefix, backends.choose(backends.AUTO), gpus)
    graph = [{"name": step.name, "command": step.command(), "needs": list(step.needs),  # steps that come before
              "output": str(step.outputs[0]),  # exists when the step is done
              "gpus": step.processes if step.on_gpu else 0}
             for step in (study.begin() if out else study).steps()]  # fmt: skip
    print(json.dumps(graph, indent=2))


def plan_text(experiment: str, share_prefix: bool, gpus: int, seconds_per_iter: float | None) -> str:
    """The plan as a table with totals. Raises UserError for an unknown experiment and for invalid numbers.

    The checkpoints' size is about right: models are measured in results/models.csv, with 80 classes.
    """
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: expected 1 or more")
    if seconds_per_iter is not None and not 0 < seconds_per_iter < 1e6:
        raise UserError(f"--seconds-per-iter {seconds_per_iter}: expected a number above 0")
    runs = of_place(experiment)
    jobs = jobs_of(runs, share_prefix)
    iterations, apart = (sum(job.iterations for job in each) for each in (jobs, jobs_of(runs, share_prefix=False)))
    with MODELS.open(encoding="utf-8", newline="") as lines:
        measured = {row["model"]: int(row["parameters"]) for row in csv.DictReader(lines)}
    rows, kinds, disk, unmeasured = [PLAN_HEADER], list[str](), 0, 0
    for job in jobs:
        kinds.append(KINDS.get(job.run.kind, "trunk" if job.keep_at else "run"))
        if job.start:
            kinds[-1] = "switch" if job.run.is_switch else "branch"
        rows.append((job.name, kinds[-1], f"{job.start:,}", f"{job.iterations:,}", ", ".join(job.needs)))
        cfg = load_config(ROOT / job.run.config, job.run.changes).cfg
        model = model_name(cfg)
        kept = 0 if job.run.kind == EVALUATE else job.run.points * (KEPT + len(job.keep_at))
        disk += kept * checkpoint_bytes(cfg, measured.get(model, 0), measured.get(model, 0))
        unmeasured += model not in measured
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    saving = "" if any(job.start for job in jobs) else ", every run on its own"
    if iterations != apart:
        saving = f" with shared prefixes, {apart:,} as separate runs ({iterations / apart:.0%})"
    cost = "time: --seconds-per-iter S --gpus N tells GPU hours"
    if seconds_per_iter:
        hours = iterations * seconds_per_iter / 3600
        shown, digits = f"{gpus} GPU{'s' * (gpus > 1)}", 0 if hours >= 10 else 1
        cost = f"time: {hours:,.{digits}f} h on {shown} one run after the other, {hours * gpus:,.{digits}f} GPU hours"
    space = f"about {disk / 1e9:,.1f} GB of checkpoints"
    if unmeasured:
        missing = f"not known for {counted(unmeasured, 'runs')}, whose model results/{MODELS.name} does not have"
        space = f"{space} for the others, {missing}" if unmeasured < len(jobs) else missing
        space += "; scratch-det check tells it for a recipe"
    totals = [f"{len(jobs)} runs: {counts}", f"iterations: {iterations:,}{saving}", cost, f"disk: {space}"]
    return "\n".join([*aligned(rows), "", *totals])


def run(
    experiment: str, out: Path, launcher: str, gpus: int, max_parallel: int, only: list[str], dry_run: bool,
    backend: str, slurm: Path | None, share_prefix: bool,
) -> int:  # fmt: skip
    """The exit code. Raises UserError, before anything starts, when the request or a folder is not as expected."""
    if min(gpus, max_parallel) < 1:
        raise UserError(f"--gpus {gpus} and --max-parallel {max_parallel}: expected 1 or more")
    if slurm and launcher != SLURM:
        raise UserError(f"--slurm {slurm}: this job template is for --launcher slurm, and the launcher is {launcher}")
    cluster = Slurm(out, slurm) if launcher == SLURM else None
    if cluster and not dry_run:
        squeue()  # raises UserError where there is no SLURM
    study = Study(experiment, out, share_prefix, backends.choose(backend), gpus)
    jobs = study.picked(only)
    if not ((cluster or gpus_here()) and all(step.on_gpu for step in study.steps() if step.processes)):
        # What a SLURM job gets is in its template: one thread, unless the variable says otherwise.
        asked, cores = os.environ.get("OMP_NUM_THREADS", ""), 1 if cluster else usable_cores()
        is_number = asked.isdecimal() and int(asked) > 0
        study = replace(study, threads=int(asked) if is_number else max(1, cores // (max_parallel * gpus)))
    study.check(jobs)
    if dry_run and (out / DESCRIPTION).exists():
        study = study.as_begun()
    shown = cluster.shown if cluster else LAUNCHERS[launcher].shown
    commands = [shown(step) for step in study.steps(jobs)]  # a template may reject one: before anything is written
    if dry_run:
        print("\n".join(commands))
        return 0
    if not cluster:  # whose compute nodes may have GPUs and data that this machine lacks
        require_gpus(study.steps(jobs), "change --gpus or --only")
        study.check_data(jobs)
    study = study.begin()
    study.check_folders()
    if not cluster:
        return run_here(study, jobs, LAUNCHERS[launcher], max_parallel)
    with alone_in(out, LOCK):
        ids = cluster.submit(study.steps(jobs))
    numbers = f"{len(ids)} jobs: {' '.join(ids)}" if ids else "nothing new"
    say_now(f"submitted {numbers}; see scratch-det study status --out {out}, or scancel them")
    return 0


def run_here(study: Study, jobs: Sequence[Job], launcher: type[Local], max_parallel: int) -> int:
    """Start what is not done on this machine, and wait for it; the exit code.

    Shows the iterations of ``jobs``, and says when a run of the study changes its state.
    """
    out, steps, chosen = study.out, study.steps(jobs), {job.name for job in jobs}
    with alone_in(out, LOCK) as lock:
        on_cluster = jobs_on_cluster(study) or {}
        if left_out := sorted({step.run for step in steps if not step.is_done} & set(on_cluster)):
            names = ", ".join(left_out)
            say_now(f"left out, as SLURM has them queued or running: {names}; see scratch-det study status")
            steps = [step for step in steps if step.run not in left_out]

        def records(running: Collection[str] = ()) -> list[Record]:
            return survey(study.jobs, out, on_cluster | dict.fromkeys(running, RUNNING))

        with Screen(study, chosen, records()) as screen:
            launcher(out, lock, max_parallel, study.gpus).run(steps, lambda running: screen.show(records(running)))
        # Read before another launcher can start what is left.
        ended = [record for record in records() if record.run.name in chosen]
    unfinished = [record for record in ended if record.state != FINISHED]
    for record in unfinished:
        say_now(f"{record.run.name}: {record.state}: {record.error}")
    if any(record.state == FAILED for record in unfinished):
        say_now(f"{jobs_folder(out)} has the logs")
    say_now(summary(ended, study))
    return EXIT_SOME_FAILED if unfinished else 0


class Screen(Progress):
    """Iterations of the ``chosen`` runs as a bar or a line now and then, and a line when a run changes its state.

    The ETA is the time for what can still be trained at the speed of all runs together since this start of the study.
    """

    seconds_between_lines = 60.0  # it may run for weeks

    def __init__(self, study: Study, chosen: Collection[str], records: Sequence[Record]):
        self.chosen, self.states = chosen, {record.run.name: record.state for record in records}
        mine = [record for record in records if record.run.name in chosen]
        done = sum(record.iterations_done for record in mine)
        super().__init__(study.experiment, done + iterations_left(mine), done)

    def show(self, records: Sequence[Record]) -> None:
        for record in records:
            name, state = record.run.name, record.state
            if self.states[name] != state:
                say_now(f"{name}: {state}{'' if state == RUNNING else ' ' + ' '.join(_row(record)[2:]).rstrip()}")
            self.states[name] = state
        mine = [record for record in records if record.run.name in self.chosen]
        done = sum(record.iterations_done for record in mine)
        self.start = min(self.start, done)  # a resumed run goes back to its last checkpoint
        self.total = done + iterations_left(mine)
        self.advance(steps=done - self.done)


def jobs_on_cluster(study: Study) -> dict[str, str] | None:
    """QUEUED or RUNNING of the runs that SLURM has jobs of; None, after a message, when squeue does not answer."""
    if not any(jobs_folder(study.out).glob("*.sh")):
        return {}
    try:
        return Slurm(study.out).states()
    except UserError:
        print("squeue does not answer; jobs on the cluster are not shown", flush=True)
        return None


def status(out: Path) -> None:
    study = study_in(out)
    on_cluster = jobs_on_cluster(study)
    running = dict.fromkeys(holder_of(out / LOCK).get("running", []), RUNNING)
    records = survey(study.jobs, out, (on_cluster or {}) | running)
    submitted = on_cluster is not None and any(jobs_folder(out).glob("*.sh"))
    unfinished = [step for step in study.steps() if not step.is_done] if submitted else []
    logs = {step.run: step.file(out, ".log") for step in reversed(unfinished) if step.file(out, ".sh").exists()}
    for index, record in enumerate(records):
        if (log := logs.get(record.run.name)) and record.state in (READY, INTERRUPTED):
            error = f"SLURM no longer has its job, and it left no exit code: see {log.relative_to(out)}"
            records[index] = replace(record, state=INTERRUPTED, error=error)
    print(status_text(records, study))


def status_text(records: Sequence[Record], study: Study) -> str:
    """A table for ``status``, with the time left at the pace of the finished runs, one after the other."""
    done = [(one.seconds, one.iteration) for one in records if one.state == FINISHED and one.seconds and one.iteration]
    left = iterations_left(records) * sum(s for s, _ in done) / sum(i for _, i in done) if done else 0
    apart = f"; {clock(left)} of training left, one run after the other" if left else ""
    return "\n".join([*aligned([STATUS_HEADER, *map(_row, records)]), summary(records, study) + apart])


def report(experiment: str, out: Path, results: Path | None) -> None:
    from scratch_det.study.report import write_report  # matplotlib takes longer than a plan

    study = study_in(out)
    study.check_folders()
    for path in write_report(study, experiment, results):
        print(path)


def table(experiment: str, results: Path | None) -> None:
    from scratch_det.study.report import tables_from  # matplotlib

    print(tables_from(results, experiment), end="")


def summary(records: Sequence[Record], study: Study) -> str:
    """The number of runs in each state, and the iterations."""
    states = [record.state for record in records]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    done, total = sum(one.iterations_done for one in records), sum(one.run.iterations - one.start for one in records)
    return f"{study.experiment}: {counts}; {done:,} of {total:,} iterations"


def iterations_left(records: Sequence[Record]) -> int:
    """Iterations to train in runs that are neither finished nor failed nor blocked, as those that need a failed one."""
    going_on = [record for record in records if record.state not in (FAILED, BLOCKED, FINISHED)]
    return sum(record.run.iterations - record.start - record.iterations_done for record in going_on)


def _row(record: Record) -> tuple[str, ...]:
    total = record.run.iterations
    done = f"{record.iteration:,}/{total:,}" if total else "-"
    scores = " ".join(f"{word} {record.metrics[key]:.1f}" for key, word in SHOWN if key in record.metrics)
    eta = clock(record.eta) if record.eta is not None else ""
    return record.run.name, record.state, done, scores, eta, record.error
