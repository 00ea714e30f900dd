"""PASCAL VOC's box AP: matching, ignored objects, thresholds and both curves, by hand."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from coco_truth import evaluate, predictions_of

from scratch_det.data.catalog import VOC_AP
from scratch_det.evaluation.truth import load_truth
from scratch_det.evaluation.voc import CURVES, evaluate_voc, voc_11point, voc_area

Box = tuple[float, float, float, float]  # x, y, width, height
A, B, C, D = ((100.0 * i, 0.0, 50.0, 50.0) for i in range(4))
NOWHERE = (0.0, 500.0, 50.0, 50.0)
IMAGE = {"id": 1, "file_name": "1.jpg", "width": 1000, "height": 600}


def voc(folder: Path, results: list[dict], ap: str) -> dict[str, float]:
    return evaluate_voc(load_truth(folder / "truth.json"), predictions_of(results), ap)["bbox"]


@pytest.fixture
def ap50(tmp_path: Path) -> Callable[..., float]:
    """``ap50(objects, found, ap, difficult=...)``: of boxes in one image; ``found`` in the order of their scores."""

    def compute(
        objects: list[Box],
        found: list[Box],
        ap: str,
        difficult: tuple[Box, ...] = (),
        key: str = "AP50",
        ignored_by: str = "ignore",
    ) -> float:
        annotations = [
            {"id": i, "image_id": 1, "category_id": 1, "bbox": list(box), ignored_by: int(box in difficult)}
            for i, box in enumerate([*objects, *difficult], start=1)
        ]
        content = {
            "images": [IMAGE],
            "annotations": annotations,
            "categories": [{"id": 1, "name": "dog"}],
        }
        (tmp_path / "truth.json").write_text(json.dumps(content))
        results = [
            {"image_id": 1, "category_id": 1, "bbox": list(box), "score": 0.9 - i / 100} for i, box in enumerate(found)
        ]
        return voc(tmp_path, results[::-1], ap)[key]

    return compute


class TestAp:
    def test_every_name_has_a_curve(self) -> None:
        assert tuple(CURVES) == VOC_AP

    @pytest.mark.parametrize(("ap", "expected"), [("voc_area", 5 / 9), ("voc_11point", 6 / 11)])
    def test_duplicates_are_errors_and_difficult_ones_nothing(self, ap50: Callable, ap: str, expected: float) -> None:
        """Right, passed over, duplicate, right, nowhere: recall 1/3, 1/3, 2/3, 2/3, precision 1, 1/2, 2/3, 1/2."""
        assert ap50([A, B, C], [A, D, A, B, NOWHERE, D], ap, difficult=(D,)) == pytest.approx(100 * expected)

    @pytest.mark.parametrize("ap", VOC_AP)
    def test_without_an_error_it_is_100_and_without_detections_0(self, ap50: Callable, ap: str) -> None:
        assert ap50([A, B], [B, A, D], ap, difficult=(D,)) == pytest.approx(100)
        assert ap50([A, B], [], ap) == 0
        assert np.isnan(ap50([], [A], ap, difficult=(D,)))

    def test_each_goes_to_its_best_object(self, ap50: Callable, tmp_path: Path) -> None:
        """The second one overlaps a free object too, by 0.67, but the taken one more, by 0.82: COCO would count it."""
        near = (0.0, 15.0, 50.0, 50.0)
        found = [A, (0.0, 5.0, 50.0, 50.0)]
        assert ap50([A, near], found, "voc_area") == pytest.approx(50)
        results = [{"image_id": 1, "category_id": 1, "bbox": [*box], "score": 1 - i / 9} for i, box in enumerate(found)]
        assert evaluate(tmp_path / "truth.json", results, ("bbox",))["bbox"]["AP50"] == pytest.approx(100)

    @pytest.mark.parametrize(
        ("height", "key", "expected"), [(25, "AP50", 0), (26, "AP50", 100), (41, "AP75", 100), (41, "AP", 70)]
    )
    def test_thresholds(self, ap50: Callable, height: float, key: str, expected: float) -> None:
        assert ap50([A], [(0.0, 0.0, 50.0, height)], "voc_area", key=key) == pytest.approx(expected)

    def test_three_of_ten_reach_the_point_at_0_3(self, ap50: Callable) -> None:
        objects = [(100.0 * i, 0.0, 50.0, 50.0) for i in range(10)]
        assert ap50(objects, objects[:3], "voc_11point") == pytest.approx(100 * 4 / 11)

    @pytest.mark.parametrize("ap", VOC_AP)
    def test_crowds_are_ignored_as_difficult_objects_are(self, ap50: Callable, ap: str) -> None:
        assert ap50([A, B], [D, A, D, B], ap, difficult=(D,), ignored_by="iscrowd") == pytest.approx(100)
        assert ap50([A, B], [C, A, C, B], ap, difficult=(D,), ignored_by="iscrowd") < 60

    @pytest.mark.parametrize(("width", "expected"), [(26, 100), (25, 50)])
    def test_too_little_of_a_difficult_object_is_an_error(self, ap50: Callable, width: float, expected: float) -> None:
        """An IoU of 0.52 with it is passed over, one of 0.5 is not: precision 0, then 1/2."""
        x, y, _, height = D
        assert ap50([A], [(x, y, width, height), A], "voc_area", difficult=(D,)) == pytest.approx(expected)

    def test_two_classes(self, tmp_path: Path) -> None:
        """A dog with an IoU of 0.82, right at seven thresholds, and a cat that is missed."""
        content = {
            "images": [IMAGE],
            "annotations": [{"id": i, "image_id": 1, "category_id": i, "bbox": list(A)} for i in (1, 2)],
            "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}],
        }
        (tmp_path / "truth.json").write_text(json.dumps(content))
        found = [{"image_id": 1, "category_id": 1, "bbox": [0.0, 0.0, 50.0, 41.0], "score": 0.5}]
        assert voc(tmp_path, found, "voc_area") == pytest.approx(
            {"AP": 35, "AP50": 50, "AP75": 50, "AP-dog": 70, "AP-cat": 0, "AP50-dog": 100, "AP50-cat": 0}
        )

    def test_a_detection_is_right_in_its_own_image_alone(self, tmp_path: Path) -> None:
        """Image 2 has the object, image 1 the detection with the higher score at its place: precision 0, then 1/2."""
        content = {
            "images": [{**IMAGE, "id": i} for i in (1, 2)],
            "annotations": [{"id": 1, "image_id": 2, "category_id": 1, "bbox": list(A)}],
            "categories": [{"id": 1, "name": "dog"}],
        }
        (tmp_path / "truth.json").write_text(json.dumps(content))
        found = [{"image_id": i, "category_id": 1, "bbox": list(A), "score": 1 / i} for i in (1, 2)]
        assert voc(tmp_path, found, "voc_area") == pytest.approx({"AP": 50, "AP50": 50, "AP75": 50})

    def test_curves(self) -> None:
        """Recall 0.2, 0.2, 0.4, 0.4, 0.6 at precision 1, 1/2, 2/3, 1/2, 3/5: below the envelope 1, 2/3, 3/5."""
        recall, precision = np.array([0.2, 0.2, 0.4, 0.4, 0.6]), np.array([1, 1 / 2, 2 / 3, 1 / 2, 3 / 5])
        assert voc_area(recall, precision) == pytest.approx(0.2 * (1 + 2 / 3 + 3 / 5))
        assert voc_11point(recall, precision) == pytest.approx((3 * 1 + 2 * 2 / 3 + 2 * 3 / 5) / 11)
