"""Annotation files in COCO's format: read, checked and indexed. Needs no torch."""

import gc
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fvcore.common.config import CfgNode

from scratch_det.data.catalog import DatasetEntry
from scratch_det.data.coco_checks import FIELDS, Problem, count_visible, explain, find_problems
from scratch_det.errors import DataError


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

    See ``scratch_det.data.coco_checks.CHECKS``; masks and keypoints are checked only where they are needed. Raises
    DataError when the file is no json with COCO's three lists.
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
