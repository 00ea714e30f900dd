"""Precision, recall and scores are pycocotools' to the last bit on made-up data of every kind."""

from pathlib import Path

import numpy as np
import pytest
from coco_truth import HEIGHT, WIDTH, annotation, assert_same, compressed, polygon, predictions_of, small_coco, write

from scratch_det.evaluation.average_precision import evaluate_predictions, run_cocoeval
from scratch_det.evaluation.truth import load_truth

IDS = (
    lambda n: n,
    lambda n: n - 4,
    lambda n: 2**53 + 1 + n,
    lambda n: 997 * n % 1009,
)  # from 0; negative; large; mixed
POINTS = 5


def made_up(seed: int) -> tuple[dict, list[dict]]:
    """Few images or many, classes without an object, crowds, equal scores, results in any order, ids of all kinds."""
    rng, as_id = np.random.default_rng(seed), IDS[seed % len(IDS)]
    images, classes = int(rng.integers(1, 9)), int(rng.integers(1, 6))
    number = lambda count: as_id(int(rng.integers(count)))  # noqa: E731
    coco = small_coco(
        images=[{"id": as_id(i), "file_name": f"{i}.jpg", "width": WIDTH, "height": HEIGHT} for i in range(images)],
        categories=[{"id": as_id(i), "name": f"c{i}", "keypoints": ["a", "b"]} for i in range(classes)],
        annotations=[],
    )
    for place in range(int(rng.integers(0, 6 * images))):
        size = np.exp(rng.uniform(1.5, 5, 2))
        box = (*(rng.random(2) * (WIDTH, HEIGHT) * 0.7).round(1).tolist(), *size.round(1).tolist())
        kind = rng.choice(["polygon", "rle", "crowd"], p=[0.7, 0.2, 0.1])
        one = annotation(place, number(images), number(classes), box, kind)
        visible = rng.integers(0, 3, POINTS)
        points = np.column_stack([box[:2] + rng.random((POINTS, 2)) * size, visible]) * (visible > 0)[:, None]
        coco["annotations"].append(one | {"keypoints": points.ravel().tolist(), "num_keypoints": int(sum(visible > 0))})
        coco["annotations"][-1]["area"] *= rng.uniform(0.5, 1)  # a mask's, rather than the box's
    results = []
    for _ in range(int(rng.integers(1, 80 * images))):
        near = coco["annotations"][rng.integers(len(coco["annotations"]))] if coco["annotations"] else None
        box = np.array(near["bbox"] if near else (20.0, 20.0, 50.0, 60.0)) + rng.normal(0, 4, 4)
        box[2:] = np.abs(box[2:]) + 1
        points = np.reshape(near["keypoints"] if near else np.zeros(3 * POINTS), (-1, 3)) + rng.normal(
            0, 3, (POINTS, 3)
        )
        results.append({
            "image_id": near["image_id"] if near and rng.random() < 0.8 else number(images),
            "category_id": near["category_id"] if near and rng.random() < 0.8 else number(classes),
            "score": round(float(rng.random()), 1 if seed % 2 else 9), "bbox": box.tolist(),
            "segmentation": compressed(polygon(*box), HEIGHT, WIDTH), "keypoints": points.ravel().tolist(),
        })  # fmt: skip
    return coco, results


@pytest.mark.parametrize("seed", range(16))
def test_equals_pycocotools(tmp_path: Path, seed: int) -> None:
    coco, results = made_up(seed)
    for one in coco["annotations"]:
        one["id"] += 1  # pycocotools takes 0 for unmatched
    path = write(tmp_path, coco)
    for task in ("bbox", "segm", "keypoints"):
        assert_same(path, results, task, [0.05, 0.1, 0.2, 0.1, 0.02] if task == "keypoints" else None)


def test_annotation_ids_say_nothing(tmp_path: Path) -> None:
    """From 0, from 1, or falling."""
    coco, results = made_up(2)
    expected = None
    for ids in (range(100), range(1, 100), range(100, 0, -1)):
        coco["annotations"] = [one | {"id": number} for one, number in zip(coco["annotations"], ids, strict=False)]
        metrics = evaluate_predictions(load_truth(write(tmp_path, coco)), predictions_of(results))
        assert expected in (None, metrics)
        expected = metrics
    assert expected["bbox"]["AP"] > 1


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_images_by_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    """How many images are matched at once changes nothing."""
    coco, results = made_up(3)
    truth, predictions = load_truth(write(tmp_path, coco)), predictions_of(results)
    whole = run_cocoeval(truth, predictions, task).eval
    monkeypatch.setattr("scratch_det.evaluation.average_precision.IMAGES_AT_ONCE", 2)
    parts = run_cocoeval(truth, predictions, task).eval
    assert all(np.array_equal(parts[name], whole[name]) for name in ("precision", "recall", "scores"))
    assert len(truth.images) > 2
