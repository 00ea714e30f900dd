"""The jobs of a study: one a run, and the steps, commands that a launcher starts, that each job consists of.

A trunk is a chain of steps with ``--stop-at N``, one to each checkpoint that a branch starts from; a search is a step a
point and one that chooses. So a step only has to wait for the end of other steps.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scratch_det.study.experiments import find
from scratch_det.study.run import EVALUATE, PRETRAIN, SEARCH, TRAIN, Run

TOOLS = {TRAIN: "train_net.py", EVALUATE: "train_net.py", PRETRAIN: "pretrain_net.py", SEARCH: "search.py"}
ROOT = Path(__file__).parents[2]  # of the repository, which recipes and tools are named from


@dataclass(frozen=True)
class Step:
    """One command of a study.

    Attributes:
        name: RUN; RUN@N for the part of it up to N iterations; RUN/POINT for a search's.
        run: name of the run whose folder it writes into.
        words: the tool and its arguments, without the Python interpreter and the number of processes.
        needs: names of the steps that have to be done before.
        inputs: files of other runs that have to exist before it starts.
        outputs: it is done when one of these files exists; the first one is its own.
        processes: how many train together; 0 for a command that does not train.
        also_after_failures: it starts when those that it needs have ended, whether they are done or failed.
    """

    name: str
    run: str
    words: tuple[str, ...]
    needs: tuple[str, ...] = ()
    inputs: tuple[Path, ...] = ()
    outputs: tuple[Path, ...] = ()
    processes: int = 1
    on_gpu: bool = False
    also_after_failures: bool = False

    @property
    def is_done(self) -> bool:
        return any(path.exists() for path in self.outputs)

    @property
    def file_name(self) -> str:
        """The step's name for file names."""
        return self.name.replace("/", ".")

    def command(self, launches: bool = True) -> list[str]:
        """The whole command line in this Python; ``launches``: it starts its processes itself."""
        several = ["--num-gpus", str(self.processes)] if launches and self.processes > 1 else []
        return [sys.executable, self.words[0], *several, *self.words[1:]]


@dataclass(frozen=True)
class Job:
    """A run of a study with its place among the others.

    Attributes:
        run: what is trained or evaluated.
        start: completed iterations of the checkpoint that it starts from; 0 when it starts from weights.
        keep_at: completed iterations whose checkpoints other jobs start from.
        needs: names of the jobs whose files it uses.
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
        """Iterations that the job itself trains."""
        return self.run.iterations - self.start

    def inputs(self, out: Path) -> list[Path]:
        """Files of other jobs that have to exist before it starts."""
        files = [out / run / "result.json" for run in self.needs if run != self.run.trunk]
        if self.start and not any((out / self.name / "checkpoints").glob("model_*.pth")):
            files.append(self.parent(out))
        if self.run.pretraining:
            files.append(out / self.run.pretraining / "backbone.pth")
        return [*files, self.config(out)] if self.run.found_by else files

    def config(self, out: Path) -> Path:
        """The recipe: the repository's, or the one that a search has written."""
        return out / self.run.found_by / self.run.config.name if self.run.found_by else from_here(self.run.config)

    def result(self, out: Path) -> Path:
        """The file that exists when the job is finished."""
        return out / self.name / ("inference" if self.run.kind == EVALUATE else "") / "result.json"

    def overrides(self, out: Path) -> list[str]:
        """The keys that are changed in the recipe: ``KEY VALUE KEY VALUE ...``."""
        run = self.run
        changes = {
            "SEED": run.seed,
            "MODEL.WEIGHTS": out / run.pretraining / "backbone.pth" if run.pretraining else None,
            "OUTPUT_DIR": out / self.name if run.kind != SEARCH else None,
        }
        if run.evaluates:
            changes["MODEL.WEIGHTS"] = out / run.evaluates / "checkpoints/model_final.pth"
        pairs = [(key, str(value)) for key, value in changes.items() if value is not None]
        return [*run.changes, *(word for pair in pairs for word in pair)]

    def arguments(self, out: Path, backend: str, gpus: int = 0, stop_at: int = 0) -> list[str]:
        """The tool's arguments; ``gpus``: number of processes, 0 if a launcher starts them."""
        run = self.run
        words = ["--config-file", str(self.config(out))]
        if run.kind != PRETRAIN:
            words += ["--backend", backend]
        if (processes := gpus and (run.processes or gpus)) > 1:
            words += ["--num-gpus", str(processes)]
        if run.kind == SEARCH:
            words += ["--out", str(out / run.name), "--grid", str(from_here(Path(run.grid)))]
            words += [word for recipe in run.apply_to for word in ("--apply-to", str(from_here(Path(recipe))))]
        elif run.kind == EVALUATE:
            words.append("--eval-only")
        else:
            if self.keep_at:
                words += ["--keep-at", ",".join(map(str, self.keep_at))]
            if self.start:
                words += ["--switch-from" if run.is_switch else "--branch-from", str(self.parent(out))]
            words += [*(["--stop-at", str(stop_at)] if stop_at else []), "--resume"]
        return [*words, *run.flags, *self.overrides(out)]

    def steps(self, out: Path, backend: str, gpus: int, on_gpu: bool) -> list[Step]:
        """The steps of a job that is not a search, in order."""
        run, needs, found = self.run, self.step_needs, list[Step]()
        for stop_at in (*self.keep_at, 0):
            name = f"{run.name}@{stop_at}" if stop_at else run.name
            outputs = [*([_checkpoint(out, run.name, stop_at)] if stop_at else []), self.result(out)]
            words = (self.tool, *self.arguments(out, backend, stop_at=stop_at))
            found.append(Step(name, run.name, words, needs, tuple(self.inputs(out)), tuple(outputs),
                              run.processes or gpus, on_gpu))  # fmt: skip
            needs = (name,)
        return found

    @property
    def tool(self) -> str:
        return str(from_here(Path("tools") / TOOLS[self.run.kind]))

    @property
    def step_needs(self) -> tuple[str, ...]:
        """Names of the steps that the job's first step needs; in a trunk, the step that ends at the checkpoint."""
        return tuple(f"{name}@{self.start}" if self.start and name == self.run.trunk else name for name in self.needs)

    def parent(self, out: Path) -> Path:
        """The checkpoint of the trunk from which a branch starts."""
        return _checkpoint(out, str(self.run.trunk), self.start)


def _checkpoint(out: Path, run: str, completed: int) -> Path:
    return out / run / "checkpoints" / f"model_{completed - 1:07d}.pth"


def jobs_of(runs: Sequence[Run], share_prefix: bool = True) -> list[Job]:
    """``runs`` and all runs that they need, sorted so that each run comes after the runs that it needs.

    ``share_prefix``: a run whose trunk is among them branches off it; otherwise it trains all of its iterations.
    """
    everything = {run.name: run for run in runs}
    waiting = list(runs)
    while waiting:
        for name in _needs(run := waiting.pop(), start=int(run.is_switch)):
            if name not in everything:
                everything[name] = find(name)
                waiting.append(everything[name])
    starts: dict[str, int] = {}
    keep_at: dict[str, set[int]] = {}
    for name, run in everything.items():
        shares = run.trunk and (run.is_switch or (share_prefix and run.trunk in everything))
        starts[name] = run.branch_at(find(str(run.trunk))) if shares else 0
        if starts[name]:
            keep_at.setdefault(str(run.trunk), set()).add(starts[name])
    found: dict[str, Job] = {}
    while len(found) < len(everything):
        for name, run in everything.items():
            needs = _needs(run, starts[name])
            if name not in found and all(needed in found for needed in needs):
                found[name] = Job(run, starts[name], tuple(sorted(keep_at.get(name, ()))), needs)
                break
    return list(found.values())


def from_here(path: Path) -> Path:
    """A path from the repository's root, from the current folder."""
    return path if Path.cwd() == ROOT else ROOT / path


def _needs(run: Run, start: int) -> tuple[str, ...]:
    asked = (run.trunk if start else None, run.evaluates, run.pretraining, run.found_by)
    return tuple(name for name in asked if name)
