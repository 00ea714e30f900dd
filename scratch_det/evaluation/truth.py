"""What predictions are scored against: the objects of a COCO json, indexed; and the IoU of boxes with them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hotcoco import mask as mask_api

from scratch_det.data.catalog import DatasetEntry
from scratch_det.data.checks import Problem, explain
from scratch_det.data.coco import CocoDataset
from scratch_det.data.coco_json import read_json
from scratch_det.data.packed import load
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
    """A data set, with images and categories in ascending order of their ids; an index there is called a place."""

    images: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    data: CocoDataset
    numbers: np.ndarray  # int64, of each image in ``data``

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
        for place in range(len(self.images))[images]:
            for one in self.data.objects(int(self.numbers[place])):
                yield place, one["label"], one

    def objects(self) -> Objects:
        """All of them, as columns."""
        arrays, places, used = self.data.arrays, np.argsort(self.numbers), self.data.arrays["order"]
        image, label, box, crowd, ignore = (
            arrays[name][used] for name in ("image", "label", "box", "iscrowd", "ignore")
        )
        return Objects(places[image], label, box, crowd, crowd | ignore)


def load_truth(json_file: str | Path) -> Truth:
    """Read a COCO json, packed as for training. Raises DataError where neither could use it."""
    path = Path(json_file)
    header, arrays, _ = load(path, read_json)
    if "label" not in arrays:
        problems = [Problem(**fields) for fields in header["problems"] if not fields["only"]]
        raise DataError(explain(path, problems) if problems else f"{path} has no images, or no categories")
    entry = DatasetEntry(path.stem, path, path.parent)
    return truth_of(CocoDataset(entry, header["categories"], arrays, header["digest"], header["counts"][2]))


def truth_of(data: CocoDataset) -> Truth:
    """What a data set's predictions are compared with."""
    numbers = data.arrays["image_id"].argsort()
    return Truth([data.images[k] for k in numbers.tolist()], data.categories, data, numbers)


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
    known = {record["id"]: place for place, record in enumerate(records)}
    places = np.array([known.get(one, -1) for one in ids.tolist()], np.int64)
    return places, list(dict.fromkeys(ids[places < 0].tolist()))
