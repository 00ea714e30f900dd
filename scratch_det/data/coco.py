"""COCO-format annotation files: read, validate, index."""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scratch_det.data.catalog import DatasetEntry
from scratch_det.errors import DataError

SECTIONS = ("images", "annotations", "categories")


@dataclass(frozen=True)
class CocoDataset:
    """A validated data set.

    Attributes:
        classes: class names, ordered by category id; a label is a 0-based index into this list.
        category_ids: the json's category id of each label.
        images: the json's image entries (``id``, ``file_name``, ``width``, ``height``; pixels), in the json's order.
        annotations: image id -> its annotation entries as the json has them (``bbox`` is x, y, width, height in
            pixels, ``segmentation`` polygons or RLE), each with an added 0-based ``label``.
    """

    entry: DatasetEntry
    classes: list[str]
    category_ids: list[int]
    images: list[dict[str, Any]]
    annotations: dict[int, list[dict[str, Any]]]

    def training_annotations(self, image_id: int) -> list[dict[str, Any]]:
        """The objects to learn from: crowd regions and boxes without area are left out, as in detectron2."""
        return [a for a in self.annotations.get(image_id, []) if not a.get("iscrowd") and _has_area(a)]

    def sha256(self) -> str:
        """Digest of the annotation file, recorded with every run."""
        return hashlib.sha256(self.entry.json_file.read_bytes()).hexdigest()


def read_coco(entry: DatasetEntry, need_masks: bool) -> CocoDataset:
    """Read and check one annotation file.

    Raises DataError naming the json id at fault: broken json, missing sections, duplicate ids, unknown image or
    category ids, boxes without area (unless the entry drops them), masks that are neither polygons nor RLE (when
    ``need_masks``), images that are not in the folder, or no image at all.
    """
    content = _load(entry.json_file)
    _check_content(entry, content, need_masks)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    label_of = {category["id"]: label for label, category in enumerate(categories)}
    annotations: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for annotation in content["annotations"]:
        annotations[annotation["image_id"]].append({**annotation, "label": label_of[annotation["category_id"]]})
    return CocoDataset(
        entry=entry,
        classes=[str(category["name"]) for category in categories],
        category_ids=list(label_of),
        images=content["images"],
        annotations=dict(annotations),
    )


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}:{error.colno}: broken json ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a json text file ({error.reason} at byte {error.start})") from None
    missing = [key for key in SECTIONS if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        raise DataError(f"{path}: no list '{missing[0]}'; COCO format has {', '.join(SECTIONS)}")
    return content


def _check_content(entry: DatasetEntry, content: dict[str, Any], need_masks: bool) -> None:
    """Run the checks one after the other and report the first kind of problem, with how many and which ids."""
    images, annotations, categories = (content[key] for key in SECTIONS)
    checks: list[tuple[str, Iterator[Any], str]] = [
        ("categories without id or name", _lacking(categories, "id", "name"), "give each an id and a name"),
        ("images without id, file_name, width or height", _lacking(images, "id", "file_name", "width", "height"), ""),
        ("annotations without id, image_id, category_id or bbox",
         _lacking(annotations, "id", "image_id", "category_id", "bbox"), ""),
        ("images whose width or height is not a whole number of pixels above 0, or whose file_name is no text",
         (i["id"] for i in images if not _is_image(i)), ""),
        ("duplicate category ids", _duplicates(categories), "number categories uniquely"),
        ("duplicate image ids", _duplicates(images), "number images uniquely"),
        ("duplicate annotation ids", _duplicates(annotations), "number annotations uniquely"),
        ("annotations with an unknown image_id", _unknown(annotations, "image_id", images), "drop them or add images"),
        ("annotations with an unknown category_id", _unknown(annotations, "category_id", categories),
         f"known category ids: {[c.get('id') for c in categories][:20]}"),
        ("annotations whose bbox is not [x, y, width, height] of numbers",
         (a["id"] for a in annotations if not _is_box(a["bbox"])), ""),
        ("annotations with a box of no width or height",
         (a["id"] for a in annotations if not (entry.drop_empty_boxes or a.get("iscrowd") or _has_area(a))),
         "mend the boxes, or set 'drop_empty_boxes: true' in the data set's catalog entry"),
        ("annotations whose segmentation is neither polygons of 3+ points nor RLE",
         (a["id"] for a in annotations if need_masks and not _is_mask(a.get("segmentation"))),
         "mend them, or train without masks (MODEL.MASK_ON False)"),
        ("annotations whose RLE does not fit the image: size [height, width], counts that add up to height x width",
         _misfits(annotations, images) if need_masks else iter(()), "mend them, or the image's height and width"),
    ]  # fmt: skip
    for problem, offenders, mend in checks:
        _refuse(entry, problem, list(offenders), mend)
    if not images or not categories:
        raise DataError(f"{entry.json_file}: data set '{entry.name}' is empty: {len(images)} images, "
                        f"{len(categories)} categories")  # fmt: skip
    present = {path.name for path in entry.image_root.iterdir()} if _is_flat(images) else None
    absent = (f"{i['id']} ({i['file_name']})" for i in images if not _on_disk(entry, i["file_name"], present))
    _refuse(entry, f"images that are not in {entry.image_root}", list(absent), "complete the folder")


def _refuse(entry: DatasetEntry, problem: str, offenders: list[Any], mend: str) -> None:
    if offenders:
        first = ", ".join(str(i) for i in offenders[:5]) + (", ..." if len(offenders) > 5 else "")
        raise DataError(f"{entry.json_file}: {len(offenders)} {problem}: id {first}" + (f"\n  {mend}" if mend else ""))


def _lacking(items: Iterable[Any], *keys: str) -> Iterator[Any]:
    for position, item in enumerate(items):
        if not isinstance(item, dict) or any(key not in item for key in keys):
            yield item.get("id", f"(entry {position})") if isinstance(item, dict) else f"(entry {position})"


def _duplicates(items: list[dict[str, Any]]) -> Iterator[Any]:
    seen = set()
    for item in items:
        if item["id"] in seen:
            yield item["id"]
        seen.add(item["id"])


def _unknown(annotations: list[dict[str, Any]], key: str, known: list[dict[str, Any]]) -> Iterator[Any]:
    ids = {item["id"] for item in known}
    return (f"{a['id']} ({key} {a[key]})" for a in annotations if a[key] not in ids)


def _is_image(image: dict[str, Any]) -> bool:
    sides = image["width"], image["height"]
    return isinstance(image["file_name"], str) and all(isinstance(side, int) and side > 0 for side in sides)


def _is_box(bbox: Any) -> bool:
    return isinstance(bbox, list) and len(bbox) == 4 and _are_numbers(bbox)


def _are_numbers(values: list[Any]) -> bool:
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def _has_area(annotation: dict[str, Any]) -> bool:
    _, _, width, height = annotation["bbox"]
    return bool(width > 0 and height > 0)


def _is_mask(segmentation: Any) -> bool:
    if isinstance(segmentation, dict):
        return isinstance(segmentation.get("counts"), str | list) and isinstance(segmentation.get("size"), list)
    return (
        isinstance(segmentation, list)
        and len(segmentation) > 0
        and all(isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in segmentation)
        and all(_are_numbers(polygon) for polygon in segmentation)
    )


def _misfits(annotations: list[dict[str, Any]], images: list[dict[str, Any]]) -> Iterator[Any]:
    size_of = {image["id"]: [image["height"], image["width"]] for image in images}
    for annotation in annotations:
        rle, size = annotation["segmentation"], size_of[annotation["image_id"]]
        if isinstance(rle, dict) and not (rle["size"] == size and _covers(rle["counts"], *size)):
            yield annotation["id"]


def _covers(counts: Any, height: int, width: int) -> bool:
    """Whether uncompressed counts reach the last pixel; compressed ones (text) are not looked into."""
    return isinstance(counts, str) or sum(counts) == height * width


def _is_flat(images: list[dict[str, Any]]) -> bool:
    """Whether every file lies directly in the image folder, so that one listing of it answers for all."""
    return not any("/" in image["file_name"] for image in images)


def _on_disk(entry: DatasetEntry, file_name: str, present: set[str] | None) -> bool:
    return file_name in present if present is not None else (entry.image_root / file_name).is_file()
