"""A study of one's own: a YAML file of runs, each with its recipe, which is found from the file's folder.

scratch: {recipe: scratch.yaml, seeds: [1, 2, 3]}
pretrained: {recipe: pretrained.yaml, pretraining: crops, changes: {MODEL.BACKBONE.FREEZE_AT: 0}}
crops: {recipe: crops.yaml}

``seeds``: the run is repeated, and tables have the mean. ``pretraining``: the run, of tools/pretrain_net.py, whose
backbone.pth it starts from. ``changes``: keys of the recipe with other values. ``project``: the folder of the project
that the recipe needs; its code is only loaded by --project FOLDER on the command line.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from scratch_det import backends
from scratch_det.command_line import LOADED
from scratch_det.config.load import BASE_KEY, COMMAND_LINE, Entry, load_config, read_source
from scratch_det.errors import ConfigError, did_you_mean, quoted
from scratch_det.reading import read_yaml
from scratch_det.study.run import PRETRAIN, PRETRAINED, SCRATCH, TRAIN, Run

PLACE = "runs"  # of all of them: their table and their figure are called so
NAME = re.compile(r"(?!(jobs|report)$|.*_seed\d+$)[A-Za-z0-9][A-Za-z0-9_-]*")  # of a folder beside a study's others
CHANGES = "changes."
FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {  # a test of the value, and the expected value in words
    "recipe": (lambda value: str(value).endswith(".yaml"), "a file, NAME.yaml"),
    "seeds": (lambda value: _are_seeds(value), "a list of different numbers, such as [1, 2, 3]"),
    "pretraining": (lambda value: isinstance(value, str), "the name of a run"),
    "project": (lambda value: isinstance(value, str), "a folder such as ../projects/lsj"),
    "changes": (lambda _: False, "{KEY: VALUE}"),
}
SET_BY = {"OUTPUT_DIR": "its name", "SEED": "seeds", "MODEL.WEIGHTS": "pretraining"}  # keys, and what sets them
Fields = Mapping[str, Entry]  # by their names; one of a recipe's keys is called CHANGES + KEY


def is_file(experiment: str) -> bool:
    """Whether it names a file of runs, and no experiment that is listed."""
    return experiment.endswith((".yaml", ".yml"))


def runs(path: Path) -> list[Run]:
    """The runs of a file, in its order. Raises ConfigError, with file and line, for an invalid one."""
    entries = read_source(path, "study.py")
    if bases := [entry for entry in entries if entry.key == BASE_KEY]:
        raise ConfigError(f"{bases[0].where}: a file of runs has no {BASE_KEY}: list all runs in it")
    names = list(read_yaml(path))
    sections: dict[str, Fields] = {
        name: {entry.key[len(name) + 1 :]: entry for entry in entries if f"{entry.key}.".startswith(f"{name}.")}
        for name in names
    }
    for name in names:
        _check(path, name, sections)
    sources = {fields["pretraining"].value for fields in sections.values() if "pretraining" in fields}
    kinds = {name: PRETRAIN if name in sources else TRAIN for name in names}
    return [run for name in names for run in _repeated(path.parent, name, sections[name], kinds[name])]


def _repeated(folder: Path, name: str, fields: Fields, kind: str) -> Iterator[Run]:
    """The run, with the first of its seeds, and NAME_seed2 with seed 2."""
    values, where = {field: entry.value for field, entry in fields.items()}, fields["recipe"].where
    recipe = (folder / values["recipe"]).absolute()
    seeds, pretraining = values.get("seeds", []), values.get("pretraining")
    pairs = [(field.removeprefix(CHANGES), value) for field, value in values.items() if field.startswith(CHANGES)]
    changes = tuple(str(word) for pair in pairs for word in pair)
    project = (folder / values["project"]).absolute() if "project" in values else None
    if project and project.resolve() not in LOADED:  # a file, and a study's folder that names it, may be somebody's
        needed = f"needs a project: if you trust it, give --project {quoted(project)}"
        raise ConfigError(f"{fields['project'].where}: {name} {needed}")
    try:
        cfg = load_config(recipe, changes, backends.defaults(backends.choose(backends.AUTO))).cfg
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"{COMMAND_LINE}:", f"{where}: {name}:")) from None
    if len(cfg.DATASETS.TEST) > 1:
        one = f"a study takes one: name it in changes: {{DATASETS.TEST: ['{cfg.DATASETS.TEST[0]}']}}"
        raise ConfigError(f"{where}: {name} has DATASETS.TEST {cfg.DATASETS.TEST}, but {one}")
    init = PRETRAINED if cfg.MODEL.WEIGHTS or pretraining else SCRATCH
    run = Run(name, (PLACE,), name, init, k=0, length=cfg.SOLVER.MAX_ITER, kind=kind, pretraining=pretraining,
              folder=str(recipe.parent), recipe=recipe.stem, changes=changes,
              flags=("--project", str(project)) if project else ())  # fmt: skip
    yield replace(run, changes=(*changes, "SEED", str(seeds[0]))) if seeds else run
    yield from (replace(run, name=f"{name}_seed{seed}", seed=seed) for seed in seeds[1:])


def _check(path: Path, name: str, sections: Mapping[str, Fields]) -> None:
    """Raise ConfigError for the first error in the section of a run."""
    fields = sections[name]
    where = next((entry.where for entry in fields.values()), str(path))
    if not NAME.fullmatch(name):
        raise ConfigError(f"{where}: a run cannot be called {name}: take another name, of letters, digits, - and _")
    for field, entry in fields.items():
        if not field:
            raise ConfigError(f"{where}: {name} is {entry.value!r}: write {name}: {{recipe: FILE.yaml}}")
        if field in FIELDS and not FIELDS[field][0](entry.value):
            raise ConfigError(f"{entry.where}: {entry.key} is {entry.value!r}, expected {FIELDS[field][1]}")
        if field not in FIELDS and not field.startswith(CHANGES):
            hint = did_you_mean(field, list(FIELDS))
            raise ConfigError(f"{entry.where}: {name} has no {field}{hint}; it may have {', '.join(FIELDS)}")
    if "recipe" not in fields:
        raise ConfigError(f"{where}: {name} has no recipe: write {name}: {{recipe: FILE.yaml}}")
    for key, by in SET_BY.items():
        if (changed := fields.get(CHANGES + key)) and (by in fields or key == "OUTPUT_DIR"):
            raise ConfigError(f"{changed.where}: {name} changes {key}, which {by} sets: leave one of them out")
    if twins := [other for other in sections if other != name and other.lower() == name.lower()]:
        raise ConfigError(f"{where}: {name} and {twins[0]} would be one folder on some disks: rename one of them")
    sources = [other for other, theirs in sections.items() if "pretraining" not in theirs]
    if "pretraining" in fields and (source := fields["pretraining"].value) not in sources:
        expected = f"expected a run of this file that itself starts from none{did_you_mean(source, sources)}"
        raise ConfigError(f"{fields['pretraining'].where}: {name} starts from {source}, {expected}")


def _are_seeds(value: Any) -> bool:
    are_numbers = isinstance(value, list) and all(type(seed) is int and seed >= 0 for seed in value)
    return are_numbers and 0 < len(value) == len(set(value))
