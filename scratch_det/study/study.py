"""One study: an experiment, its folder, what must not change between two starts, and the checks before each start."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from scratch_det import backends
from scratch_det.command_line import TRACEBACK
from scratch_det.data.catalog import lookup, lookup_folder
from scratch_det.engine.run_dir import Index, RunDir
from scratch_det.errors import DataError, UserError, did_you_mean, quoted
from scratch_det.files import sha256_of, write_atomically
from scratch_det.reading import read_json
from scratch_det.study.experiments import jobs_of, of_place
from scratch_det.study.local import alone_in
from scratch_det.study.records import FIX, other_recipe
from scratch_det.study.run import EVALUATE, PRETRAIN, SEARCH, Job, Step, checkpoint, from_here, jobs_folder
from scratch_det.study.search import Search
from scratch_det.weights.locate import place_of, url_of

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
        found: list[Step] = []
        for job in self.jobs if jobs is None else jobs:
            run, inputs = job.run, tuple(job.inputs(self.out))
            # Of a trunk, a branch needs the step that ends at its checkpoint.
            needs = tuple(f"{name}@{job.start}" if job.start and name == run.trunk else name for name in job.needs)
            if run.kind == SEARCH:
                points = [replace(step, name=f"{run.name}/{step.name}", run=run.name, needs=needs, inputs=inputs,
                                  threads=self.threads)
                          for step in self.search(job).steps()]  # fmt: skip
                words = (run.kind, "--choose", *job.arguments(self.out, self.backend))
                # The best of the finished points is worth knowing; its result.json needs all of them.
                choice = Step(run.name, run.name, words, tuple(step.name for step in points),
                              outputs=(job.result(self.out),), processes=0, also_after_failures=True)  # fmt: skip
                found += [*points, choice]
                continue
            on_gpu = job.recipe(self.out, self.backend).MODEL.DEVICE != "cpu"
            for stop_at in (*job.keep_at, 0):
                name = f"{run.name}@{stop_at}" if stop_at else run.name
                words = (run.kind, *job.arguments(self.out, self.backend, stop_at=stop_at))
                outputs = (*([checkpoint(self.out, run.name, stop_at)] if stop_at else []), job.result(self.out))
                found.append(Step(name, run.name, words, needs, inputs, outputs, run.processes or self.gpus, on_gpu,
                                  self.threads))  # fmt: skip
                needs = (name,)
        return found

    def search(self, job: Job) -> Search:
        """The grid search of a job."""
        run, apply_to = job.run, tuple(str(from_here(path)) for path in job.run.apply_to)
        return Search(str(from_here(run.config)), str(from_here(run.grid)), self.out / run.name,
                      tuple(job.overrides(self.out)), apply_to=apply_to, backend=self.backend,
                      num_gpus=run.processes or self.gpus)  # fmt: skip

    def check(self, jobs: Sequence[Job]) -> None:
        """Raise UserError when processes cannot share the images of an iteration evenly, or for an invalid search."""
        for job in jobs:
            solver, processes = job.recipe(self.out, self.backend).SOLVER, job.run.processes or self.gpus
            is_even = solver.IMS_PER_BATCH % processes == 0 or solver.REFERENCE_WORLD_SIZE  # which fits the batch
            if not is_even and job.run.kind != EVALUATE:
                fix = f"give --gpus a number that divides {solver.IMS_PER_BATCH}"
                if job.run.processes:
                    fix = f"change SOLVER.IMS_PER_BATCH in its recipe (it needs {processes} processes)"
                images = f"{solver.IMS_PER_BATCH} images an iteration, which {processes} processes cannot share evenly"
                raise UserError(f"{job.name} has {images}; {fix}")
            if job.run.kind == SEARCH:
                self.search(job).check()

    def check_data(self, jobs: Sequence[Job]) -> None:
        """Raise DataError when data or weights of one of ``jobs`` that is not finished are not on this machine."""
        for job in jobs:
            if job.result(self.out).exists():
                continue
            cfg = job.recipe(self.out, self.backend)
            weights, about = place_of(cfg.MODEL.WEIGHTS), job.run.about
            if {"weights", "source"} <= about.keys() and not (url_of(cfg.MODEL.WEIGHTS) or weights.is_file()):
                source = about["source"]
                weights = Path(os.path.normpath(weights))
                tool = "gdown --fuzzy" if "drive.google" in source else "wget"
                get = f"mkdir -p {quoted(weights.parent)} && {tool} -O {quoted(weights)} {quoted(source)}"
                get = source if " " in source else get
                raise DataError(f"{job.name}: its weights {weights} are missing; fetch them: {get}")
            for name in (*(() if job.run.kind == EVALUATE else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST):
                try:
                    (lookup_folder if job.run.kind == PRETRAIN else lookup)(name)
                except DataError as error:
                    raise DataError(f"{job.name}: {error}") from None

    def check_folders(self) -> None:
        """Raise one UserError with a line for each run folder that another recipe or another checkpoint made."""
        if problems := [problem for job in self.jobs for problem in disagreements(job, self.out, self.backend)]:
            fix = "move such a folder away, and scratch-det study run trains it again"
            raise UserError("\n  ".join([*problems, fix]))

    def begin(self) -> "Study":
        """Write study.json, or compare the study with it; returns the study that it describes, with its threads.

        Raises UserError when the folder holds another study, or files of something else.
        """
        path = self.out / DESCRIPTION
        self.out.mkdir(parents=True, exist_ok=True)
        # Listed before study.json is looked for: another process may begin this study, and its runs, in the meantime.
        others = {one.name for one in self.out.iterdir() if one.suffix != ".partial"} - {LOCK, TRACEBACK, "jobs"}
        if others and not path.exists():
            raise UserError(f"--out {self.out} has {min(others)} in it, but no {DESCRIPTION}; if it is lost, {RESTORE}")
        if not path.exists():
            with alone_in(self.out, LOCK):
                if not path.exists():  # another process may have begun one in the meantime
                    write_atomically(path, json.dumps(asdict(self), indent=2, default=str) + "\n")
        jobs_folder(self.out).mkdir(exist_ok=True)
        return self.as_begun()

    def as_begun(self) -> "Study":
        """The study in study.json. Raises UserError when that is another one, or when there is none."""
        study = study_in(self.out)
        pairs = {key: (getattr(study, key), getattr(self, key)) for key in SAME}
        if other := "; ".join(f"{key} was {was}, now {now}" for key, (was, now) in pairs.items() if was != now):
            fix = "repeat its command, or name another folder"
            raise UserError(f"--out {self.out} holds another study: {other}; {fix}")
        return study


def study_in(out: Path) -> Study:
    """The study whose folder ``out`` is, under the name that it was begun with.

    Raises UserError when it is no study's folder, when study.json is damaged, and when the folder has moved: its runs
    name their weights and parents by the path.
    """
    path = out / DESCRIPTION
    if not path.exists():
        found = f"there is no {DESCRIPTION}, so no study was started there"
        raise UserError(f"--out {out}: {found}; see scratch-det study run (study table prints results without it)")
    kinds: Any = [(one.name, str if one.type is Path else one.type) for one in fields(Study)]
    content = read_json(path, msgspec.defstruct("Study", kinds, forbid_unknown_fields=True), RESTORE)
    study = Study(**{**content, "out": Path(content["out"])})
    if study.out.resolve() != out.resolve():
        raise UserError(
            f"--out {out} was begun as {study.out}, the path by which its runs refer to each other; start the command "
            "in the folder where it was begun, or move the study back"
        )
    return study


def disagreements(job: Job, out: Path, backend: str) -> Iterator[str]:
    """How the run in the folder of ``job`` is not the one that its command makes, a line each.

    It has another recipe, or it began with a file of another run that was repeated since.
    """
    run_dir, notes, key = RunDir(out / job.name), job.result(out), "weights_sha256"
    if job.run.kind != EVALUATE:
        if job.run.kind == SEARCH or not run_dir.holds_run():
            return
        if job.config(out).exists():  # else the search that found it is made anew
            yield from other_recipe(run_dir, job.recipe(out, backend))
        notes, key = (run_dir.parent, "sha256") if job.start else (run_dir.environment, key)
    source = job.parent(out) if job.start else job.weights(out)
    if source and (began_with := read_json(notes, fix=FIX).get(key)):
        known = read_json(source.with_name("index.json"), Index, FIX).get("sha256", {}).get(source.name)
        known = known or ([sha256_of(source)] if source.exists() else [began_with])  # backbone.pth has no index
        if began_with not in known:
            yield f"{notes} names another {source.name} than {source.relative_to(out).parts[0]} has now"
