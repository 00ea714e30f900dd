"""A grid search: one run for each point of a grid, and a step that chooses the best one and writes its values down.

The grid is a YAML file of axes: a recipe in which each key has a list of values instead of one value.

SOLVER:
  BASE_LR: [0.02, 0.04]
scales:                         # keys that change together: any name, and a list of their values
  - {INPUT.MIN_SIZE_TRAIN: [800], INPUT.MIN_SIZE_TRAIN_SAMPLING: choice}
  - {INPUT.MIN_SIZE_TRAIN: [512, 800], INPUT.MIN_SIZE_TRAIN_SAMPLING: range}
"""

import json
import math
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path

import yaml
from fvcore.common.config import CfgNode

from scratch_det import backends
from scratch_det.command_line import project_flags
from scratch_det.config.load import BASE_KEY, Entry, flatten, plain, read_source, with_keys
from scratch_det.config.rules import check_config
from scratch_det.engine.plan import DETECTION, Request, check_recipe, choose_backend
from scratch_det.engine.run_dir import Facts, RunDir
from scratch_det.errors import ConfigError, Section, UserError, did_you_mean
from scratch_det.evaluation.metrics import detection_tasks, metrics_of, suffixes
from scratch_det.files import write_atomically
from scratch_det.log import Progress, clock, say_now
from scratch_det.reading import read_json
from scratch_det.study.local import Local, alone_in, require_gpus
from scratch_det.study.records import FIX, failure_of, other_recipe
from scratch_det.study.run import EXIT_SOME_FAILED, Step, jobs_folder
from scratch_det.tables import markdown

BEST = "best.yaml"
SEED = 0  # where the recipe has none: then the points differ only in the keys of the grid
Axes = dict[str, dict[str, dict[str, str]]]  # axis -> label -> keys and values as scratch-det train takes them


@dataclass(frozen=True)
class Point:
    """One choice on every axis, and what its run has reached.

    Attributes:
        labels: by axis; values: by key of the recipe.
        score, seconds: of a finished run: its metric, and how long it trained.
        error: why a run failed; empty while it is not finished.
    """

    labels: dict[str, str]
    values: dict[str, str]
    score: float | None = None
    seconds: float | None = None
    error: str = ""

    @property
    def name(self) -> str:
        """The name of its run folder."""
        return "_".join(["trial", *(f"{axis}-{label}" for axis, label in self.labels.items())])

    @property
    def overrides(self) -> list[str]:
        """``KEY VALUE KEY VALUE ...``"""
        return [word for pair in self.values.items() for word in pair]

    @property
    def result(self) -> str:
        return "failed" if self.score is None else f"{self.score:.2f}"

    def __str__(self) -> str:
        return ", ".join(f"{axis} {label}" for axis, label in self.labels.items())


def read_grid(path: Path, overrides: Sequence[str] = ()) -> Axes:
    """The axes in the file's order. Raises ConfigError when they span no grid, or set what ``overrides`` set."""
    entries = {entry.key: entry for entry in read_source(path, "--grid")}
    if base := entries.get(BASE_KEY):
        raise ConfigError(f"{base.where}: a grid has no {BASE_KEY}: write its axes into one file")
    axes = {key: _choices(entry) for key, entry in entries.items()}
    set_by = {"OUTPUT_DIR": "--out, where each point has a folder of its own,"}
    keys = [(key, "the command line") for key in overrides[::2]]
    keys += [(key, f"the axis {axis}") for axis, choices in axes.items() for key in next(iter(choices.values()))]
    for key, owner in keys:
        if set_by.setdefault(key, owner) != owner:
            raise ConfigError(f"{path}: {key} is set by {set_by[key]} and by {owner}: leave out one")
    if math.prod(map(len, axes.values())) < 2:
        raise ConfigError(f"{path}: the grid has one point, expected two or more: give a key several values")
    return axes


def _choices(entry: Entry) -> dict[str, dict[str, str]]:
    """The keys and values of each choice on an axis, by a label that can be part of a file's name."""
    if not isinstance(entry.value, list) or not entry.value:
        raise ConfigError(f"{entry.where}: {entry.key} is {entry.value!r}, expected a list of values, such as [1, 2]")
    keys = {frozenset(value) if isinstance(value, dict) else None for value in entry.value}
    if len(keys) > 1:
        raise ConfigError(f"{entry.where}: {entry.key}: each choice on this axis has to set the same keys")
    choices: dict[str, dict[str, str]] = {}
    for value in entry.value:
        values = {str(key): str(word) for key, word in ({entry.key: value} if None in keys else value).items()}
        bare = [re.sub(r"[\[\](){}'\"]", "", word).strip() for word in values.values()]
        label = "-".join(re.sub(r"[^\w.+-]+", "-", word).rstrip("-") or "empty" for word in bare)  # 0.02, 512-800
        if label in choices:
            raise ConfigError(f"{entry.where}: {entry.key} has {label} twice")
        choices[label] = values
    return choices


def points_of(axes: Axes) -> list[Point]:
    """Every combination, the last axis changing fastest; a key's last word names its axis where that is unique."""
    short = [axis.rpartition(".")[2] for axis in axes]
    names = [name if short.count(name) == 1 else axis for name, axis in zip(short, axes, strict=True)]
    chosen = (zip(*choice, strict=True) for choice in product(*(choices.items() for choices in axes.values())))
    return [
        Point(dict(zip(names, labels, strict=True)), dict(pair for values in keys for pair in values.items()))
        for labels, keys in chosen
    ]


@dataclass(frozen=True)
class Search:
    """A grid search in the folder ``out``; the fields are the flags of scratch-det search."""

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
        """Number of processes of a point; --num-gpus 0 is one process, as in scratch-det train."""
        return max(self.num_gpus, 1)

    @cached_property
    def axes(self) -> Axes:
        """Raises ConfigError when the file is no grid."""
        return read_grid(Path(self.grid), self.overrides)

    @cached_property
    def points(self) -> list[Point]:
        """All points of the grid, in its order."""
        return points_of(self.axes)

    def read(self, point: Point) -> Point:
        """``point`` with what its run has reached by now."""
        result = read_json(self.out / point.name / "result.json", Facts, FIX)
        if not result:
            return replace(point, error=failure_of(jobs_folder(self.out), point.name))
        score = flatten(result.get("metrics") or {}, "/").get(self.metric)
        missing = "" if score is not None else f"its result.json has no number for {self.metric}"
        return replace(point, score=score, seconds=result.get("seconds"), error=missing)

    def request(self, point: Point | None = None, config_file: str = "") -> Request:
        """The recipe with the command line's overrides, or another recipe without them; then those of the point."""
        words = [*(() if config_file else self.overrides), *(point.overrides if point else ())]
        return Request(config_file or self.config_file, words, self.backend,
                       scale_to_batch=self.scale_to_batch, accumulate=self.accumulate)  # fmt: skip

    def recipe(self, point: Point | None = None, config_file: str = "") -> CfgNode:
        """The config that is requested, before a batch rescales it."""
        return choose_backend(self.request(point, config_file))[1].cfg

    def steps(self) -> list[Step]:
        """One step for each point."""
        cfg = self.recipe()
        words = ["train", *project_flags(), "--config-file", self.config_file]
        words += ["--backend", self.backend] if self.backend != backends.AUTO else []
        words += ["--scale-to-batch", str(self.scale_to_batch)] if self.scale_to_batch is not None else []
        words += ["--accumulate", str(self.accumulate)] if self.accumulate != 1 else []
        words += ["--resume", *(["SEED", str(SEED)] if cfg.SEED < 0 else []), *self.overrides]
        return [
            Step(point.name, point.name, (*words, *point.overrides, "OUTPUT_DIR", str(self.out / point.name)),
                 outputs=(self.out / point.name / "result.json",), processes=self.processes,
                 on_gpu=cfg.MODEL.DEVICE != "cpu")
            for point in self.points
        ]  # fmt: skip

    def check(self) -> None:
        """Raise UserError, before anything is written, when the runs or the choice could not be made."""
        if self.num_gpus < 0:
            raise UserError(f"--num-gpus {self.num_gpus}: expected 1 or more")
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
        _check_metric(self.metric, self.recipe())
        if RunDir(self.out).holds_run():
            raise UserError(f"--out {self.out} is the folder of a run; name another folder for the runs of the search")
        RunDir(self.out).check(allow_existing=True)

    def _check_point(self, point: Point) -> str:
        """The point's values, as the recipe has them before a batch rescales them."""
        request = self.request(point)
        backend, recipe = choose_backend(request)
        all_values = flatten(recipe.cfg)
        check_recipe(Section(strict=True), request, recipe, backend, self.processes, DETECTION)
        for target in self.apply_to:
            check_config(self.recipe(point, target))
        if others := list(other_recipe(RunDir(self.out / point.name), recipe.cfg)):
            raise UserError(f"--out {self.out} holds another search:\n  {others[0]}\n  name another folder: --out DIR")
        return repr([all_values[key] for key in point.values])


def _check_metric(metric: str, cfg: CfgNode) -> None:
    """Raise ConfigError for a metric that no result of ``cfg`` will have; classes are not known here."""
    if not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty: a search needs a data set to compare its points on")
    places = [""] if len(cfg.DATASETS.TEST) == 1 else [f"{name}/" for name in cfg.DATASETS.TEST]
    tasks = [(task, end) for end in suffixes(cfg) for task in detection_tasks(cfg)]
    known = [f"{place}{task}{end}/{score}" for place in places for task, end in tasks for score in metrics_of(task)]
    of_class = re.fullmatch(r"(.+/AP)(?:50)?-.+", metric)  # PASCAL VOC's have AP50-CLASS too
    if metric not in known and not (of_class and of_class[1] in known):
        raise ConfigError(f"--metric is {metric}, expected one of {', '.join(known)}{did_you_mean(metric, known)}")


def search_grid(search: Search) -> int:
    """Train all points on this machine, one after the other, then ``choose``; the exit code: 1 when points failed.

    ``search.check`` has passed. Raises UserError when this machine has too few GPUs, and Stopped after a signal.
    """
    steps = search.steps()
    require_gpus(steps, "give a smaller --num-gpus")
    running: set[str] = set()

    def look(now: set[str]) -> None:
        for point in search.points:
            if point.name in now - running:
                say_now(f"training {point}: see {jobs_folder(search.out) / point.name}.log")
            elif point.name in running - now and ((read := search.read(point)).score is not None or read.error):
                progress.advance()
                what = f"{search.metric} {read.result}; {progress.done} of {progress.total}"
                say_now(f"{point}: {what}, {progress.eta()}")
        running.clear()
        running.update(now)

    done = sum(step.is_done for step in steps)
    progress = Progress("search", len(steps), start=done, say=None)
    with alone_in(search.out, "search.lock") as lock, progress:
        Local(search.out, lock, gpus=search.processes).run(steps, look)
        return EXIT_SOME_FAILED if choose(search) else 0


def choose(search: Search) -> int:
    """Print the table; write search.md, search.png, best.yaml and the recipes of --apply-to into the search's folder.

    When no point has failed, result.json comes last, as in a run folder. Returns the number of points that failed.
    """
    from scratch_det.visualization.curves import draw_grid  # matplotlib is slow to import; user errors come first

    points = [search.read(point) for point in search.points]
    ranked = sorted(points, key=lambda point: (point.score is None, -(point.score or 0.0)))  # the first of equal ones
    failed = [point for point in points if point.score is None]
    best = ranked[0] if ranked[0].score is not None else None
    rows = [
        ["best" if point is best else "", *point.labels.values(), point.result,
         "-" if point.seconds is None else clock(point.seconds)]
        for point in ranked
    ]  # fmt: skip
    table = markdown(["", *ranked[0].labels, search.metric, "training"], rows)
    files = {"search.md": table + "\n", **(_recipes(search, best, len(failed)) if best else {})}
    for name, content in files.items():
        write_atomically(search.out / name, content)
    draw_grid([one.labels for one in points], [one.score for one in points], search.metric, search.out / "search.png")
    (search.out / "result.json").unlink(missing_ok=True)
    if best and not failed:
        task, _, score = search.metric.rpartition("/")
        seconds = sum(point.seconds or 0.0 for point in points)
        result = {"seconds": seconds, "best": best.values, "metrics": {task: {score: best.score}}}
        write_atomically(search.out / "result.json", json.dumps(result, indent=2) + "\n")
    print(table)
    for point in failed:
        print(f"failed: {point} ({search.out / point.name}): {point.error or 'it is not finished'}")
    print(f"wrote {search.out}/: {', '.join([*files, 'search.png'])}")
    return len(failed)


def _recipes(search: Search, best: Point, failed: int) -> dict[str, str]:
    """The best point's keys as best.yaml, and each recipe of --apply-to with them, by file name."""
    axes = "".join(f"#   {axis}: {', '.join(choices)}\n" for axis, choices in search.axes.items())
    origin = (
        f"# The best of a grid search: {search.metric} {best.result} of {search.config_file}\n"
        f"# with {shlex.join(search.overrides) or 'no other changes'}. Its run is {search.out / best.name}.\n"
        f"# The grid of {len(search.points)} points, {failed} of which failed:\n{axes}"
    )
    cfg = flatten(search.recipe(best))
    chosen = with_keys(CfgNode(), {key: plain(cfg[key]) for key in best.values})
    files = {BEST: origin + chosen.dump(default_flow_style=None, sort_keys=False)}
    for recipe in search.apply_to:
        name, bases = Path(recipe).name, [os.path.relpath(recipe, search.out), BEST]
        words = [*project_flags(), "--config-file", str(search.out / name), "OUTPUT_DIR", f"output/{Path(name).stem}"]
        header = f"# {recipe} with what a grid search found, see {BEST}.\n#  scratch-det train "
        files[name] = f"{header}{shlex.join(words)}\n{yaml.safe_dump({'_BASE_': bases})}"
    return files
