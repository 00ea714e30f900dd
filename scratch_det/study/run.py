"""The runs of a study: what each one is, its place among the others, and the commands that it consists of."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scratch_det.config.schedule import ITERATIONS_PER_X, kx_schedule, shared_prefix

CONFIGS = Path("configs")
SWITCH_BEFORE_END = 3  # of the kx schedule: the paper's last 270k iterations (section 5.1)
SCRATCH, PRETRAINED = "scratch", "pretrained"
TRAIN, PRETRAIN, SEARCH, EVALUATE = "train", "pretrain", "search", "evaluate"


@dataclass(frozen=True)
class Run:
    """One run: a training, a pre-training, an evaluation of another run's weights, or a search's trainings.

    Attributes:
        name: of its folder, and of its recipe unless ``recipe`` says otherwise.
        places: of the paper, such as "table1", or of a study that mirrors it, such as "digits/table1", or own.PLACE.
        shown: the row, column or curve there.
        init: SCRATCH or PRETRAINED.
        k: of the kx schedule; 0 for a run that follows none and has a ``length`` in iterations instead.
        expected: what the paper reports, in percent by metric; empty where it only shows a curve.
        trunk: the run of the same model whose checkpoint after ``branch_at`` iterations this one may start from.
        folder: the recipe's, below configs/; an absolute path where it is elsewhere.
        is_switch: it does start there, and goes on as a cascade.
        evaluates: the run whose final weights are evaluated; nothing is trained.
        per_x: iterations of 1x.
        seed: of a run that is repeated with others; None for what the recipe says.
        pretraining: the run whose backbone.pth it starts from.
        kind: TRAIN, PRETRAIN, SEARCH or EVALUATE: which tool it is.
        found_by: the search whose best values it is trained with.
        processes: how many it needs where their number shapes the result, as BN's does.
        flags: further words of its command.
        changes: to its recipe, "KEY", "VALUE", "KEY", ...
        grid: of a search: its file, see ``scratch_det.study.search``; points: how many runs that are.
        apply_to: of a search: recipes that get its best values.
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

    @property
    def config(self) -> Path:
        """The recipe, from the repository's root or as an absolute path."""
        return CONFIGS / self.folder / f"{self.recipe or self.name}.yaml"

    @property
    def iterations(self) -> int:
        """Of the whole run, of all points of a search."""
        return 0 if self.kind == EVALUATE else self.points * (self.length or kx_schedule(self.k, self.per_x).max_iter)

    def branch_at(self, trunk: "Run | None") -> int:
        """Completed iterations of the checkpoint of ``trunk`` that this run starts from; 0 without a trunk."""
        if trunk is None:
            return 0
        if self.is_switch:
            return self.iterations - SWITCH_BEFORE_END * self.per_x
        return shared_prefix(kx_schedule(self.k, self.per_x), kx_schedule(trunk.k, trunk.per_x))


def schedules(
    name: str,
    places: str,
    reported: Mapping[int, dict[str, float]],
    more: Mapping[int, str] | None = None,
    shown: str = "{init}, {k}x",
    **fields: Any,
) -> list[Run]:
    """Runs of one model that differ only in length, the longest first: the others branch off it.

    Args:
        name: begins with the initialisation, unless ``fields`` has it; has "{k}" where there are several.
        places: of all runs, separated by spaces; ``more``: of some, by k.
        reported: ``expected`` of each run, by k.
        fields: others of Run.
    """
    init, longest = fields.pop("init", name.partition("_")[0]), max(reported)
    return [
        Run(
            name=name.format(k=k),
            places=(*places.split(), *(more or {}).get(k, "").split()),
            shown=shown.format(init=init, k=k),
            init=init,
            k=k,
            expected=expected,
            **{"trunk": None if k == longest else name.format(k=longest), **fields},
        )
        for k, expected in reported.items()
    ]


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


def from_here(path: Path) -> Path:
    """A path from the repository's root, from the current folder."""
    return path if Path.cwd() == ROOT else ROOT / path
