"""A kind of problem in a data set: how often it occurs, where first, and what mends it.

Boxes, masks and keypoints of a COCO json that cannot be what was meant.

The keypoints that the categories of a COCO json name, and what becomes of them in a mirror.

The content of a COCO json: every kind of problem that it has, not just the first.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import mul
from typing import Any, Literal, TypeVar

import numpy as np

from scratch_det.data.catalog import DatasetEntry

Severity = Literal["error", "notice"]  # cannot be trained on; can, but is rarely meant
NUM_SHOWN = 5
Item = TypeVar("Item")


@dataclass(frozen=True)
class Problem:
    """One kind of problem.

    Attributes:
        kind: what is wrong, in words that follow a number: "images without file_name".
        count: number of offenders; ``first`` holds the first five, each as its json id with an explanation.
        fix: the change that helps, or nothing where ``kind`` says enough.
    """

    severity: Severity
    kind: str
    count: int = 0
    first: tuple[str, ...] = ()
    fix: str = ""

    def __str__(self) -> str:
        if not self.first:
            return self.kind
        more = ", ..." if self.count > len(self.first) else ""
        return f"{self.count} {self.kind}: id {', '.join(self.first)}{more}"


def error(kind: str, offenders: Iterable[Any], mend: str = "") -> Iterator[Problem]:
    """An error when there are offenders, else nothing."""
    return _found("error", kind, iter(offenders), mend)


def notice(kind: str, offenders: Iterable[Any], mend: str = "") -> Iterator[Problem]:
    """A notice when there are offenders, else nothing."""
    return _found("notice", kind, iter(offenders), mend)


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


def split(items: Iterable[Item], test: Callable[[Item], bool]) -> tuple[list[Item], list[Item]]:
    """Those that pass the test, and the others."""
    passed: list[Item] = []
    others: list[Item] = []
    for item in items:
        (passed if test(item) else others).append(item)
    return passed, others


def _found(severity: Severity, kind: str, offenders: Iterator[Any], mend: str) -> Iterator[Problem]:
    first = tuple(str(one) for one in islice(offenders, NUM_SHOWN))
    if first:
        yield Problem(severity, kind, len(first) + sum(1 for _ in offenders), first, mend)


Record = dict[str, Any]
Sizes = dict[int, tuple[int, int]]  # width and height in pixels, by image id
UNKNOWN_SIZE = (math.inf, math.inf)
OVERHANG = 1.0  # pixels; COCO's own boxes and sizes are rounded
ROUNDING = 1e-6  # square pixels; coordinates below 10^4 leave a sum of products uncertain by less


def box_problems(annotations: list[Record], sizes: Sizes, drop_empty: bool) -> Iterator[Problem]:
    """Boxes that are none, have no area (unless those are dropped), or lie outside their image."""
    boxed, others = split(annotations, lambda one: _are_numbers(one["bbox"], 4))
    x, y, width, height = np.array([one["bbox"] for one in boxed], dtype=float).reshape(-1, 4).T
    crowd = np.array([bool(one.get("iscrowd")) for one in boxed], dtype=bool)
    image_width, image_height = np.array([sizes.get(one["image_id"], UNKNOWN_SIZE) for one in boxed]).reshape(-1, 2).T
    has_area = (width > 0) & (height > 0)
    outside = has_area & ((x >= image_width) | (y >= image_height) | (x + width <= 0) | (y + height <= 0))
    overhang = np.maximum.reduce([-x, -y, x + width - image_width, y + height - image_height])

    def ids(chosen: np.ndarray) -> Iterator[Any]:
        return (boxed[i]["id"] for i in np.flatnonzero(chosen))

    yield from error(
        "annotations whose bbox is not [x, y, width, height] of numbers",
        (one["id"] for one in others),
    )
    yield from error(
        "annotations with a box of no width or height",
        ids(~has_area & ~crowd) if not drop_empty else (),
        "mend the boxes, or set 'drop_empty_boxes: true' in the data set's catalog entry",
    )
    yield from error(
        "annotations with a box that lies outside its image",
        ids(outside),
        "boxes are [x, y, width, height] in pixels from the upper left corner; mend them or drop the annotations",
    )
    yield from notice(
        f"annotations with a box that sticks out of its image by more than {OVERHANG:g} pixel",
        ids(has_area & ~outside & (overhang > OVERHANG)),
        "training clips them to the image",
    )


def mask_problems(annotations: list[Record], sizes: Sizes) -> Iterator[Problem]:
    """Masks that are neither polygons nor RLE, that do not fit their image, or that are empty."""
    malformed, misfits, flat = [], [], []
    for one in annotations:
        mask: Any = one.get("segmentation")
        number = one["id"]
        if _is_rle(mask):
            if one["image_id"] in sizes and not _fits(mask, *sizes[one["image_id"]]):
                misfits.append(number)
        elif not _is_polygons(mask):
            malformed.append(number)
        elif not all(map(encloses_area, mask)):
            flat.append(number)
    yield from error(
        "annotations whose segmentation is neither polygons of 3+ points nor RLE",
        malformed,
        "mend them, or train without masks (MODEL.MASK_ON False)",
    )
    yield from error(
        "annotations whose RLE does not fit the image: size [height, width], counts that add up to height x width",
        misfits,
        "mend them, or the image's height and width",
    )
    yield from notice(
        "annotations with a polygon that encloses no area (two corners, all on one line, or crossing itself)",
        flat,
        "such a part of a mask is empty",
    )


def keypoint_problems(annotations: list[Record], count: int) -> Iterator[Problem]:
    """Keypoints that are not x, y, v of ``count`` points or have an unknown v, and wrong ``num_keypoints``."""
    complete, others = split(annotations, lambda one: _are_numbers(one.get("keypoints"), 3 * count))
    sound, unknown = split(complete, lambda one: set(one["keypoints"][2::3]) <= {0, 1, 2})
    yield from error(
        f"annotations whose keypoints are not x, y, v of {count} points",
        (one["id"] for one in others),
        f"write {3 * count} numbers, with 0, 0, 0 for what is not labelled",
    )
    yield from error(
        "annotations whose keypoints have a v other than 0, 1 or 2",
        (one["id"] for one in unknown),
        "0 is not labelled, 1 hidden, 2 visible",
    )
    yield from notice(
        "annotations whose num_keypoints is not their number of keypoints with v above 0",
        (one["id"] for one in sound if one.get("num_keypoints", count_visible(one)) != count_visible(one)),
        "keypoint AP ignores objects with 0; a missing one is counted",
    )


def count_visible(annotation: Record) -> int:
    """How many keypoints are labelled, hidden ones included."""
    return sum(v > 0 for v in annotation["keypoints"][2::3])


def encloses_area(polygon: list[float]) -> bool:
    """Whether the area inside, x and y of the corners taking turns, is more than rounding (Gauss's area formula)."""
    x, y = polygon[0::2], polygon[1::2]
    twice = sum(map(mul, x, y[1:] + y[:1])) - sum(map(mul, y, x[1:] + x[:1]))
    return abs(twice) > ROUNDING


def _are_numbers(values: Any, count: int) -> bool:
    """Whether ``values`` is a list of ``count`` finite numbers."""
    return isinstance(values, list) and len(values) == count and _are_finite(values)


def _are_finite(values: list[Any]) -> bool:
    """Whether all are numbers, neither infinite nor NaN: adding them up tells, and quickly."""
    try:
        return math.isfinite(sum(values))
    except (TypeError, OverflowError):
        return False


def _is_polygons(mask: Any) -> bool:
    return (
        isinstance(mask, list)
        and len(mask) > 0
        and all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 and _are_finite(p) for p in mask)
    )


def _is_rle(mask: Any) -> bool:
    if not isinstance(mask, dict) or not isinstance(mask.get("size"), list):
        return False
    counts = mask.get("counts")
    return isinstance(counts, str) or (isinstance(counts, list) and _are_finite(counts))


def _fits(rle: dict[str, Any], width: int, height: int) -> bool:
    """Whether size and uncompressed counts reach the last pixel; compressed counts (text) are not looked into."""
    counts = rle["counts"]
    return rle["size"] == [height, width] and (isinstance(counts, str) or sum(counts) == height * width)


LEFT, RIGHT = "left_", "right_"  # how COCO's names of a person's keypoints begin


def category_problems(categories: list[Record]) -> Iterator[Problem]:
    """Categories without keypoints, with others than the first one's, or with a ``flip_map`` that is none."""
    first = names_of(categories)
    yield from error(
        "categories without keypoints, a list of different names",
        (one["id"] for one in categories if not _are_names(one.get("keypoints"))),
        "name them in the order of the annotations' x, y, v, or train without (MODEL.KEYPOINT_ON False)",
    )
    yield from error(
        f"categories whose keypoints or flip_map are not those of category {categories[0]['id']}",
        (one["id"] for one in categories[1:] if _naming(one) != _naming(categories[0])),
        "one keypoint head predicts all classes: give all categories the same",
    )
    yield from error(
        "categories whose flip_map is not a list of [name, name], each one of the keypoints and none twice",
        (one["id"] for one in categories if not _is_flip_map(one.get("flip_map", []), first)),
        'such as [["left_eye", "right_eye"]]: what changes places in a mirror',
    )


def names_of(categories: list[Record]) -> tuple[str, ...]:
    """The keypoints of categories that agree on them."""
    names = categories[0].get("keypoints")
    return tuple(names) if isinstance(names, list) and _are_names(names) else ()


def flip_indices_of(categories: list[Record]) -> tuple[int, ...] | None:
    """Keypoint flip indices (see ``CocoDataset``); None when neither flip_map nor names tell."""
    names, pairs = names_of(categories), categories[0].get("flip_map")
    partner = dict(pairs) if pairs is not None else _sides(names)
    if partner is None:
        return None
    partner |= {other: name for name, other in partner.items()}
    return tuple(names.index(partner.get(name, name)) for name in names)


def _sides(names: Sequence[str]) -> dict[str, str] | None:
    """left_eye -> right_eye and so on; None where there is no pair, or a side without its other one."""
    left = {name.removeprefix(LEFT) for name in names if name.startswith(LEFT)}
    right = {name.removeprefix(RIGHT) for name in names if name.startswith(RIGHT)}
    return {LEFT + name: RIGHT + name for name in left} if left and left == right else None


def _naming(category: Record) -> tuple[Any, Any]:
    return category.get("keypoints"), category.get("flip_map")


def _are_names(names: Any) -> bool:
    texts = isinstance(names, list) and len(names) > 0 and all(isinstance(name, str) for name in names)
    return texts and len(set(names)) == len(names)


def _is_flip_map(pairs: Any, names: Sequence[str]) -> bool:
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        return False
    named = [name for pair in pairs for name in pair]
    return all(name in names for name in named) and all(named.count(name) == 1 for name in named)


KEYS = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}  # of a COCO json: its lists, and what every entry needs


def find_problems(
    entry: DatasetEntry, content: dict[str, list[Any]], need_masks: bool, need_keypoints: bool = False
) -> list[Problem]:
    """Every kind of problem of a json whose ``content`` has the lists of ``KEYS``, and images that are not on disk.

    What a broken entry says is looked into no further, so that one fault is not reported as several.
    """
    if not content["images"] or not content["categories"]:
        counts = f"{len(content['images'])} images, {len(content['categories'])} categories"
        return [Problem("error", f"data set '{entry.name}' is empty: {counts}")]
    problems: list[Problem] = []
    complete = {section: _complete(section, content[section], problems) for section in KEYS}
    images, annotations, categories = (_well_typed(section, complete[section], problems) for section in KEYS)
    for section, items in complete.items():
        singular = "category" if section == "categories" else section.removesuffix("s")
        problems += error(f"duplicate {singular} ids", _duplicates(items), f"number {section} uniquely")
    problems += _unknown("image_id", annotations, content["images"], "drop them or add images")
    known = f"known category ids: {[category['id'] for category in categories][:20]}"
    problems += _unknown("category_id", annotations, content["categories"], known)
    sizes = {image["id"]: (image["width"], image["height"]) for image in images}
    problems += box_problems(annotations, sizes, entry.drop_empty_boxes)
    problems += mask_problems(annotations, sizes) if need_masks else ()
    problems += _keypoint_problems(annotations, categories) if need_keypoints and categories else ()
    problems += _notices(annotations)
    absent = (f"{image['id']} ({image['file_name']})" for image in _absent(entry, images))
    problems += error(f"images that are not in {entry.image_root}", absent, "complete the folder")
    return problems


def _keypoint_problems(annotations: list[Record], categories: list[Record]) -> list[Problem]:
    """Those of the categories; where they have none, their names tell what the annotations need."""
    return list(category_problems(categories)) or list(keypoint_problems(annotations, len(names_of(categories))))


def _complete(section: str, items: list[Any], problems: list[Problem]) -> list[Record]:
    """The entries that have what every entry needs; a problem for the others."""
    keys = KEYS[section]
    needed = frozenset(keys)

    def is_complete(item: Any) -> bool:
        return isinstance(item, dict) and needed <= item.keys()

    lacking = ((i, item) for i, item in enumerate(items) if not is_complete(item))
    ids = (item["id"] if _has_id(item) else f"(entry {i})" for i, item in lacking)
    problems += error(f"{section} without {', '.join(keys[:-1])} or {keys[-1]}", ids)
    return [item for item in items if is_complete(item)]


def _well_typed(section: str, items: list[Record], problems: list[Problem]) -> list[Record]:
    """The entries whose ids and sizes can be used; problems for the others."""
    if section == "annotations":
        kind = "annotations whose id is neither number nor text, or whose image_id or category_id is no whole number"
        items, broken = split(items, _is_linked)
        problems += error(kind, (one["id"] for one in broken))
        return items
    items, broken = split(items, lambda item: _is_whole(item["id"]))
    mend = "number them: COCO's evaluation takes nothing else"
    problems += error(f"{section} whose id is not a whole number", (one["id"] for one in broken), mend)
    if section == "images":
        kind = "images whose width or height is not a whole number of pixels above 0, or whose file_name is no text"
        items, broken = split(items, _is_image)
        problems += error(kind, (one["id"] for one in broken))
    return items


def _unknown(key: str, annotations: list[Record], entries: list[Any], mend: str) -> Iterator[Problem]:
    known = {item["id"] for item in entries if _has_id(item) and _is_whole(item["id"])}
    unknown = (f"{one['id']} ({key} {one[key]})" for one in annotations if one[key] not in known)
    return error(f"annotations with an unknown {key}", unknown, mend)


def _notices(annotations: list[Record]) -> Iterator[Problem]:
    yield from notice(
        "annotations whose area is missing or negative",
        (one["id"] for one in annotations if not _is_area(one.get("area"))),
        "AP of small, medium and large objects goes by it; a missing one counts as the box's",
    )
    yield from notice(
        "annotations whose iscrowd is missing or neither 0 nor 1",
        (one["id"] for one in annotations if one.get("iscrowd") not in (0, 1)),
        "a missing one counts as 0, any other as 1",
    )


def _absent(entry: DatasetEntry, images: list[Record]) -> Iterator[Record]:
    """Images without a file; one listing answers for all of them where no file lies in a subfolder."""
    exists: Callable[[str], bool] = lambda name: (entry.image_root / name).is_file()  # noqa: E731
    if not any("/" in image["file_name"] for image in images):
        exists = set(os.listdir(entry.image_root)).__contains__
    return (image for image in images if not exists(image["file_name"]))


def _duplicates(items: Iterable[Record]) -> Iterator[Any]:
    seen = set()
    for number in (item["id"] for item in items if isinstance(item["id"], int | float | str)):
        if number in seen:
            yield number
        seen.add(number)


def _has_id(item: Any) -> bool:
    return isinstance(item, dict) and "id" in item


def _is_whole(number: Any) -> bool:
    return isinstance(number, int) or (isinstance(number, float) and number.is_integer())


def _is_image(image: Record) -> bool:
    sides = image["width"], image["height"]
    return isinstance(image["file_name"], str) and all(isinstance(side, int) and side > 0 for side in sides)


def _is_linked(annotation: Record) -> bool:
    named = isinstance(annotation["id"], (int, float, str))
    return named and _is_whole(annotation["image_id"]) and _is_whole(annotation["category_id"])


def _is_area(area: Any) -> bool:
    return isinstance(area, int | float) and area >= 0
