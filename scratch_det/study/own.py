"""A study of one's own: a YAML file of runs, each with its recipe, which is found from the file's folder.

scratch: {recipe: scratch.yaml, seeds: [1, 2, 3]}
pretrained: {recipe: pretrained.yaml, pretraining: crops, changes: {MODEL.BACKBONE.FREEZE_AT: 0}}
crops: {recipe: crops.yaml}

``seeds``: the run is repeated, and tables have the mean. ``pretraining``: the run, of tools/pretrain_net.py, whose
backbone.pth it starts from. ``changes``: keys of the recipe with other values. ``project``: the folder of the project
that the recipe needs; its code is only loaded by --project FOLDER on the command line.

A matrix compares initialisations: each run without a recipe is a row, and is trained in each of the ``columns``.

columns: {coco: {recipe: 6x.yaml, lengths: [1, 6], seeds: [1, 2]}, 10k: {recipe: 10k.yaml, seeds: [1, 2]}}
random: {}
moco: {weights: ../moco.pth, pixels: imagenet, source: ADDRESS, licence: MIT, epochs: 200, views: {224: 2}}

What a column says comes before what a row says. ``lengths``: in 1x of ``per_x`` iterations, 90,000 by default; the
shorter ones branch off the longest. ``weights``: the file, found from this file's folder, or address of MODEL.WEIGHTS;
``pixels``: MODEL.WEIGHTS_PIXELS; ``source`` and ``licence`` are for readers, and for who lacks the file. Of what a
pre-training saw: ``epochs`` of ``images``, ImageNet's 1,281,167 by default, and an image's ``views``, {SIDE: NUMBER}.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from scratch_det import backends
from scratch_det.command_line import LOADED
from scratch_det.config.choices import PIXELS, RECIPES
from scratch_det.config.load import BASE_KEY, COMMAND_LINE, Entry, load_config, read_source
from scratch_det.config.schedule import ITERATIONS_PER_X, kx_schedule
from scratch_det.errors import ConfigError, did_you_mean, quoted
from scratch_det.reading import read_yaml
from scratch_det.study.run import PRETRAIN, PRETRAINED, ROOT, SCRATCH, TRAIN, Run

STUDIES = ROOT / "studies"
# Of all runs, or of a matrix and its pre-trainings: their table and their figure are called so.
PLACE, MATRIX, PRETRAINING = "runs", "inits", "pretraining"
NAME = re.compile(r"(?!(jobs|report)$|.*_seed\d+$)[A-Za-z0-9][A-Za-z0-9_-]*")  # of a folder beside a study's others
COLUMNS, CHANGES, VIEWS = "columns", "changes.", "views."
FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {  # a test of the value, and the expected value in words
    "recipe": (lambda value: str(value).endswith(".yaml"), "a file, NAME.yaml"),
    "seeds": (lambda value: _are_numbers(value, 0), "a list of different numbers, such as [1, 2, 3]"),
    "lengths": (lambda value: _are_numbers(value, 1), "a list of different lengths in 1x, such as [1, 2, 6]"),
    "per_x": (lambda value: _are_numbers([value], 1), "the iterations of 1x"),
    "pretraining": (lambda value: isinstance(value, str), "the name of a run"),
    "project": (lambda value: isinstance(value, str), "a folder such as ../projects/lsj"),
    "changes": (lambda _: True, "{KEY: VALUE}"),
    "weights": (lambda value: isinstance(value, str), "a file or an address"),
    "pixels": (lambda value: value in (*PIXELS, RECIPES), f"one of {', '.join((*PIXELS, RECIPES))}"),
    "source": (lambda value: isinstance(value, str), "an address"),
    "licence": (lambda value: isinstance(value, str), "a name"),
    "epochs": (lambda value: _are_numbers([value], 1), "a number of epochs"),
    "images": (lambda value: _are_numbers([value], 1), "the number of images of an epoch"),
    "views": (lambda value: _are_numbers([value], 1), "{SIDE IN PIXELS: NUMBER}"),
}
FACTS = ("weights", "source", "licence", "epochs", "images")
SET_BY = (("OUTPUT_DIR", "its name"), ("SEED", "seeds"), ("MODEL.WEIGHTS", "pretraining"), ("MODEL.WEIGHTS", "weights"),
          ("MODEL.WEIGHTS_PIXELS", "pixels"), ("SOLVER.MAX_ITER", "lengths"), ("SOLVER.STEPS", "lengths"))  # fmt: skip
Fields = Mapping[str, Entry]  # by their names; one of a recipe's keys is called CHANGES + KEY, a view's VIEWS + SIDE


def is_file(experiment: str) -> bool:
    """Whether it is a file of runs."""
    return experiment.endswith((".yaml", ".yml"))


def file_of(experiment: str) -> Path | None:
    """The file of runs that it names, or of that name in studies/; None for an experiment that is listed."""
    listed = STUDIES / f"{experiment}.yaml"
    return Path(experiment) if is_file(experiment) else listed if listed.is_file() else None


def runs(path: Path) -> list[Run]:
    """The runs of a file, in its order. Raises ConfigError, with file and line, for an invalid one."""
    entries = read_source(path, "study.py")
    if bases := [entry for entry in entries if entry.key == BASE_KEY]:
        raise ConfigError(f"{bases[0].where}: a file of runs has no {BASE_KEY}: list all runs in it")
    content = read_yaml(path)
    names, columns = [name for name in content if name != COLUMNS], content.get(COLUMNS, {})
    if not isinstance(columns, dict):
        raise ConfigError(f"{path}: {COLUMNS} is {columns!r}: write {COLUMNS}: {{NAME: {{recipe: FILE.yaml}}}}")
    sections, matrix = (
        {name: {entry.key[len(prefix + name) + 1 :]: entry for entry in entries
                if f"{entry.key}.".startswith(f"{prefix}{name}.")} for name in some}
        for prefix, some in (("", names), (f"{COLUMNS}.", columns))
    )  # fmt: skip
    for name in names:
        _check(path, name, sections, is_row=bool(matrix) and "recipe" not in sections[name])
    for name in columns:
        _check(path, name, matrix)
    sources = {fields["pretraining"].value for fields in sections.values() if "pretraining" in fields}
    found: list[Run] = []
    for name, fields in sections.items():
        if "recipe" in fields:
            kind = PRETRAIN if name in sources else TRAIN
            place = PRETRAINING if matrix and kind == PRETRAIN else PLACE
            found += _repeated(path.parent, fields, Run(name, (place,), name, SCRATCH, k=0, kind=kind))
            continue
        for column, shared in matrix.items():
            run = Run(f"{name}_{column}", (MATRIX,), f"{name}, {column}", SCRATCH, k=0)
            found += _repeated(path.parent, {**fields, **shared}, run)
    return found


def _repeated(folder: Path, fields: Fields, run: Run) -> Iterator[Run]:
    """``run`` as ``fields`` have it: in each length, with the first of its seeds, and NAME_seed2 with seed 2."""
    name = run.name
    values, where = {field: entry.value for field, entry in fields.items()}, fields["recipe"].where
    recipe = (folder / values["recipe"]).absolute()
    seeds, pretraining = values.get("seeds", []), values.get("pretraining")
    pairs: list[tuple[str, Any]] = [
        (field.removeprefix(CHANGES), value) for field, value in values.items() if field.startswith(CHANGES)
    ]
    if weights := values.get("weights"):
        pairs.append(("MODEL.WEIGHTS", weights if "://" in weights else (folder / weights).absolute()))
    pairs += [("MODEL.WEIGHTS_PIXELS", values["pixels"])] if "pixels" in values else []
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
        fix = f"a study takes one: name it in changes: {{DATASETS.TEST: ['{cfg.DATASETS.TEST[0]}']}}"
        raise ConfigError(f"{where}: {name} has DATASETS.TEST {cfg.DATASETS.TEST}, but {fix}")
    init = PRETRAINED if cfg.MODEL.WEIGHTS or pretraining else SCRATCH
    about = {fact: values[fact] for fact in FACTS if fact in values}
    about |= {"views": {int(field[len(VIEWS) :]): values[field] for field in values if field.startswith(VIEWS)}}
    made = replace(run, init=init, length=cfg.SOLVER.MAX_ITER, pretraining=pretraining, folder=str(recipe.parent),
                   recipe=recipe.stem, changes=changes, flags=("--project", str(project)) if project else (),
                   about=about)  # fmt: skip
    for one in _lengths(made, sorted(values.get("lengths", []), reverse=True), values.get("per_x", ITERATIONS_PER_X)):
        yield replace(one, changes=(*one.changes, "SEED", str(seeds[0]))) if seeds else one
        for seed in seeds[1:]:
            trunk = one.trunk and f"{one.trunk}_seed{seed}"
            yield replace(one, name=f"{one.name}_seed{seed}", seed=seed, trunk=trunk)


def _lengths(run: Run, lengths: list[int], per_x: int) -> Iterator[Run]:
    """``run`` in each of its lengths, the longest first, off which the others branch; as it is without any."""
    for k in lengths:
        schedule = kx_schedule(k, per_x)
        changes = (*run.changes, "SOLVER.MAX_ITER", str(schedule.max_iter), "SOLVER.STEPS", str(schedule.steps))
        yield replace(run, name=f"{run.name}_{k}x", shown=f"{run.shown}, {k}x", k=k, per_x=per_x, length=0,
                      changes=changes, trunk=None if k == lengths[0] else f"{run.name}_{lengths[0]}x")  # fmt: skip
    if not lengths:
        yield run


def _check(path: Path, name: str, sections: Mapping[str, Fields], is_row: bool = False) -> None:
    """Raise ConfigError for the first error in the section of a run, or a column; ``is_row``: of a matrix."""
    fields = sections[name]
    where = next((entry.where for entry in fields.values()), str(path))
    if not NAME.fullmatch(name):
        raise ConfigError(f"{where}: a run cannot be called {name}: take another name, of letters, digits, - and _")
    for field, entry in fields.items():
        if not field:
            raise ConfigError(f"{where}: {name} is {entry.value!r}: write {name}: {{recipe: FILE.yaml}}")
        _check_field(name, field, entry)
    if "recipe" not in fields and not is_row:
        raise ConfigError(f"{where}: {name} has no recipe: write {name}: {{recipe: FILE.yaml}}")
    for key, by in SET_BY:
        if (changed := fields.get(CHANGES + key)) and (by in fields or key == "OUTPUT_DIR"):
            raise ConfigError(f"{changed.where}: {name} changes {key}, which {by} sets: leave one of them out")
    if {"weights", "pretraining"} <= fields.keys():
        raise ConfigError(f"{fields['weights'].where}: {name} has weights and pretraining: leave one of them out")
    if twins := [other for other in sections if other != name and other.lower() == name.lower()]:
        raise ConfigError(f"{where}: {name} and {twins[0]} would be one folder on some disks: rename one of them")
    sources = [other for other, theirs in sections.items() if "pretraining" not in theirs]
    if "pretraining" in fields and (source := fields["pretraining"].value) not in sources:
        expected = f"expected a run of this file that itself starts from none{did_you_mean(source, sources)}"
        raise ConfigError(f"{fields['pretraining'].where}: {name} starts from {source}, {expected}")


def _check_field(name: str, field: str, entry: Entry) -> None:
    """Raise ConfigError for a field of ``name`` that there is not, or whose value is not as FIELDS has it."""
    section, _, key = field.partition(".")
    if section not in FIELDS or (key and section not in ("changes", "views")):
        hint = did_you_mean(field, list(FIELDS))
        raise ConfigError(f"{entry.where}: {name} has no {field}{hint}; it may have {', '.join(FIELDS)}")
    is_valid, expected = FIELDS[section]
    if not (is_valid(entry.value) and bool(key) == (section in ("changes", "views"))) or (
        section == "views" and not key.isdecimal()
    ):
        raise ConfigError(f"{entry.where}: {entry.key} is {entry.value!r}, expected {expected}")


def _are_numbers(value: Any, least: int) -> bool:
    are_numbers = isinstance(value, list) and all(type(number) is int and number >= least for number in value)
    return are_numbers and 0 < len(value) == len(set(value))
