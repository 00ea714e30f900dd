"""A grid search: one run for each point of a grid, and a step that chooses the best one and writes its values down.

The grid is a YAML file of axes, written like a recipe, but with a list of values in the place of a value.

SOLVER:
  BASE_LR: [0.02, 0.04]
scales:                         # keys that go together: any name, and a list of what they are set to
  - {INPUT.MIN_SIZE_TRAIN: [800], INPUT.MIN_SIZE_TRAIN_SAMPLING: choice}
  - {INPUT.MIN_SIZE_TRAIN: [512, 800], INPUT.MIN_SIZE_TRAIN_SAMPLING: range}
"""

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

from fvcore.common.config import CfgNode

from scratch_det import backends
from scratch_det.command_line import project_flags
from scratch_det.config import LoadedConfig, check_config, flatten, settle_batch
from scratch_det.config.load import BASE_KEY, Entry, read_source
from scratch_det.engine.plan import Request, choose_backend
from scratch_det.engine.run_dir import RunDir
from scratch_det.errors import ConfigError, UserError, did_you_mean
from scratch_det.evaluation.metrics import TTA, detection_tasks, metrics_of
from scratch_det.study.records import other_recipe
from scratch_det.study.run import Step, from_here

BEST = "best.yaml"
SEED = 0  # of all points where the recipe has none: they differ only in the grid's keys
Axes = dict[str, dict[str, dict[str, str]]]  # axis -> label -> keys and values as tools/train_net.py takes them


@dataclass(frozen=True)
class Point:
    """One choice on every axis: ``labels`` by axis, ``values`` by key of the recipe."""

    labels: dict[str, str]
    values: dict[str, str]

    @property
    def name(self) -> str:
        """The name of its run folder."""
        return "_".join(["trial", *(f"{axis}-{label}" for axis, label in self.labels.items())])

    @property
    def overrides(self) -> list[str]:
        """``KEY VALUE KEY VALUE ...``"""
        return [word for pair in self.values.items() for word in pair]

    def __str__(self) -> str:
        return ", ".join(f"{axis} {label}" for axis, label in self.labels.items())


def read_grid(path: Path) -> Axes:
    """The axes in the file's order. Raises ConfigError when they span no grid."""
    source = read_source(path, "--grid")
    if source.bases:
        raise ConfigError(f"{source.bases[0].where}: a grid has no {BASE_KEY}: write its axes into one file")
    axes = {entry.key: _choices(entry) for entry in source.entries}
    owners: dict[str, str] = {}
    for axis, choices in axes.items():
        for key in next(iter(choices.values())):  # each choice sets the same keys
            if key == "OUTPUT_DIR":
                raise ConfigError(f"{path}: OUTPUT_DIR cannot be searched: each point has a folder of its own in --out")
            if key in owners:
                raise ConfigError(f"{path}: {key} is set by two axes, {owners[key]} and {axis}: leave out one")
            owners[key] = axis
    if len(points_of(axes)) < 2:
        raise ConfigError(f"{path}: the grid has one point, expected two or more: give a key several values")
    return axes


def points_of(axes: Axes) -> list[Point]:
    """Every combination, the last axis changing fastest; a key's last word names its axis where that is unique."""
    short = [axis.rpartition(".")[2] for axis in axes]
    names = [name if short.count(name) == 1 else axis for name, axis in zip(short, axes, strict=True)]
    points = []
    for labels in product(*axes.values()):
        chosen = [axes[axis][label] for axis, label in zip(axes, labels, strict=True)]
        values = {key: value for choice in chosen for key, value in choice.items()}
        points.append(Point(dict(zip(names, labels, strict=True)), values))
    return points


def _choices(entry: Entry) -> dict[str, dict[str, str]]:
    """The keys and values of each choice on an axis, by a label that can be part of a file's name."""
    if not isinstance(entry.value, list) or not entry.value:
        raise ConfigError(f"{entry.where}: {entry.key} is {entry.value!r}, expected a list of values, such as [1, 2]")
    together = [isinstance(value, dict) for value in entry.value]
    if any(together) and not (all(together) and all(value.keys() == entry.value[0].keys() for value in entry.value)):
        raise ConfigError(
            f"{entry.where}: {entry.key} sets keys that go together, so each of its choices has to set all"
        )
    choices: dict[str, dict[str, str]] = {}
    for value in entry.value:
        values = {str(key): str(word) for key, word in (value if all(together) else {entry.key: value}).items()}
        bare = [re.sub(r"[\[\](){}'\"]", "", word).strip() for word in values.values()]
        label = "-".join(re.sub(r"[^\w.+-]+", "-", word).rstrip("-") or "empty" for word in bare)  # 0.02, 512-800
        if label in choices:
            raise ConfigError(f"{entry.where}: {entry.key} has {label} twice")
        choices[label] = values
    return choices


@dataclass(frozen=True)
class Search:
    """A grid search in the folder ``out``; see ``tools/search.py --help``."""

    config_file: str
    grid: str
    out: Path
    overrides: tuple[str, ...] = ()
    metric: str = "bbox/AP"
    apply_to: tuple[str, ...] = ()
    backend: str = backends.AUTO
    num_gpus: int = 1
    scale_to_batch: int | None = None
    accumulate: int = 1

    @property
    def processes(self) -> int:
        """Of a point; --num-gpus 0 is one process, as in tools/train_net.py."""
        return max(self.num_gpus, 1)

    @cached_property
    def axes(self) -> Axes:
        """Raises ConfigError when the file is no grid."""
        return read_grid(Path(self.grid))

    @cached_property
    def points(self) -> list[Point]:
        """All points of the grid, in its order."""
        return points_of(self.axes)

    def recipe(self, point: Point | None = None, config_file: str = "") -> LoadedConfig:
        """The recipe with the command line's overrides, or another one without; then the point's."""
        words = [*(() if config_file else self.overrides), *(point.overrides if point else ())]
        return choose_backend(Request(config_file or self.config_file, words, self.backend))[1]

    def steps(self) -> list[Step]:
        """A step a point."""
        cfg, tool = self.recipe().cfg, str(from_here(Path("tools/train_net.py")))
        flags: list[object] = ["--config-file", self.config_file]
        flags += ["--backend", self.backend] if self.backend != backends.AUTO else []
        flags += ["--scale-to-batch", self.scale_to_batch] if self.scale_to_batch is not None else []
        flags += ["--accumulate", self.accumulate] if self.accumulate != 1 else []
        shared = (tool, *project_flags(), *map(str, flags), "--resume")
        shared += (*(("SEED", str(SEED)) if cfg.SEED < 0 else ()), *self.overrides)
        return [
            Step(point.name, point.name, (*shared, *point.overrides, "OUTPUT_DIR", str(self.out / point.name)),
                 outputs=(self.out / point.name / "result.json",), processes=self.processes,
                 on_gpu=cfg.MODEL.DEVICE != "cpu")
            for point in self.points
        ]  # fmt: skip

    def check(self) -> None:
        """Raise UserError, before anything is written, when the runs or the choice could not be made."""
        if self.num_gpus < 0:
            raise UserError(f"--num-gpus {self.num_gpus}: expected 1 or more")
        if "OUTPUT_DIR" in self.overrides[::2]:
            raise ConfigError("OUTPUT_DIR is not for a search to set: each point has a folder of its own in --out DIR")
        if clash := sorted(set(self.overrides[::2]).intersection(*(point.values for point in self.points))):
            raise ConfigError(
                f"{', '.join(clash)}: the grid searches it, so it cannot be set on the command line; leave it out"
            )
        names = [BEST, *(Path(recipe).name for recipe in self.apply_to)]
        if twice := [recipe for recipe in self.apply_to if names.count(Path(recipe).name) > 1]:
            raise UserError(f"--apply-to {twice[0]}: {Path(twice[0]).name} would be written twice into {self.out}")
        seen: dict[str, Point] = {}
        for point in self.points:
            try:
                values = self._check_point(point)
            except ConfigError as error:
                raise ConfigError(f"at the grid point {point}: {error}") from None
            if values in seen:
                raise ConfigError(f"{self.grid}: {seen[values]} and {point} are one and the same point: leave out one")
            seen[values] = point
        _check_metric(self.metric, self.recipe().cfg)
        if RunDir(self.out).holds_run():
            raise UserError(
                f"--out {self.out} is the folder of a run; name one for the search, which makes a run a point"
            )
        RunDir(self.out).check(allow_existing=True)

    def _check_point(self, point: Point) -> str:
        """The point's values, as the recipe has them before a batch rescales them."""
        recipe = self.recipe(point)
        all_values = flatten(recipe.cfg)
        settle_batch(recipe, self.processes, self.scale_to_batch, self.accumulate)
        check_config(recipe.cfg, self.processes, self.accumulate)
        backends.check_keys(backends.choose(self.backend), recipe.cfg)
        for target in self.apply_to:
            check_config(self.recipe(point, target).cfg)
        if others := list(other_recipe(RunDir(self.out / point.name), recipe.cfg)):
            raise UserError(f"--out {self.out} holds another search:\n  {others[0]}\n  name another folder: --out DIR")
        return repr([all_values[key] for key in point.values])


def _check_metric(metric: str, cfg: CfgNode) -> None:
    """Raise ConfigError for a metric that no result of ``cfg`` will have; classes are not known here."""
    if not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty: a search needs a data set to compare its points on")
    ends = ("", TTA) if cfg.TEST.AUG.ENABLED else ("",)
    names = [f"{task}{end}/{score}" for end in ends for task in detection_tasks(cfg) for score in metrics_of(task)]
    places = [""] if len(cfg.DATASETS.TEST) == 1 else [f"{name}/" for name in cfg.DATASETS.TEST]
    known = [f"{place}{name}" for place in places for name in names]
    of_class = re.fullmatch(r"(.+/AP)(?:50)?-.+", metric)  # PASCAL VOC's have AP50-CLASS too
    if metric not in known and not (of_class and of_class[1] in known):
        raise ConfigError(f"--metric is {metric}, expected one of {', '.join(known)}{did_you_mean(metric, known)}")
