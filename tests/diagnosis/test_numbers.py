"""A diagnosis: AP as the evaluation has it, and each kind of error where it was put."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from coco_truth import evaluate, predictions_of, results_of, small_coco, write

from scratch_det.diagnosis.numbers import Diagnosis, diagnose
from scratch_det.errors import DataError
from scratch_det.evaluation.predictions import joined
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


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_class_without_objects_and_no_detections(tmp_path: Path) -> None:
    content = small_coco()
    content["annotations"] = [one for one in content["annotations"] if one["category_id"] != 5]
    truth = load_truth(write(tmp_path, content))
    assert np.isnan(diagnose(truth, predictions_of(results_of(content))).ap()).tolist() == [False, True, False]
    assert diagnose(truth, joined([])).ap()[0] == 0


def test_difficult_objects_count_as_crowds_where_vocs_ap_is_the_score(tmp_path: Path) -> None:
    content = small_coco()
    for one in content["annotations"]:
        one["ignore"] = int(one["image_id"] == 1)
    truth, predictions = load_truth(write(tmp_path, content)), predictions_of(sure(results_of(content)))
    assert diagnose(truth, predictions).counts.sum() == 33
    voc = truth._replace(data=replace(truth.data, entry=replace(truth.data.entry, ap="voc_area")))
    found = diagnose(voc, predictions)
    assert found.counts.sum() == 33 - sum(one["ignore"] for one in content["annotations"])
    assert all(one.f1 == 1 for one in found.images)


@pytest.mark.parametrize("is_crowd", [0, 1])
def test_without_objects(tmp_path: Path, is_crowd: int) -> None:
    annotations = [one | {"iscrowd": 1} for one in small_coco()["annotations"]] if is_crowd else []
    truth = load_truth(write(tmp_path, small_coco(annotations=annotations)))
    with pytest.raises(DataError, match=r"truth has no objects to compare with"):
        diagnose(truth, predictions_of(results_of(small_coco())))


def test_without_masks(truth: Truth) -> None:
    predictions = predictions_of(results_of(small_coco()))
    del predictions["segmentation"]
    with pytest.raises(DataError, match=r"no result holds 'segmentation', which the diagnosis of segm needs"):
        diagnose(truth, predictions, "segm")
