"""What the data sets of one run, and its recipe, have to agree on."""

import os
from collections.abc import Iterator

from scratch_det.config import LoadedConfig
from scratch_det.data.coco import CocoDataset
from scratch_det.data.problem import Problem, notice

NUM_CLASSES = "MODEL.ROI_HEADS.NUM_CLASSES"


def category_mismatch(first: CocoDataset, other: CocoDataset) -> str | None:
    """Which categories differ, as a message; None when both have the same ids with the same names."""
    ours, theirs = _categories(other), _categories(first)
    differing = [number for number in sorted(ours.keys() | theirs.keys()) if ours.get(number) != theirs.get(number)]
    if not differing:
        return None
    pairs = [
        f"id {number}: {ours.get(number, 'none')} here, {theirs.get(number, 'none')} there" for number in differing
    ]
    return (
        f"{other.entry.json_file} has {_listed(ours)}\n"
        f"  {first.entry.json_file} has {_listed(theirs)}\n"
        f"  {len(differing)} differ, {'; '.join(pairs[:5])}{'; ...' if len(pairs) > 5 else ''}\n"
        "  training and test data need the same category ids and names"
    )


def class_count_conflict(recipe: LoadedConfig, data: CocoDataset) -> str | None:
    """A recipe that names another number of classes than the json has, as a message; None when it names none."""
    found, expected = recipe.cfg.MODEL.ROI_HEADS.NUM_CLASSES, len(data.classes)
    if NUM_CLASSES not in recipe.explicit or found == expected:
        return None
    return (
        f"{NUM_CLASSES} is {found}, but {data.entry.json_file} has {expected} categories; "
        f"set {NUM_CLASSES} {expected}, or leave the key out: the json decides"
    )


def shared_images(training: CocoDataset, test: CocoDataset) -> Iterator[Problem]:
    """A notice on ``test`` when files of it are also trained on."""
    trained = {path for path, _ in _files(training)}
    yield from notice(
        f"images that are also in {training.entry.name}, which is trained on",
        (number for path, number in _files(test) if path in trained),
        "AP on them says little about new images",
    )


def _categories(data: CocoDataset) -> dict[int, str]:
    return dict(zip(data.category_ids, data.classes, strict=True))


def _listed(categories: dict[int, str]) -> str:
    pairs = [f"{number} {name}" for number, name in categories.items()]
    return f"{len(pairs)} categories: {', '.join(pairs[:6])}{', ...' if len(pairs) > 6 else ''}"


def _files(data: CocoDataset) -> Iterator[tuple[str, int]]:
    """Path and image id of every image."""
    root = os.path.realpath(data.entry.image_root)
    return ((f"{root}/{image['file_name']}", image["id"]) for image in data.images)
