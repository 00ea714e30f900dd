"""The checks of a COCO json. Needs no torch.

CHECKS lists every kind of problem of such a file; ``find_problems`` finds the offenders of each.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import mul
from typing import Any, Self

from scratch_det.data.rle import run_lengths
from scratch_det.errors import Severity, listed, quoted, shortened

Record = dict[str, Any]  # an entry of the json
OVERHANG = 1.0  # pixels; COCO's own boxes and sizes are rounded
ROUNDING = 1e-6  # square pixels; coordinates below 10^4 leave a sum of products uncertain by less
MOST_SHOWN, MOST_LETTERS = 5, 40
LEAST_IOU = 0.5  # of a box and its mask's; in sound files none of 6,488 is below
# what a run needs, or does not accept
MASKS, NO_MASK, KEYPOINTS, EMPTY_BOXES = "masks", "a mask of each", "keypoints", "empty boxes"
UNKNOWN_SIZE = (math.inf, math.inf)
WHOLE = "a whole number"
PIXELS = "a whole number of pixels above 0"
TEXT = "a string"
NAME = "a number or a string"
ANYTHING = ""  # not checked, or checked below
MEND = "scratch-det data fix {} writes a repaired copy"  # {}: the data set's name, or the file
VALUES: dict[str, Callable[[Any], bool]] = {
    WHOLE: lambda value: isinstance(value, int | float) and value % 1 == 0 and -(2**63) <= value < 2**63,
    PIXELS: lambda value: isinstance(value, int | float) and value % 1 == 0 and 0 < value < 2**63,
    TEXT: lambda value: isinstance(value, str),
    NAME: lambda value: isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)),
    ANYTHING: lambda value: True,
}
FIELDS = {  # the lists of a COCO json, and what every entry needs
    "images": {"id": NAME, "file_name": TEXT, "width": PIXELS, "height": PIXELS},
    "annotations": {"id": NAME, "image_id": NAME, "category_id": NAME, "bbox": ANYTHING},
    "categories": {"id": NAME, "name": ANYTHING},
}
NUMBERING = {"id": "number them", "image_id": "number the images", "category_id": "number the categories"}
IMAGE = "{id} (image_id {image_id})"


@dataclass
class Problem:
    """A kind of problem, and the entries of the json that have it.

    Attributes:
        kind: what is wrong, in words that follow a number: "images without file_name".
        fix: the change that helps; empty where ``kind`` says enough.
        shown: how a message names an offender, its keys in braces.
        only: the runs that it concerns, one of MASKS, KEYPOINTS and EMPTY_BOXES; all runs where empty.
        mend: the flags with which the command of MEND mends it, in most files at least; None where it cannot.
        count: offenders.
        first: the names of the first ones, one more than a message shows.
    """

    severity: Severity
    kind: str
    fix: str = ""
    shown: str = "{id}"
    only: str = ""
    mend: str | None = None
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, *offenders: Record) -> Self:
        """Count and name these; returns the problem itself."""
        self.count += len(offenders)
        self.first += [self.shown.format(**one) for one in offenders[: MOST_SHOWN + 1 - len(self.first)]]
        return self

    def __str__(self) -> str:
        return f"{self.count} {self.kind}: id {listed(self.first, MOST_SHOWN)}" if self.count else self.kind


fatal, notice = partial(Problem, "error"), partial(Problem, "notice")
mended = partial(fatal, mend="")
CHECKS = {  # in the order in which problems are reported
    **{f"{section} fields": mended(f"{section} without one of {', '.join(fields)}", shown="{id} (no {missing})")
       for section, fields in FIELDS.items()},
    **{f"{section} {name}": fatal(f"{section} whose {name} is not {value}", NUMBERING[name] if value == NAME else "",
                                  "{found}" if name == "id" else f"{{id}} ({name} {{found}})",
                                  mend=None if value == TEXT else "")
       for section, fields in FIELDS.items() for name, value in fields.items() if value != ANYTHING},
    **{f"{section} twice": mended(f"{section} with a duplicate id", "number them uniquely") for section in FIELDS},
    **{f"{section} own id": notice(f"{section} whose id is not a whole number below 2^63",
        "scoring numbers them; results files keep the ids of the json") for section in ("images", "categories")},
    "size": notice("images whose width or height is not written as a whole number", "640.0 is read as 640"),
    "image_id": notice("annotations of images that are not listed", "they are left out", IMAGE),
    "image_id type": mended("annotations whose image_id is text where the image's id is a number, or a number where it "
        "is text", "write both alike", IMAGE),
    "category_id": fatal("annotations with an unknown category_id", "known category ids: {category_ids}",
        "{id} (category_id {category_id})"),
    "bbox": mended("annotations whose bbox is not [x, y, width, height] of numbers"),
    "empty box": mended("annotations with a box of no width or height",
        "fix the boxes, or set 'drop_empty_boxes: true' in the data set's catalog entry", only=EMPTY_BOXES),
    "box outside": fatal("annotations with a box that lies outside its image",
        "boxes are [x, y, width, height] in pixels from the upper left corner; fix them or drop the annotations"),
    "overhang": notice(f"annotations with a box that sticks out of its image by more than {OVERHANG:g} pixel",
        "training clips them to the image"),
    "no mask": fatal("annotations without a mask: no segmentation, or no polygon of 3+ points",
        "add them, take their boxes as masks, set 'drop_objects_without_mask: true' in the data set's catalog entry, "
        "or train without masks (MODEL.MASK_ON False)", IMAGE, only=NO_MASK, mend="--boxes-as-masks"),
    "mask": mended("annotations whose segmentation is neither polygons, a list of [x, y, x, y, ...] each, nor RLE",
        "fix them, or train without masks (MODEL.MASK_ON False)", IMAGE, only=MASKS),
    "RLE": mended("annotations whose RLE does not fit their image: size [height, width], counts that "
        "are not negative and add up to height x width",
        "fix them, or the image's size; write bytes with counts.decode(), not str(counts)", IMAGE, only=MASKS),
    "stray polygon": notice("annotations with a polygon of less than 3 points, or of an odd number of values, beside "
        "sound ones", "that polygon is left out", only=MASKS),
    "flat polygon": notice("annotations with a polygon that encloses no area (two corners, all on one line, or "
        "crossing itself)", "such a part of a mask is empty", only=MASKS),
    "keypoint names": fatal("categories without keypoints, a list of different names",
        "name them in the order of the annotations' x, y, v, or train without (MODEL.KEYPOINT_ON False)",
        only=KEYPOINTS),
    "other names": fatal("categories whose keypoints or flip_map are not those of category {first_category}",
        "one keypoint head predicts all classes: give all categories the same", only=KEYPOINTS),
    "flip_map": fatal("categories whose flip_map is not a list of [name, name], each one of the keypoints and none "
        "twice", 'such as [["left_eye", "right_eye"]]: what changes places when an image is flipped',
        only=KEYPOINTS),
    "keypoints": fatal("annotations whose keypoints are not x, y, v of {num_keypoints} points",
        "write {num_numbers} numbers, with 0, 0, 0 for what is not labelled", only=KEYPOINTS),
    "v": fatal("annotations whose keypoints have a v other than 0, 1 or 2",
        "0 is not labelled, 1 hidden, 2 visible", only=KEYPOINTS),
    "num_keypoints": notice("annotations whose num_keypoints is not their number of keypoints with v above 0",
        "keypoint AP ignores objects with 0; a missing one is counted", only=KEYPOINTS),
    "area": notice("annotations whose area is missing or negative",
        "AP of small, medium and large objects goes by it; a missing one counts as the box's"),
    "iscrowd": notice("annotations whose iscrowd is missing or neither 0 nor 1",
        "a missing one, null, '0' and 'false' count as 0, any other as 1"),
    # of a whole json, see data/plausible.py
    "shares": notice("annotations whose box has no number above 1: shares of the image, where pixels are expected",
        mend=""),
    "corners": notice("annotations with a box that fits its image as x0, y0, x1, y1, and sticks out as x, y, width, "
        "height", "where all boxes of the json are so:", mend="--boxes-are-corners"),
    "box of mask": notice(f"annotations with a box that is not that of their mask (IoU below {LEAST_IOU:g})",
        "one of them is wrong; to take the boxes from the masks:", mend="--boxes-from-masks"),
    "large area": notice("annotations with an area larger than that of their box"),
    "crowds": notice("annotations that are crowds (iscrowd 1), most of all: crowds are not trained on",
        mend="--no-crowds"),
    "one name": notice("categories with the name of another", shown="{id} ({name})", mend=""),
    "no annotation": notice("categories without an annotation", shown="{id} ({name})"),
}  # fmt: skip


def how_to_mend(name: str, problems: Iterable[Problem]) -> list[str]:
    """The command that mends what can be mended of these problems of data set, or file, ``name``, if any can."""
    flags = {one.mend: None for one in problems if one.mend is not None}
    return [MEND.format(" ".join([quoted(name), *filter(None, flags)]))] if flags else []


def told(name: str, problem: Problem) -> str:
    """A problem of data set ``name``, each way to mend it on a line of its own."""
    return "\n  ".join([f"{name}: {problem}", *filter(None, [problem.fix]), *how_to_mend(name, [problem])])


def explain(path: Any, problems: Sequence[Problem], most_lines: int = 7) -> str:
    """The errors among ``problems`` of the file ``path``, as a message of at most ``most_lines`` lines."""
    errors = [one for one in problems if one.severity == "error"]
    hint = [f"  {line}" for line in how_to_mend(str(path), errors)]
    if len(errors) == 1:
        return "\n".join([f"{path}: {errors[0]}", *([f"  {errors[0].fix}"] if errors[0].fix else []), *hint])
    lines = [f"  {one}" + (f"; {one.fix}" if one.fix else "") for one in errors]
    most = most_lines - 1 - len(hint)
    if len(lines) > most:
        lines[most - 1 :] = [f"  and {len(lines) - most + 1} more kinds, which scratch-det check lists"]
    return "\n".join([f"{path}: {len(errors)} kinds of problems", *lines, *hint])


def find_problems(images: list[Any], categories: list[Any], annotations: Iterable[Any]) -> tuple[list[Problem], Any]:
    """Every kind of problem of the lists of a json, for every kind of run, and the images whose entries can be used.

    The other values of a broken entry are not checked, so that one fault is not reported as several. ``annotations``
    are all of them, or those in which there may be a problem.
    """
    found = {key: replace(check, first=[]) for key, check in CHECKS.items()}
    known = {  # of broken entries too
        key: {one["id"] for one in entries if isinstance(one, dict) and VALUES[NAME](one.get("id"))}
        for key, entries in (("image_id", images), ("category_id", categories))
    }
    images, categories = (list(_sound_entries(name, entries, found))
                          for name, entries in (("images", images), ("categories", categories)))  # fmt: skip
    found["size"].add(*(one for one in images if not isinstance(one["width"] + one["height"], int)))
    for section, entries in (("images", images), ("categories", categories)):
        own = (one["id"] for one in entries if not VALUES[WHOLE](one["id"]))
        found[f"{section} own id"].add(*({"id": _as_found(number)} for number in own))
    num_keypoints = _count_keypoints(categories, found) if categories else 0
    sizes = {image["id"]: (image["width"], image["height"]) for image in images}
    texts = set(map(str, known["image_id"]))
    for one in _sound_entries("annotations", annotations, found):
        if one["image_id"] not in known["image_id"]:
            key = "image_id type" if str(one["image_id"]) in texts else "image_id"
            found[key].add(one | {"image_id": _as_found(one["image_id"])})
            continue
        size = sizes.get(one["image_id"], UNKNOWN_SIZE)
        box_fault = _box_fault(one, *size)
        faults = [
            None if one["category_id"] in known["category_id"] else "category_id",
            box_fault,
            mask_fault(one.get("segmentation"), *size) if box_fault != "empty box" else None,
            _keypoint_fault(one, num_keypoints) if num_keypoints else None,
            None if isinstance(one.get("area"), int | float) and one["area"] >= 0 else "area",
            None if one.get("iscrowd") in (0, 1) else "iscrowd",
        ]
        for fault in filter(None, faults):
            found[fault].add(one)
    facts = {"num_keypoints": num_keypoints, "num_numbers": 3 * num_keypoints,
             "category_ids": [category["id"] for category in categories[:20]],
             "first_category": categories[0]["id"] if categories else None}  # fmt: skip
    problems = [replace(one, kind=one.kind.format(**facts), fix=one.fix.format(**facts)) for one in found.values()]
    return [one for one in problems if one.count], images


def _sound_entries(section: str, entries: Iterable[Any], found: dict[str, Problem]) -> Iterator[Record]:
    """The entries whose ids and sizes can be used; the others, and duplicates, are added to ``found``."""
    seen, fields = set(), FIELDS[section]
    for place, one in enumerate(entries):
        if not isinstance(one, dict) or not fields.keys() <= one.keys():
            own = one if isinstance(one, dict) else {}
            missing = ", ".join(field for field in fields if field not in own)
            found[f"{section} fields"].add({"id": f"(entry {place})"} | own | {"missing": missing})
        elif wrong := next((field for field, value in fields.items() if not VALUES[value](one[field])), None):
            found[f"{section} {wrong}"].add(one | {"found": _as_found(one[wrong])})
        else:
            if one["id"] in seen:
                found[f"{section} twice"].add(one)
            seen.add(one["id"])
            yield one


def _as_found(value: Any) -> str:
    """A value of the json, so that text differs from a number."""
    return shortened(f"'{value}' (text)" if isinstance(value, str) else json.dumps(value), MOST_LETTERS)


def _count_keypoints(categories: list[Record], found: dict[str, Problem]) -> int:
    """How many keypoints an annotation needs; 0 when the categories, added to ``found``, do not tell."""
    names, flip_map = categories[0].get("keypoints"), categories[0].get("flip_map")
    faulty = {
        "keypoint names": [one for one in categories if not _are_names(one.get("keypoints"))],
        "other names": [one for one in categories if (one.get("keypoints"), one.get("flip_map")) != (names, flip_map)],
        "flip_map": [one for one in categories if not _is_flip_map(one.get("flip_map", []), names)],
    }
    for key, offenders in faulty.items():
        found[key].add(*offenders)
    return 0 if any(faulty.values()) else len(names or ())


def _box_fault(one: Record, image_width: float, image_height: float) -> str | None:
    if not are_numbers(one["bbox"], 4):
        return "bbox"
    x, y, width, height = one["bbox"]
    if width <= 0 or height <= 0:
        return None if is_set(one.get("iscrowd")) else "empty box"
    if x >= image_width or y >= image_height or x + width <= 0 or y + height <= 0:
        return "box outside"
    return "overhang" if max(-x, -y, x + width - image_width, y + height - image_height) > OVERHANG else None


def is_set(flag: Any) -> bool:
    """Whether an ``iscrowd`` or ``ignore`` means 1."""
    return str(flag).strip().lower() not in ("", "0", "0.0", "false", "none", "null", "no")


def mask_fault(mask: Any, width: float, height: float) -> str | None:
    """The key in CHECKS of what is wrong with a segmentation, if anything."""
    if not mask:
        return "no mask"
    if isinstance(mask, dict):
        size, counts = mask.get("size", ()), mask.get("counts", ())
        counts = run_lengths([counts])[0] if isinstance(counts, str) else counts
        if not _are_whole(size, 2) or not _are_whole(counts):
            return "mask"
        fits = sum(counts) == math.prod(size) and min(counts, default=-1) >= 0
        return None if fits and (size == [height, width] or (width, height) == UNKNOWN_SIZE) else "RLE"
    if not isinstance(mask, list) or not all(map(are_numbers, mask)):
        return "mask"
    polygons = [polygon for polygon in mask if len(polygon) >= 6 and len(polygon) % 2 == 0]
    if len(polygons) < len(mask):
        return "stray polygon" if polygons else "no mask"
    return None if all(map(_encloses_area, polygons)) else "flat polygon"


def _are_whole(values: Any, count: int | None = None) -> bool:
    return isinstance(values, list) and count in (None, len(values)) and all(map(VALUES[WHOLE], values))


def _encloses_area(polygon: list[float]) -> bool:
    """Whether the area is more than rounding (Gauss's area formula); ``polygon`` is x, y of each corner in turn."""
    x, y = polygon[0::2], polygon[1::2]
    twice = sum(map(mul, x, y[1:] + y[:1])) - sum(map(mul, y, x[1:] + x[:1]))
    return abs(twice) > ROUNDING


def _keypoint_fault(one: Record, count: int) -> str | None:
    if not are_numbers(one.get("keypoints"), 3 * count):
        return "keypoints"
    if not set(one["keypoints"][2::3]) <= {0, 1, 2}:
        return "v"
    labelled = sum(v > 0 for v in one["keypoints"][2::3])
    return None if one.get("num_keypoints", labelled) == labelled else "num_keypoints"


def _are_names(names: Any) -> bool:
    texts = isinstance(names, list) and len(names) > 0 and all(isinstance(name, str) for name in names)
    return texts and len(set(names)) == len(names)


def _is_flip_map(pairs: Any, names: Any) -> bool:
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        return False
    named = [name for pair in pairs for name in pair]
    return all(isinstance(names, list) and name in names and named.count(name) == 1 for name in named)


def are_numbers(values: Any, count: int | None = None) -> bool:
    """Whether it is a list of numbers, neither infinite nor NaN, ``count`` of them where given."""
    try:  # adding them up tells, and quickly
        return isinstance(values, list) and count in (None, len(values)) and math.isfinite(sum(values))
    except (TypeError, OverflowError):
        return False
