"""Repairs of a COCO json. REPAIRS lists them in their order; each changes the plain json in memory. Needs no torch."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from hotcoco import mask as mask_api
from PIL import Image

from scratch_det.data.checks import FIELDS, PIXELS, UNKNOWN_SIZE, VALUES, Record, are_numbers, is_set, mask_fault
from scratch_det.data.file_names import other_spellings
from scratch_det.data.image import UNREADABLE, decode_masks, encode_masks, turn_of

Content = dict[str, Any]
Sizes = dict[Any, Any]  # id of an image -> width, height
REFERENCES = {"images": "image_id", "annotations": "", "categories": "category_id"}
NUMBERS = [
    *((section, "id") for section in REFERENCES), ("images", "width"), ("images", "height"),
    ("annotations", "image_id"), ("annotations", "category_id"),
]  # fmt: skip


class Wishes(NamedTuple):
    """What the json alone does not tell.

    root: the images' folder. exif: the objects were drawn on the images as "stored", or as "turned" by their EXIF tags;
    empty where sizes and objects stay as they are. boxes_as_masks: an object without a mask that can be read gets its
    box as mask. boxes_from_masks: every object with a mask gets the box around it. no_crowds: no object is a crowd.
    boxes_are_corners: they are x0, y0, x1, y1.
    """

    root: Path
    exif: str = ""
    boxes_as_masks: bool = False
    boxes_from_masks: bool = False
    no_crowds: bool = False
    boxes_are_corners: bool = False


Mend = Callable[[Content, Wishes], int]  # changes the content, and tells how many entries it has mended


def repair(content: Content, wishes: Wishes) -> list[str]:
    """Change the lists of a COCO json in place; a line for each kind of repair that had something to mend."""
    lists = {"annotations": [], **content}  # test-dev has none
    done = [(mend(lists, wishes), said) for said, mend in REPAIRS.items()]
    content |= {name: lists[name] for name in content}
    return [f"{number:,} {said}" for number, said in done if number]


def encode(content: Content) -> bytes:
    """The content as a json file."""
    with suppress(OverflowError, UnicodeError):  # integers above 2^64, halves of surrogate pairs
        return msgspec.json.encode(content)  # COCO in 2 s
    return json.dumps(content).encode()


def _drop(content: Content, section: str, entries: Iterable[Any]) -> int:
    dropped, before = set(map(id, entries)), content[section]
    content[section] = [one for one in before if id(one) not in dropped]
    return len(before) - len(content[section])


def _drop_what_is_no_entry(content: Content, _: Wishes) -> int:
    return sum(_drop(content, name, [one for one in content[name] if not isinstance(one, dict)]) for name in REFERENCES)


def _drop_repeated_images(content: Content, _: Wishes) -> int:
    first: dict[tuple[str, str], Record] = {}
    pairs = (((str(one.get("id")), str(one.get("file_name"))), one) for one in content["images"])
    return _drop(content, "images", [one for key, one in pairs if first.setdefault(key, one) is not one])


def _merge_categories(content: Content, wishes: Wishes) -> int:
    """The first of a name has the objects of all. One whose id is also that of another name stays."""
    named = [(one.get("id"), str(one["name"]), one) for one in content["categories"] if "name" in one]
    first = {name: one for _, name, one in reversed(named)}
    names = Counter(number for number, _ in {pair[:2] for pair in named})
    again = [(number, first[name], one) for number, name, one in named if first[name] is not one and names[number] == 1]
    _replace({number: kept.get("id") for number, kept, _ in again}, "annotations", "category_id")(content, wishes)
    return _drop(content, "categories", [one for *_, one in again])


def _drop_orphans(content: Content, _: Wishes) -> int:
    """Where no annotation has an image, the references are wrong, not the annotations: they stay."""
    known = {one.get("id") for one in content["images"]} - {None}
    orphans = [one for one in content["annotations"] if one.get("image_id") not in known]
    return _drop(content, "annotations", orphans) if len(orphans) < len(content["annotations"]) else 0


def _renumber(section: str, content: Content, wishes: Wishes) -> int:
    """Ids that are missing, no numbers, negative or another entry's become free numbers, and references follow.

    An id that several images or categories have, and objects refer to, stays: nobody can tell whose objects these are.
    The order is that of the ids, so that the same categories get the same numbers in each json.
    """
    key = REFERENCES[section]
    referred = {one.get(key) for one in content["annotations"]} - {None}
    times = Counter(one.get("id") for one in content[section])
    first: dict[int, Record] = {}

    def is_faulty(one: Record) -> bool:
        number: Any = one.get("id")
        is_sound = type(number) is int and 0 <= number < 2**63 and first.setdefault(number, one) is one
        return not is_sound and (times[number] == 1 or number not in referred)

    faulty = sorted(filter(is_faulty, content[section]), key=lambda one: str(one.get("id")))
    free = (number for number in count(1) if number not in times and number not in referred)
    new = {}
    for one in faulty:
        new[one.get("id")] = one["id"] = next(free)
    _replace(new, "annotations", key)(content, wishes)
    return len(faulty)


def _find_files(content: Content, wishes: Wishes) -> int:
    names = (name for one in content["images"] if isinstance(name := one.get("file_name"), str))
    return _replace(other_spellings(wishes.root, names), "images", "file_name")(content, wishes)


def _settle_sizes(content: Content, wishes: Wishes) -> int:
    changed, is_stored = 0, wishes.exif == "stored"
    objects: dict[Any, list[Record]] = defaultdict(list)
    for one in content["annotations"] if is_stored else ():
        objects[one.get("image_id")].append(one)
    for image in content["images"]:
        before = image.get("width"), image.get("height")
        is_known = all(map(VALUES[PIXELS], before))
        path = wishes.root / str(image.get("file_name"))
        with suppress(*UNREADABLE):
            if (is_known and not wishes.exif) or not path.is_file():
                continue
            with Image.open(path) as opened:
                size, turn = opened.size, turn_of(opened)
            if is_known and size != before:
                continue
            for one in objects[image.get("id")] if any(turn) else ():
                _turn(one, np.array(size), np.array(turn[:2]), swap=turn[2])
            image["width"], image["height"] = upright = size[::-1] if turn[2] else size
            changed += upright != before or (is_stored and any(turn))
    return changed


def _turn(one: Record, size: np.ndarray, mirror: np.ndarray, swap: bool) -> None:
    """An object of a stored image of this size, to where it is in the upright one."""

    def move(values: Any, pixel: int = 0) -> np.ndarray:
        points = np.array(values, float).reshape(-1, 2)
        return np.where(mirror, size - pixel - points, points)[:, :: -1 if swap else 1]

    box, points = one.get("bbox", ()), one.get("keypoints", ())
    if are_numbers(box, 4):
        low, high = np.sort(move([box[0], box[1], box[0] + box[2], box[1] + box[3]]), axis=0)
        one["bbox"] = [*low.tolist(), *(high - low).tolist()]
    if are_numbers(points) and len(points) % 3 == 0:  # x and y are indices of pixels
        table = np.array(points, float).reshape(-1, 3)
        table[:, :2] = np.where(table[:, 2:] > 0, move(table[:, :2], pixel=1), table[:, :2])
        one["keypoints"] = table.ravel().tolist()
    if isinstance(mask := _readable(one, {one["image_id"]: size.tolist()}), list):
        one["segmentation"] = [move(polygon).ravel().tolist() for polygon in mask]
    elif mask:
        step_x, step_y = np.where(mirror, -1, 1)
        pixels = decode_masks([mask], *mask["size"])[:, ::step_y, ::step_x]
        [one["segmentation"]] = encode_masks(pixels.transpose(0, 2, 1) if swap else pixels)


def _replace(new: dict[Any, Any], section: str, key: str) -> Mend:
    """Texts and numbers that ``new`` has become what it says."""
    return _each(lambda old, *_: new.get(old, old) if isinstance(old, str | int | float) else old, (section, key))


def _sizes(content: Content) -> Sizes:
    kinds = FIELDS["images"].items()
    known = [one for one in content["images"] if all(VALUES[kind](one.get(key)) for key, kind in kinds)]
    return {one["id"]: (one["width"], one["height"]) for one in known}


def _each(mend: Callable[..., Any], *fields: tuple[str, str]) -> Mend:
    """Every value of these fields (section, key) becomes ``mend(value, its entry, sizes of the images, wishes)``."""

    def mend_all(content: Content, wishes: Wishes) -> int:
        sizes, changed = _sizes(content), 0
        for one, key in ((one, key) for section, key in fields for one in content[section]):
            if (value := mend(before := one.get(key), one, sizes, wishes)) is not before:
                one[key] = value
                changed += 1
        return changed

    return mend_all


def _whole(value: Any, *_: Any) -> Any:
    """The whole number that a float or a text such as "12" stands for; a list counts as missing, others are kept."""
    if isinstance(value, list | dict):
        return None
    if isinstance(value, str):  # "007" is a name
        return int(value) if re.fullmatch(r"0|[1-9]\d{0,18}", value, re.ASCII) else value
    return int(value) if isinstance(value, float | bool) and value % 1 == 0 else value


def _nested(mask: Any, *_: Any) -> Any:
    if isinstance(mask, list) and mask and (not isinstance(mask[0], list) or len(mask[0]) == 2):
        if are_numbers(mask):
            return [mask]
        if all(are_numbers(point, 2) for point in mask):
            return [list(chain(*mask))]
    return mask


def _of_3_points(mask: Any, *_: Any) -> Any:
    parts = mask if isinstance(mask, list) else []
    kept = [one for one in parts if not isinstance(one, list) or (len(one) >= 6 and len(one) % 2 == 0)]
    return kept if len(kept) < len(parts) else mask


def _decoded(mask: Any, *_: Any) -> Any:
    """Counts are Python's text of bytes, or counts or size have floats or text."""
    if not isinstance(mask, dict):
        return mask
    new = {**mask}
    for key, value in mask.items():
        if isinstance(value, list):
            new[key] = list(map(_whole, value))
        elif isinstance(value, str) and re.fullmatch(r"b(['\"]).+\1", value):
            new[key] = value[2:-1].replace(r"\\", "\\")
    return new if repr(new) != repr(mask) else mask


def _crowd(value: Any, _one: Record, _sizes: Sizes, wishes: Wishes) -> int:
    new = 0 if wishes.no_crowds else int(is_set(value))
    return value if type(value) is int and value == new else new


def _from_corners(box: Any, _one: Record, _sizes: Sizes, wishes: Wishes) -> Any:
    if not wishes.boxes_are_corners or not are_numbers(box, 4):
        return box
    x0, y0, x1, y1 = box
    return [x0, y0, x1 - x0, y1 - y0]


def _to_pixels(content: Content, _: Wishes) -> int:
    """Boxes that are shares of their image's sides, where all of the json are; their areas and polygons too."""
    sizes = _sizes(content)
    boxes = [one for one in content["annotations"] if _has_area(one.get("bbox")) and one.get("image_id") in sizes]
    if not boxes or any(not 0 <= min(one["bbox"]) <= max(one["bbox"]) <= 1 for one in boxes):
        return 0
    for one in boxes:
        sides, mask = sizes[one["image_id"]], one.get("segmentation")
        one["bbox"] = (np.reshape(one["bbox"], (2, 2)) * sides).ravel().tolist()
        if are_numbers([one.get("area")]) and one["area"] <= 1:
            one["area"] *= float(np.prod(sides))
        is_read = isinstance(mask, list) and all(are_numbers(part) and len(part) % 2 == 0 for part in mask)
        if is_read and max(chain(*mask), default=2) <= 1:
            one["segmentation"] = [(np.reshape(part, (-1, 2)) * sides).ravel().tolist() for part in mask]
    return len(boxes)


def _has_area(box: Any) -> bool:
    return are_numbers(box, 4) and min(box[2:]) > 0


def _readable(one: Record, sizes: Sizes) -> Any:
    """The segmentation; None where it cannot be read."""
    mask, size = one.get("segmentation"), sizes.get(one.get("image_id"), UNKNOWN_SIZE)
    return mask if mask_fault(mask, *size) in (None, "flat polygon") else None


def _box_of_mask(box: Any, one: Record, sizes: Sizes, wishes: Wishes) -> Any:
    if (_has_area(box) and not wishes.boxes_from_masks) or not (mask := _readable(one, sizes)):
        return box
    if isinstance(mask, list):
        points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in mask])
    else:
        x, y, w, h = mask_api.to_bbox(mask)
        points = np.array([[x, y], [x + w, y + h]])
    low, high = points.min(0), points.max(0)
    found = [*low.tolist(), *(high - low).tolist()]
    return found if min(found[2:]) > 0 and found != box else box


def _mask_of_box(mask: Any, one: Record, sizes: Sizes, wishes: Wishes) -> Any:
    if not wishes.boxes_as_masks or not _has_area(one.get("bbox")) or _readable(one, sizes):
        return mask
    x, y, w, h = one["bbox"]
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def _drop_empty(content: Content, _: Wishes) -> int:
    boxes = [(one.get("bbox"), one) for one in content["annotations"] if not one.get("iscrowd")]
    empty = (one for box, one in boxes if not box or (are_numbers(box, 4) and not _has_area(box)))
    return _drop(content, "annotations", empty)


MASK = ("annotations", "segmentation")
REPAIRS: dict[str, Mend] = {  # what a line says after a number -> the function
    "entries that are no json objects: dropped": _drop_what_is_no_entry,
    "ids, widths and heights as text or floats: made whole numbers": _each(_whole, *NUMBERS),
    "images listed twice (same id and file_name): dropped": _drop_repeated_images,
    "categories of a name that another has: merged into the first of that name": _merge_categories,
    "annotations of images that are not listed: dropped": _drop_orphans,
    **{f"{section} with an id that is missing, text, negative or another's: renumbered": partial(_renumber, section)
       for section in REFERENCES},
    "images whose file_name is spelled in another way on disk: renamed in the json": _find_files,
    "annotations with a mask [x, y, ...] or [[x, y], ...]: made [[x, y, ...]]": _each(_nested, MASK),
    "annotations with polygons of under 3 points or an odd number of values: these left out": _each(_of_3_points, MASK),
    "annotations with RLE counts as text of bytes, or as floats: decoded": _each(_decoded, MASK),
    "images without a size, or with --exif of the stored size: the upright image's size taken": _settle_sizes,
    "annotations with a box x0, y0, x1, y1 (--boxes-are-corners): made x, y, width, height":
        _each(_from_corners, ("annotations", "bbox")),
    "annotations with a box in shares of the image, from 0 to 1: made pixels": _to_pixels,
    "annotations with iscrowd missing or neither 0 nor 1, or with --no-crowds 1: made 0 or 1":
        _each(_crowd, ("annotations", "iscrowd")),
    "annotations whose box is not that around the mask: made so": _each(_box_of_mask, ("annotations", "bbox")),
    "annotations without a mask that can be read: their box made the mask": _each(_mask_of_box, MASK),
    "annotations without a box of an area: dropped": _drop_empty,
}  # fmt: skip
