"""Why AP is near zero: each cause is named."""

import pytest
from coco_truth import results_of, small_coco, write

from scratch_det.evaluation.coco import evaluate_predictions
from scratch_det.evaluation.diagnosis import explain_low_ap


@pytest.fixture
def truth_file(tmp_path):
    return write(tmp_path, small_coco())


def corners(result: dict) -> dict:
    x, y, w, h = result["bbox"]
    return {"bbox": [x * 3, y * 3, x * 3 + w, y * 3 + h]}


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (corners, "not [x, y, w, h]"),
        (lambda result: {"category_id": {2: 5, 5: 9, 9: 2}[result["category_id"]]}, "wrong category ids"),
        (lambda result: {"bbox": [5.0, 5.0, 3.0, 3.0], "score": 0.01}, "scores are tiny"),
        (lambda result: {"bbox": [5.0, 5.0, 3.0, 3.0], "category_id": 2}, "one class is predicted everywhere"),
        (lambda result: {"bbox": [5.0, 5.0, 3.0, 3.0]}, "boxes miss the objects"),
    ],
)
def test_a_low_ap_is_explained(truth_file, change, cause):
    results = [result | change(result) for result in results_of(small_coco())]
    metrics = evaluate_predictions(truth_file, results, ("bbox",))
    words = explain_low_ap(truth_file, results, metrics)
    assert cause in words.splitlines()[-1]
    assert "predictions: 33" in words
    assert len(words.splitlines()) <= 8


def test_a_good_ap_needs_no_explanation(truth_file):
    assert explain_low_ap(truth_file, [], {"bbox": {"AP": 1.0}}) == ""
