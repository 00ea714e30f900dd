"""The grid of a search: a YAML file of axes, written like a recipe, but with a list of values in the place of a value.

SOLVER:
  BASE_LR: [0.02, 0.04]
scales:                         # keys that go together: any name, and a list of what they are set to
  - {INPUT.MIN_SIZE_TRAIN: [800], INPUT.MIN_SIZE_TRAIN_SAMPLING: choice}
  - {INPUT.MIN_SIZE_TRAIN: [512, 800], INPUT.MIN_SIZE_TRAIN_SAMPLING: range}
"""

import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from scratch_det.config.load import BASE_KEY, Entry, read_source
from scratch_det.errors import ConfigError


@dataclass(frozen=True)
class Axis:
    """One direction of the grid; ``choices``: label -> keys and values as ``tools/train_net.py`` takes them."""

    name: str
    choices: dict[str, dict[str, str]]

    @property
    def keys(self) -> set[str]:
        """The recipe's keys that the axis sets."""
        return {key for values in self.choices.values() for key in values}


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


def read_grid(path: str | Path) -> list[Axis]:
    """The axes in the file's order. Raises ConfigError when they span no grid."""
    source = read_source(Path(path), "--grid")
    if source.bases:
        raise ConfigError(f"{source.bases[0].where}: a grid has no {BASE_KEY}: write its axes into one file")
    axes = [_axis(entry) for entry in source.entries]
    _refuse_shared_keys(axes, source.path)
    if len(points_of(axes)) < 2:
        raise ConfigError(f"{path}: the grid has one point, expected two or more: give a key several values")
    return axes


def points_of(axes: list[Axis]) -> list[Point]:
    """Every combination, the last axis changing fastest; a key's last word names its axis where that is unique."""
    short = [axis.name.rpartition(".")[2] for axis in axes]
    names = [name if short.count(name) == 1 else axis.name for name, axis in zip(short, axes, strict=True)]
    points = []
    for labels in product(*(axis.choices for axis in axes)):
        chosen = [axis.choices[label] for axis, label in zip(axes, labels, strict=True)]
        values = {key: value for choice in chosen for key, value in choice.items()}
        points.append(Point(dict(zip(names, labels, strict=True)), values))
    return points


def _axis(entry: Entry) -> Axis:
    if not isinstance(entry.value, list) or not entry.value:
        raise ConfigError(f"{entry.where}: {entry.key} is {entry.value!r}, expected a list of values, such as [1, 2]")
    together = [isinstance(value, dict) for value in entry.value]
    if any(together) and not (all(together) and all(value.keys() == entry.value[0].keys() for value in entry.value)):
        raise ConfigError(
            f"{entry.where}: {entry.key} sets keys that go together, so each of its choices has to set all"
        )
    axis = Axis(entry.key, {})
    for value in entry.value:
        values = {str(key): str(word) for key, word in (value if all(together) else {entry.key: value}).items()}
        label = "-".join(map(_label, values.values()))
        if label in axis.choices:
            raise ConfigError(f"{entry.where}: {entry.key} has {label} twice")
        axis.choices[label] = values
    return axis


def _label(value: Any) -> str:
    """A value as part of a file's name: 0.02, 512-800, range."""
    bare = re.sub(r"[\[\](){}'\"]", "", str(value)).strip()
    return re.sub(r"[^\w.+-]+", "-", bare).rstrip("-") or "empty"


def _refuse_shared_keys(axes: list[Axis], path: Path) -> None:
    owner: dict[str, str] = {}
    for axis in axes:
        for key in axis.keys:
            if key == "OUTPUT_DIR":
                raise ConfigError(f"{path}: OUTPUT_DIR cannot be searched: each point has a folder of its own in --out")
            if key in owner:
                raise ConfigError(f"{path}: {key} is set by two axes, {owner[key]} and {axis.name}: leave out one")
            owner[key] = axis.name
