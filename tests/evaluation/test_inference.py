"""Predicting a data set: the order of images among ranks, and what is written."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from coco_truth import compressed, predictions_of
from toy_data import all_objects, read_toy

from scratch_det.config.load import load_config
from scratch_det.data.dataset import EvaluationSet
from scratch_det.distributed.group import Group
from scratch_det.distributed.launch import ALONE
from scratch_det.distributed.stop import StopFlag
from scratch_det.evaluation import inference
from scratch_det.evaluation.inference import predict_dataset, score_and_write
from scratch_det.evaluation.predictions import RESULTS_FILE
from scratch_det.modeling.ops import paste_masks


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

    def results_of(rank: int, gather: Callable) -> list[int]:
        group = SimpleNamespace(
            world=SimpleNamespace(rank=rank, size=size), size=size, stop=SimpleNamespace(requested=False),
            any=lambda flag: flag, gather=gather,
        )  # fmt: skip
        return predict_dataset(predict, EvaluationSet(cfg, data), data, group)["image_id"].tolist()

    shares: list[Any] = []

    def send(own: Any) -> list[Any]:
        shares.append(own)
        return []  # as on other ranks than 0

    for rank in range(size):
        assert results_of(rank, send) == []
    assert sorted(predicted) == list(range(1, 8))
    assert results_of(0, lambda own: shares) == [1, 2, 2, 4, 5, 5, 7]


def test_masks_are_pasted_beside_the_next_prediction(
    toy_recipe: Path, coco_factory: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    coco_factory("two", num_images=2)
    data, cfg, second = read_toy("two"), load_config(toy_recipe).cfg, threading.Event()
    boxes, masks = torch.tensor([[4.0, 4, 20, 20], [6, 2, 9, 30]]), torch.rand(2, 28, 28)

    def predict(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if batch[0]["image_id"] == data.images[1]["id"]:
            second.set()
        return [{"boxes": boxes, "scores": torch.ones(2), "labels": torch.zeros(2, dtype=int), "masks": masks}]

    def paste(*what: Any) -> list[dict[str, Any]]:
        assert second.wait(60)
        return paste_masks(*what)

    monkeypatch.setattr(inference, "paste_masks", paste)
    found = predict_dataset(predict, EvaluationSet(cfg, data), data, Group(ALONE, "cpu", StopFlag()))
    sizes = [(image["height"], image["width"]) for image in data.images]
    assert found["segmentation"].tolist() == [rle for size in sizes for rle in paste_masks(masks, boxes, *size)]


def test_an_error_in_pasting_comes_at_once(
    toy_recipe: Path, coco_factory: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    coco_factory("four", num_images=4)
    data, cfg, predicted = read_toy("four"), load_config(toy_recipe).cfg, []

    def predict(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        predicted.append(batch[0]["image_id"])
        return [{"boxes": torch.zeros(0, 4), "masks": torch.zeros(0, 28, 28)}]

    monkeypatch.setattr(inference, "paste_masks", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predict_dataset(predict, EvaluationSet(cfg, data), data, Group(ALONE, "cpu", StopFlag()))
    assert len(predicted) == 2


def test_what_is_written(toy_recipe: Path, tmp_path: Path) -> None:
    """The truth as predictions, as test-time augmentation names them."""
    data, cfg = read_toy("toy_val"), load_config(toy_recipe).cfg
    truth = [
        {"score": 0.5}
        | {name: one[name] for name in ("image_id", "category_id", "bbox")}
        | {"segmentation": compressed(one["segmentation"], *one["segmentation"]["size"])}
        for one in all_objects(data)
        if isinstance(one["segmentation"], dict) and not one["iscrowd"]
    ]
    data.entry.json_file.write_text("{}")  # what was read counts
    metrics = score_and_write(cfg, data, predictions_of(truth), tmp_path / "inference", "_TTA")
    assert json.loads((tmp_path / "inference_TTA" / RESULTS_FILE).read_text()) == truth
    assert list(metrics) == ["bbox_TTA", "segm_TTA"]
    assert metrics["bbox_TTA"]["AP"] > 10
