"""One study: an experiment, the folder that its runs are in, and what must not change between two starts."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from scratch_det import backends
from scratch_det.config import load_config
from scratch_det.data.catalog import lookup, lookup_folder
from scratch_det.engine.run_dir import RunDir
from scratch_det.errors import DataError, UserError, did_you_mean
from scratch_det.files import sha256_of, write_atomically
from scratch_det.study.experiments import jobs_of, of_place
from scratch_det.study.local import alone_in
from scratch_det.study.records import jobs_folder, other_recipe, read_json
from scratch_det.study.run import EVALUATE, PRETRAIN, SEARCH, Job, Step, from_here
from scratch_det.study.search import Search

DESCRIPTION, LOCK = "study.json", "study.lock"
SAME = ("experiment", "share_prefix", "backend", "gpus")  # between two starts
RESTORE = "restore it from a copy, or name another folder"


@dataclass(frozen=True)
class Study:
    """An experiment in ``out``.

    Attributes:
        experiment: as ``of_place`` takes it.
        share_prefix: whether schedules branch off a trunk.
        backend: who builds the models.
        gpus: processes of a run that does not say how many it needs.
        threads: of a process on the CPU; 0 where a GPU does the work. Another number rounds differently.
    """

    experiment: str
    out: Path
    share_prefix: bool = True
    backend: str = backends.AUTO
    gpus: int = 1
    threads: int = 0

    @cached_property
    def jobs(self) -> list[Job]:
        """In an order in which each comes after those that it needs. Raises UserError for an unknown experiment."""
        return jobs_of(of_place(self.experiment), self.share_prefix)

    def picked(self, names: Sequence[str]) -> list[Job]:
        """The jobs called so, all where no name is given. Raises UserError when the study has no such job."""
        known = [job.name for job in self.jobs]
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"{self.experiment} has no run {unknown[0]}{did_you_mean(unknown[0], known)}")
        return [job for job in self.jobs if not names or job.name in names]

    def steps(self, jobs: Sequence[Job] | None = None) -> list[Step]:
        """The commands of ``jobs``, of all by default, each after those that it needs."""
        found = []
        for job in self.jobs if jobs is None else jobs:
            if job.run.kind != SEARCH:
                on_gpu = recipe_of(job, self.out, self.backend).MODEL.DEVICE != "cpu"
                found += job.steps(self.out, self.backend, self.gpus, on_gpu)
                continue
            points = [
                replace(step, name=f"{job.name}/{step.name}", run=job.name, needs=job.step_needs,
                        inputs=tuple(job.inputs(self.out)))
                for step in self.search(job).steps()
            ]  # fmt: skip
            words = (job.tool, "--choose", *job.arguments(self.out, self.backend))
            # The best of the finished points is worth knowing; its result.json needs all of them.
            choice = Step(job.name, job.name, words, tuple(step.name for step in points), (), (job.result(self.out),),
                          processes=0, also_after_failures=True)  # fmt: skip
            found += [*points, choice]
        return found

    def search(self, job: Job) -> Search:
        """What a job that is a search asks for."""
        return Search(
            config_file=str(from_here(job.run.config)),
            grid=str(from_here(Path(job.run.grid))),
            out=self.out / job.name,
            overrides=tuple(job.overrides(self.out)),
            apply_to=tuple(str(from_here(Path(path))) for path in job.run.apply_to),
            backend=self.backend,
            num_gpus=job.run.processes or self.gpus,
        )

    def begin(self) -> "Study":
        """Write down what the study is, or compare it with what is written there.

        Returns the study as it is there: with its number of threads. Raises UserError when the folder holds another
        one, or files that are no study's, or cannot be made.
        """
        path = self.out / DESCRIPTION
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            foreign = {path.name for path in self.out.iterdir()} - {LOCK, f"{DESCRIPTION}.partial", "jobs"}
            if not path.exists() and foreign & {job.name for job in self.jobs}:
                raise UserError(
                    f"--out {self.out} has runs of {self.experiment}, but no {DESCRIPTION}: restore it from a "
                    "copy, or begin the study in another folder, and move that study.json here with this folder "
                    'as its "out": the run folders are compared with it, and nothing is trained anew'
                )
            if not path.exists() and foreign:
                raise UserError(
                    f"--out {self.out} has {min(foreign)} in it, but no {DESCRIPTION}: it is no study's; name another"
                )
            if not path.exists():
                with alone_in(self.out, LOCK):
                    if not path.exists():  # nor has another study.py begun one in the meantime
                        write_atomically(path, json.dumps(asdict(self), indent=2, default=str) + "\n")
            (self.out / LOCK).touch()  # see local.py; also tells a study's folder from one of results
            jobs_folder(self.out).mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.out} cannot be used: {error.strerror}; name another folder") from None
        return self.as_begun()

    def as_begun(self) -> "Study":
        """The study as it is written down. Raises UserError when that is another one, or when there is none."""
        study = study_in(self.out)
        pairs = {key: (getattr(study, key), getattr(self, key)) for key in SAME}
        if changes := [f"{key} was {was}, now {now}" for key, (was, now) in pairs.items() if was != now]:
            raise UserError(
                f"--out {self.out} holds another study: {'; '.join(changes)}; give the command as it was, or name "
                "another folder"
            )
        return study


def study_in(out: Path) -> Study:
    """The study whose folder ``out`` is, under the name that it was begun with.

    Runs know their weights and parents by that name. Raises UserError when the folder is no study's, or has moved.
    """
    path = out / DESCRIPTION
    content = read_json(path, RESTORE)
    if not path.exists():
        raise UserError(f"--out {out}: there is no {DESCRIPTION}, so no study was started there; see study.py run")
    known = [field.name for field in fields(Study)]
    if set(content) != set(known):
        raise UserError(f"{path} is not as study.py run wrote it, which was {', '.join(known)}; {RESTORE}")
    expected = {**asdict(Study("", out)), "out": ""}
    for key, value in content.items():
        if type(value) is not type(expected[key]):  # True is an int too
            kind = type(expected[key]).__name__
            raise UserError(f"{path} has {key} {value!r}, expected one of type {kind}; {RESTORE}")
    study = Study(**{**content, "out": Path(content["out"])})
    if study.out.resolve() != out.resolve():
        raise UserError(
            f"--out {out} was begun as {study.out}, by which its runs know each other; start it from the folder that "
            "this is named from, or move it back"
        )
    return study


def recipe_of(job: Job, out: Path, backend: str) -> CfgNode:
    """The recipe as the job's command changes it; before a search has written it, the one that it is made from."""
    found = job.config(out)
    config = found if found.exists() else from_here(job.run.config)
    return load_config(config, job.overrides(out), backends.defaults(backend)).cfg


def disagreements(job: Job, out: Path, backend: str) -> Iterator[str]:
    """How the run in the folder of ``job`` is not the one that its command makes, a line each."""
    run_dir, run, result = RunDir(out / job.name), job.run, job.result(out)
    if run.kind == SEARCH or not (result.exists() if run.kind == EVALUATE else run_dir.holds_run()):
        return
    asked: dict[str, Any] = {"backend": backend}  # recorded by the run at its start
    if run.kind == EVALUATE:
        asked["weights"] = dict(pairwise(job.overrides(out)))["MODEL.WEIGHTS"]
        notes, source = result, out / str(run.evaluates) / "checkpoints/model_final.pth"
    else:
        notes, source = run_dir.environment, out / str(run.pretraining) / "backbone.pth"
        init_std = dict(pairwise(run.flags)).get("--init-std")
        asked = {"init_std": float(init_std) if init_std else None, **({} if run.kind == PRETRAIN else asked)}
        if run.processes:  # BN's statistics are of each process
            asked["processes"] = run.processes
        if job.config(out).exists():  # else the search that found it is made anew
            yield from other_recipe(run_dir, recipe_of(job, out, backend))
        if run_dir.parent.exists() != bool(job.start):
            found, kind = ("is there", "a run of its own") if run_dir.parent.exists() else ("is missing", "a branch")
            yield f"{run_dir.parent} {found}, but {job.name} is {kind} here"
    written = read_json(notes)
    for key, value in asked.items():
        if written.get(key, value) != value:
            yield f"{notes} has {key} {written[key]!r}, its command {value!r}"
    began_with = written.get("weights_sha256")
    if job.start:
        notes, source = run_dir.parent, job.parent(out)
        began_with = read_json(notes).get("sha256")
    known = read_json(source.with_name("index.json")).get("sha256", {}).get(source.name)
    if source.name == "backbone.pth" and source.exists():  # has no index
        known = [sha256_of(source)]
    if began_with and known and began_with not in known:  # the run that wrote it was repeated since
        yield f"{notes} is of another {source.name} than {source.relative_to(out).parts[0]} has"


def check_folders(jobs: Sequence[Job], out: Path, backend: str) -> None:
    """Raise one UserError with a line for each run folder that another recipe or another checkpoint made."""
    if problems := [problem for job in jobs for problem in disagreements(job, out, backend)]:
        raise UserError("\n  ".join([*problems, "move such a folder away, and study.py run makes it anew"]))


def require_even_shares(jobs: Sequence[Job], out: Path, backend: str, gpus: int) -> None:
    """Raise UserError when the processes of one of ``jobs`` cannot share the images of an iteration evenly."""
    for job in jobs:
        processes = job.run.processes or gpus
        solver = recipe_of(job, out, backend).SOLVER
        uneven = solver.IMS_PER_BATCH % processes and solver.REFERENCE_WORLD_SIZE == 0  # else it adapts to any number
        if uneven and job.run.kind != EVALUATE:
            asked = f"it needs {processes} processes" if job.run.processes else f"--gpus {gpus}"
            raise UserError(
                f"{job.name} has {solver.IMS_PER_BATCH} images an iteration, which {processes} processes cannot share "
                f"evenly ({asked}); give a number that divides {solver.IMS_PER_BATCH}"
            )


def require_data(jobs: Sequence[Job], out: Path, backend: str) -> None:
    """Raise DataError when a data set of one of ``jobs`` that is not finished is not on this machine."""
    for job in jobs:
        if job.result(out).exists():
            continue
        datasets = recipe_of(job, out, backend).DATASETS
        look_up = lookup_folder if job.run.kind == PRETRAIN else lookup
        for name in (*(() if job.run.kind == EVALUATE else datasets.TRAIN), *datasets.TEST):
            try:
                look_up(name)
            except DataError as error:
                raise DataError(f"{job.name}: {error}") from None
