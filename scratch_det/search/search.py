"""What a search is asked for, and what is refused before its first run."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from scratch_det import backends
from scratch_det.config import LoadedConfig, check_config, flatten, settle_batch
from scratch_det.engine.plan import Request, choose_backend
from scratch_det.engine.run_dir import RunDir
from scratch_det.errors import ConfigError, UserError, did_you_mean
from scratch_det.evaluation.metrics import TTA, detection_tasks, metrics_of
from scratch_det.search.grid import Axis, Point, points_of, read_grid

BEST = "best.yaml"


@dataclass(frozen=True)
class Search:
    """What the command line asks for; see ``tools/search.py --help``. ``train_net``: the script that runs a point."""

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
    train_net: Path = Path("tools/train_net.py")

    @cached_property
    def axes(self) -> list[Axis]:
        """Raises ConfigError when the file is no grid."""
        return read_grid(self.grid)

    @cached_property
    def points(self) -> list[Point]:
        """All points of the grid, in its order."""
        return points_of(self.axes)

    def folder(self, point: Point) -> Path:
        """The run folder of a point."""
        return self.out / point.name

    def recipe(self, point: Point | None = None, config_file: str | None = None) -> LoadedConfig:
        """The recipe, or another one, with the command line's overrides and then the point's."""
        own = list(self.overrides) if config_file is None else []
        words = [*own, *(point.overrides if point else [])]
        return choose_backend(Request(config_file or self.config_file, words, self.backend))[1]

    def describe(self) -> dict[str, Any]:
        """What must not change between two workers of one search, as JSON."""
        return {
            "metric": self.metric,
            "grid": {axis.name: list(axis.choices.values()) for axis in self.axes},
            "backend": backends.choose(self.backend),
            "--scale-to-batch": self.scale_to_batch,
            "--accumulate": self.accumulate,
            "recipe": self.recipe().cfg.dump(),
        }

    def check(self) -> None:
        """Refuse, before anything is written, what no run could be started with. Raises UserError."""
        if "OUTPUT_DIR" in self.overrides[::2]:
            raise ConfigError("OUTPUT_DIR is not for a search to set: each point has a folder of its own in --out DIR")
        if clash := sorted(set(self.overrides[::2]).intersection(*(point.values for point in self.points))):
            raise ConfigError(
                f"{', '.join(clash)}: the grid searches it, so it cannot be set behind the flags; leave it out"
            )
        seen: dict[str, Point] = {}
        for point in self.points:
            with _at(point):
                cfg = self._check_point(point)
            values = repr([cfg[key] for key in point.values])
            if values in seen:
                raise ConfigError(f"{self.grid}: {seen[values]} and {point} are one and the same point: leave out one")
            seen[values] = point
        _check_metric(self.metric, self.recipe().cfg)
        self._check_targets()
        if RunDir(self.out).holds_run():
            raise UserError(
                f"--out {self.out} is the folder of a run; name one for the search, which makes a run a point"
            )
        RunDir(self.out).check(allow_existing=True)

    def _check_point(self, point: Point) -> dict[str, Any]:
        """The point's values by key, as the recipe has them before a batch rescales them."""
        recipe = self.recipe(point)
        values = flatten(recipe.cfg)
        processes = max(self.num_gpus, 1)
        settle_batch(recipe, processes, self.scale_to_batch, self.accumulate)
        check_config(recipe.cfg, processes, self.accumulate)
        backends.check_keys(backends.choose(self.backend), recipe.cfg)
        return values

    def _check_targets(self) -> None:
        """Every recipe of --apply-to must be able to take every point, and a name of its own in the folder."""
        names = [BEST, *(Path(recipe).name for recipe in self.apply_to)]
        for recipe in self.apply_to:
            if names.count(Path(recipe).name) > 1:
                raise UserError(f"--apply-to {recipe}: {Path(recipe).name} would be written twice into {self.out}")
            for point in self.points:
                with _at(point):
                    check_config(self.recipe(point, recipe).cfg)


@contextmanager
def _at(point: Point) -> Iterator[None]:
    """Say which point a recipe is refused for."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"at the grid point {point}: {error}") from None


def _check_metric(metric: str, cfg: CfgNode) -> None:
    """Refuse a metric that no result of ``cfg`` will have; per-class ones are only known by their beginning."""
    if not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty: a search needs a data set to compare its points on")
    ends = ("", TTA) if cfg.TEST.AUG.ENABLED else ("",)
    names = [f"{task}{end}/{score}" for end in ends for task in detection_tasks(cfg) for score in metrics_of(task)]
    places = [""] if len(cfg.DATASETS.TEST) == 1 else [f"{name}/" for name in cfg.DATASETS.TEST]
    known = [f"{place}{name}" for place in places for name in names]
    of_class = re.fullmatch(r"(.+/AP)(?:50)?-.+", metric)  # PASCAL VOC's have AP50-CLASS too
    if metric not in known and not (of_class and of_class[1] in known):
        raise ConfigError(f"--metric is {metric}, expected one of {', '.join(known)}{did_you_mean(metric, known)}")
