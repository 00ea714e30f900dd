"""What the data sets of one run, and its recipe, have to agree on."""

import os
from collections.abc import Iterator

from fvcore.common.config import CfgNode

from scratch_det.config import LoadedConfig
from scratch_det.data.coco import CocoDataset
from scratch_det.data.coco_checks import Problem

NUM_CLASSES = "MODEL.ROI_HEADS.NUM_CLASSES"
NUM_KEYPOINTS = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"
SIGMAS = "TEST.KEYPOINT_OKS_SIGMAS"
PERSON = 17  # keypoints that COCO has sigmas for


def settle_counts(cfg: CfgNode, data: CocoDataset) -> None:
    """Set the numbers of classes and keypoints, which the json decides."""
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(data.classes)
    if cfg.MODEL.KEYPOINT_ON:
        cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = len(data.keypoints)


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


def keypoint_conflicts(recipe: LoadedConfig, training: list[CocoDataset], test: list[CocoDataset]) -> Iterator[str]:
    """With MODEL.KEYPOINT_ON, what data sets and recipe do not agree on, a message each."""
    if not recipe.cfg.MODEL.KEYPOINT_ON:
        return
    first, *others = training + test
    for other in others:
        if (other.keypoints, other.flip_indices) != (first.keypoints, first.flip_indices):
            yield (
                f"{other.entry.json_file} has keypoints {', '.join(other.keypoints)}\n"
                f"  {first.entry.json_file} has {', '.join(first.keypoints)}\n"
                "  training and test data need the same keypoints, in the same order, with the same flip_map"
            )
    found, expected = recipe.cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, len(first.keypoints)
    if NUM_KEYPOINTS in recipe.explicit and found != expected:
        yield (
            f"{NUM_KEYPOINTS} is {found}, but the categories of {first.entry.json_file} name {expected} keypoints; "
            f"set {NUM_KEYPOINTS} {expected}, or leave the key out: the json decides"
        )
    mirrored = _mirrors(recipe.cfg, bool(training), bool(test))
    if mirrored and first.flip_indices is None:
        points, mends = ", ".join(first.keypoints), " and ".join(mirrored.values())
        yield (
            f"{' and '.join(mirrored)}, but the keypoints of {first.entry.json_file} do not tell which change places "
            f"in a mirror: {points}\n  set it to {mends}, name them left_X and right_X in pairs, or give the "
            "categories a flip_map, a list of [name, name]"
        )
    if test:
        yield from _wrong_sigmas(recipe.cfg.TEST.KEYPOINT_OKS_SIGMAS, first)


def _wrong_sigmas(sigmas: list[float], data: CocoDataset) -> Iterator[str]:
    count = len(data.keypoints)
    found = f"has {len(sigmas)} numbers" if sigmas else "is empty, which stands for COCO's 17 of a person"
    if len(sigmas or [0] * PERSON) != count:
        yield (
            f"{SIGMAS} {found}, but {data.entry.json_file} has {count} keypoints; set {SIGMAS} to {count} numbers, "
            f'such as "{[0.1] * min(count, 4)}"{" (here 4)" if count > 4 else ""}: how far off, as a share of '
            "the object's size, a point may be"
        )
    elif not all(isinstance(sigma, int | float) and sigma > 0 for sigma in sigmas):
        yield f"{SIGMAS} is {sigmas}, expected numbers above 0"


def shared_images(training: CocoDataset, test: CocoDataset) -> list[Problem]:
    """A notice on ``test`` when files of it are also trained on."""
    trained = {path for path, _ in _files(training)}
    kind = f"images that are also in {training.entry.name}, which is trained on"
    shared = [number for path, number in _files(test) if path in trained]
    return [Problem.of("notice", kind, shared, "AP on them says little about new images")] if shared else []


def _categories(data: CocoDataset) -> dict[int, str]:
    return dict(zip(data.category_ids, data.classes, strict=True))


def _listed(categories: dict[int, str]) -> str:
    pairs = [f"{number} {name}" for number, name in categories.items()]
    return f"{len(pairs)} categories: {', '.join(pairs[:6])}{', ...' if len(pairs) > 6 else ''}"


def _files(data: CocoDataset) -> Iterator[tuple[str, int]]:
    """Path and image id of every image."""
    root = os.path.realpath(data.entry.image_root)
    return ((f"{root}/{image['file_name']}", image["id"]) for image in data.images)


def _mirrors(cfg: CfgNode, training: bool, test: bool) -> dict[str, str]:
    """Which keys have images mirrored left-right, as "KEY is VALUE", and what they are set to so that they do not."""
    aug = cfg.TEST.AUG
    mirrors = {
        "INPUT.RANDOM_FLIP is 'horizontal'": ("none", training and cfg.INPUT.RANDOM_FLIP == "horizontal"),
        "TEST.AUG.FLIP is True": ("False", test and aug.ENABLED and aug.FLIP),
    }
    return {found: mend for found, (mend, is_so) in mirrors.items() if is_so}
