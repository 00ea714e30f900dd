"""One study: an experiment, the folder that its runs are in, and what must not change between two starts."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from scratch_det import backends
from scratch_det.errors import UserError, did_you_mean
from scratch_det.study.experiments import of_place
from scratch_det.study.job import Job, jobs_of
from scratch_det.study.standing import jobs_folder, read_json
from scratch_det.textfile import write_atomically

DESCRIPTION = "study.json"


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

    def begin(self) -> "Study":
        """Write down what the study is, or compare it with what is written there.

        Returns the study as it is there: with its number of threads. Raises UserError when the folder holds another
        one, or files that are no study's.
        """
        earlier = read_json(self.out / DESCRIPTION)
        if not earlier:
            if self.out.exists() and any(self.out.iterdir()):
                raise UserError(
                    f"--out {self.out} has files in it, but no {DESCRIPTION}: it is no study's folder; name another"
                )
            jobs_folder(self.out).mkdir(parents=True)
            write_atomically(self.out / DESCRIPTION, json.dumps(self._description(), indent=2) + "\n")
            return self
        now = {**self._description(), "threads": earlier.get("threads")}
        if changes := [f"{key} was {earlier.get(key)}, now {now[key]}" for key in now if earlier.get(key) != now[key]]:
            raise UserError(
                f"--out {self.out} holds another study: {'; '.join(changes)}; give the command as it was, or name "
                "another folder"
            )
        return study_in(self.out)

    def _description(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "out"}


def study_in(out: Path) -> Study:
    """The study whose folder ``out`` is. Raises UserError when it is none's."""
    content = read_json(out / DESCRIPTION)
    if not content:
        raise UserError(f"--out {out}: there is no {DESCRIPTION}, so no study was started there; see study.py run")
    try:
        return Study(out=out, **content)
    except TypeError as error:
        raise UserError(f"{out / DESCRIPTION} is not as study.py run wrote it: {error}; restore it") from None


def threads_of_a_run(max_parallel: int) -> int:
    """OMP_NUM_THREADS where it is set, else this machine's cores shared among the runs that go on at once."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) else max(1, (os.cpu_count() or 1) // max_parallel)
