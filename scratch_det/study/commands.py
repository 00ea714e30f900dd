"""The commands of tools/study.py."""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from scratch_det import backends
from scratch_det.errors import UserError
from scratch_det.log import say_now
from scratch_det.study import own
from scratch_det.study.checks import check_folders, gpus_here, require_data, require_even_shares, require_gpus
from scratch_det.study.experiments import HEADER, find, listing, of_place
from scratch_det.study.job import Job, Step
from scratch_det.study.local import Local, Torchrun, alone_in, running_in
from scratch_det.study.overview import Screen, plan_text, status_text
from scratch_det.study.records import INTERRUPTED, READY, RUNNING, jobs_folder, survey
from scratch_det.study.run import SEARCH
from scratch_det.study.samples import compare
from scratch_det.study.slurm import Slurm, require_slurm
from scratch_det.study.study import DESCRIPTION, LOCK, Study, study_in
from scratch_det.tables import markdown

STUDIES = Path("output/studies")
FIGURE2 = ("pretrained_mask_rcnn_R_50_FPN_2x_gn", "scratch_mask_rcnn_R_50_FPN_6x_gn")
SLURM = "slurm"
LAUNCHERS = {"local": Local, "torchrun": Torchrun}  # and SLURM
EXIT_SOME_FAILED = 1


def folder_of(experiment: str) -> Path:
    """The folder of a study when --out is not given: output/studies/digits-table1; for a file only its name."""
    return STUDIES / (Path(experiment).stem if own.is_file(experiment) else experiment.replace("/", "-"))


def list_runs(experiment: str) -> None:
    rows = listing(of_place(experiment))
    if not sys.stdout.isatty():
        print(markdown(HEADER, rows))
        return
    name, *others = HEADER  # the table folds cells to fit the terminal
    table = Table(Column(name, no_wrap=True), *(Column(title, overflow="fold") for title in others), box=None)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def samples(config_file: list[str] | None) -> None:
    print(compare(config_file or [str(find(name).config) for name in FIGURE2]))


def plan(
    experiment: str, share_prefix: bool, gpus: int, seconds_per_iter: float | None, as_json: bool, out: Path | None
) -> None:
    """The cost as text, or the graph as JSON; with ``out`` the study is begun there, for status and report."""
    if not as_json:
        print(plan_text(experiment, share_prefix, gpus, seconds_per_iter))
        return
    study = Study(experiment, out or folder_of(experiment), share_prefix, backends.choose(backends.AUTO), gpus)
    graph = [
        {
            "name": step.name,
            "command": step.command(),
            "needs": list(step.needs),  # steps that have to be done before
            "output": str(step.outputs[0]),  # exists when the step is done
            "gpus": step.processes if step.on_gpu else 0,
        }
        for step in (study.begin() if out else study).steps()
    ]
    print(json.dumps(graph, indent=2))


def run(
    experiment: str,
    out: Path,
    launcher: str,
    gpus: int,
    max_parallel: int,
    only: list[str],
    dry_run: bool,
    backend: str,
    slurm: Path | None,
    share_prefix: bool,
) -> int:
    """The exit code. Raises UserError, before anything starts, when the request or a folder is not as expected."""
    if min(gpus, max_parallel) < 1:
        raise UserError(f"--gpus {gpus} and --max-parallel {max_parallel}: expected 1 or more")
    if slurm and launcher != SLURM:
        raise UserError(f"--slurm {slurm}: this job template is for --launcher slurm, and the launcher is {launcher}")
    cores = len(os.sched_getaffinity(0))
    if launcher == SLURM:
        Slurm(out, slurm)  # errors in the template come first
        if not dry_run:
            require_slurm()
        cores = 1  # of a process, unless OMP_NUM_THREADS says otherwise: what a job gets is in the template
    study = Study(experiment, out, share_prefix, backends.choose(backend), gpus)
    jobs = study.picked(only)
    has_gpus = launcher == SLURM or bool(gpus_here())
    if not (has_gpus and all(step.on_gpu for step in study.steps() if step.processes)):
        asked = os.environ.get("OMP_NUM_THREADS", "")
        is_number = asked.isdecimal() and int(asked) > 0
        study = replace(study, threads=int(asked) if is_number else max(1, cores // (max_parallel * gpus)))
    require_even_shares(jobs, out, study.backend, gpus)
    for job in jobs:
        if job.run.kind == SEARCH:
            study.search(job).check()
    if dry_run:
        study = study.as_begun() if (out / DESCRIPTION).exists() else study
        for step in study.steps(jobs):
            print(_described(step, study, launcher, slurm))
        return 0
    if launcher != SLURM:
        require_gpus({step.run: step.processes for step in study.steps(jobs) if step.on_gpu}, gpus, max_parallel)
        require_data(jobs, out, study.backend)  # compute nodes may have data that the login node lacks
    else:
        Slurm(out, slurm, study.threads).check(study.steps(jobs))
    study = study.begin()
    check_folders(study.jobs, out, study.backend)
    if launcher == SLURM:
        with alone_in(out, LOCK):
            ids = Slurm(out, slurm, study.threads).submit(study.steps(jobs))
        numbers = f"{len(ids)} jobs: {' '.join(ids)}" if ids else "nothing new"
        say_now(f"submitted {numbers}; see study.py status --out {out}, or scancel them")
        return 0
    return _run_here(study, jobs, launcher, gpus, max_parallel)


def _run_here(study: Study, jobs: Sequence[Job], launcher: str, gpus: int, max_parallel: int) -> int:
    """Start what is not done on this machine, and wait for it; the exit code."""
    out, steps = study.out, study.steps(jobs)
    with alone_in(out, LOCK) as lock:
        on_cluster = jobs_on_cluster(study) or {}
        if left_out := sorted({step.run for step in steps if not step.is_done} & set(on_cluster)):
            say_now(f"left out, as SLURM has them queued or running: {', '.join(left_out)}; see study.py status")
            steps = [step for step in steps if step.run not in left_out]
        with Screen(study, {job.name for job in jobs}) as screen:
            LAUNCHERS[launcher](out, lock, max_parallel, gpus, study.threads).run(
                steps, lambda names: screen.show(survey(study.jobs, out, on_cluster | dict.fromkeys(names, RUNNING)))
            )
            return 0 if screen.conclude(survey(study.jobs, out, on_cluster)) else EXIT_SOME_FAILED


def _described(step: Step, study: Study, launcher: str, slurm: Path | None) -> str:
    if launcher == SLURM:
        job = Slurm(study.out, slurm, study.threads)
        return f"# sbatch {shlex.join(job.options(step, {name: name for name in step.needs}))}\n{job.script(step)}"
    threads = "" if study.threads == 0 or (gpus_here() and step.on_gpu) else f"OMP_NUM_THREADS={study.threads} "
    return threads + shlex.join(LAUNCHERS[launcher].command(step))


def status(out: Path) -> None:
    study = study_in(out)
    on_cluster = jobs_on_cluster(study)
    records = survey(study.jobs, out, (on_cluster or {}) | dict.fromkeys(running_in(out, LOCK), RUNNING))
    lost = {} if on_cluster is None else {step.run: step for step in reversed(submitted_steps(study))}
    for index, record in enumerate(records):
        if (step := lost.get(record.run.name)) and record.state in (READY, INTERRUPTED):
            error = f"SLURM no longer has its job, and it left no exit code: see jobs/{step.file_name}.log"
            records[index] = replace(record, state=INTERRUPTED, error=error)
    print(status_text(records, study))


def submitted_steps(study: Study) -> list[Step]:
    """The steps that are not done, and that SLURM was the last to be given."""
    jobs = jobs_folder(study.out)
    if not any(jobs.glob("*.sh")):
        return []
    return [step for step in study.steps() if not step.is_done and (jobs / f"{step.file_name}.sh").exists()]


def jobs_on_cluster(study: Study) -> dict[str, str] | None:
    """QUEUED or RUNNING of the runs that SLURM has jobs of; None, which is said, when squeue does not answer."""
    if not any(jobs_folder(study.out).glob("*.sh")):
        return {}
    try:
        return Slurm(study.out).states()
    except UserError:
        print("squeue does not answer; jobs on the cluster are not shown", flush=True)
        return None


def report(experiment: str, out: Path, results: Path | None) -> None:
    from scratch_det.study.report.write import write_report  # matplotlib takes longer than a plan

    study = study_in(out)
    check_folders(study.jobs, out, study.backend)
    for path in write_report(study, experiment, results):
        print(path)
