"""Predictions as columns: ids, coordinates, and a file that holds them to the last bit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_truth import predictions_of, results_of, small_coco

from scratch_det.errors import DataError
from scratch_det.evaluation import predictions
from scratch_det.evaluation.predictions import detections_of, joined, read_predictions, write_predictions

FOUND = {
    "boxes": torch.tensor([[1.0, 2, 11, 22], [0, 0, 4, 4]]),
    "scores": torch.tensor([0.75, 0.5]),
    "labels": torch.tensor([2, 0]),
    "masks": [{"size": [4, 5], "counts": "first"}, {"size": [4, 5], "counts": "second"}],
    "keypoints": torch.tensor([[[1.5, 2.5, 0.25]], [[3.0, 4.0, 1.0]]]),
}
IDS = [3, 5, 9]


def test_json_ids_and_cocos_coordinates() -> None:
    found = detections_of(7, FOUND, IDS)
    assert {name: column.tolist() for name, column in found.items()} == {
        "image_id": [7, 7], "category_id": [9, 3], "score": [0.75, 0.5], "bbox": [[1, 2, 10, 20], [0, 0, 4, 4]],
        "segmentation": FOUND["masks"], "keypoints": [[1, 2, 0.25], [2.5, 3.5, 1]],
    }  # fmt: skip
    assert FOUND["boxes"][0].tolist() == [1, 2, 11, 22]


def test_images_without_detections_are_joined_too() -> None:
    none = detections_of(6, {name: values[:0] for name, values in FOUND.items()}, IDS)
    found = joined([none, detections_of(7, FOUND, IDS), none])
    assert found["image_id"].tolist() == [7, 7]
    assert {name: column.shape for name, column in found.items()} == {
        "image_id": (2,), "category_id": (2,), "score": (2,), "bbox": (2, 4), "segmentation": (2,), "keypoints": (2, 3)
    }  # fmt: skip
    assert {len(column) for part in (joined([none, none]), joined([])) for column in part.values()} == {0}


@pytest.mark.parametrize("at_once", [5, 1000])
@pytest.mark.parametrize("names", [("bbox",), ("bbox", "segmentation"), ("keypoints",), ()])
def test_the_file_holds_every_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], at_once: int
) -> None:
    """Also of float32 numbers, which have long decimals."""
    monkeypatch.setattr(predictions, "AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    given = predictions_of(results_of(small_coco(), noise=3))
    given |= {"score": rng.random(len(given["score"]), dtype=np.float32).astype(float)}
    given |= {"keypoints": rng.normal(size=(len(given["score"]), 6)) * 10.0 ** rng.integers(-9, 9, 6)}
    given = {name: given[name] for name in ("image_id", "category_id", "score", *names)}
    write_predictions(tmp_path / "results.json", given)
    assert {tuple(one) for one in json.loads((tmp_path / "results.json").read_text())} == {tuple(given)}
    found = read_predictions(tmp_path / "results.json")
    assert found.keys() == given.keys()
    for name, column in given.items():
        np.testing.assert_array_equal(found[name], column, err_msg=name)
        assert found[name].dtype == column.dtype


def test_the_file_of_no_predictions(tmp_path: Path) -> None:
    write_predictions(tmp_path / "results.json", joined([]))
    assert (tmp_path / "results.json").read_bytes() == b"[]"
    assert {len(column) for column in read_predictions(tmp_path / "results.json").values()} == {0}


def test_fields_that_one_result_lacks_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says which one."""
    results = results_of(small_coco())
    del results[13]["segmentation"]
    with pytest.raises(DataError, match=r"missing required field `segmentation` - at `\$\[13\]`$"):
        predictions_of(results)
    monkeypatch.setattr(predictions, "AT_ONCE", 5)
    with pytest.raises(DataError, match=r"`segmentation` - at `\$\[3\]`, counted from result 10$"):
        predictions_of(results)


ONE = {"image_id": 1, "category_id": 1, "score": 0.5, "keypoints": [1, 2, 0.5]}


@pytest.mark.parametrize(
    "content",
    ["[{]", "{}", *(json.dumps([ONE, ONE | other]) for other in ({"score": "high"}, {"image_id": None},
                                                                 {"keypoints": [1, 2, 0.5] * 2}))],
)  # fmt: skip
@pytest.mark.parametrize("at_once", [1, 1000])
def test_other_files_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, at_once: int) -> None:
    monkeypatch.setattr(predictions, "AT_ONCE", at_once)
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(DataError, match=r"results.json is no file of COCO results: .+"):
        read_predictions(tmp_path / "results.json")
