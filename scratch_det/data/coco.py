"""Annotation files in COCO's format: read, checked and indexed. Needs no torch.

CHECKS lists every kind of problem of such a file; ``find_problems`` finds the offenders of each.
"""

import gc
import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from operator import mul
from pathlib import Path
from typing import Any, ClassVar

from fvcore.common.config import CfgNode

from scratch_det.data.catalog import DatasetEntry
from scratch_det.errors import DataError, Severity, listed

Record = dict[str, Any]  # an entry of the json
OVERHANG = 1.0  # pixels; COCO's own boxes and sizes are rounded
ROUNDING = 1e-6  # square pixels; coordinates below 10^4 leave a sum of products uncertain by less
UNKNOWN_SIZE = (math.inf, math.inf)
WHOLE = "a whole number"
PIXELS = "a whole number of pixels above 0"
TEXT = "a string"
NAME = "a number or a string"
ANYTHING = ""  # not checked, or checked below
VALUES: dict[str, Callable[[Any], bool]] = {
    WHOLE: lambda value: isinstance(value, int) or (isinstance(value, float) and value.is_integer()),
    PIXELS: lambda value: isinstance(value, int) and value > 0,
    TEXT: lambda value: isinstance(value, str),
    NAME: lambda value: isinstance(value, int | float | str),
    ANYTHING: lambda value: True,
}
FIELDS = {  # the lists of a COCO json, and what every entry needs
    "images": {"id": WHOLE, "file_name": TEXT, "width": PIXELS, "height": PIXELS},
    "annotations": {"id": NAME, "image_id": WHOLE, "category_id": WHOLE, "bbox": ANYTHING},
    "categories": {"id": WHOLE, "name": ANYTHING},
}
NUMBERING = {"id": "number them", "image_id": "number the images", "category_id": "number the categories"}


@dataclass(frozen=True)
class Problem:
    """A kind of problem, and the entries of the json that have it.

    Attributes:
        kind: what is wrong, in words that follow a number: "images without file_name".
        fix: the change that helps; empty where ``kind`` says enough.
        shown: how a message names one of ``offenders``, its keys in braces.
    """

    severity: Severity
    kind: str
    fix: str = ""
    shown: str = "{id}"
    offenders: Sequence[Record] = ()

    def __str__(self) -> str:
        if not self.offenders:
            return self.kind
        return f"{len(self.offenders)} {self.kind}: id {listed([self.shown.format(**one) for one in self.offenders])}"


fatal, notice = partial(Problem, "error"), partial(Problem, "notice")
CHECKS = {  # in the order in which problems are reported
    **{f"{section} fields": fatal(f"{section} without one of {', '.join(names)}") for section, names in FIELDS.items()},
    **{f"{section} {name}": fatal(f"{section} whose {name} is not {value}", NUMBERING[name] if value == WHOLE else "")
       for section, fields in FIELDS.items() for name, value in fields.items() if value != ANYTHING},
    **{f"{section} twice": fatal(f"{section} with a duplicate id", "number them uniquely") for section in FIELDS},
    "image_id": fatal("annotations with an unknown image_id", "drop them or add images", "{id} (image_id {image_id})"),
    "category_id": fatal("annotations with an unknown category_id", "known category ids: {category_ids}",
        "{id} (category_id {category_id})"),
    "bbox": fatal("annotations whose bbox is not [x, y, width, height] of numbers"),
    "empty box": fatal("annotations with a box of no width or height",
        "fix the boxes, or set 'drop_empty_boxes: true' in the data set's catalog entry"),
    "box outside": fatal("annotations with a box that lies outside its image",
        "boxes are [x, y, width, height] in pixels from the upper left corner; fix them or drop the annotations"),
    "overhang": notice(f"annotations with a box that sticks out of its image by more than {OVERHANG:g} pixel",
        "training clips them to the image"),
    "mask": fatal("annotations whose segmentation is neither polygons of 3+ points nor RLE",
        "fix them, or train without masks (MODEL.MASK_ON False)"),
    "RLE size": fatal("annotations whose RLE does not fit the image: size [height, width], counts that add up to "
        "height x width", "fix them, or the image's height and width"),
    "flat polygon": notice("annotations with a polygon that encloses no area (two corners, all on one line, or "
        "crossing itself)", "such a part of a mask is empty"),
    "keypoint names": fatal("categories without keypoints, a list of different names",
        "name them in the order of the annotations' x, y, v, or train without (MODEL.KEYPOINT_ON False)"),
    "other names": fatal("categories whose keypoints or flip_map are not those of category {first_category}",
        "one keypoint head predicts all classes: give all categories the same"),
    "flip_map": fatal("categories whose flip_map is not a list of [name, name], each one of the keypoints and none "
        "twice", 'such as [["left_eye", "right_eye"]]: what changes places when an image is flipped'),
    "keypoints": fatal("annotations whose keypoints are not x, y, v of {num_keypoints} points",
        "write {num_numbers} numbers, with 0, 0, 0 for what is not labelled"),
    "v": fatal("annotations whose keypoints have a v other than 0, 1 or 2",
        "0 is not labelled, 1 hidden, 2 visible"),
    "num_keypoints": notice("annotations whose num_keypoints is not their number of keypoints with v above 0",
        "keypoint AP ignores objects with 0; a missing one is counted"),
    "area": notice("annotations whose area is missing or negative",
        "AP of small, medium and large objects goes by it; a missing one counts as the box's"),
    "iscrowd": notice("annotations whose iscrowd is missing or neither 0 nor 1",
        "a missing one counts as 0, any other as 1"),
    "file": fatal("images that are not in {image_root}", "complete the folder", "{id} ({file_name})"),
}  # fmt: skip


@dataclass(frozen=True)
class CocoDataset:
    """A validated data set.

    Attributes:
        classes: class names, ordered by category id; a label is a 0-based index into this list.
        category_ids: the json's category id of each label.
        images: the json's image entries (``id``, ``file_name``, ``width``, ``height``; pixels), in the json's order.
        annotations: image id -> its annotation entries as the json has them (``bbox`` is x, y, width, height in
            pixels, ``segmentation`` polygons or RLE, ``keypoints`` x, y, v of each; x and y are indices of pixels),
            each with an added 0-based ``label``.
        digest: SHA-256 of the annotation file's bytes.
        keypoints: their names, where they were asked for.
        flip_indices: keypoint i of a flipped object is keypoint flip_indices[i] of the original; None where the json
            does not tell.
    """

    described_by: ClassVar[str] = "json"  # what ``digest`` is of
    entry: DatasetEntry
    classes: list[str]
    category_ids: list[int]
    images: list[dict[str, Any]]
    annotations: dict[int, list[dict[str, Any]]]
    digest: str
    keypoints: tuple[str, ...] = ()
    flip_indices: tuple[int, ...] | None = None

    def training_images(self, cfg: CfgNode) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
        """The images to train on, with their objects.

        As in detectron2, FILTER_EMPTY_ANNOTATIONS leaves out images without objects, MIN_KEYPOINTS_PER_IMAGE images
        with fewer labelled keypoints.
        """
        least = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
        for image in self.images:
            objects = self.training_annotations(image["id"])
            every = self.annotations.get(image["id"], [])  # detectron2 counts the keypoints of crowds too
            if (objects or not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS) and (
                least <= 0 or sum(map(count_visible, every)) >= least
            ):
                yield image, objects

    def training_annotations(self, image_id: int) -> list[dict[str, Any]]:
        """The objects to learn from: no crowd regions and no boxes without area, as in detectron2.

        Objects marked ``ignore`` (PASCAL VOC's difficult ones) are left out too, as in Detectron.
        """
        return [
            one
            for one in self.annotations.get(image_id, [])
            if not (one.get("iscrowd") or one.get("ignore")) and min(one["bbox"][2:]) > 0
        ]


def needed_for_training(cfg: CfgNode) -> str:
    """What an image needs so that ``training_images`` yields it, in words for a message."""
    least = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    if cfg.MODEL.KEYPOINT_ON and least > 0:
        return f"an object and {least} labelled keypoints (MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE)"
    return "an object; DATALOADER.FILTER_EMPTY_ANNOTATIONS False keeps them"


def read_coco(entry: DatasetEntry, need_masks: bool, need_keypoints: bool = False) -> CocoDataset:
    """Read and check one annotation file. Raises DataError (at most six lines) with the errors of ``inspect_coco``."""
    dataset, problems = inspect_coco(entry, need_masks, need_keypoints)
    if dataset is None:
        raise DataError(explain(entry.json_file, problems))
    return dataset


def inspect_coco(
    entry: DatasetEntry, need_masks: bool, need_keypoints: bool = False
) -> tuple[CocoDataset | None, list[Problem]]:
    """Read one annotation file: the data set (None when its problems include an error), and every kind of problem.

    The kinds are those of CHECKS; masks and keypoints are checked only where they are needed. Raises DataError when the
    file is no json with COCO's three lists.
    """
    with gc_paused():
        content, digest = _load(entry.json_file)
        problems = find_problems(entry, content, need_masks, need_keypoints)
        if any(one.severity == "error" for one in problems):
            return None, problems
        categories = sorted(content["categories"], key=lambda category: category["id"])
        label_of = {category["id"]: label for label, category in enumerate(categories)}
        annotations: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for annotation in content["annotations"]:
            annotation["label"] = label_of[annotation["category_id"]]
            annotations[annotation["image_id"]].append(annotation)
    classes = [str(category["name"]) for category in categories]
    points = (tuple(categories[0]["keypoints"]), flip_indices_of(categories[0])) if need_keypoints else ()
    return CocoDataset(entry, classes, list(label_of), content["images"], dict(annotations), digest, *points), problems


def flip_indices_of(category: dict[str, Any]) -> tuple[int, ...] | None:
    """Keypoint flip indices (see ``CocoDataset``) by the category's ``flip_map``, else by names: left_X and right_X.

    None when there is no ``flip_map``, and either no left_X or a left_X or right_X without its partner.
    """
    names = category["keypoints"]
    if (pairs := category.get("flip_map")) is None:
        left, right = ({name for name in names if name.startswith(side)} for side in ("left_", "right_"))
        pairs = [(name, name.replace("left_", "right_", 1)) for name in left]
        if not left or right != {other for _, other in pairs}:
            return None
    partner = {one: other for pair in pairs for one, other in (pair, reversed(pair))}
    return tuple(names.index(partner.get(name, name)) for name in names)


def _load(path: Path) -> tuple[dict[str, list[Any]], str]:
    """The content and the SHA-256 of the same bytes."""
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    try:
        text = data.decode(json.detect_encoding(data))
        del data  # a large file should not lie in memory twice
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}:{error.colno}: broken json ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a json text file ({error.reason} at byte {error.start})") from None
    missing = [key for key in FIELDS if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        raise DataError(f"{path}: no list '{missing[0]}'; COCO format has {', '.join(FIELDS)}")
    return content, digest


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pause the garbage collector: it would visit a json's millions of lists many times, and they have no cycles.

    COCO is read twice as fast.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def explain(path: Any, problems: Sequence[Problem], most_lines: int = 6) -> str:
    """The errors among ``problems`` of the file ``path``, as a message of at most ``most_lines`` lines."""
    errors = [one for one in problems if one.severity == "error"]
    if len(errors) == 1:
        return f"{path}: {errors[0]}" + (f"\n  {errors[0].fix}" if errors[0].fix else "")
    lines = [f"  {one}" + (f"; {one.fix}" if one.fix else "") for one in errors]
    if len(lines) >= most_lines:
        left = len(lines) - (most_lines - 2)
        lines[most_lines - 2 :] = [f"  and {left} more kinds, which tools/check.py lists"]
    return "\n".join([f"{path}: {len(errors)} kinds of problems", *lines])


def find_problems(
    entry: DatasetEntry, content: dict[str, list[Any]], need_masks: bool, need_keypoints: bool = False
) -> list[Problem]:
    """Every kind of problem of a json whose ``content`` has the lists of ``FIELDS``, and images that are not on disk.

    The other values of a broken entry are not checked, so that one fault is not reported as several.
    """
    if not content["images"] or not content["categories"]:
        counts = f"{len(content['images'])} images, {len(content['categories'])} categories"
        return [fatal(f"data set '{entry.name}' is empty: {counts}")]
    found: dict[str, list[Record]] = defaultdict(list)  # key of CHECKS -> offenders
    images, annotations, categories = (_sound_entries(section, content[section], found) for section in FIELDS)
    for key, section in (("image_id", "images"), ("category_id", "categories")):  # of broken entries too
        known = {one["id"] for one in content[section] if isinstance(one, dict) and VALUES[WHOLE](one.get("id"))}
        found[key] = [one for one in annotations if one[key] not in known]
    num_keypoints = _count_keypoints(categories, found) if need_keypoints and categories else 0
    sizes = {image["id"]: (image["width"], image["height"]) for image in images}
    for one in annotations:
        size = sizes.get(one["image_id"], UNKNOWN_SIZE)
        faults = [
            _box_fault(one, *size, entry.drop_empty_boxes),
            _mask_fault(one.get("segmentation"), *size) if need_masks else None,
            _keypoint_fault(one, num_keypoints) if num_keypoints else None,
            None if isinstance(one.get("area"), int | float) and one["area"] >= 0 else "area",
            None if one.get("iscrowd") in (0, 1) else "iscrowd",
        ]
        for fault in filter(None, faults):
            found[fault].append(one)
    root, names = entry.image_root, [image["file_name"] for image in images]
    # without subfolders one listing answers for all
    files = {name for name in names if (root / name).is_file()} if "/" in "".join(names) else set(os.listdir(root))
    found["file"] = [image for image in images if image["file_name"] not in files]

    facts = {"num_keypoints": num_keypoints, "num_numbers": 3 * num_keypoints, "image_root": root,
             "category_ids": [category["id"] for category in categories[:20]],
             "first_category": categories[0]["id"] if categories else None}  # fmt: skip
    return [
        replace(check, kind=check.kind.format(**facts), fix=check.fix.format(**facts), offenders=found[key])
        for key, check in CHECKS.items()
        if found[key]
    ]


def count_visible(annotation: Record) -> int:
    """How many keypoints are labelled, hidden ones included."""
    return sum(v > 0 for v in annotation["keypoints"][2::3])


def _sound_entries(section: str, entries: list[Any], found: dict[str, list[Record]]) -> list[Record]:
    """The entries whose ids and sizes can be used; the others, and duplicates, are added to ``found``."""
    sound, seen, fields = [], set(), FIELDS[section]
    for place, one in enumerate(entries):
        if not isinstance(one, dict) or not fields.keys() <= one.keys():
            found[f"{section} fields"].append({"id": f"(entry {place})"} | (one if isinstance(one, dict) else {}))
        elif wrong := next((field for field, value in fields.items() if not VALUES[value](one[field])), None):
            found[f"{section} {wrong}"].append(one)
        else:
            found[f"{section} twice"] += [one] if one["id"] in seen else []
            seen.add(one["id"])
            sound.append(one)
    return sound


def _count_keypoints(categories: list[Record], found: dict[str, list[Record]]) -> int:
    """How many keypoints an annotation needs; 0 when the categories, added to ``found``, do not tell."""
    names, flip_map = categories[0].get("keypoints"), categories[0].get("flip_map")
    faulty = {
        "keypoint names": [one for one in categories if not _are_names(one.get("keypoints"))],
        "other names": [one for one in categories if (one.get("keypoints"), one.get("flip_map")) != (names, flip_map)],
        "flip_map": [one for one in categories if not _is_flip_map(one.get("flip_map", []), names)],
    }
    found |= faulty
    return 0 if any(faulty.values()) else len(names or ())


def _box_fault(one: Record, image_width: float, image_height: float, drop_empty: bool) -> str | None:
    if not _are_numbers(one["bbox"], 4):
        return "bbox"
    x, y, width, height = one["bbox"]
    if width <= 0 or height <= 0:
        return None if drop_empty or one.get("iscrowd") else "empty box"
    if x >= image_width or y >= image_height or x + width <= 0 or y + height <= 0:
        return "box outside"
    return "overhang" if max(-x, -y, x + width - image_width, y + height - image_height) > OVERHANG else None


def _mask_fault(mask: Any, width: float, height: float) -> str | None:
    if isinstance(mask, dict):
        size, counts = mask.get("size"), mask.get("counts", ())
        is_text = isinstance(counts, str)  # compressed; its content is not checked
        if not isinstance(size, list) or not (is_text or _are_numbers(counts)):
            return "mask"
        fits = size == [height, width] and (is_text or sum(counts) == height * width)
        return None if fits or (width, height) == UNKNOWN_SIZE else "RLE size"
    if not isinstance(mask, list) or not mask:
        return "mask"
    if not all(_are_numbers(polygon) and len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in mask):
        return "mask"
    return None if all(map(_encloses_area, mask)) else "flat polygon"


def _encloses_area(polygon: list[float]) -> bool:
    """Whether the area is more than rounding (Gauss's area formula); ``polygon`` is x, y of each corner in turn."""
    x, y = polygon[0::2], polygon[1::2]
    twice = sum(map(mul, x, y[1:] + y[:1])) - sum(map(mul, y, x[1:] + x[:1]))
    return abs(twice) > ROUNDING


def _keypoint_fault(one: Record, count: int) -> str | None:
    if not _are_numbers(one.get("keypoints"), 3 * count):
        return "keypoints"
    if not set(one["keypoints"][2::3]) <= {0, 1, 2}:
        return "v"
    return None if one.get("num_keypoints", count_visible(one)) == count_visible(one) else "num_keypoints"


def _are_names(names: Any) -> bool:
    texts = isinstance(names, list) and len(names) > 0 and all(isinstance(name, str) for name in names)
    return texts and len(set(names)) == len(names)


def _is_flip_map(pairs: Any, names: Any) -> bool:
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        return False
    named = [name for pair in pairs for name in pair]
    return all(isinstance(names, list) and name in names and named.count(name) == 1 for name in named)


def _are_numbers(values: Any, count: int | None = None) -> bool:
    """Whether it is a list of numbers, neither infinite nor NaN, ``count`` of them where given."""
    try:  # adding them up tells, and quickly
        return isinstance(values, list) and count in (None, len(values)) and math.isfinite(sum(values))
    except (TypeError, OverflowError):
        return False
