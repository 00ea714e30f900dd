"""From a COCO json to arrays: read, checked, and no Python object left for each of its entries. Needs no torch.

The quick way decodes the annotations in chunks into typed structs and looks for suspects with numpy; only these become
the dictionaries that ``find_problems`` judges. A json with other types than COCO's (ids as text, true for 1, NaN) goes
the slow way: all of its entries are judged, and those that can be used are converted. Every mask is decoded here.

The arrays, with I images, N annotations in the json's order, and P polygons; ``X_at`` says where each item of X begins:
    image_id, height, width    int64 [I]; pixels; where an id is no such number: the places of the ids in their order,
                               and the ids as json in id_text (uint8, with id_text_at [I + 1])
    file_name                  uint8, UTF-8, with file_name_at [I + 1]
    order, first               int32 [M]; int64 [I + 1]: the annotations of image i are order[first[i] : first[i + 1]];
                               those of images that are not listed are not among them
    image, label               int32 [N]: indices of the image (-1: not listed) and of the category, by ascending id
    box                        float64 [N, 4], x y width height in pixels
    area                       float64 [N], NaN where the json has none
    iscrowd, ignore            bool [N]
    num_keypoints              int64 [N], NONE where the json has none
    keypoints                  float64, x y v of each, with keypoints_at [N + 1]
    polygon                    float64, x y of each corner, with polygon_at [P + 1]
    polygons_at                int64 [N + 1]: polygons_at[k] is the first polygon of annotation k
    rle_size                   int64 [N, 2], height and width; 0 0 where the segmentation is none
    rle_counts                 int32, with rle_counts_at [N + 1]
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

from scratch_det.data import checks
from scratch_det.data.checks import OVERHANG, VALUES, WHOLE, Problem, Record
from scratch_det.data.forked import map_forked
from scratch_det.data.other_formats import other_format
from scratch_det.data.plausible import find_notices, mask_extents
from scratch_det.data.rle import run_lengths
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
    categories: list[Category]
    annotations: list[msgspec.Raw] | None = None


class Checked(NamedTuple):
    """A json that was read: ``sound`` are the images that can be used, ``parts`` the columns of each chunk.

    counts: of images, categories, and lists of annotations, 0 or 1. ids: of the annotations.
    """

    counts: tuple[int, int, bool]
    problems: list[Problem]
    sound: list[Record]
    ids: list[Any]
    categories: list[Any]
    parts: list[Arrays]


def read_json(path: Path) -> tuple[dict[str, Any], Arrays]:
    """The arrays; and digest, categories by id, problems, and counts of images, categories and lists of annotations.

    The annotations' arrays are missing where no run can use the json. Raises DataError when the file is no json with
    COCO's three lists.
    """
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    with gc_paused():
        counts, problems, sound, ids, categories, parts = _read_quickly(data) or _read_slowly(path, data)
    del data  # before the arrays are copied together
    own = [image["id"] for image in sound]
    arrays: Arrays = {
        "image_id": np.array(list(map(numbers_of(own).get, own)), np.int64),
        **{name: np.array([image[name] for image in sound], np.int64) for name in ("height", "width")},
        **_texts("file_name", [image["file_name"] for image in sound]),
    }
    if not all(map(VALUES[WHOLE], own)):
        arrays |= _texts("id_text", map(json.dumps, own))
    if all(counts[:2]) and _some_run_can_use_it(problems):
        numbers = numbers_of([one["id"] for one in categories])
        categories.sort(key=lambda category: numbers[category["id"]])
        arrays |= _annotations(parts, arrays["image_id"], np.array(sorted(numbers.values()), np.int64))
        problems += find_notices(arrays, ids, categories)
        del arrays["extent"]
    found = [asdict(one) for one in problems]
    return {"digest": digest, "problems": found, "categories": categories, "counts": counts}, arrays


def rank(number: Any) -> tuple[bool, Any]:
    """By which ids are sorted: those that are text come last."""
    return isinstance(number, str), number


def numbers_of(ids: Sequence[Any]) -> dict[Any, int]:
    """A number for each id: itself where all are whole numbers of 64 bits, else its place in their order."""
    if all(map(VALUES[WHOLE], ids)):
        return {one: int(one) for one in ids}
    return {one: place for place, one in enumerate(sorted(ids, key=rank))}


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
        decoder, annotations = msgspec.json.Decoder(list[Annotation]), content.annotations or []

        def judge(start: int) -> tuple[Arrays, np.ndarray]:
            chunk = decoder.decode(b"[" + b",".join(annotations[start : start + CHUNK]) + b"]")
            part = _columns(chunk)
            return part, start + np.flatnonzero(_are_suspect(part, known, of_known, classes, num_keypoints))

        judged = map_forked(judge, range(0, len(annotations), CHUNK), LEAST)
        parts, doubted = map(list, zip(*judged, strict=True)) if annotations else ([], [])
        ids = np.concatenate([np.empty(0, int), *(part["id"] for part in parts)])
        order = ids.argsort(kind="stable")
        again = np.flatnonzero(np.diff(ids[order]) == 0)
        doubted += [order[again], order[again + 1]]
        suspects = np.unique(np.concatenate([np.empty(0, int), *doubted])).tolist()
        entries = (msgspec.json.decode(annotations[k]) for k in suspects)
        problems, sound = checks.find_problems(content.images, content.categories, entries)
    except (msgspec.MsgspecError, OverflowError, UnicodeError, RecursionError):  # in fields that nobody reads, too
        return None
    counts = len(content.images), len(content.categories), content.annotations is not None
    return Checked(counts, problems, sound, ids.tolist(), content.categories, parts)


@np.errstate(over="ignore")  # a number near the largest is a suspect, not a warning
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
    has_other_keypoints = num_keypoints and (part["keypoints_at"] != 3 * num_keypoints).any()
    if has_other_keypoints or np.abs(points).max(initial=0) > LARGEST:
        return np.ones(count, bool)
    corner, start = points.reshape(-1, 2), _starts(length // 2)
    following = np.roll(corner, -1, axis=0)
    following[start[1:] - 1] = corner[start[:-1]]
    cross = corner[:, 0] * following[:, 1] - corner[:, 1] * following[:, 0]
    is_flat = np.abs(np.add.reduceat(cross, start[:-1])) < SMALLEST
    sound[np.repeat(np.arange(count), part["polygons_at"])[is_flat]] = False

    sound &= ((part["rle_size"] == size[:, ::-1]) | (part["rle_size"] == 0)).all(1) & ~np.isnan(part["extent"][:, 0])

    if num_keypoints:
        points = part["keypoints"].reshape(count, num_keypoints, 3)
        visible = (points[..., 2] > 0).sum(1)
        sound &= (np.isin(points[..., 2], (0, 1, 2)) & (np.abs(points) <= LARGEST).all(2)).all(1)
        sound &= (part["num_keypoints"] == NONE) | (part["num_keypoints"] == visible)
    return ~sound


def _read_slowly(path: Path, data: bytes) -> Checked:
    """Every entry is judged, and converted where a run can use it. Raises DataError as ``read_json``."""
    content = load_json(path, data)
    images, categories, annotations = content["images"], content["categories"], content.get("annotations", [])
    counts = len(images), len(categories), "annotations" in content
    if not all(counts[:2]):
        return Checked(counts, [], [], [], [], [])
    problems, sound = checks.find_problems(images, categories, annotations)
    if not _some_run_can_use_it(problems):
        return Checked(counts, problems, sound, [], [], [])
    numbers = [numbers_of([one["id"] for one in section]) for section in (sound, categories)]
    annotations = [one for one in annotations if one["image_id"] in numbers[0]]
    chunks = (annotations[k : k + CHUNK] for k in range(0, len(annotations), CHUNK))
    parts = [_columns([_converted(one, *numbers) for one in chunk]) for chunk in chunks]
    categories = [{name: one[name] for name in Category.__annotations__ if name in one} for one in categories]
    return Checked(counts, problems, sound, [one["id"] for one in annotations], categories, parts)


def load_json(path: Path, data: bytes) -> dict[str, list[Any]]:
    """The json of these bytes of ``path``, with COCO's three lists, or without annotations. Raises DataError if not."""
    content: Any = None
    fault = ""
    try:
        try:
            content = msgspec.json.decode(data)  # four times as fast
        except (msgspec.MsgspecError, UnicodeError):  # NaN, UTF-16
            content = json.loads(data.decode(json.detect_encoding(data)))
    except json.JSONDecodeError as error:
        fault = f"{path}:{error.lineno}:{error.colno}: broken json ({error.msg})"
    except RecursionError:
        fault = f"{path}: broken json (lists in lists, too many to read); export it again"
    except UnicodeDecodeError as error:
        fault = f"{path}: not a json text file ({error.reason} at byte {error.start})"
    if other := other_format(data, content):
        fault = f"{path} is {other}"
    if fault:
        raise DataError(fault)
    lists: Record = {"annotations": []} | (content if isinstance(content, dict) else {})
    missing = [key for key in checks.FIELDS if not isinstance(lists.get(key), list)]
    if missing:
        raise DataError(f"{path}: no list '{missing[0]}'; COCO format has {', '.join(checks.FIELDS)}")
    return content


def _converted(one: Record, images: dict[Any, int], categories: dict[Any, int]) -> Annotation:
    """An annotation that some run can use; a segmentation or keypoints that are no numbers are left out.

    images, categories: the number of each id.
    """
    mask: Any = one.get("segmentation")
    points: Any = one.get("keypoints")
    if isinstance(mask, list):
        mask = mask if all(map(checks.are_numbers, mask)) else None
    elif checks.mask_fault(mask, np.inf, np.inf) in ("no mask", "mask"):
        mask = None
    else:
        counts = mask["counts"] if isinstance(mask["counts"], str) else list(map(int, mask["counts"]))
        mask = Rle((int(mask["size"][0]), int(mask["size"][1])), counts)
    return Annotation(
        id=0,
        image_id=images[one["image_id"]],
        category_id=categories[one["category_id"]],
        bbox=tuple(one["bbox"]),
        segmentation=mask,
        keypoints=points if checks.are_numbers(points) else [],
        num_keypoints=int(one["num_keypoints"]) if VALUES[WHOLE](one.get("num_keypoints")) else NONE,
        area=one["area"] if checks.are_numbers([one.get("area")]) else None,
        iscrowd=checks.is_set(one.get("iscrowd")),
        ignore=checks.is_set(one.get("ignore")),
    )


def _columns(chunk: Sequence[Annotation]) -> Arrays:
    """The arrays of some annotations; an ``_at`` holds lengths, ``image_id`` and ``category_id`` are the json's."""
    masks = [one.segmentation for one in chunk]
    polygons = [mask if isinstance(mask, list) else [] for mask in masks]
    rles = [mask if isinstance(mask, Rle) else NO_RLE for mask in masks]
    every, keypoints = list(chain.from_iterable(polygons)), [one.keypoints for one in chunk]
    length, owner = _lengths(every), np.repeat(np.arange(len(chunk)), _lengths(polygons))
    kept, is_odd = (length >= 6) & (length % 2 == 0), np.array([one.iscrowd not in (0, 1) for one in chunk], bool)
    is_odd[owner[~kept]] = True
    decoded = iter(run_lengths([rle.counts for rle in rles if isinstance(rle.counts, str)]))
    counts = [next(decoded) if isinstance(rle.counts, str) else rle.counts for rle in rles]
    columns = {
        "id": np.array([one.id for one in chunk], np.int64),
        "image_id": np.array([one.image_id for one in chunk], np.int64),
        "category_id": np.array([one.category_id for one in chunk], np.int64),
        "box": np.fromiter(chain.from_iterable(one.bbox for one in chunk), float).reshape(-1, 4),
        "area": np.array([one.area for one in chunk], float),
        "iscrowd": np.array([bool(one.iscrowd) for one in chunk], bool),
        "is_odd": is_odd,
        "ignore": np.array([bool(one.ignore) for one in chunk], bool),
        "num_keypoints": np.array([one.num_keypoints for one in chunk], np.int64),
        "keypoints": np.fromiter(chain.from_iterable(keypoints), float), "keypoints_at": _lengths(keypoints),
        "polygon": np.fromiter(chain.from_iterable(every), float)[np.repeat(kept, length)],
        "polygon_at": length[kept], "polygons_at": np.bincount(owner[kept], minlength=len(chunk)),
        "rle_size": np.array([rle.size for rle in rles], np.int64).reshape(-1, 2),
        "rle_counts": np.fromiter(chain.from_iterable(counts), np.int64).clip(-1, 2**31 - 1).astype(np.int32),
        "rle_counts_at": _lengths(counts),
    }  # fmt: skip
    return columns | {"extent": mask_extents(columns, counts)}


def _annotations(parts: list[Arrays], image_ids: np.ndarray, category_ids: np.ndarray) -> Arrays:
    """The arrays of all annotations, from those of the chunks, which it empties."""
    parts = parts or [_columns([])]
    arrays = {}
    for name in list(parts[0]):
        values = np.concatenate([part.pop(name) for part in parts])
        arrays[name] = _starts(values) if name.endswith("_at") else values
    del arrays["id"], arrays["is_odd"]  # no longer asked for
    by_id, of_image = image_ids.argsort(), arrays.pop("image_id")
    image = by_id[np.searchsorted(image_ids, of_image, sorter=by_id).clip(max=len(by_id) - 1)].astype(np.int32)
    image[image_ids[image] != of_image] = -1
    label = np.searchsorted(category_ids, arrays.pop("category_id")).astype(np.int32)
    return arrays | {"image": image, "label": label} | by_image(image, image >= 0, len(image_ids))


def by_image(image: np.ndarray, is_used: np.ndarray, num_images: int) -> Arrays:
    """``order`` and ``first`` of the annotations that are used: those of an image in the order of the json."""
    order = image.argsort(kind="stable")
    order = order[is_used[order]].astype(np.int32)
    return {"order": order, "first": np.searchsorted(image[order], np.arange(num_images + 1))}


def _texts(name: str, texts: Iterable[str]) -> Arrays:
    """Texts as an array and where each begins."""
    written = [text.encode("utf-8", "surrogatepass") for text in texts]
    return {name: np.frombuffer(b"".join(written), np.uint8), f"{name}_at": _starts(_lengths(written))}


def _lengths(items: Iterable[Any]) -> np.ndarray:
    return np.array([len(item) for item in items], np.int64)


def _starts(lengths: np.ndarray) -> np.ndarray:
    """int64 [n + 1]: where each item begins, and where the last one ends."""
    return np.concatenate([[0], lengths.cumsum()])
