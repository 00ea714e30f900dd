"""What predictions are scored against: the objects of a COCO json, indexed; and the IoU of boxes with them."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from hotcoco import mask as mask_api

from scratch_det.data.checks import count_visible
from scratch_det.data.coco_json import gc_paused
from scratch_det.errors import DataError
from scratch_det.evaluation.predictions import Predictions


class Objects(NamedTuple):
    """M objects as columns."""

    images: np.ndarray  # int64 [M], places
    classes: np.ndarray  # int64 [M], places of categories
    boxes: np.ndarray  # float64 [M, 4], x, y, width, height
    crowd: np.ndarray  # bool [M]
    ignored: np.ndarray  # bool [M]: crowds, and VOC's difficult objects


class Truth(NamedTuple):
    """A COCO json: images and categories in ascending order of their ids, and its annotations.

    An index of ``images`` or ``categories`` is called a place. Every annotation has ``iscrowd`` and ``area``, and
    ``num_keypoints`` where it has keypoints.
    """

    images: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    annotations: Mapping[int, list[dict[str, Any]]]  # by image id

    def places(self, predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
        """The place of each detection's image, and of its category [N]. Raises DataError for ids unknown here."""
        images, unknown = _places(self.images, predictions["image_id"])
        if len(unknown):
            raise DataError(
                f"{len(unknown)} image ids are not in the json, the first is {unknown[0]!r}: "
                "score predictions against the json of the data set they were made on"
            )
        categories, unknown = _places(self.categories, predictions["category_id"])
        if len(unknown):
            known = ", ".join(str(category["id"]) for category in self.categories[:5])
            raise DataError(
                f"category_id {unknown[0]!r} of the results is not among the json's {len(self.categories)} category "
                f"ids ({known}, ...): results carry the json's ids, not contiguous labels"
            )
        return images, categories

    def annotated(self, images: slice = slice(None)) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """The places of image and category, and the annotation, of every object in these images."""
        classes = {category["id"]: place for place, category in enumerate(self.categories)}
        for place in range(len(self.images))[images]:
            for one in self.annotations.get(self.images[place]["id"], ()):
                if one["category_id"] in classes:
                    yield place, classes[one["category_id"]], one

    def objects(self) -> Objects:
        """All of them, as columns."""
        found = list(self.annotated())
        crowd, ignore = (
            np.array([bool(one.get(key)) for *_, one in found], dtype=bool) for key in ("iscrowd", "ignore")
        )
        boxes = np.array([one["bbox"] for *_, one in found], dtype=float).reshape(-1, 4)
        images, classes = (np.array([one[k] for one in found], dtype=int) for k in (0, 1))
        return Objects(images, classes, boxes, crowd, crowd | ignore)


def load_truth(json_file: str | Path) -> Truth:
    """Read a COCO json.

    A missing ``iscrowd`` counts as 0, a missing ``area`` as that of the box, a missing ``num_keypoints`` as those with
    v above 0. Annotations of images or categories that are not in the json do not count.
    """
    data = Path(json_file).read_bytes()
    with gc_paused():
        content = msgspec.json.decode(data.decode(json.detect_encoding(data)))
        annotations = defaultdict(list)
        for one in content.get("annotations", ()):
            one.setdefault("iscrowd", 0)
            if "area" not in one:
                one["area"] = one["bbox"][2] * one["bbox"][3]
            if "keypoints" in one:
                one.setdefault("num_keypoints", count_visible(one))
            annotations[one["image_id"]].append(one)
    images, categories = (sorted(content[key], key=lambda one: one["id"]) for key in ("images", "categories"))
    return Truth(images, categories, annotations)


def box_ious(
    found: np.ndarray, boxes: np.ndarray, true: np.ndarray, true_boxes: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The IoU of detections and objects with the same key, such as the place of the image.

    found, true: the keys [N], [M] of detections and objects; boxes, true_boxes: their boxes [N, 4], [M, 4].
    Yields for each key of both: the indices of its detections [n] and of its objects [m], and IoU [n, m].
    """
    here, there = grouped(found), grouped(true)
    for key in here.keys() & there.keys():
        rows, others = here[key], there[key]
        yield rows, others, mask_api.bbox_iou(boxes[rows], true_boxes[others], [0] * len(others))


def grouped(keys: np.ndarray) -> dict[int, np.ndarray]:
    """The indices of each key [N], ascending."""
    order = np.argsort(keys, kind="stable")
    values, starts = np.unique(keys[order], return_index=True)
    return dict(zip(values.tolist(), np.split(order, starts[1:]), strict=False))  # of no keys one empty part remains


def _places(records: list[dict[str, Any]], ids: np.ndarray) -> tuple[np.ndarray, list[Any]]:
    """The index of each of ``ids`` [N] among the records, whose ids ascend, and the ids that none of them has."""
    known = np.array([record["id"] for record in records])
    places = np.searchsorted(known, ids)
    missing = ids[known[np.minimum(places, len(known) - 1)] != ids] if len(known) else ids
    return places, np.unique(missing).tolist()
