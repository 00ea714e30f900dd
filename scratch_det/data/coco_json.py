"""From a COCO json to arrays: read, checked, and no Python object left for each of its entries. Needs no torch.

The quick way decodes the annotations in chunks into typed structs and looks for suspects with numpy; only these become
the dictionaries that ``find_problems`` judges. A json with other types than COCO's (ids as text, true for 1, NaN) goes
the slow way: all of its entries are judged, and those that can be used are converted.

The arrays, with I images, N annotations in the json's order, and P polygons; ``X_at`` says where each item of X begins:
    image_id, height, width    int64 [I]; pixels
    file_name                  uint8, UTF-8, with file_name_at [I + 1]
    order, first               int32 [N]; int64 [I + 1]: the annotations of image i are order[first[i] : first[i + 1]]
    image, label               int32 [N]: indices of the image and of the category, by ascending id
    box                        float64 [N, 4], x y width height in pixels
    area                       float64 [N], NaN where the json has none
    iscrowd, ignore            bool [N]
    num_keypoints              int64 [N], NONE where the json has none
    keypoints                  float64, x y v of each, with keypoints_at [N + 1]
    polygon                    float64, x y of each corner, with polygon_at [P + 1]
    polygons_at                int64 [N + 1]: polygons_at[k] is the first polygon of annotation k
    rle_size                   int64 [N, 2], height and width; 0 0 where the segmentation is none
    rle_text, rle_counts       uint8 and int64, compressed and plain, with rle_text_at and rle_counts_at [N + 1]
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import msgspec
import numpy as np

from scratch_det.data.checks import (
    FIELDS,
    OVERHANG,
    VALUES,
    WHOLE,
    Problem,
    Record,
    are_numbers,
    find_problems,
    mask_fault,
)  # fmt: skip
from scratch_det.data.forked import map_forked
from scratch_det.data.other_formats import other_format
from scratch_det.data.plausible import find_notices
from scratch_det.errors import DataError
from scratch_det.files import gc_paused

Arrays = dict[str, np.ndarray]
CHUNK = 1_000  # annotations that are Python objects at a time: 3 MB of COCO's
LEAST = 50  # chunks that are worth a process
LARGEST, SMALLEST = 1e4, 1e-3  # a coordinate, px, and twice an area, px^2, between which rounding decides nothing
NONE = -(2**63)  # num_keypoints is missing


class Image(TypedDict):
    """An entry of images."""

    id: int
    file_name: str
    width: int
    height: int


class Category(TypedDict):
    """An entry of categories; its content is checked, not its type."""

    id: int
    name: Any
    keypoints: NotRequired[Any]
    flip_map: NotRequired[Any]


class Rle(msgspec.Struct, gc=False):
    """A segmentation as runs; size is height, width."""

    size: tuple[int, int]
    counts: str | list[int]


NO_RLE = Rle((0, 0), [])


class Annotation(msgspec.Struct, gc=False):
    """An entry of annotations."""

    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    segmentation: list[list[float]] | Rle | None = None
    keypoints: list[float] = []
    num_keypoints: int = NONE
    area: float | None = None
    iscrowd: int | None = None
    ignore: int | None = 0


class Content(msgspec.Struct, gc=False):
    """A json whose annotations are not decoded yet."""

    images: list[Image]
    annotations: list[msgspec.Raw]
    categories: list[Category]


class Checked(NamedTuple):
    """A json that was read: ``sound`` are the images that can be used, ``parts`` the columns of each chunk.

    ids: of the annotations.
    """

    counts: tuple[int, int]
    problems: list[Problem]
    sound: list[Record]
    ids: list[Any]
    categories: list[Any]
    parts: list[Arrays]


def read_json(path: Path) -> tuple[dict[str, Any], Arrays]:
    """The arrays; and digest, categories by id, problems, and counts of images and categories.

    The annotations' arrays are missing where no run can use the json. Raises DataError when the file is no json with
    COCO's three lists.
    """
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    with gc_paused():
        counts, problems, sound, ids, categories, parts = _read_quickly(data) or _read_slowly(path, data)
    del data  # before the arrays are copied together
    names = [image["file_name"].encode("utf-8", "surrogatepass") for image in sound]
    arrays: Arrays = {
        **{key: np.array([image[name] for image in sound], np.int64)
           for key, name in (("image_id", "id"), ("height", "height"), ("width", "width"))},
        "file_name": np.frombuffer(b"".join(names), np.uint8), "file_name_at": _starts(_lengths(names)),
    }  # fmt: skip
    if all(counts) and _some_run_can_use_it(problems):
        categories.sort(key=lambda category: category["id"])
        arrays |= _annotations(parts, arrays["image_id"], np.array([one["id"] for one in categories], np.int64))
        problems += find_notices(arrays, ids, categories)
    header = {"problems": [asdict(one) for one in problems], "categories": categories, "counts": counts}
    return {"digest": digest, **header}, arrays


def _some_run_can_use_it(problems: list[Problem]) -> bool:
    return all(one.only or one.severity != "error" for one in problems)


def _read_quickly(data: bytes) -> Checked | None:
    """None where it is empty, or not typed as COCO's."""
    try:
        content = msgspec.json.decode(data, type=Content)
        if not content.images or not content.categories:
            return None
        sizes = {image["id"]: (image["width"], image["height"]) for image in content.images}
        known = np.array(sorted(sizes), np.int64)
        of_known = np.array([sizes[number] for number in known.tolist()], np.int64)
        classes = np.array([one["id"] for one in content.categories], np.int64)
        names = content.categories[0].get("keypoints")
        num_keypoints = len(names) if isinstance(names, list) else 0
        decoder = msgspec.json.Decoder(list[Annotation])

        def judge(start: int) -> tuple[Arrays, np.ndarray]:
            chunk = decoder.decode(b"[" + b",".join(content.annotations[start : start + CHUNK]) + b"]")
            part = _columns(chunk)
            return part, start + np.flatnonzero(_are_suspect(part, known, of_known, classes, num_keypoints))

        judged = map_forked(judge, range(0, len(content.annotations), CHUNK), LEAST)
        parts, doubted = map(list, zip(*judged, strict=True)) if content.annotations else ([], [])
        ids = np.concatenate([np.empty(0, int), *(part["id"] for part in parts)])
        order = ids.argsort(kind="stable")
        again = np.flatnonzero(np.diff(ids[order]) == 0)
        doubted += [order[again], order[again + 1]]
        suspects = np.unique(np.concatenate([np.empty(0, int), *doubted])).tolist()
        entries = (msgspec.json.decode(content.annotations[k]) for k in suspects)
        problems, sound = find_problems(content.images, content.categories, entries)
    except (msgspec.MsgspecError, OverflowError, UnicodeError):  # in fields that nobody reads, too
        return None
    return Checked(
        (len(content.images), len(content.categories)), problems, sound, ids.tolist(), content.categories, parts
    )


def _are_suspect(
    part: Arrays, known: np.ndarray, sizes: np.ndarray, classes: np.ndarray, num_keypoints: int
) -> np.ndarray:
    """bool [n]: the annotations of a chunk that may have a problem; those without one are not among the others.

    known, sizes: ids of the images, ascending, and width and height of each.
    """
    place = np.searchsorted(known, part["image_id"]).clip(max=len(known) - 1)
    size, box, area, count = sizes[place], part["box"], part["area"], len(place)
    low, high = box[:, :2], box[:, :2] + box[:, 2:]
    sound = (known[place] == part["image_id"]) & np.isin(part["category_id"], classes)
    sound &= ((box[:, 2:] > 0) & (low < size) & (high > 0) & (-low <= OVERHANG) & (high - size <= OVERHANG)).all(1)
    sound &= (area >= 0) & ~part["is_odd"]

    length, points = part["polygon_at"], part["polygon"]
    if (length < 6).any() or (length % 2).any() or np.abs(points).max(initial=0) > LARGEST:
        return np.ones(count, bool)
    if part["rle_counts"].min(initial=0) < 0:
        return np.ones(count, bool)
    corner, start = points.reshape(-1, 2), _starts(length // 2)
    following = np.roll(corner, -1, axis=0)
    following[start[1:] - 1] = corner[start[:-1]]
    cross = corner[:, 0] * following[:, 1] - corner[:, 1] * following[:, 0]
    is_flat = np.abs(np.add.reduceat(cross, start[:-1])) < SMALLEST
    sound[np.repeat(np.arange(count), part["polygons_at"])[is_flat]] = False

    is_rle, is_plain = part["rle_size"][:, 0] > 0, part["rle_counts_at"] > 0
    fits = (part["rle_size"] == size[:, ::-1]).all(1)
    fits &= np.where(
        is_plain, _sums(part["rle_counts"], part["rle_counts_at"]) == size.prod(1), part["rle_text_at"] > 0
    )
    sound &= np.where(is_rle, fits, part["polygons_at"] > 0)

    if num_keypoints:
        if (part["keypoints_at"] != 3 * num_keypoints).any():
            return np.ones(count, bool)
        points = part["keypoints"].reshape(count, num_keypoints, 3)
        visible = (points[..., 2] > 0).sum(1)
        sound &= (np.isin(points[..., 2], (0, 1, 2)) & (np.abs(points) <= LARGEST).all(2)).all(1)
        sound &= (part["num_keypoints"] == NONE) | (part["num_keypoints"] == visible)
    return ~sound


def _read_slowly(path: Path, data: bytes) -> Checked:
    """Every entry is judged, and converted where a run can use it. Raises DataError as ``read_json``."""
    content = load_json(path, data)
    images, annotations, categories = (content[name] for name in FIELDS)
    counts = len(images), len(categories)
    if not all(counts):
        return Checked(counts, [], [], [], [], [])
    problems, sound = find_problems(images, categories, annotations)
    if not _some_run_can_use_it(problems):
        return Checked(counts, problems, sound, [], [], [])
    parts = [_columns(list(map(_converted, annotations[k : k + CHUNK]))) for k in range(0, len(annotations), CHUNK)]
    categories = [{name: one[name] for name in Category.__annotations__ if name in one} for one in categories]
    return Checked(counts, problems, sound, [one["id"] for one in annotations], categories, parts)


def load_json(path: Path, data: bytes) -> dict[str, list[Any]]:
    """The json of these bytes of ``path``, with COCO's three lists. Raises DataError where it has not."""
    content: Any = None
    fault = ""
    try:
        try:
            content = msgspec.json.decode(data)  # four times as fast
        except (msgspec.MsgspecError, UnicodeError):  # NaN, UTF-16
            content = json.loads(data.decode(json.detect_encoding(data)))
    except json.JSONDecodeError as error:
        fault = f"{path}:{error.lineno}:{error.colno}: broken json ({error.msg})"
    except UnicodeDecodeError as error:
        fault = f"{path}: not a json text file ({error.reason} at byte {error.start})"
    if other := other_format(data, content):
        fault = f"{path} is {other}"
    if fault:
        raise DataError(fault)
    missing = [key for key in FIELDS if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        raise DataError(f"{path}: no list '{missing[0]}'; COCO format has {', '.join(FIELDS)}")
    return content


def _converted(one: Record) -> Annotation:
    """An annotation that some run can use; a segmentation or keypoints that are no numbers are left out."""
    mask: Any = one.get("segmentation")
    points: Any = one.get("keypoints")
    if isinstance(mask, list):
        mask = mask if all(map(are_numbers, mask)) else None
    elif mask_fault(mask, np.inf, np.inf):
        mask = None
    else:
        counts = mask["counts"] if isinstance(mask["counts"], str) else list(map(int, mask["counts"]))
        mask = Rle((int(mask["size"][0]), int(mask["size"][1])), counts)
    return Annotation(
        id=0,
        image_id=int(one["image_id"]),
        category_id=int(one["category_id"]),
        bbox=tuple(one["bbox"]),
        segmentation=mask,
        keypoints=points if are_numbers(points) else [],
        num_keypoints=int(one["num_keypoints"]) if VALUES[WHOLE](one.get("num_keypoints")) else NONE,
        area=one["area"] if are_numbers([one.get("area")]) else None,
        iscrowd=bool(one.get("iscrowd")),
        ignore=bool(one.get("ignore")),
    )


def _columns(chunk: Sequence[Annotation]) -> Arrays:
    """The arrays of some annotations; an ``_at`` holds lengths, ``image_id`` and ``category_id`` are the json's."""
    masks = [one.segmentation for one in chunk]
    polygons = [mask if isinstance(mask, list) else [] for mask in masks]
    rles = [mask if isinstance(mask, Rle) else NO_RLE for mask in masks]
    every, keypoints = list(chain.from_iterable(polygons)), [one.keypoints for one in chunk]
    texts = [rle.counts.encode() if isinstance(rle.counts, str) else b"" for rle in rles]
    counts = [rle.counts if isinstance(rle.counts, list) else [] for rle in rles]
    return {
        "id": np.array([one.id for one in chunk], np.int64),
        "image_id": np.array([one.image_id for one in chunk], np.int64),
        "category_id": np.array([one.category_id for one in chunk], np.int64),
        "box": np.fromiter(chain.from_iterable(one.bbox for one in chunk), float).reshape(-1, 4),
        "area": np.array([one.area for one in chunk], float),
        "iscrowd": np.array([bool(one.iscrowd) for one in chunk], bool),
        "is_odd": np.array([one.iscrowd not in (0, 1) for one in chunk], bool),
        "ignore": np.array([bool(one.ignore) for one in chunk], bool),
        "num_keypoints": np.array([one.num_keypoints for one in chunk], np.int64),
        "keypoints": np.fromiter(chain.from_iterable(keypoints), float), "keypoints_at": _lengths(keypoints),
        "polygon": np.fromiter(chain.from_iterable(every), float), "polygon_at": _lengths(every),
        "polygons_at": _lengths(polygons),
        "rle_size": np.array([rle.size for rle in rles], np.int64).reshape(-1, 2),
        "rle_text": np.frombuffer(b"".join(texts), np.uint8), "rle_text_at": _lengths(texts),
        "rle_counts": np.fromiter(chain.from_iterable(counts), np.int64), "rle_counts_at": _lengths(counts),
    }  # fmt: skip


def _annotations(parts: list[Arrays], image_ids: np.ndarray, category_ids: np.ndarray) -> Arrays:
    """The arrays of all annotations, from those of the chunks, which it empties."""
    parts = parts or [_columns([])]
    arrays = {}
    for name in list(parts[0]):
        values = np.concatenate([part.pop(name) for part in parts])
        arrays[name] = _starts(values) if name.endswith("_at") else values
    del arrays["id"], arrays["is_odd"]  # no longer asked for
    by_id = image_ids.argsort()
    image = by_id[np.searchsorted(image_ids, arrays.pop("image_id"), sorter=by_id)].astype(np.int32)
    order = image.argsort(kind="stable").astype(np.int32)
    first = np.searchsorted(image[order], np.arange(len(image_ids) + 1))
    label = np.searchsorted(category_ids, arrays.pop("category_id")).astype(np.int32)
    return arrays | {"image": image, "order": order, "first": first, "label": label}


def _lengths(items: Iterable[Any]) -> np.ndarray:
    return np.array([len(item) for item in items], np.int64)


def _starts(lengths: np.ndarray) -> np.ndarray:
    """int64 [n + 1]: where each item begins, and where the last one ends."""
    return np.concatenate([[0], lengths.cumsum()])


def _sums(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The sum of each item's values."""
    return np.diff(np.concatenate([np.zeros(1, values.dtype), values.cumsum()])[_starts(lengths)])
