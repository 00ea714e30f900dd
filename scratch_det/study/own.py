"""A study of one's own: a YAML file of runs, each with its recipe, which is found from the file's folder.

scratch: {recipe: scratch.yaml, seeds: [1, 2, 3]}
pretrained: {recipe: pretrained.yaml, pretraining: crops, changes: {MODEL.BACKBONE.FREEZE_AT: 0}}
crops: {recipe: crops.yaml}

``seeds``: the run is repeated, and tables have the mean. ``pretraining``: the run, of scratch-det pretrain, whose
backbone.pth it starts from. ``changes``: keys of the recipe with other values. ``project``: the folder of the project
that the recipe needs; its code is only loaded by --project FOLDER on the command line.

A matrix compares initialisations: each run without a recipe is a row, and is trained in each of the ``columns``.

columns: {coco: {recipe: 6x.yaml, lengths: [1, 6], seeds: [1, 2]}, 10k: {recipe: 10k.yaml, seeds: [1, 2]}}
random: {}
moco: {weights: ../moco.pth, pixels: imagenet, source: ADDRESS, licence: MIT, epochs: 200, views: {224: 2}}

What a column says comes before what a row says. ``lengths``: in 1x of ``per_x`` iterations, 90,000 by default; the
shorter ones branch off the longest. ``weights``: the file, found from this file's folder, or address of MODEL.WEIGHTS;
``pixels``: MODEL.WEIGHTS_PIXELS; ``source``, an address or a command, and ``licence``: for readers, and for who lacks
the file. Of what a pre-training saw: ``epochs`` of ``images``, ImageNet's 1,281,167 by default, and an image's
``views``, {SIDE: NUMBER}. ``columns`` of a row: those that it is trained in, all by default.

``claims``, of runs or of a matrix: what is to be said in numbers, as a sum over runs of the same seed, each with its
interval; of another metric than box AP as RUN:METRIC. A run's name is without its seed, + and - stand between spaces.

claims:
  10k images with moco - all without, 6x: moco_10k - random_coco_6x
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from os.path import normpath
from pathlib import Path
from typing import Any

from scratch_det import backends
from scratch_det.command_line import LOADED
from scratch_det.config.choices import PIXELS, RECIPES
from scratch_det.config.load import BASE_KEY, COMMAND_LINE, flatten, load_config, read_source
from scratch_det.config.schedule import ITERATIONS_PER_X, kx_schedule
from scratch_det.errors import ConfigError, did_you_mean, quoted
from scratch_det.evaluation.metrics import METRICS, PRETRAINED, SCRATCH
from scratch_det.files import ROOT, find_file
from scratch_det.reading import read_yaml
from scratch_det.study.run import PRETRAIN, TRAIN, Claim, Run

STUDIES = ROOT / "studies"
# Of all runs, or of a matrix and its pre-trainings: their table and their figure are called so.
PLACE, MATRIX, PRETRAINING = "runs", "inits", "pretraining"
NAME = re.compile(r"(?!(jobs|report)$|.*_seed\d+$)[A-Za-z0-9][A-Za-z0-9_-]*")  # of a folder beside a study's others
COLUMNS, CLAIMS = "columns", "claims"
FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {  # a test of the value, and the expected value in words
    "recipe": (lambda value: str(value).endswith(".yaml"), "a file, NAME.yaml"),
    "seeds": (lambda value: _are_numbers(value, 0), "a list of different numbers, such as [1, 2, 3]"),
    "lengths": (lambda value: _are_numbers(value, 1), "a list of different lengths in 1x, such as [1, 2, 6]"),
    "per_x": (lambda value: _are_numbers([value], 1) and value % 9 == 0, "the iterations of 1x, a multiple of 9"),
    "project": (lambda value: isinstance(value, str), "a folder such as ../projects/lsj"),
    "changes": (lambda value: isinstance(value, dict), "{KEY: VALUE}"),
    "pretraining": (lambda value: isinstance(value, str), "the name of a run"),
    "weights": (lambda value: isinstance(value, str), "a file or an address"),
    "pixels": (lambda value: value in (*PIXELS, RECIPES), f"one of {', '.join((*PIXELS, RECIPES))}"),
    "source": (lambda value: isinstance(value, str), "an address or a command"),
    "licence": (lambda value: isinstance(value, str), "a name"),
    "epochs": (lambda value: _are_numbers([value], 1), "a number of epochs"),
    "images": (lambda value: _are_numbers([value], 1), "the number of images of an epoch"),
    "views": (lambda value: isinstance(value, dict) and all(side.isdecimal() and _are_numbers([number], 1)
                                                            for side, number in value.items()), "{SIDE: NUMBER}"),
    COLUMNS: (lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value)
              and 0 < len(value) == len(set(value)), "a list of different columns, such as [all]"),
}  # fmt: skip
OF_COLUMNS, OF_RUNS = [*FIELDS][:6], [*FIELDS][:-1]  # what a column's runs start from is a row's
SET_BY = (("OUTPUT_DIR", "its name"), ("SEED", "seeds"), ("MODEL.WEIGHTS", "pretraining"), ("MODEL.WEIGHTS", "weights"),
          ("MODEL.WEIGHTS_PIXELS", "pixels"), ("SOLVER.MAX_ITER", "lengths"), ("SOLVER.STEPS", "lengths"))  # fmt: skip
Fields = Mapping[str, Any]  # of a run or a column, by their names
Where = Callable[[str], str]  # file and line of a dotted name


def file_of(experiment: str) -> Path | None:
    """The file of runs that it names, or of that name in studies/; None for an experiment that is listed."""
    listed = STUDIES / f"{experiment}.yaml"
    return find_file(experiment) if experiment.endswith((".yaml", ".yml")) else listed if listed.is_file() else None


def runs(path: Path) -> list[Run]:
    """The runs of a file, in its order. Raises ConfigError, with file and line, for an invalid one."""
    return read(path)[0]


def read(path: Path) -> tuple[list[Run], list[Claim]]:
    """``runs``, and the claims about them."""
    entries = read_source(path, "scratch-det study")
    if bases := [entry for entry in entries if entry.key == BASE_KEY]:
        raise ConfigError(f"{bases[0].where}: a file of runs has no {BASE_KEY}: list all runs in it")
    sections = read_yaml(path)
    columns, formulas = sections.pop(COLUMNS, {}), sections.pop(CLAIMS, {})
    if not isinstance(columns, dict):
        raise ConfigError(f"{path}: {COLUMNS} is {columns!r}: write {COLUMNS}: {{NAME: {{recipe: FILE.yaml}}}}")

    def where(name: str) -> str:
        return next((entry.where for entry in entries if f"{entry.key}.".startswith(f"{name}.")), str(path))

    rows = {name for name, one in sections.items() if columns and not (isinstance(one, dict) and "recipe" in one)}
    sections |= {name: sections[name] or {} for name in rows}  # of a random one nothing has to be said
    for name in sections:
        _check(name, sections, where, [*FIELDS] if name in rows else OF_RUNS, needs_recipe=name not in rows)
    for name in columns:
        _check(name, columns, lambda name: where(f"{COLUMNS}.{name}"), OF_COLUMNS)
    if columns and not rows:
        raise ConfigError(f"{path}: there are {COLUMNS} and no row, a run without a recipe: write random: {{}}")
    sources, found = {fields.get("pretraining") for fields in sections.values()}, list[Run]()
    for name, fields in sections.items():
        for column in fields.get(COLUMNS, columns) if name in rows else ():
            if column not in columns:
                here = where(f"{name}.{COLUMNS}")
                raise ConfigError(f"{here}: {name}.columns has {column}, expected some of {', '.join(columns)}")
            shared = columns[column]
            changes = flatten(fields.get("changes", {})) | flatten(shared.get("changes", {}))
            run = Run(f"{name}_{column}", (MATRIX,), f"{name}, {column}", SCRATCH, k=0)
            found += _repeated(path.parent, {**fields, **shared, "changes": changes}, run, where(f"{COLUMNS}.{column}"))
        if name not in rows:
            kind = PRETRAIN if name in sources else TRAIN
            place = PRETRAINING if rows and kind == PRETRAIN else PLACE
            found += _repeated(path.parent, fields, Run(name, (place,), name, SCRATCH, k=0, kind=kind), where(name))
    _check_names(path, found)
    return found, _claims(formulas, {run.repeats for run in found}, where)


def _check_names(path: Path, found: Sequence[Run]) -> None:
    if not found:
        raise ConfigError(f"{path} names no run: write NAME: {{recipe: FILE.yaml}}")
    names = sorted((run.name for run in found), key=str.lower)
    if twins := [pair for pair in pairwise(names) if len({name.lower() for name in pair}) == 1]:
        both = " and ".join(twins[0])
        raise ConfigError(f"{path}: {both} would be one folder on some disks: rename a run, a row or a column")


def _claims(formulas: Any, names: set[str], where: Where) -> list[Claim]:
    """Checked: a sum of runs of those ``names``, and of metrics."""
    if not isinstance(formulas, dict):
        raise ConfigError(f"{where(CLAIMS)}: {CLAIMS} is {formulas!r}: write {CLAIMS}: {{TEXT: RUN - RUN}}")
    found = []
    for text, formula in formulas.items():
        here = f"{where(f'{CLAIMS}.{text}')}: the claim {text!r} is"
        try:
            found.append(Claim.parse(text, formula))
        except (AttributeError, KeyError, ValueError):
            expected = "expected a sum such as a_6x - b_6x or a_6x:bbox/AP50 - b_6x:bbox/AP50"
            raise ConfigError(f"{here} {formula!r}, {expected}") from None
        for _, name, metric in found[-1].terms:
            for word, known, kind in ((name, names, "run, without its seed"), (metric, METRICS, "metric")):
                if word not in known:
                    raise ConfigError(f"{here} about {word}, expected a {kind}{did_you_mean(word, [*known])}")
    return found


def _repeated(folder: Path, fields: Fields, run: Run, where: str) -> Iterator[Run]:
    """``run`` as ``fields`` have it: in each length, with the first of its seeds, and NAME_seed2 with seed 2."""
    name, recipe = run.name, (folder / fields["recipe"]).absolute()
    seeds, pretraining, keys = fields.get("seeds", []), fields.get("pretraining"), flatten(fields.get("changes", {}))
    for key, by in SET_BY:
        if key in keys and (by in fields or key == "OUTPUT_DIR"):
            raise ConfigError(f"{where}: {name} changes {key}, which {by} sets: leave one of them out")
    if weights := fields.get("weights"):
        keys["MODEL.WEIGHTS"] = weights if "://" in weights else (folder / weights).absolute()
    if "pixels" in fields:
        keys["MODEL.WEIGHTS_PIXELS"] = fields["pixels"]
    changes = tuple(str(word) for pair in keys.items() for word in pair)
    project = Path(normpath((folder / fields["project"]).absolute())) if "project" in fields else None
    if project and project.resolve() not in LOADED:  # a file, and a study's folder that names it, may be somebody's
        raise ConfigError(f"{where}: {name} needs a project: if you trust it, give --project {quoted(project)}")
    try:
        cfg = load_config(recipe, changes, backends.defaults(backends.choose(backends.AUTO))).cfg
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"{COMMAND_LINE}:", f"{where}: {name}:")) from None
    if len(cfg.DATASETS.TEST) > 1:
        fix = f"a study takes one: name it in changes: {{DATASETS.TEST: ['{cfg.DATASETS.TEST[0]}']}}"
        raise ConfigError(f"{where}: {name} has DATASETS.TEST {cfg.DATASETS.TEST}, but {fix}")
    init = PRETRAINED if cfg.MODEL.WEIGHTS or pretraining else SCRATCH
    made = replace(run, init=init, length=cfg.SOLVER.MAX_ITER, pretraining=pretraining, folder=str(recipe.parent),
                   recipe=recipe.stem, changes=changes, flags=("--project", str(project)) if project else (),
                   about=fields)  # fmt: skip
    for one in _lengths(made, sorted(fields.get("lengths", []), reverse=True), fields.get("per_x", ITERATIONS_PER_X)):
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


def _check(
    name: str, sections: Mapping[str, Fields], where: Where, known: Sequence[str], needs_recipe: bool = True,
) -> None:  # fmt: skip
    """Raise ConfigError for the first error in a section, of a run or a column, which has fields of ``known``."""
    fields, here = sections[name], where(name)
    if not NAME.fullmatch(name):
        raise ConfigError(f"{here}: a run cannot be called {name}: take another name, of letters, digits, - and _")
    if not isinstance(fields, dict):
        raise ConfigError(f"{here}: {name} is {fields!r}: write {name}: {{recipe: FILE.yaml}}")
    for field, value in fields.items():
        if field not in known:
            hint = f"{did_you_mean(field, known)}; it may have {', '.join(known)}"
            raise ConfigError(f"{where(f'{name}.{field}')}: {name} has no {field}{hint}")
        is_valid, expected = FIELDS[field]
        if not is_valid(value):
            raise ConfigError(f"{where(f'{name}.{field}')}: {name}.{field} is {value!r}, expected {expected}")
    if "recipe" not in fields and needs_recipe:
        raise ConfigError(f"{here}: {name} has no recipe: write {name}: {{recipe: FILE.yaml}}")
    if {"weights", "pretraining"} <= fields.keys():
        raise ConfigError(f"{here}: {name} has weights and pretraining: leave one of them out")
    sources = [other for other, theirs in sections.items() if isinstance(theirs, dict)
               and "recipe" in theirs and not theirs.keys() & {"pretraining", "lengths"}]  # fmt: skip
    if "pretraining" in fields and (source := fields["pretraining"]) not in sources:
        expected = "expected a run of this file that itself starts from none, a recipe without lengths"
        raise ConfigError(
            f"{where(f'{name}.pretraining')}: {name} starts from {source}, {expected}{did_you_mean(source, sources)}"
        )


def _are_numbers(value: Any, least: int) -> bool:
    are_numbers = isinstance(value, list) and all(type(number) is int and number >= least for number in value)
    return are_numbers and 0 < len(value) == len(set(value))
