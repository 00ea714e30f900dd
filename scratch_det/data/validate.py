"""The content of a COCO json: every kind of problem that it has, not just the first."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from scratch_det.data.catalog import DatasetEntry
from scratch_det.data.keypoints import category_problems, names_of
from scratch_det.data.problem import Problem, error, notice, split
from scratch_det.data.shapes import box_problems, keypoint_problems, mask_problems

Record = dict[str, Any]
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
