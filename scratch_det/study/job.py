"""The commands of a study: one a run, with the runs that have to come first."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from scratch_det.study.experiments import find
from scratch_det.study.run import EVALUATE, PRETRAIN, SEARCH, TRAIN, Run

TOOLS = {TRAIN: "train_net.py", EVALUATE: "train_net.py", PRETRAIN: "pretrain_net.py", SEARCH: "search.py"}
ROOT = Path(__file__).parents[2]  # of the repository, which recipes and tools are named from


@dataclass(frozen=True)
class Job:
    """A run of a study, as it is going to be started.

    Attributes:
        run: what is trained or evaluated.
        start: completed iterations of the checkpoint that it begins with; 0 when it begins with the weights.
        keep_at: completed iterations whose checkpoints others begin with.
        needs: names of the jobs that something is taken from.
    """

    run: Run
    start: int = 0
    keep_at: tuple[int, ...] = ()
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def iterations(self) -> int:
        """Those that the job itself trains."""
        return self.run.iterations - self.start

    def weight(self, gpus: int) -> int:
        """How many of the places for runs of ``gpus`` processes each it takes."""
        return ceil((self.run.processes or gpus) / gpus)

    def inputs(self, out: Path) -> list[Path]:
        """The files of other jobs without which it cannot start."""
        run, files = self.run, []
        if self.start and not any((out / run.name / "checkpoints").glob("model_*.pth")):
            files.append(self._parent(out))
        if run.evaluates:
            files.append(out / run.evaluates / "result.json")
        if run.pretraining:
            files += [out / run.pretraining / "result.json", out / run.pretraining / "backbone.pth"]
        if run.found_by:
            files += [out / run.found_by / "result.json", self.config(out)]
        return files

    def config(self, out: Path) -> Path:
        """The recipe: the repository's, or the one that a search has written."""
        return out / self.run.found_by / self.run.config.name if self.run.found_by else from_here(self.run.config)

    def result(self, out: Path) -> Path:
        """The file that says that the job is finished."""
        return out / self.name / ("inference" if self.run.kind == EVALUATE else "") / "result.json"

    def overrides(self, out: Path) -> list[str]:
        """The keys that are changed in the recipe: ``KEY VALUE KEY VALUE ...``."""
        run = self.run
        words = list(run.changes)
        if run.seed is not None:
            words += ["SEED", str(run.seed)]
        if run.pretraining:
            words += ["MODEL.WEIGHTS", str(out / run.pretraining / "backbone.pth")]
        if run.evaluates:
            words += ["MODEL.WEIGHTS", str(out / run.evaluates / "checkpoints/model_final.pth")]
        return words if run.kind == SEARCH else [*words, "OUTPUT_DIR", str(out / self.name)]

    def arguments(self, out: Path, backend: str, gpus: int = 0) -> list[str]:
        """What the tool is given; ``gpus`` processes, 0 where a launcher starts them."""
        run = self.run
        words = ["--config-file", str(self.config(out))]
        if run.kind != PRETRAIN:
            words += ["--backend", backend]
        if (processes := gpus and (run.processes or gpus)) > 1:
            words += ["--num-gpus", str(processes)]
        if run.kind == SEARCH:
            words += ["--out", str(out / run.name)]
        elif run.kind == EVALUATE:
            words.append("--eval-only")
        else:
            words += [*self._checkpoints(out), "--resume"]
        return [*words, *run.flags, *self.overrides(out)]

    def command(self, out: Path, backend: str, gpus: int = 0) -> list[str]:
        """The whole command line, in this Python."""
        return [
            sys.executable,
            str(from_here(Path("tools") / TOOLS[self.run.kind])),
            *self.arguments(out, backend, gpus),
        ]

    def _checkpoints(self, out: Path) -> list[str]:
        words = ["--keep-at", ",".join(map(str, self.keep_at))] if self.keep_at else []
        if self.start:
            words += ["--switch-from" if self.run.is_switch else "--branch-from", str(self._parent(out))]
        return words

    def _parent(self, out: Path) -> Path:
        return out / str(self.run.trunk) / "checkpoints" / f"model_{self.start - 1:07d}.pth"


def jobs_of(runs: Sequence[Run], share_prefix: bool = True) -> list[Job]:
    """``runs``, and those without which they cannot be, in an order in which each comes after what it needs.

    ``share_prefix``: a run whose trunk is among them branches off it; otherwise it trains all of its iterations.
    """
    everything = _with_needs(runs)
    names = {run.name for run in everything}
    starts: dict[str, int] = {}
    keep_at: dict[str | None, set[int]] = {}
    for run in everything:
        shares = run.is_switch or (share_prefix and run.trunk in names)
        starts[run.name] = run.branch_at(find(str(run.trunk))) if run.trunk and shares else 0
        if starts[run.name]:
            keep_at.setdefault(run.trunk, set()).add(starts[run.name])
    return _ordered(
        Job(run, starts[run.name], tuple(sorted(keep_at.get(run.name, ()))), _needs(run, starts[run.name]))
        for run in everything
    )


def from_here(path: Path) -> Path:
    """A path from the repository's root, from the current folder."""
    return path if Path.cwd() == ROOT else ROOT / path


def _needs(run: Run, start: int) -> tuple[str, ...]:
    asked = (run.trunk if start else None, run.evaluates, run.pretraining, run.found_by)
    return tuple(name for name in asked if name)


def _with_needs(runs: Sequence[Run]) -> list[Run]:
    """``runs`` and, once each, the ones that they cannot do without."""
    found = {run.name: run for run in runs}
    waiting = list(runs)
    while waiting:
        run = waiting.pop()
        for name in _needs(run, start=int(run.is_switch)):
            if name not in found:
                found[name] = find(name)
                waiting.append(found[name])
    return list(found.values())


def _ordered(jobs: Iterable[Job]) -> list[Job]:
    """Each after those that it needs, otherwise in the given order."""
    waiting, done = list(jobs), dict[str, Job]()
    while waiting:
        ready = next(job for job in waiting if all(name in done for name in job.needs))
        waiting.remove(ready)
        done[ready.name] = ready
    return list(done.values())
