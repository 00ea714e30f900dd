"""The data sets of a run: reading them, and their conflicts with each other and with the recipe, as messages."""

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import Any

from fvcore.common.config import CfgNode

from scratch_det.config.load import LoadedConfig, flatten
from scratch_det.data.catalog import ImageFolder, class_mismatch, lookup, lookup_folder, read_image_folder
from scratch_det.data.checks import Problem, explain, told
from scratch_det.data.coco import CocoDataset, inspect_coco
from scratch_det.data.coco_json import rank
from scratch_det.errors import DataError, Section, counted, listed, raise_problems, shortened

NUM_CLASSES = "MODEL.ROI_HEADS.NUM_CLASSES"
NUM_KEYPOINTS = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"
SIGMAS = "TEST.KEYPOINT_OKS_SIGMAS"
MOST_NAMES, LONGEST_NAME = 10, 40  # of the classes that are shown
PERSON = 17  # number of keypoints in COCO, which has sigmas only for these


def read_data(section: Section, recipe: LoadedConfig, *, detection: bool, trains: bool) -> tuple[list[Any], list[Any]]:
    """Read DATASETS.TRAIN (if the run ``trains``) and TEST; compare them with each other and with the recipe.

    Sets the numbers of classes and keypoints in ``recipe.cfg``: the data decides. detection: COCO data sets, else
    image folders.
    """
    cfg = recipe.cfg
    conflicts: Callable[..., Iterator[str]] = coco_conflicts if detection else folder_conflicts

    def read(name: str) -> Any:
        return read_detection_set(section, cfg, name) if detection else read_image_folder(lookup_folder(name))

    names = cfg.DATASETS.TRAIN if trains else (), cfg.DATASETS.TEST
    training, test = ([data for name in part if (data := section.attempt(read, name))] for part in names)
    if training or test:
        section.attempt(raise_problems, conflicts(recipe, training, test))
        first = [*training, *test][0]
        cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.DATASETS.CLASS_NAMES = len(first.classes), list(first.classes)
        if detection and cfg.MODEL.KEYPOINT_ON:
            cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = len(first.keypoints)
    if detection:
        for one, other in product(training, test):
            add_problems(section, other.entry.name, shared_images(one, other))
    return training, test


def count_training_images(cfg: CfgNode, detection: bool) -> int:
    """How many images are trained on: those that FILTER_EMPTY_ANNOTATIONS and the like leave. Raises DataError."""
    if not detection:
        return sum(len(read_image_folder(lookup_folder(name)).images) for name in cfg.DATASETS.TRAIN)
    found = (read_detection_set(Section(strict=True), cfg, name) for name in cfg.DATASETS.TRAIN)
    return sum(len(data.training_images(cfg)) for data in found if data)


def read_detection_set(section: Section, cfg: CfgNode, name: str) -> CocoDataset | None:
    """A COCO data set of the catalog; adds its facts and problems. Raises DataError (seven lines) when strict."""
    entry = lookup(name)
    data, problems = inspect_coco(entry, cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON)
    if data:
        objects = data.arrays["order"]
        crowds = int(data.arrays["iscrowd"][objects].sum())
        facts = {"images": len(data.images), "objects": len(objects), "crowds": crowds, "classes": len(data.classes)}
        counts = [counted(number, what) for what, number in facts.items() if crowds or what != "crowds"]
        classes = listed([shortened(one, LONGEST_NAME) for one in data.classes], MOST_NAMES)
        section.add(
            f"{name}: {', '.join(counts)} ({classes}); {entry.json_file} (sha256 {data.digest[:12]})",
            **{name: {**facts, "names": data.classes, "json": str(entry.json_file), "sha256": data.digest}},
        )
    elif section.strict:
        raise DataError(explain(entry.json_file, problems))
    else:
        section.add(f"{name}: {entry.json_file} cannot be used", **{name: {"json": str(entry.json_file)}})
    add_problems(section, name, problems)
    return data


def add_problems(section: Section, name: str, problems: Iterable[Problem]) -> None:
    """Add the problems of data set ``name``, each with its fix."""
    for one in problems:
        section.problem(one.severity, told(name, one))


def folder_conflicts(recipe: LoadedConfig, training: list[ImageFolder], test: list[ImageFolder]) -> Iterator[str]:
    """Image folders of a classification: their classes, and the number of classes that the recipe names."""
    first, *others = training + test
    yield from filter(None, (class_mismatch(first, other) for other in others))
    yield from _count_conflict(recipe, NUM_CLASSES, len(first.classes), f"{first.entry.root} has", "classes")


def coco_conflicts(recipe: LoadedConfig, training: list[CocoDataset], test: list[CocoDataset]) -> Iterator[str]:
    """COCO data sets of a detection: their categories and keypoints, and what the recipe says about these."""
    for data in training:
        if not data.is_annotated:
            yield f"{data.entry.json_file}: no list 'annotations', so it cannot be trained on; name it in DATASETS.TEST"
    first, *others = training + test
    path, theirs = first.entry.json_file, dict(zip(first.category_ids, first.classes, strict=True))
    for other in others:
        ours = dict(zip(other.category_ids, other.classes, strict=True))
        differing = [k for k in sorted(ours.keys() | theirs.keys(), key=rank) if ours.get(k) != theirs.get(k)]
        if differing:
            pairs = [f"id {k}: {ours.get(k, 'none')} here, {theirs.get(k, 'none')} there" for k in differing]
            one, another = (
                f"{len(categories)} categories: {listed([f'{k} {name}' for k, name in categories.items()], most=6)}"
                for categories in (ours, theirs)
            )
            yield (
                f"{other.entry.json_file} has {one}\n  {path} has {another}\n"
                f"  {len(pairs)} differ, {listed(pairs, separator='; ')}\n"
                "  training and test data need the same category ids and names"
            )
    yield from _count_conflict(recipe, NUM_CLASSES, len(first.classes), f"{path} has", "categories")
    if recipe.cfg.MODEL.KEYPOINT_ON:
        yield from _keypoint_conflicts(recipe, training, test)


def shared_images(training: CocoDataset, test: CocoDataset) -> list[Problem]:
    """A notice on ``test`` when the training set has some of its image files."""
    root, trained_root = (os.path.realpath(data.entry.image_root) for data in (test, training))
    trained = {f"{trained_root}/{name}" for name in training.images.names()}
    shared = [test.images[k] for k, name in enumerate(test.images.names()) if f"{root}/{name}" in trained]
    kind = f"images that are also in {training.entry.name}, which is trained on"
    problem = Problem("notice", kind, "AP on them says little about new images").add(*shared)
    return [problem] if shared else []


def _count_conflict(recipe: LoadedConfig, key: str, count: int, source: str, what: str) -> Iterator[str]:
    """The data decides on ``key``: a recipe may leave it out, or name the same number."""
    named = flatten(recipe.cfg)[key]
    if key in recipe.explicit and named != count:
        yield f"{key} is {named}, but {source} {count} {what}; leave the key out: the data decides"


def _keypoint_conflicts(recipe: LoadedConfig, training: list[CocoDataset], test: list[CocoDataset]) -> Iterator[str]:
    """Keypoints that differ between data sets, keys that do not fit them, flips of keypoints without pairs."""
    cfg, sigmas = recipe.cfg, recipe.cfg.TEST.KEYPOINT_OKS_SIGMAS
    first, *others = training + test
    path, names, count = first.entry.json_file, ", ".join(first.keypoints), len(first.keypoints)
    for other in others:
        if (other.keypoints, other.flip_indices) != (first.keypoints, first.flip_indices):
            yield (
                f"{other.entry.json_file} has keypoints {', '.join(other.keypoints)}\n  {path} has {names}\n"
                "  training and test data need the same keypoints, in the same order, with the same flip_map"
            )
    yield from _count_conflict(recipe, NUM_KEYPOINTS, count, f"the categories of {path} name", "keypoints")
    flips = {}  # "KEY is VALUE" -> the value that flips nothing
    if training and cfg.INPUT.RANDOM_FLIP == "horizontal":
        flips["INPUT.RANDOM_FLIP is 'horizontal'"] = "none"
    if test and cfg.TEST.AUG.ENABLED and cfg.TEST.AUG.FLIP:
        flips["TEST.AUG.FLIP is True"] = "False"
    if flips and first.flip_indices is None:
        yield (
            f"{' and '.join(flips)}, but the keypoints of {path} do not tell which change places "
            f"in a mirror: {names}\n  set it to {' and '.join(flips.values())}, name them left_X "
            "and right_X in pairs, or give the categories a flip_map, a list of [name, name]"
        )
    if test and len(sigmas or [0] * PERSON) != count:
        found = f"has {len(sigmas)} numbers" if sigmas else "is empty, which stands for COCO's 17 of a person"
        yield (
            f"{SIGMAS} {found}, but {path} has {count} keypoints; set {SIGMAS} to {count} numbers, "
            f'such as "{[0.1] * min(count, 4)}"{" (here 4)" if count > 4 else ""}: how far off, as a share of '
            "the object's size, a point may be"
        )
