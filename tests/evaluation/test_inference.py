"""From detections to COCO results: ids, coordinates, the order of images among ranks, and what is written."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toy_data import read_toy

from scratch_det.config.load import load_config
from scratch_det.data.dataset import EvaluationSet
from scratch_det.evaluation.inference import RESULTS_FILE, predict_dataset, score_and_write, to_results


def test_results_have_json_ids_and_cocos_coordinates() -> None:
    found = {
        "boxes": torch.tensor([[1.0, 2, 11, 22], [0, 0, 4, 4]]),
        "scores": torch.tensor([0.75, 0.5]),
        "labels": torch.tensor([2, 0]),
        "masks": ["first", "second"],
        "keypoints": torch.tensor([[[1.5, 2.5, 0.25]], [[3.0, 4.0, 1.0]]]),
    }
    first, second = to_results(7, found, [3, 5, 9])
    assert list(first.items()) == [
        ("image_id", 7), ("category_id", 9), ("bbox", [1, 2, 10, 20]), ("score", 0.75), ("segmentation", "first"),
        ("keypoints", [1, 2, 0.25]),
    ]  # fmt: skip
    assert (second["category_id"], second["bbox"], second["keypoints"]) == (3, [0, 0, 4, 4], [2.5, 3.5, 1])
    assert found["boxes"][0].tolist() == [1, 2, 11, 22]
    empty = {name: found[name][:0] for name in ("boxes", "scores", "labels", "masks", "keypoints")}
    assert to_results(7, empty, [3, 5, 9]) == []


@pytest.mark.parametrize("size", [1, 2, 3])
def test_results_are_in_the_jsons_order(size: int, toy_recipe: Path, coco_factory: Callable) -> None:
    """Seven images, each predicted by one rank; an image may have no result or two."""
    coco_factory("seven", num_images=7)
    data, cfg = read_toy("seven"), load_config(toy_recipe).cfg
    predicted: list[int] = []

    def predict(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        predicted.extend(sample["image_id"] for sample in batch)
        counts = [sample["image_id"] % 3 for sample in batch]
        return [
            {"boxes": torch.zeros(n, 4), "scores": torch.zeros(n), "labels": torch.zeros(n, dtype=int)} for n in counts
        ]

    def results_of(rank: int, gather: Callable) -> list[dict[str, Any]]:
        group = SimpleNamespace(
            world=SimpleNamespace(rank=rank, size=size), size=size, stop=SimpleNamespace(requested=False),
            any=lambda flag: flag, gather=gather,
        )  # fmt: skip
        return predict_dataset(predict, EvaluationSet(cfg, data), data, group)

    shares: list[Any] = []

    def send(own: Any) -> list[Any]:
        shares.append(own)
        return []  # as on other ranks than 0

    for rank in range(size):
        assert results_of(rank, send) == []
    assert sorted(predicted) == list(range(1, 8))
    results = results_of(0, lambda own: shares)
    assert [result["image_id"] for result in results] == [1, 2, 2, 4, 5, 5, 7]


def test_what_is_written(toy_recipe: Path, tmp_path: Path) -> None:
    """The truth as predictions, as test-time augmentation names them."""
    data, cfg = read_toy("toy_val"), load_config(toy_recipe).cfg
    objects = [one for found in data.annotations.values() for one in found if not one["iscrowd"]]
    truth = [
        {
            "image_id": one["image_id"], "category_id": one["category_id"], "score": 0.5, "bbox": one["bbox"],
            "segmentation": one["segmentation"],
        }
        for one in objects
        if isinstance(one["segmentation"], dict) and isinstance(one["segmentation"]["counts"], str)
    ]  # fmt: skip
    metrics = score_and_write(cfg, data, truth, tmp_path / "inference", "_TTA")
    assert json.loads((tmp_path / "inference_TTA" / RESULTS_FILE).read_text()) == truth
    assert list(metrics) == ["bbox_TTA", "segm_TTA"]
    assert metrics["bbox_TTA"]["AP"] > 10
