"""AP: the truth scores 100, numbers equal pycocotools', and what a user may get wrong is said rather than scored."""

import json
import math

import numpy as np
import pytest
from coco_truth import (
    HEIGHT,
    WIDTH,
    annotation,
    assert_same,
    evaluate,
    explain,
    predictions_of,
    results_of,
    small_coco,
    write,
)

from scratch_det.errors import DataError
from scratch_det.evaluation.average_precision import evaluate_predictions
from scratch_det.evaluation.low_ap import explain_low_ap
from scratch_det.evaluation.metrics import format_per_class, format_table
from scratch_det.evaluation.truth import load_truth


@pytest.fixture
def truth_file(tmp_path):
    return write(tmp_path, small_coco())


@pytest.fixture
def tiny_file(tiny_coco):
    return tiny_coco / "annotations" / "instances_val2017.json"


def assert_perfect(metrics: dict) -> None:
    for task, values in metrics.items():
        for name, value in values.items():
            assert math.isnan(value) or value == pytest.approx(100), (task, name, value)
        assert values["AP"] == pytest.approx(100)


def test_truth_scores_100(truth_file):
    metrics = evaluate(truth_file, results_of(small_coco()))
    assert_perfect(metrics)
    assert list(metrics["bbox"]) == ["AP", "AP50", "AP75", "APs", "APm", "APl", "AP-cat", "AP-dog", "AP-owl"]
    assert not any(math.isnan(value) for values in metrics.values() for value in values.values())


def test_two_classes_of_one_name_have_a_row_each(tmp_path):
    coco = small_coco()
    coco["categories"][2]["name"] = "cat"
    metrics = evaluate(write(tmp_path, coco), results_of(small_coco()), ("bbox",))
    assert [name for name in metrics["bbox"] if "-" in name] == ["AP-cat (id 2)", "AP-dog", "AP-cat (id 9)"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_truth_in_other_encodings(tmp_path, encoding):
    """What the validation of a data set reads, the evaluation at the end of a run reads too."""
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(small_coco()), encoding=encoding)
    assert len(load_truth(path).images) == 12


def test_truth_of_tiny_coco_scores_100(tiny_file):
    assert_perfect(evaluate(tiny_file, results_of(json.loads(tiny_file.read_text()))))


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("source", ["truth_file", "tiny_file"])
def test_numbers_equal_pycocotools(request, source, task):
    path = request.getfixturevalue(source)
    results = results_of(json.loads(path.read_text()), noise=4)
    reference = assert_same(path, results, task)
    metrics = evaluate(path, results, (task,))[task]
    expected = [value if value > -1 else math.nan for value in reference.stats[:6]]
    np.testing.assert_allclose(list(metrics.values())[:6], np.multiply(expected, 100), rtol=1e-12)
    assert 1 < metrics["AP"] < 99
    for k, category in enumerate(reference.params.catIds):
        precision = reference.eval["precision"][:, :, k, 0, -1]
        expected = precision[precision > -1].mean() * 100 if (precision > -1).any() else math.nan
        name = reference.cocoGt.cats[category]["name"]
        assert metrics[f"AP-{name}"] == pytest.approx(expected, rel=1e-12, nan_ok=True)


def test_segm_areas_come_from_masks_not_boxes(truth_file):
    results = results_of(small_coco(), noise=2)
    with_boxes = evaluate(truth_file, results, ("segm",))
    wrong_boxes = [result | {"bbox": [0.0, 0.0, 300.0, 200.0]} for result in results]
    assert evaluate(truth_file, wrong_boxes, ("segm",)) == with_boxes


def test_annotation_ids_may_start_at_zero(tmp_path):
    coco = small_coco()
    for entry in coco["annotations"]:
        entry["id"] -= 1
    assert_perfect(evaluate(write(tmp_path, coco), results_of(coco)))


def test_no_predictions_score_zero_and_are_explained(truth_file):
    metrics = evaluate(truth_file, [])
    assert set(metrics["bbox"].values()) == set(metrics["segm"].values()) == {0.0}
    assert "finds nothing" in explain(truth_file, [], metrics)


def test_no_truth_in_a_size_range_is_nan(tmp_path):
    coco = small_coco()
    coco["annotations"] = [entry for entry in coco["annotations"] if entry["area"] > 32**2]
    path = write(tmp_path, coco)
    for results in (results_of(coco), []):
        metrics = evaluate(path, results)["bbox"]
        assert math.isnan(metrics["APs"])
        assert not math.isnan(metrics["APm"])


def test_no_truth_at_all_is_nan(tmp_path):
    coco = small_coco(annotations=[])
    path = write(tmp_path, coco)
    metrics = evaluate(path, results_of(small_coco()))
    assert all(math.isnan(value) for value in metrics["bbox"].values())
    assert "no objects" in explain(path, [], metrics)


def test_single_class_has_no_per_class_ap(tmp_path):
    coco = small_coco(categories=[{"id": 2, "name": "cat"}])
    coco["annotations"] = [entry | {"category_id": 2} for entry in coco["annotations"]]
    metrics = evaluate(write(tmp_path, coco), results_of(coco))
    assert list(metrics["segm"]) == ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    assert format_per_class(metrics) == ""


def test_results_are_not_changed_and_nothing_is_printed(truth_file, capfd):
    results = results_of(small_coco(), noise=3)
    truth, predictions = load_truth(truth_file), predictions_of(results)
    metrics = evaluate_predictions(truth, predictions)
    explain_low_ap(truth, predictions, {"bbox": {"AP": 0.0}})
    again = load_truth(truth_file)
    assert (truth.images, truth.categories) == (again.images, again.categories)
    assert repr(predictions) == repr(predictions_of(results))
    assert "".join(capfd.readouterr()) == ""
    assert evaluate_predictions(truth, predictions) == metrics


def keypoint_coco(count: int) -> dict:
    coco = small_coco(categories=[{"id": 1, "name": "person", "keypoints": [f"k{i}" for i in range(count)]}])
    for entry in coco["annotations"]:
        x, y, w, h = entry["bbox"]
        points = [[x + w * i / count, y + h * (i % 3) / 3, 2] for i in range(count)]
        entry.update(category_id=1, keypoints=np.ravel(points).tolist(), num_keypoints=count)
    return coco


def keypoint_results(coco: dict) -> list[dict]:
    people = [entry for entry in coco["annotations"] if not entry["iscrowd"]]
    keys = ("image_id", "category_id", "bbox", "keypoints")
    return [{key: entry[key] for key in keys} | {"score": 0.9} for entry in people]


def test_keypoints(tmp_path):
    coco = keypoint_coco(17)
    metrics = evaluate(write(tmp_path, coco), keypoint_results(coco), ("keypoints",))
    assert_perfect(metrics)
    assert list(metrics["keypoints"]) == ["AP", "AP50", "AP75", "APm", "APl"]
    assert "-" in format_table(metrics).splitlines()[-1]


@pytest.mark.parametrize("with_boxes", [True, False])
def test_keypoint_numbers_equal_pycocotools(tmp_path, with_boxes):
    """Moved points and false positives; without boxes the size of a result is its points' extent."""
    coco = keypoint_coco(17)
    rng = np.random.default_rng(2)
    results = keypoint_results(coco)
    for place, result in enumerate(results):
        moved = np.reshape(result["keypoints"], (-1, 3)) + rng.normal(0, 4, (17, 3)) * (1, 1, 0)
        result.update(keypoints=moved.ravel().tolist(), score=float(rng.uniform()))
        if place % 5 == 0:
            result["image_id"] = result["image_id"] % 12 + 1
        if not with_boxes:
            del result["bbox"]
    path = write(tmp_path, coco)
    reference = assert_same(path, results, "keypoints").stats[:5]
    metrics = evaluate(path, results, ("keypoints",))["keypoints"]
    np.testing.assert_allclose(list(metrics.values()), reference * 100, rtol=1e-12)
    assert 1 < metrics["AP"] < 99


def test_keypoints_of_other_categories_and_hidden_ones(tmp_path):
    """An object of a category without keypoints needs none; an object counts with v 1 too, but not with v 0 alone."""
    coco = keypoint_coco(17)
    for entry in coco["annotations"]:
        del entry["num_keypoints"]
    hidden, unlabelled = coco["annotations"][:2]
    hidden["keypoints"][2::3] = [1] * 17
    unlabelled["keypoints"] = [0] * 51
    coco["categories"].append({"id": 7, "name": "dog"})
    coco["annotations"].append(annotation(99, 1, 7, (1.0, 1.0, 80.0, 80.0)))
    results = [one for one in keypoint_results({**coco, "annotations": coco["annotations"][2:-1]})]
    path = write(tmp_path, coco)
    missed = evaluate(path, results, ("keypoints",))["keypoints"]
    found = evaluate(path, [*results, *keypoint_results({**coco, "annotations": [hidden]})], ("keypoints",))
    assert list(missed) == ["AP", "AP50", "AP75", "APm", "APl"]  # of one category
    assert missed["AP"] < 99
    assert_perfect(found)


def one_class(boxes: list[tuple], **fields) -> dict:
    """Objects of one class in one image; ``fields`` of the first one."""
    annotations = [annotation(number, 1, 2, box) for number, box in enumerate(boxes, start=1)]
    annotations[0] |= fields
    images = [{"id": 1, "file_name": "1.jpg", "width": WIDTH, "height": HEIGHT}]
    return small_coco(images=images, annotations=annotations, categories=[{"id": 2, "name": "cat"}])


def found_at(*boxes: tuple) -> list[dict]:
    """Results by falling score."""
    return [
        {"image_id": 1, "category_id": 2, "bbox": list(box), "score": 0.9 - place / 100}
        for place, box in enumerate(boxes)
    ]


class TestByHand:
    def test_iou_thresholds(self, tmp_path):
        """An IoU of 0.72 counts at 0.50, 0.55, 0.60, 0.65 and 0.70."""
        path = write(tmp_path, one_class([(10.0, 10.0, 100.0, 100.0)]))
        metrics = evaluate(path, found_at((10.0, 10.0, 100.0, 72.0)), ("bbox",))["bbox"]
        assert [metrics[key] for key in ("AP", "AP50", "AP75")] == pytest.approx([50, 100, 0])

    @pytest.mark.parametrize(("side", "area"), [(31.9, "APs"), (32.1, "APm"), (95.9, "APm"), (96.1, "APl")])
    def test_area_ranges(self, tmp_path, side, area):
        path = write(tmp_path, one_class([(5.0, 5.0, side, side)]))
        metrics = evaluate(path, found_at((5.0, 5.0, side, side)), ("bbox",))["bbox"]
        assert {key for key in ("APs", "APm", "APl") if not math.isnan(metrics[key])} == {area}
        assert metrics[area] == pytest.approx(100)

    @pytest.mark.parametrize("iscrowd", [1, 0])
    def test_detections_in_a_crowd_are_no_errors(self, tmp_path, iscrowd):
        """Three in the crowd, of higher scores than the one that is right; as an object it is missed."""
        crowd, alone = (0.0, 0.0, 200.0, 100.0), (220.0, 120.0, 60.0, 60.0)
        path = write(tmp_path, one_class([crowd, alone], iscrowd=iscrowd))
        inside = [(10.0 + 50 * i, 10.0, 40.0, 60.0) for i in range(3)]
        metrics = evaluate(path, found_at(*inside, alone), ("bbox",))["bbox"]
        expected = 100 if iscrowd else 100 * (51 * 0.25) / 101  # of two objects one, at precision 1/4
        assert metrics["AP50"] == pytest.approx(expected)

    def test_at_most_a_hundred_detections_of_an_image(self, tmp_path):
        right = (10.0, 10.0, 50.0, 50.0)
        path = write(tmp_path, one_class([right]))
        wrong = [(100.0, 100.0, 20.0, 20.0)] * 99
        assert evaluate(path, found_at(*wrong, right), ("bbox",))["bbox"]["AP50"] == pytest.approx(1)
        assert evaluate(path, found_at(*wrong, wrong[0], right), ("bbox",))["bbox"]["AP50"] == 0


def test_keypoint_sigmas_must_match(tmp_path):
    coco = keypoint_coco(5)
    path, results = write(tmp_path, coco), keypoint_results(coco)
    assert_perfect(evaluate(path, results, ("keypoints",), oks_sigmas=[0.05] * 5))
    with pytest.raises(DataError, match="5 keypoints in the json but 17 OKS sigmas"):
        evaluate(path, results, ("keypoints",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 99}, "image ids are not in the json"),
        ({"category_id": 0}, "not contiguous labels"),
    ],
)
def test_ids_unknown_to_the_json_are_rejected(truth_file, change, message):
    results = results_of(small_coco())
    with pytest.raises(DataError, match=message):
        evaluate(truth_file, [results[0] | change, *results[1:]])


def test_missing_masks_are_rejected(tmp_path):
    coco = small_coco()
    boxes = [{k: v for k, v in result.items() if k != "segmentation"} for result in results_of(coco)]
    with pytest.raises(DataError, match="leave 'segm' out"):
        evaluate(write(tmp_path, coco), boxes)
    assert_perfect(evaluate(write(tmp_path, coco), boxes, ("bbox",)))
    for entry in coco["annotations"]:
        del entry["segmentation"]
    with pytest.raises(DataError, match="needs 'segmentation' in every annotation"):
        evaluate(write(tmp_path, coco), results_of(small_coco()))


def test_unknown_iou_type_is_rejected(truth_file):
    with pytest.raises(DataError, match="unknown iou type 'box'"):
        evaluate(truth_file, [], ("box",))


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
    metrics = evaluate(truth_file, results, ("bbox",))
    words = explain(truth_file, results, metrics)
    assert cause in words.splitlines()[-1]
    assert "predictions: 33" in words
    assert len(words.splitlines()) <= 8


def test_a_good_ap_needs_no_explanation(truth_file):
    assert explain(truth_file, [], {"bbox": {"AP": 1.0}}) == ""
