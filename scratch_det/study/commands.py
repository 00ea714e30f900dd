"""What the commands of tools/study.py do."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from scratch_det import backends
from scratch_det.errors import UserError
from scratch_det.study import own
from scratch_det.study.board import as_text
from scratch_det.study.experiments import find, of_place
from scratch_det.study.folder import check_folders
from scratch_det.study.launch import Launcher
from scratch_det.study.launch.devices import gpus_here, gpus_needed, require_even_shares, require_gpus
from scratch_det.study.launch.local import Local, Torchrun
from scratch_det.study.launch.slurm import Slurm
from scratch_det.study.launch.slurm_options import read_options, require_slurm
from scratch_det.study.listing import as_table
from scratch_det.study.loop import run_study
from scratch_det.study.plan import as_text as plan_text
from scratch_det.study.recipe import require_data
from scratch_det.study.records import survey
from scratch_det.study.samples import compare
from scratch_det.study.study import DESCRIPTION, Study, study_in, threads_of_a_process

STUDIES = Path("output/studies")
FIGURE2 = ("pretrained_mask_rcnn_R_50_FPN_2x_gn", "scratch_mask_rcnn_R_50_FPN_6x_gn")
SLURM = "slurm"
LAUNCHERS: dict[str, Callable[..., Launcher]] = {"local": Local, "torchrun": Torchrun, SLURM: Slurm}


def folder_of(experiment: str) -> Path:
    """Where a study is that names no folder: output/studies/digits-table1; of a file by its name alone."""
    return STUDIES / (Path(experiment).stem if own.is_file(experiment) else experiment.replace("/", "-"))


def list_runs(experiment: str) -> None:
    print(as_table(of_place(experiment)))


def samples(config_file: list[str] | None) -> None:
    print(compare(config_file or [str(find(name).config) for name in FIGURE2]))


def plan(experiment: str, share_prefix: bool, gpus: int, seconds_per_iter: float | None) -> None:
    print(plan_text(experiment, share_prefix, gpus, seconds_per_iter))


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
    """The exit code. Raises UserError for what can be refused before anything starts."""
    if min(gpus, max_parallel) < 1:
        raise UserError(f"--gpus {gpus} and --max-parallel {max_parallel}: expected 1 or more")
    launch, has_gpus, threads = LAUNCHERS[launcher], bool(gpus_here()), threads_of_a_process(max_parallel * gpus)
    if launcher == SLURM:
        options = read_options(slurm)
        require_slurm()
        launch, has_gpus, threads = partial(Slurm, options=options), options.gpus_per_node != 0, options.threads
    elif slurm:
        raise UserError(f"--slurm {slurm}: these options are for --launcher slurm, and the launcher is {launcher}")
    study = Study(experiment, out, share_prefix, backends.choose(backend), gpus)
    if not (has_gpus and all(gpus_needed(job, study) for job in study.jobs)):
        study = replace(study, threads=threads)
    jobs, would_be = study.picked(only), launch(study)
    require_even_shares(jobs, study)
    if dry_run:
        if (out / DESCRIPTION).exists():
            would_be = launch(study.as_begun())
        for job in jobs:
            print(would_be.describe(job))
        return 0
    if launcher != SLURM:
        require_gpus(jobs, study, max_parallel)
        require_data(jobs, study)  # a cluster's nodes may have what its login node has not
    study = study.begin()
    check_folders(study, study.jobs)
    return run_study(study, study.picked(only), launch(study), max_parallel)


def status(out: Path) -> None:
    study = study_in(out)
    print(as_text(survey(study.jobs, out, Local(study).running()), study))


def report(experiment: str, out: Path, results: Path | None) -> None:
    from scratch_det.study.report.write import write_report  # matplotlib takes longer than a plan

    study = study_in(out)
    check_folders(study, study.jobs)
    for path in write_report(study, experiment, results):
        print(path)
