"""The runs of a study: what each is, its place among the others (Job), and the commands that it consists of (Step).

A trunk is a chain of steps with ``--stop-at N``, one to each checkpoint that a branch starts from; a search is a step a
point and one that chooses. So a step only has to wait for the end of other steps.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from fvcore.common.config import CfgNode

from scratch_det import backends
from scratch_det.config.load import load_config
from scratch_det.config.schedule import ITERATIONS_PER_X, Schedule, kx_schedule, length_schedule, shared_prefix
from scratch_det.evaluation.metrics import SCRATCH
from scratch_det.files import ROOT

CONFIGS = Path("configs")
SWITCH_BEFORE_END = 3  # of the kx schedule: the paper's last 270k iterations (section 5.1)
FEWEST_ITERATIONS = 1000  # above, a length is in iterations; below, in units of 1x
TRAIN, PRETRAIN, SEARCH, EVALUATE = "train", "pretrain", "search", "eval"  # commands of scratch-det
EXIT_SOME_FAILED = 1


@dataclass(frozen=True)
class Run:
    """One run: a training, a pre-training, an evaluation of another run's weights, or a search's trainings.

    Attributes:
        name: of its folder, and of its recipe unless ``recipe`` says otherwise.
        places: tables and figures that show it: "table1" of the paper, "digits/table1" of the miniature, or own.PLACE.
        shown: the name of its row, column or curve there.
        init: SCRATCH or PRETRAINED.
        k: of the kx schedule; 0 for a run that follows none and has a ``length`` in iterations instead.
        expected: what the paper reports, in percent by metric; empty where it only shows a curve.
        trunk: the run of the same model whose checkpoint after ``branch_at`` iterations this one may start from.
        folder: the recipe's, below configs/; an absolute path where it is elsewhere.
        is_switch: it starts from the trunk's checkpoint in any case, and continues as a cascade.
        evaluates: the run whose final weights are evaluated; nothing is trained.
        per_x: iterations of 1x.
        seed: of a run that is repeated with other seeds; None for the recipe's.
        pretraining: the run whose backbone.pth it starts from.
        kind: TRAIN, PRETRAIN, SEARCH or EVALUATE: which command it is.
        found_by: the search whose best values it is trained with.
        processes: their number, where the result depends on it, as with BN.
        flags: further flags of its command.
        changes: to its recipe, "KEY", "VALUE", "KEY", ...
        grid: of a search: its file, see ``scratch_det.study.search``; points: how many runs that are.
        apply_to: of a search: recipes that get its best values.
        about: what a file of runs says of it, by its fields, see ``own``.
        diverges: its loss is expected to become infinite, as without normalisation from random initialisation.
        in_proportion: a long run of ``length`` drops after 2/3 and 8/9 too, see ``config.schedule.length_schedule``.
    """

    name: str
    places: tuple[str, ...]
    shown: str
    init: str
    k: int
    expected: dict[str, float] = field(default_factory=dict)
    trunk: str | None = None
    folder: str = "COCO-InstanceSegmentation"
    length: int = 0
    is_switch: bool = False
    evaluates: str | None = None
    per_x: int = ITERATIONS_PER_X
    recipe: str = ""
    seed: int | None = None
    pretraining: str | None = None
    kind: str = TRAIN
    found_by: str | None = None
    processes: int | None = None
    flags: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    grid: str = ""
    points: int = 1
    apply_to: tuple[str, ...] = ()
    in_proportion: bool = False
    diverges: bool = False
    about: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def repeats(self) -> str:
        """The name of the run that this one is, but for its seed."""
        return self.name.removesuffix(f"_seed{self.seed}")

    @property
    def config(self) -> Path:
        """The recipe, from the repository's root or as an absolute path."""
        return CONFIGS / self.folder / f"{self.recipe or self.name}.yaml"

    @property
    def schedule(self) -> Schedule:
        """Of one training of the run."""
        return length_schedule(self.length, self.in_proportion) if self.length else kx_schedule(self.k, self.per_x)

    @property
    def iterations(self) -> int:
        """Of the whole run, of all points of a search."""
        return 0 if self.kind == EVALUATE else self.points * self.schedule.max_iter

    def branch_at(self, trunk: "Run | None") -> int:
        """Completed iterations of the checkpoint of ``trunk`` that this run starts from; 0 without a trunk."""
        if trunk is None:
            return 0
        if self.is_switch:
            return self.iterations - SWITCH_BEFORE_END * self.per_x
        return shared_prefix(self.schedule, trunk.schedule)


class Claim(NamedTuple):
    """Something that a study says in numbers: a sum of metrics, in percent, over runs of the same seed.

    Attributes:
        text: what it is.
        terms: factor, the run's name without its seed, and the metric, of each summand.
    """

    text: str
    terms: tuple[tuple[int, str, str], ...]

    @classmethod
    def parse(cls, text: str, formula: str) -> "Claim":
        """``formula``: RUN, or RUN:METRIC for another one than box AP, with + and - between: "a_6x - b_6x".

        Raises AttributeError, KeyError or ValueError for anything else.
        """
        words, terms = ["+", *formula.split()], []
        for sign, word in zip(words[::2], words[1::2], strict=True):
            name, _, metric = word.partition(":")
            terms.append(({"+": 1, "-": -1}[sign], name, metric or "bbox/AP"))
        return cls(text, tuple(terms))


def schedules(
    name: str,
    places: str,
    reported: Mapping[int, dict[str, float]],
    more: Mapping[int, str] | None = None,
    shown: str = "{init}, {k}x",
    recipe_of: Mapping[int, int] | None = None,
    **fields: Any,
) -> list[Run]:
    """Runs of one model that differ only in length: all branch off the longest, which comes first.

    Args:
        name: begins with the initialisation, unless ``fields`` has it; has "{k}" where there are several.
        places: of all runs, separated by spaces; ``more``: of some, by k.
        reported: ``expected`` of each run, by k, or by iterations (60,000 is "60k" in a name) where it is no kx run.
        recipe_of: of runs without a recipe of their own: the k of the run whose recipe they change.
        fields: others of Run.
    """
    init, longest, runs = fields.pop("init", name.partition("_")[0]), max(reported), list[Run]()
    labels = {k: str(k) if k < FEWEST_ITERATIONS else f"{k / 1000:g}k" for k in reported}
    for k, expected in sorted(reported.items(), reverse=True):
        where = (*places.split(), *(more or {}).get(k, "").split())
        length = {"k": k} if k < FEWEST_ITERATIONS else {"k": 0, "length": k}
        trunk = None if k == longest else name.format(k=labels[longest])
        run = Run(name.format(k=labels[k]), where, shown.format(init=init, k=labels[k]), init, expected=expected,
                  **{"trunk": trunk, **length, **fields})  # fmt: skip
        if recipe_of and k in recipe_of:
            changes = ("SOLVER.MAX_ITER", str(run.schedule.max_iter), "SOLVER.STEPS", str(run.schedule.steps))
            run = replace(run, recipe=name.format(k=labels[recipe_of[k]]), changes=changes)
        runs.append(run)
    return runs


def cascade_runs(
    plain: Run, test_aug: tuple[str, ...], reported: dict[str, float], reported_tta: dict[str, float], **fields: Any
) -> list[Run]:
    """``plain`` with a cascade, which from scratch follows plain training; and that, evaluated with test aug."""
    name, trunk = plain.name.replace("mask_rcnn", "cascade_mask_rcnn"), plain.name if plain.init == SCRATCH else None
    cascade = replace(plain, name=name, shown=f"{plain.shown}, cascade", expected=reported, trunk=trunk,
                      is_switch=trunk is not None, **fields)  # fmt: skip
    expected = {metric.replace("/", "_TTA/"): value for metric, value in reported_tta.items()}
    evaluation = replace(cascade, name=f"{name}_test_aug", recipe=name, changes=test_aug, expected=expected,
                         shown=f"{cascade.shown}, test aug", trunk=None, is_switch=False, pretraining=None,
                         kind=EVALUATE, evaluates=name)  # fmt: skip
    return [cascade, evaluation]


@dataclass(frozen=True)
class Job:
    """A run with its place in a study, whose run folders are in ``out``.

    Attributes:
        run: what is trained or evaluated.
        start: completed iterations of the trunk's checkpoint that it starts from; 0 when it starts from weights.
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

    def config(self, out: Path) -> Path:
        """The recipe: the repository's, or the one that a search has written."""
        return out / self.run.found_by / self.run.config.name if self.run.found_by else from_here(self.run.config)

    def recipe(self, out: Path, backend: str) -> CfgNode:
        """The recipe with the job's changes; while a search has not written it yet, the recipe that it will change."""
        path = self.config(out) if self.config(out).exists() else from_here(self.run.config)
        return load_config(path, self.overrides(out), backends.defaults(backend)).cfg

    def result(self, out: Path) -> Path:
        """The file that exists when the job is finished."""
        return out / self.name / ("inference" if self.run.kind == EVALUATE else "") / "result.json"

    def weights(self, out: Path) -> Path | None:
        """MODEL.WEIGHTS, where another job writes them."""
        if self.run.evaluates:
            return out / self.run.evaluates / "checkpoints/model_final.pth"
        return out / self.run.pretraining / "backbone.pth" if self.run.pretraining else None

    def parent(self, out: Path) -> Path:
        """The checkpoint of the trunk from which a branch starts."""
        return checkpoint(out, str(self.run.trunk), self.start)

    def inputs(self, out: Path) -> list[Path]:
        """Files of other jobs that have to exist before it starts."""
        files = [out / run / "result.json" for run in self.needs if run != self.run.trunk]
        if self.start and not any((out / self.name / "checkpoints").glob("model_*.pth")):
            files.append(self.parent(out))
        if weights := self.weights(out):
            files.append(weights)
        if self.run.found_by:
            files.append(self.config(out))
        return files

    def overrides(self, out: Path) -> list[str]:
        """The keys that are changed in the recipe: ``KEY VALUE KEY VALUE ...``."""
        output_dir = None if self.run.kind == SEARCH else out / self.name  # each point of a search has its own
        changes = {"SEED": self.run.seed, "MODEL.WEIGHTS": self.weights(out), "OUTPUT_DIR": output_dir}
        pairs = [(key, str(value)) for key, value in changes.items() if value is not None]
        return [*self.run.changes, *(word for pair in pairs for word in pair)]

    def arguments(self, out: Path, backend: str, gpus: int = 0, stop_at: int = 0) -> list[str]:
        """The command's arguments; ``gpus``: number of processes, 0 if a launcher starts them."""
        run, words = self.run, ["--config-file", str(self.config(out))]
        if run.kind != PRETRAIN:
            words += ["--backend", backend]
        if (processes := gpus and (run.processes or gpus)) > 1:
            words += ["--num-gpus", str(processes)]
        if run.kind == SEARCH:
            words += ["--out", str(out / run.name), "--grid", str(from_here(run.grid))]
            words += [word for recipe in run.apply_to for word in ("--apply-to", str(from_here(recipe)))]
        elif run.kind != EVALUATE:
            words += ["--keep-at", ",".join(map(str, self.keep_at))] if self.keep_at else []
            if self.start:
                words += ["--switch-from" if run.is_switch else "--branch-from", str(self.parent(out))]
            words += [*(["--stop-at", str(stop_at)] if stop_at else []), "--resume"]
        return [*words, *run.flags, *self.overrides(out)]


@dataclass(frozen=True)
class Step:
    """One command of a study.

    Attributes:
        name: RUN; RUN@N for the part of it up to N iterations; RUN/POINT for a search's.
        run: name of the run whose folder it writes into.
        words: a command of scratch-det and its arguments, without the number of processes.
        needs: names of the steps that have to be done before.
        inputs: files of other runs that have to exist before it starts.
        outputs: it is done when one of these files exists; the first one is its own.
        processes: how many train together; 0 for a command that does not train.
        on_gpu: it uses a GPU for each of them, where there is one.
        threads: of each of them on the CPU, OMP_NUM_THREADS; 0: as the environment has it.
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
    threads: int = 0
    also_after_failures: bool = False

    @property
    def is_done(self) -> bool:
        return any(path.exists() for path in self.outputs)

    def file(self, out: Path, suffix: str) -> Path:
        """The step's own file in jobs/: its log (.log), exit code (.exit) or SLURM script (.sh)."""
        return jobs_folder(out) / f"{self.name.replace('/', '.')}{suffix}"

    def command(self, launches: bool = True) -> list[str]:
        """The whole command line in this Python; ``launches``: it starts its processes itself."""
        several = ["--num-gpus", str(self.processes)] if launches and self.processes > 1 else []
        return [sys.executable, "-m", "scratch_det", self.words[0], *several, *self.words[1:]]


def checkpoint(out: Path, run: str, completed: int) -> Path:
    """The checkpoint of ``run`` after so many completed iterations."""
    return out / run / "checkpoints" / f"model_{completed - 1:07d}.pth"


def jobs_folder(out: Path) -> Path:
    """The folder of the steps' own files."""
    return out / "jobs"


def from_here(path: str | Path) -> Path:
    """A path from ``ROOT``, from the current folder."""
    return Path(path) if Path.cwd() == ROOT else ROOT / path
