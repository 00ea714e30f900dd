"""Predictions as columns, and the file of COCO results that they are written to and read from.

Predictions are a dictionary of one array per field of COCO's results, a row for each detection:
    image_id, category_id   int64 [N], the ids of the json, not contiguous labels
    score                   float64 [N]
    bbox                    float64 [N, 4], x, y, width and height in px of the original image
    segmentation            object [N], compressed RLE with text counts (where masks are predicted)
    keypoints               float64 [N, 3 * K], x, y in px, where a whole number is the centre of a pixel, and score
The file is detectron2's. No number is rounded: the file holds the numbers that are scored, to the last bit.
"""

from collections.abc import Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType

from scratch_det.data.coco import gc_paused
from scratch_det.errors import DataError

Predictions = dict[str, np.ndarray]
TYPES: dict[str, type] = {"image_id": int, "category_id": int, "segmentation": object}  # other fields: float


class Rle(msgspec.Struct, gc=False):
    """A mask: height and width of the image, and COCO's compressed runs."""

    size: tuple[int, int]
    counts: str


class Result(msgspec.Struct, gc=False):
    """One detection in the file."""

    image_id: int
    category_id: int
    score: float
    bbox: tuple[float, float, float, float] | UnsetType = UNSET
    segmentation: Rle | UnsetType = UNSET
    keypoints: list[float] | UnsetType = UNSET


def detections_of(image_id: int, found: dict[str, Any], category_ids: Sequence[int]) -> Predictions:
    """The predictions of one image, ``found`` as from ``backend.predict``; label k stands for ``category_ids[k]``."""
    corners = found["boxes"].numpy()
    rows = {
        "image_id": np.full(len(corners), image_id),
        "category_id": np.array(category_ids)[found["labels"].numpy()],
        "score": found["scores"].numpy().astype(float),
        "bbox": np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).astype(float),
    }
    if "masks" in found:
        rows["segmentation"] = np.array(found["masks"], dtype=object)
    if "keypoints" in found:  # COCO's are indices of pixels, ours are continuous: the centre of pixel 0 is 0.5
        points = found["keypoints"].numpy() - np.array([0.5, 0.5, 0], dtype=np.float32)
        rows["keypoints"] = points.reshape(len(points), 3 * points.shape[1]).astype(float)
    return rows


def joined(parts: Sequence[Predictions]) -> Predictions:
    """The rows of all parts, which have the same columns."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else as_columns([])


def as_columns(results: Sequence[Result]) -> Predictions:
    """The results as predictions; no result at all stands for a model that predicts every field.

    Raises DataError when some results hold a field and others do not.
    """
    found: Predictions = {}
    for name in Result.__struct_fields__:
        values: list[Any] = [value for one in results if (value := getattr(one, name)) is not UNSET]
        if len(values) not in (0, len(results)):
            raise DataError(
                f"only {len(values)} of {len(results)} results hold '{name}'; expected all of them, or none"
            )
        if name == "segmentation":
            values = [{"size": one.size, "counts": one.counts} for one in values]
        if values or not results:
            found[name] = np.array(values, dtype=TYPES.get(name, float))
    return found | {"bbox": found["bbox"].reshape(-1, 4)} if "bbox" in found else found


def read_predictions(path: Path) -> Predictions:
    """The content of a results file. Raises DataError when it is none."""
    with gc_paused():  # see there
        try:
            results = msgspec.json.decode(path.read_bytes(), type=list[Result])
        except msgspec.DecodeError as error:
            raise DataError(f"{path} is no file of COCO results: {error}") from None
        return as_columns(results)


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write a results file."""
    with gc_paused():
        rows = [
            predictions[name].tolist() if name in predictions else repeat(UNSET) for name in Result.__struct_fields__
        ]
        path.write_bytes(msgspec.json.encode(list(map(Result, *rows))))
