"""The checks of a COCO json: every kind of problem that it has, with the first offenders and the fix. Needs no torch.

CHECKS is the whole list; ``find_problems`` finds the offenders of each.
"""

import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import mul
from typing import Any, Literal

from scratch_det.data.catalog import DatasetEntry
from scratch_det.errors import listed

Severity = Literal["error", "notice"]  # cannot be trained on; can, but is rarely meant
Record = dict[str, Any]  # an entry of the json
OVERHANG = 1.0  # pixels; COCO's own boxes and sizes are rounded
ROUNDING = 1e-6  # square pixels; coordinates below 10^4 leave a sum of products uncertain by less
UNKNOWN_SIZE = (math.inf, math.inf)
KEYS = {
    "images": {"id", "file_name", "width", "height"},
    "annotations": {"id", "image_id", "category_id", "bbox"},
    "categories": {"id", "name"},
}  # of a COCO json: its lists, and what every entry needs
WHOLE = {"images": ["id"], "annotations": ["image_id", "category_id"], "categories": ["id"]}  # whole numbers of them


@dataclass(frozen=True)
class Problem:
    """A kind of problem, and the entries of the json that have it.

    Attributes:
        kind: what is wrong, in words that follow a number: "images without file_name".
        fix: the change that helps, or nothing where ``kind`` says enough.
        shown: how one of ``offenders`` is named in a message, its keys in braces.
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


NUMBER_THEM = "number them: COCO's evaluation takes nothing else"
CHECKS = {  # in the order in which problems are reported
    "images keys": Problem("error", "images without id, file_name, width or height"),
    "annotations keys": Problem("error", "annotations without id, image_id, category_id or bbox"),
    "categories keys": Problem("error", "categories without id or name"),
    "images id": Problem("error", "images whose id is not a whole number", NUMBER_THEM),
    "images size": Problem("error",
        "images whose width or height is not a whole number of pixels above 0, or whose file_name is no text"),
    "annotations id": Problem("error",
        "annotations whose id is neither number nor text, or whose image_id or category_id is no whole number"),
    "categories id": Problem("error", "categories whose id is not a whole number", NUMBER_THEM),
    "images twice": Problem("error", "duplicate image ids", "number images uniquely"),
    "annotations twice": Problem("error", "duplicate annotation ids", "number annotations uniquely"),
    "categories twice": Problem("error", "duplicate category ids", "number categories uniquely"),
    "image_id": Problem("error", "annotations with an unknown image_id",
        "drop them or add images", "{id} (image_id {image_id})"),
    "category_id": Problem("error", "annotations with an unknown category_id",
        "known category ids: {category_ids}", "{id} (category_id {category_id})"),
    "bbox": Problem("error", "annotations whose bbox is not [x, y, width, height] of numbers"),
    "empty box": Problem("error", "annotations with a box of no width or height",
        "fix the boxes, or set 'drop_empty_boxes: true' in the data set's catalog entry"),
    "box outside": Problem("error", "annotations with a box that lies outside its image",
        "boxes are [x, y, width, height] in pixels from the upper left corner; fix them or drop the annotations"),
    "overhang": Problem("notice",
        f"annotations with a box that sticks out of its image by more than {OVERHANG:g} pixel",
        "training clips them to the image"),
    "mask": Problem("error", "annotations whose segmentation is neither polygons of 3+ points nor RLE",
        "fix them, or train without masks (MODEL.MASK_ON False)"),
    "RLE size": Problem("error",
        "annotations whose RLE does not fit the image: size [height, width], counts that add up to height x width",
        "fix them, or the image's height and width"),
    "flat polygon": Problem("notice",
        "annotations with a polygon that encloses no area (two corners, all on one line, or crossing itself)",
        "such a part of a mask is empty"),
    "keypoint names": Problem("error", "categories without keypoints, a list of different names",
        "name them in the order of the annotations' x, y, v, or train without (MODEL.KEYPOINT_ON False)"),
    "other names": Problem("error", "categories whose keypoints or flip_map are not those of category {first_category}",
        "one keypoint head predicts all classes: give all categories the same"),
    "flip_map": Problem("error",
        "categories whose flip_map is not a list of [name, name], each one of the keypoints and none twice",
        'such as [["left_eye", "right_eye"]]: what changes places when an image is flipped'),
    "keypoints": Problem("error", "annotations whose keypoints are not x, y, v of {num_keypoints} points",
        "write {num_numbers} numbers, with 0, 0, 0 for what is not labelled"),
    "v": Problem("error", "annotations whose keypoints have a v other than 0, 1 or 2",
        "0 is not labelled, 1 hidden, 2 visible"),
    "num_keypoints": Problem("notice",
        "annotations whose num_keypoints is not their number of keypoints with v above 0",
        "keypoint AP ignores objects with 0; a missing one is counted"),
    "area": Problem("notice", "annotations whose area is missing or negative",
        "AP of small, medium and large objects goes by it; a missing one counts as the box's"),
    "iscrowd": Problem("notice", "annotations whose iscrowd is missing or neither 0 nor 1",
        "a missing one counts as 0, any other as 1"),
    "file": Problem("error", "images that are not in {image_root}", "complete the folder", "{id} ({file_name})"),
}  # fmt: skip


def explain(path: Any, problems: list[Problem], most_lines: int = 6) -> str:
    """``problems`` of the file ``path`` as a message of at most ``most_lines`` lines."""
    if len(problems) == 1:
        only = problems[0]
        return f"{path}: {only}" + (f"\n  {only.fix}" if only.fix else "")
    lines = [f"  {one}" + (f"; {one.fix}" if one.fix else "") for one in problems]
    if len(lines) >= most_lines:
        left = len(lines) - (most_lines - 2)
        lines[most_lines - 2 :] = [f"  and {left} more kinds, which tools/check.py lists"]
    return "\n".join([f"{path}: {len(problems)} kinds of problems", *lines])


def find_problems(
    entry: DatasetEntry, content: dict[str, list[Any]], need_masks: bool, need_keypoints: bool = False
) -> list[Problem]:
    """Every kind of problem of a json whose ``content`` has the lists of ``KEYS``, and images that are not on disk.

    What a broken entry says is looked into no further, so that one fault is not reported as several.
    """
    if not content["images"] or not content["categories"]:
        counts = f"{len(content['images'])} images, {len(content['categories'])} categories"
        return [Problem("error", f"data set '{entry.name}' is empty: {counts}")]
    found: dict[str, list[Record]] = defaultdict(list)  # key of CHECKS -> offenders
    images, annotations, categories = (_sound_entries(section, content[section], found) for section in KEYS)
    for key, section in (("image_id", "images"), ("category_id", "categories")):  # of broken entries too
        known = {one["id"] for one in content[section] if isinstance(one, dict) and _is_whole(one.get("id"))}
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
    exists: Callable[[str], bool] = lambda name: (entry.image_root / name).is_file()  # noqa: E731
    if not any("/" in image["file_name"] for image in images):
        exists = set(os.listdir(entry.image_root)).__contains__  # without subfolders one listing answers for all
    found["file"] = [image for image in images if not exists(image["file_name"])]

    facts = {"num_keypoints": num_keypoints, "num_numbers": 3 * num_keypoints, "image_root": entry.image_root,
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
    """Those whose ids and sizes can be used; the others, and duplicates, are added to ``found``."""
    sound, seen = [], set()
    for place, one in enumerate(entries):
        if not isinstance(one, dict) or not KEYS[section] <= one.keys():
            found[f"{section} keys"].append({"id": f"(entry {place})"} | (one if isinstance(one, dict) else {}))
            continue
        if is_named := isinstance(one["id"], int | float | str):
            found[f"{section} twice"] += [one] if one["id"] in seen else []
            seen.add(one["id"])
        sides = (one["width"], one["height"]) if section == "images" else ()
        if not is_named or not all(_is_whole(one[key]) for key in WHOLE[section]):
            found[f"{section} id"].append(one)
        elif sides and not (isinstance(one["file_name"], str) and all(isinstance(n, int) and n > 0 for n in sides)):
            found["images size"].append(one)
        else:
            sound.append(one)
    return sound


def _count_keypoints(categories: list[Record], found: dict[str, list[Record]]) -> int:
    """How many keypoints an annotation needs; 0 when the categories, added to ``found``, do not tell."""
    first = categories[0]
    names = first["keypoints"] if _are_names(first.get("keypoints")) else []
    naming = [(one.get("keypoints"), one.get("flip_map")) for one in categories]
    faulty = {
        "keypoint names": [one for one in categories if not _are_names(one.get("keypoints"))],
        "other names": [one for one, own in zip(categories, naming, strict=True) if own != naming[0]],
        "flip_map": [one for one in categories if not _is_flip_map(one.get("flip_map", []), names)],
    }
    found |= faulty
    return 0 if any(faulty.values()) else len(names)


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
        is_text = isinstance(counts, str)  # compressed, and not looked into
        if not isinstance(size, list) or not (is_text or (isinstance(counts, list) and _are_finite(counts))):
            return "mask"
        fits = size == [height, width] and (is_text or sum(counts) == height * width)
        return None if fits or (width, height) == UNKNOWN_SIZE else "RLE size"
    if not isinstance(mask, list) or not mask:
        return "mask"
    if not all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 and _are_finite(p) for p in mask):
        return "mask"
    return None if all(map(_encloses_area, mask)) else "flat polygon"


def _encloses_area(polygon: list[float]) -> bool:
    """Whether the area inside, x and y of the corners taking turns, is more than rounding (Gauss's area formula)."""
    x, y = polygon[0::2], polygon[1::2]
    twice = sum(map(mul, x, y[1:] + y[:1])) - sum(map(mul, y, x[1:] + x[:1]))
    return abs(twice) > ROUNDING


def _keypoint_fault(one: Record, count: int) -> str | None:
    if not _are_numbers(one.get("keypoints"), 3 * count):
        return "keypoints"
    if not set(one["keypoints"][2::3]) <= {0, 1, 2}:
        return "v"
    return None if one.get("num_keypoints", count_visible(one)) == count_visible(one) else "num_keypoints"


def _is_whole(number: Any) -> bool:
    return isinstance(number, int) or (isinstance(number, float) and number.is_integer())


def _are_names(names: Any) -> bool:
    texts = isinstance(names, list) and len(names) > 0 and all(isinstance(name, str) for name in names)
    return texts and len(set(names)) == len(names)


def _is_flip_map(pairs: Any, names: Sequence[str]) -> bool:
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        return False
    named = [name for pair in pairs for name in pair]
    return all(name in names for name in named) and all(named.count(name) == 1 for name in named)


def _are_numbers(values: Any, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and _are_finite(values)


def _are_finite(values: list[Any]) -> bool:
    """Whether all are numbers, neither infinite nor NaN: adding them up tells, and quickly."""
    try:
        return math.isfinite(sum(values))
    except (TypeError, OverflowError):
        return False
