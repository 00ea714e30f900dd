"""What other tools write is read where its meaning is clear, with a notice; damaged masks are found by the check."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as mask_api
from toy_data import all_objects, config, read_toy, rejection

from scratch_det.data.catalog import lookup
from scratch_det.data.coco import inspect_coco
from scratch_det.data.dataset import TrainingSet
from scratch_det.data.rle import run_lengths
from scratch_det.errors import DataError
from scratch_det.evaluation.average_precision import evaluate_predictions
from scratch_det.evaluation.inference import score_and_write
from scratch_det.evaluation.predictions import RESULTS_FILE, Predictions, joined, read_predictions
from scratch_det.evaluation.truth import truth_of

SQUARE = [[4, 6, 36, 6, 36, 38, 4, 38]]


def found(name: str = "toy_train", need_masks: bool = True) -> list[tuple[str, str]]:
    return [(one.severity, str(one)) for one in inspect_coco(lookup(name), need_masks)[1]]


def edited(**changes: Any) -> Callable[[dict], None]:
    """A change of the first annotation, whose mask is a polygon."""
    return lambda content: content["annotations"][0].update({"segmentation": SQUARE, **changes})


def perfect(data: Any) -> Predictions:
    """The truth as predictions."""
    parts = []
    for k in range(len(data.images)):
        objects = [one for one in data.objects(k) if one["segmentation"] and not one["iscrowd"]]
        height, width = data.images[k]["height"], data.images[k]["width"]
        rows: dict[str, Any] = {
            name: np.array([one[name] for one in objects], object) for name in ("image_id", "category_id")
        }
        rows["bbox"] = np.array([one["bbox"] for one in objects], float).reshape(-1, 4)
        rows["score"] = np.full(len(objects), 0.9)
        rows["segmentation"] = np.array([encoded(one["segmentation"], height, width) for one in objects], object)
        parts.append(rows)
    return joined(parts)


def encoded(mask: Any, height: int, width: int) -> dict[str, Any]:
    mask = [polygon.tolist() for polygon in mask] if isinstance(mask, list) else mask
    rle = mask_api.frPyObjects(mask, height, width)
    rle = mask_api.merge(rle) if isinstance(rle, list) else rle
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


class TestMasks:
    @pytest.mark.parametrize(
        ("counts", "said"),
        [
            *((text, "RLE does not fit their image") for text in ("b'ZX1d0'", "", "P", "o" * 20 + "0", "ü1", "12")),
            *((runs, "RLE does not fit their image") for runs in ([96 * 64 + 5, -5], [9], [2**31, 2**33])),
            *((other, "nor RLE") for other in ([0.5, 96 * 64 - 0.5], [None], None)),
        ],
    )  # fmt: skip
    def test_every_one_is_decoded(self, coco_factory, counts: Any, said: str) -> None:
        coco_factory(change=edited(segmentation={"size": [64, 96], "counts": counts}))
        [(severity, text)] = found()
        assert severity == "error"
        assert said in text
        assert text.endswith(": id 101 (image_id 1)")
        assert found(need_masks=False) == []

    def test_a_size_below_0(self, coco_factory) -> None:
        coco_factory(change=edited(segmentation={"size": [-64, -96], "counts": [100, 44, 6000]}))
        assert ["RLE does not fit their image" in text for _, text in found()] == [True]

    def test_whole_numbers_may_be_floats(self, coco_factory) -> None:
        mask = {"size": [64.0, 96.0], "counts": [100.0, 44.0, 6000.0]}
        coco_factory(change=edited(segmentation=mask, bbox=[1, 0, 2, 64], area=44))
        assert found() == []
        assert read_toy().objects(0)[0]["segmentation"] == {"size": [64, 96], "counts": [100, 44, 6000]}

    def test_a_chunk_of_texts(self) -> None:
        """Decoded together as pycocotools decodes each; a broken one spoils no other."""
        rng, rles = np.random.default_rng(0), []
        for _ in range(50):
            pixels = rng.random(rng.integers(1, 60, 2)) < rng.random()
            rles.append(mask_api.encode(np.asfortranarray(pixels.astype(np.uint8))))
        texts = [rle["counts"] for rle in rles]
        for rle, runs in zip(rles, run_lengths(texts), strict=True):
            assert mask_api.frPyObjects({"size": rle["size"], "counts": runs}, *rle["size"])["counts"] == rle["counts"]
        assert run_lengths(["", *texts[:2], "P", texts[2].decode()]) == [
            [-1],
            *run_lengths(texts[:2]),
            [-1],
            *run_lengths(texts[2:3]),
        ]

    def test_a_stray_polygon_is_left_out(self, coco_factory) -> None:
        coco_factory(change=edited(segmentation=[[1, 1, 5, 5], *SQUARE, [], [1, 2, 3, 4, 5, 6, 7]]))
        [(severity, text)] = found()
        assert (severity, text[:13]) == ("notice", "1 annotations")
        assert [polygon.tolist() for polygon in read_toy().objects(0)[0]["segmentation"]] == SQUARE

    @pytest.mark.parametrize("bbox", [[0, 0, 0, 0], [3, 4, 5, 0]])
    @pytest.mark.parametrize("mask", [[], None, [[1, 1, 1, 1]]])
    def test_an_empty_object(self, coco_factory, bbox: list[int], mask: Any) -> None:
        """One fault is one problem, and what leaves out empty boxes leaves it out of masks too."""
        coco_factory(change=edited(segmentation=mask, bbox=bbox, area=0))
        assert [text for _, text in found()] == ["1 annotations with a box of no width or height: id 101"]
        coco_factory("other", change=edited(segmentation=mask, bbox=bbox, area=0), drop_empty_boxes=True)
        assert found("other") == []
        data = read_toy("other")
        assert len(data.training_objects(0)) == 1
        assert len(TrainingSet(config(), [data])[0]["masks"]) in (1, 2)
        metrics = evaluate_predictions(truth_of(data), perfect(data), ["segm"])
        assert metrics["segm"]["AP"] == pytest.approx(100)


class TestWithoutMask:
    def change(self, content: dict[str, Any]) -> None:
        for one, mask in zip(content["annotations"], ([], None, "crowd", [[1, 2, 3, 4]]), strict=False):
            one["segmentation"] = one["segmentation"] if mask == "crowd" else mask

    def test_the_message_names_the_switch(self, coco_factory) -> None:
        coco_factory(change=self.change)
        message = rejection(read_toy)
        assert (
            "3 annotations without a mask: no segmentation, or no polygon of 3+ points: id 101 (image_id 1), 102"
            in message
        )
        assert "'drop_objects_without_mask: true' in the data set's catalog entry" in message
        assert found(need_masks=False) == []

    def test_drop(self, coco_factory) -> None:
        coco_factory(change=self.change, drop_objects_without_mask=True)
        assert found() == []
        data = read_toy()
        assert [len(data.objects(k)) for k in range(4)] == [1, 1, 2, 0]
        assert data.object_counts().tolist() == [0, 1, 2, 0]
        assert len(TrainingSet(config(), [data])) == 2
        assert len(truth_of(data).objects().images) == 4
        metrics = evaluate_predictions(truth_of(data), perfect(data), ["bbox", "segm"])
        assert [metrics[task]["AP"] for task in ("bbox", "segm")] == pytest.approx([100, 100])
        assert len(all_objects(read_toy(need_masks=False))) == 7


class TestIds:
    @pytest.mark.parametrize(
        "ids",
        [["b.jpg", "a.jpg", "10", "9"], [2**63, -7, 2**70, 3.5], [1, "1x", 2**64, "ä"], [3.0, -1, 0, 2**62]],
        ids=["text", "numbers", "both", "whole"],
    )
    @pytest.mark.parametrize("section", ["image", "category"])
    def test_any_kind(self, coco_factory, tmp_path: Path, ids: list[Any], section: str) -> None:
        """Scoring numbers them; the file of results has the json's ids."""
        entries = {"image": "images", "category": "categories"}[section]

        def change(content: dict[str, Any]) -> None:
            new = dict(zip([one["id"] for one in content[entries]], ids, strict=False))
            for one in content[entries]:
                one["id"] = new[one["id"]]
            for one in content["annotations"]:
                one[f"{section}_id"] = new[one[f"{section}_id"]]

        coco_factory(change=change)
        whole = all(isinstance(one, int | float) and one % 1 == 0 and one < 2**63 for one in ids)
        assert [severity for severity, _ in found()] == ([] if whole else ["notice"])
        data = read_toy()
        assert {one["id"] for one in getattr(data, entries)} == set(ids[: len(getattr(data, entries))])
        assert len(all_objects(data)) == 7
        metrics = score_and_write(config(), data, perfect(data), tmp_path / "inference", "")
        assert [metrics[task]["AP"] for task in ("bbox", "segm")] == pytest.approx([100, 100])
        path = tmp_path / "inference" / RESULTS_FILE
        assert {one[f"{section}_id"] for one in json.loads(path.read_text())} <= set(ids)
        again = evaluate_predictions(truth_of(data), read_predictions(path), ["bbox", "segm"])
        assert again == metrics

    def test_names_of_classes_of_any_kind(self, coco_factory) -> None:
        coco_factory(change=lambda c: [one.update(name=[one["id"]]) for one in c["categories"]])
        metrics = evaluate_predictions(truth_of(read_toy()), perfect(read_toy()), ["bbox"])
        assert metrics["bbox"]["AP-[5]"] == pytest.approx(100)

    def test_of_annotations(self, coco_factory) -> None:
        coco_factory(change=edited(id=10**400))
        assert found() == []

    def test_sizes_may_be_floats(self, coco_factory) -> None:
        coco_factory(change=lambda c: c["images"][0].update(width=96.0))
        [(severity, text)] = found()
        assert (severity, text) == ("notice", "1 images whose width or height is not written as a whole number: id 1")
        assert read_toy().images[0]["width"] == 96

    @pytest.mark.parametrize("box", [[0, 0, 0, 0], "none"])
    def test_orphans_are_left_out(self, coco_factory, box: Any) -> None:
        def change(content: dict[str, Any]) -> None:
            content["annotations"].insert(0, {"id": 1, "image_id": 999, "category_id": 2, "bbox": box})
            content["annotations"].append({"id": 2, "image_id": -999, "category_id": 2, "bbox": [1, 2, 3, 4], "area": 1,
                                           "iscrowd": 0, "segmentation": SQUARE})  # fmt: skip

        coco_factory(change=change)
        assert found() == [
            ("notice", "2 annotations of images that are not listed: id 1 (image_id 999), 2 (image_id -999)")
        ]
        data = read_toy()
        assert [len(data.objects(k)) for k in range(4)] == [3, 2, 2, 0]
        assert data.object_counts().tolist() == [2, 2, 2, 0]
        assert len(truth_of(data).objects().images) == 7


class TestCrowds:
    @pytest.mark.parametrize(
        ("value", "is_crowd"),
        [(None, 0), ("0", 0), ("false", 0), (False, 0), (0.0, 0), ("", 0), ("1", 1), ("true", 1), (1.0, 1), (2, 1)],
    )
    def test_one_meaning_in_training_and_scoring(self, coco_factory, value: Any, is_crowd: int) -> None:
        coco_factory(change=edited(iscrowd=value))
        assert all(severity == "notice" for severity, _ in found())
        data = read_toy()
        assert data.objects(0)[0]["iscrowd"] == is_crowd
        assert len(data.training_objects(0)) == 2 - is_crowd
        assert truth_of(data).objects().crowd.sum() == 1 + is_crowd
        metrics = evaluate_predictions(truth_of(data), perfect(data), ["segm"])
        assert metrics["segm"]["AP"] == pytest.approx(100)


class TestWithoutAnnotations:
    def test_it_is_predicted_on_and_not_scored(self, coco_factory, tmp_path: Path) -> None:
        coco_factory("other")
        predictions = perfect(read_toy("other"))
        coco_factory(change=lambda c: c.pop("annotations"))
        [(severity, text)] = found()
        assert (severity, text[:24]) == ("notice", "no list 'annotations': i")
        data = read_toy()
        assert score_and_write(config(), data, predictions, tmp_path / "inference", "") == {}
        assert len(read_predictions(tmp_path / "inference" / RESULTS_FILE)["score"]) == 6

    def test_it_is_not_trained_on(self, coco_factory) -> None:
        coco_factory(change=lambda c: c.pop("annotations"))
        with pytest.raises(DataError, match="data set is empty for training"):
            TrainingSet(config(), [read_toy()])
