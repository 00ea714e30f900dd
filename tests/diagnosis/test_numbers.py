"""A diagnosis: AP as the evaluation has it, and each kind of error where it was put."""

from pathlib import Path

import numpy as np
import pytest
from coco_truth import evaluate, predictions_of, results_of, small_coco, write

from scratch_det.diagnosis.numbers import Diagnosis, diagnose
from scratch_det.errors import DataError
from scratch_det.evaluation.truth import Truth, load_truth


@pytest.fixture
def truth(tmp_path: Path) -> Truth:
    return load_truth(write(tmp_path, small_coco()))


def sure(results: list[dict]) -> list[dict]:
    """With scores that are shown, and differ."""
    return [one | {"score": 0.99 - 0.001 * number} for number, one in enumerate(results)]


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_ap_is_that_of_the_evaluation(tmp_path: Path, truth: Truth, task: str) -> None:
    results = results_of(small_coco(), noise=3)
    found, expected = diagnose(truth, predictions_of(results), task), evaluate(tmp_path / "truth.json", results)[task]
    assert found.ap().mean() == pytest.approx(expected["AP"])
    assert [found.ap(iou).mean() for iou in (0.5, 0.75)] == pytest.approx([expected["AP50"], expected["AP75"]])
    assert list(found.by_size[0]) == pytest.approx([expected[size] for size in ("APs", "APm", "APl")])
    assert list(found.ap()) == pytest.approx([expected[f"AP-{name}"] for name in ("cat", "dog", "owl")])
    assert found.at_thresholds().mean() == pytest.approx(expected["AP"])


def test_the_truth_has_no_errors(truth: Truth) -> None:
    found = diagnose(truth, predictions_of(sure(results_of(small_coco()))))
    assert all(count == 0 for _, count in found.kinds.values())
    assert found.confusion.tolist() == [[11, 0, 0, 0], [0, 11, 0, 0], [0, 0, 11, 0], [0, 0, 0, 0]]
    assert all(one.f1 == 1 for one in found.images)
    assert (found.counts.tolist(), found.detections.tolist()) == ([11] * 3, [11] * 3)
    assert found.by_size[1].tolist() == [11] * 3
    assert found.doubts == []


class TestErrors:
    @pytest.fixture
    def found(self, truth: Truth) -> Diagnosis:
        """In image 1 an owl is a cat and one object has two detections; in image 2 one is missed; 12 has a ghost."""
        results = sure(results_of(small_coco()))
        first, second = ([one for one in results if one["image_id"] == number] for number in (1, 2))
        large = next(one for one in first if one["bbox"][2] == 130)
        results[results.index(large)] = large | {"category_id": {2: 5, 5: 9, 9: 2}[large["category_id"]]}
        results.append(first[0] | {"score": 0.6})
        results.remove(second[1])
        results.append(first[1] | {"image_id": 12, "score": 0.7})
        return diagnose(truth, predictions_of(results))

    def test_kinds(self, found: Diagnosis) -> None:
        counts = {kind: count for kind, (_, count) in found.kinds.items()}
        assert counts == {"Cls": 1, "Loc": 0, "Both": 0, "Dupe": 1, "Bkg": 1, "Miss": 1}
        assert found.kinds["Miss"][0] > 0

    def test_images_with_errors_come_first(self, found: Diagnosis) -> None:
        shown = [(one.place, len(one.right), len(one.wrong), len(one.missed)) for one in found.images[:4]]
        assert shown[:3] == [(11, 0, 1, 0), (0, 2, 2, 1), (1, 2, 0, 1)]
        assert shown[3][1:] == (3, 0, 0)

    def test_confusions(self, found: Diagnosis) -> None:
        assert found.confusion.sum() - np.trace(found.confusion) == 4
        assert found.confusion[:3, :3].sum() - np.trace(found.confusion[:3, :3]) == 1
        assert (found.confusion[3, :3].sum(), found.confusion[:3, 3].sum()) == (2, 1)

    def test_doubts(self, found: Diagnosis) -> None:
        assert {(one["image_id"], one["type"]) for one in found.doubts} >= {(0, "wrong_label")}


def test_without_objects(tmp_path: Path) -> None:
    truth = load_truth(write(tmp_path, small_coco(annotations=[])))
    with pytest.raises(DataError, match=r"truth has no objects to compare with"):
        diagnose(truth, predictions_of(results_of(small_coco())))
