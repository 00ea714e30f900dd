"""Predictions as columns, and the file of COCO results that they are written to and read from.

Predictions are a dictionary of one array per field of COCO's results, a row for each detection:
    image_id, category_id   int64 [N], the ids of the json, not contiguous labels; objects where one is no such number
    score                   float64 [N]
    bbox                    float64 [N, 4], x, y, width and height in px of the original image
    segmentation            object [N], compressed RLE with text counts (where masks are predicted)
    keypoints               float64 [N, 3 * K], x, y in px, where a whole number is the centre of a pixel, and score
The file is detectron2's. No number is rounded: the file holds the numbers that are scored, to the last bit.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from scratch_det.data.checks import VALUES, WHOLE
from scratch_det.errors import DataError
from scratch_det.files import gc_paused

Predictions = dict[str, np.ndarray]
RESULTS_FILE = "coco_instances_results.json"  # detectron2's name
AT_ONCE = 1_000  # results that are objects at a time; as columns they need a third of the memory


class Rle(msgspec.Struct, gc=False):
    """A mask: height and width of the image, and COCO's compressed runs."""

    size: tuple[int, int]
    counts: str


Id = int | float | str


def _ids(values: Sequence[Id]) -> np.ndarray:
    return np.array(values, np.int64 if all(map(VALUES[WHOLE], values)) else object)


REQUIRED: dict[str, Any] = {"image_id": Id, "category_id": Id, "score": float}
TYPES: dict[str, Any] = {"image_id": _ids, "category_id": _ids, "segmentation": partial(np.array, dtype=object)}
FIELDS = REQUIRED | {"bbox": tuple[float, float, float, float], "segmentation": Rle, "keypoints": list[float]}


def detections_of(image_id: Id, found: dict[str, Any], category_ids: Sequence[Id]) -> Predictions:
    """The predictions of one image, ``found`` as from ``backend.predict``, or arrays; label k: ``category_ids[k]``."""
    corners = np.asarray(found["boxes"])
    rows = {
        "image_id": _ids([image_id] * len(corners)),
        "category_id": _ids(category_ids)[np.asarray(found["labels"])],
        "score": np.asarray(found["scores"], float),
        "bbox": np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).astype(float),
    }
    if "masks" in found:
        rows["segmentation"] = np.array(found["masks"], dtype=object)
    if "keypoints" in found:  # COCO's are indices of pixels, ours are continuous: the centre of pixel 0 is 0.5
        points = np.asarray(found["keypoints"]) - np.array([0.5, 0.5, 0], dtype=np.float32)
        rows["keypoints"] = points.reshape(len(points), 3 * points.shape[1]).astype(float)
    return rows


def as_columns(values: Mapping[str, Sequence[Any]]) -> Predictions:
    """One sequence of N values per field as arrays."""
    columns = {name: TYPES.get(name, partial(np.array, dtype=float))(column) for name, column in values.items()}
    return columns | {"bbox": columns["bbox"].reshape(-1, 4)} if "bbox" in columns else columns


def joined(parts: Sequence[Predictions]) -> Predictions:
    """The rows of all parts, which have the same columns; without a part, no row of any field."""
    parts = parts or [as_columns(dict.fromkeys(FIELDS, ()))]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def read_predictions(path: Path) -> Predictions:
    """The content of a results file: the fields of the first result, which all others have to hold too.

    Raises DataError when the file is none.
    """
    start = 0
    with gc_paused():  # see there
        try:
            results = msgspec.json.decode(path.read_bytes(), type=list[msgspec.Raw])
            kind = _kind(msgspec.json.decode(results[0], type=dict[str, Any]) if results else FIELDS)
            decoder, parts = msgspec.json.Decoder(list[kind]), []  # type: ignore[valid-type]
            for start in range(0, len(results), AT_ONCE):
                content = b"[%b]" % b",".join(results[start : start + AT_ONCE])
                part = decoder.decode(content)
                values = {name: [getattr(one, name) for one in part] for name in kind.__struct_fields__}
                if "segmentation" in values:
                    values["segmentation"] = [
                        {"size": one.size, "counts": one.counts} for one in values["segmentation"]
                    ]
                parts.append(as_columns(values))
            return joined(parts)
        except (msgspec.DecodeError, ValueError, OverflowError) as error:  # numpy's: other numbers of keypoints, ids
            where = f", counted from result {start}" if start else ""
            raise DataError(f"{path} is no file of COCO results: {error}{where}") from None


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write a results file."""
    kind = _kind(predictions)
    columns = [predictions[name] for name in kind.__struct_fields__]
    with gc_paused(), path.open("wb") as file:
        file.write(b"[")
        for start in range(0, len(columns[0]), AT_ONCE):
            rows = map(kind, *(column[start : start + AT_ONCE].tolist() for column in columns))
            file.write(b"," * (start > 0) + msgspec.json.encode(list(rows))[1:-1])
        file.write(b"]")


def _kind(names: Iterable[str]) -> Any:
    """The type of a result that holds these fields, and those REQUIRED; names that are none of FIELDS say nothing."""
    return msgspec.defstruct("Result", [(n, kind) for n, kind in FIELDS.items() if n in {*REQUIRED, *names}], gc=False)
