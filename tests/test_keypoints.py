"""Keypoints of a json: what is read, mirrored, rejected, trained on and scored, with either backend."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from coco_truth import evaluate
from conftest import POINTS, edit, load_command
from run_folder import interrupted_after, is_same, lines, read
from toy_data import all_objects

from scratch_det import backends
from scratch_det.config.load import load_config
from scratch_det.data.catalog import lookup
from scratch_det.data.coco import CocoDataset, flip_indices_of, inspect_coco, read_coco
from scratch_det.data.dataset import TrainingSet
from scratch_det.data.transforms import flip, resize
from scratch_det.errors import DataError

BOTH = [pytest.param(name, marks=pytest.mark.detectron2 if name == "detectron2" else ()) for name in backends.BACKENDS]
SIGMAS = ("TEST.KEYPOINT_OKS_SIGMAS", "[0.1, 0.1, 0.1]")
KEYS = ("MODEL.KEYPOINT_ON", True, "MODEL.MASK_ON", False, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(16, 16)",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, *SIGMAS)  # fmt: skip
PERSON = ["nose", "left_eye", "right_eye", "left_ear", "right_ear"]


def data_of(name: str = "toy_train") -> CocoDataset:
    return read_coco(lookup(name), need_masks=False, need_keypoints=True)


def training_set(recipe: Path, *overrides: Any) -> TrainingSet:
    return TrainingSet(load_config(recipe, [*KEYS, "INPUT.RANDOM_FLIP", "none", *overrides]).cfg, [data_of()])


class TestMirror:
    @pytest.mark.parametrize(
        ("category", "expected"),
        [
            ({"keypoints": PERSON}, (0, 2, 1, 4, 3)),
            ({"keypoints": POINTS}, (2, 1, 0)),
            ({"keypoints": ["top", "bottom", "left", "right"]}, None),
            ({"keypoints": ["nose", "left_eye"]}, None),
            ({"keypoints": ["top", "a", "b"], "flip_map": [["b", "a"]]}, (0, 2, 1)),
            ({"keypoints": ["top", "bottom"], "flip_map": []}, (0, 1)),
            ({"keypoints": PERSON, "flip_map": [["left_eye", "right_eye"]]}, (0, 2, 1, 3, 4)),
        ],
    )
    def test_of_names_or_flip_map(self, category: dict, expected: tuple[int, ...] | None) -> None:
        assert flip_indices_of(category) == expected

    def test_of_coco(self, tiny_coco: Path) -> None:
        [person] = json.loads((tiny_coco / "annotations/person_keypoints_val2017.json").read_text())["categories"]
        assert flip_indices_of(person) == (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15)

    def test_once_swaps_the_pairs_and_twice_nothing(self) -> None:
        points = torch.tensor([[[10.5, 4.5, 2.0], [20.5, 8.5, 1.0], [31.0, 4.5, 2.0]]])
        one = {"image": torch.zeros(3, 40, 50, dtype=torch.uint8), "keypoints": points}
        flipped = flip(one, "horizontal", (2, 1, 0))
        assert flipped["keypoints"].tolist() == [[[19.0, 4.5, 2.0], [29.5, 8.5, 1.0], [39.5, 4.5, 2.0]]]
        assert flip(flipped, "horizontal", (2, 1, 0))["keypoints"].equal(points)

    def test_resize(self) -> None:
        one = {"image": torch.zeros(3, 40, 50, dtype=torch.uint8), "keypoints": torch.tensor([[[10.5, 4.0, 2.0]]])}
        assert resize(one, (80, 100))["keypoints"].tolist() == [[[21.0, 8.0, 2.0]]]


class TestSamples:
    def test_centres_of_pixels(self, points_recipe: Path) -> None:
        """Image 1 is 96 x 64 px, already the size to train in; its crowd region is left out."""
        dataset = training_set(points_recipe)
        sample = next(dataset[i] for i in range(9) if dataset.image_id(i) == 1)
        x, y, width, height = 4, 6, 32, 32
        expected = [
            [x + 0.5, y + 0.5, 2],
            [x + width // 2 + 0.5, y + height // 2 + 0.5, 1],
            [x + width - 0.5, y + 0.5, 2],
        ]
        assert sample["keypoints"][0].tolist() == expected
        assert sample["keypoints"].shape == (2, 3, 3)
        assert sample["keypoints"].dtype == torch.float32

    def test_outside_or_unlabelled_is_nothing(self, points_recipe: Path, datasets_root: Path) -> None:
        def change(content: dict) -> None:
            content["annotations"][0]["keypoints"] = [-1, 6, 2, 95, 63, 2, 5, 5, 0]

        edit(datasets_root / "toy_train/annotations.json", change)
        dataset = training_set(points_recipe)
        sample = next(dataset[i] for i in range(9) if dataset.image_id(i) == 1)
        assert sample["keypoints"][0].tolist() == [[0, 0, 0], [95.5, 63.5, 2], [0, 0, 0]]

    @pytest.mark.parametrize(("least", "left"), [(0, 3), (1, 2), (6, 2), (7, 1), (9, 1)])
    def test_images_with_few_keypoints(self, least: int, left: int, points_recipe: Path, datasets_root: Path) -> None:
        """As detectron2, with crowds: image 1 has 9 keypoints, image 2 here none, image 3 six, image 4 no object."""

        def change(content: dict) -> None:
            for one in content["annotations"]:
                if one["image_id"] == 2:
                    one["keypoints"] = [0] * 9

        edit(datasets_root / "toy_train/annotations.json", change)
        key = "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE"
        dataset = training_set(points_recipe, key, least)
        assert dataset.description == f"{left} training images; {4 - left} without objects or keypoints left out"
        with pytest.raises(DataError, match=f"none of its 4 images has an object and 10 labelled keypoints .*{key}"):
            training_set(points_recipe, key, 10)


JSON = [
    (lambda c: c["categories"][1].pop("keypoints"), ["categories without keypoints", "id 5", "KEYPOINT_ON False"]),
    (lambda c: c["categories"][1].update(keypoints=POINTS[:2]), ["not those of category 2: id 5"]),
    (lambda c: c["categories"][1].update(keypoints=["a", "a"]), ["1 categories without keypoints", "different names"]),
    (lambda c: [one.update(flip_map=[["left_top", "x"]]) for one in c["categories"]], ["3 categories whose flip_map"]),
    (lambda c: [one.update(flip_map=["left_top"]) for one in c["categories"]], ["3 categories whose flip_map"]),
    (lambda c: c["annotations"][0].pop("keypoints"), ["keypoints are not x, y, v of 3 points: id 101", "9 numbers"]),
    (lambda c: c["annotations"][0]["keypoints"].pop(), ["keypoints are not x, y, v of 3 points: id 101"]),
    (lambda c: c["annotations"][0].update(keypoints=["a"] * 9), ["keypoints are not x, y, v of 3 points: id 101"]),
    (lambda c: c["annotations"][0]["keypoints"].__setitem__(2, 3), ["a v other than 0, 1 or 2: id 101", "2 visible"]),
]
RECIPE = [
    (["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 17], ["NUM_KEYPOINTS is 17", "name 3 keypoints", "leave the key out"]),
    (["TEST.KEYPOINT_OKS_SIGMAS", "[]"], ["TEST.KEYPOINT_OKS_SIGMAS is empty", "COCO's 17", "has 3 keypoints"]),
    (["TEST.KEYPOINT_OKS_SIGMAS", "[0.1]"], ["TEST.KEYPOINT_OKS_SIGMAS has 1 numbers", "[0.1, 0.1, 0.1]"]),
    (["TEST.KEYPOINT_OKS_SIGMAS", "[0.1, 0.1, 0]"], ["TEST.KEYPOINT_OKS_SIGMAS is [0.1, 0.1, 0], expected numbers"]),
    (["INPUT.RANDOM_FLIP", "vertical"], ["INPUT.RANDOM_FLIP is 'vertical' with MODEL.KEYPOINT_ON", "horizontal"]),
    (["MODEL.ROI_KEYPOINT_HEAD.NAME", "Other"], ["ROI_KEYPOINT_HEAD.NAME is 'Other'", "KRCNNConvDeconvUpsampleHead"]),
]


class TestRejections:
    @pytest.fixture
    def rejected(
        self, points_recipe: Path, train_net: Callable, capsys: pytest.CaptureFixture, tmp_path: Path
    ) -> Callable[..., str]:
        """``rejected(KEY, VALUE, ...)``: the message; nothing may be written."""

        def run(*overrides: Any) -> str:
            with pytest.raises(SystemExit) as caught:
                train_net("--config-file", points_recipe, "--backend", "torchvision", *KEYS, *overrides)
            message = capsys.readouterr().err
            assert caught.value.code == 2
            assert message.startswith("error: ")
            assert message.count("\n") <= 6
            assert not (tmp_path / "run").exists()
            return message

        return run

    @pytest.mark.parametrize(("change", "expected"), JSON)
    def test_json(self, change: Callable, expected: list[str], rejected: Callable, datasets_root: Path) -> None:
        edit(datasets_root / "toy_train/annotations.json", change)
        message = rejected()
        assert all(part in message for part in ("toy_train/annotations.json", *expected)), message

    @pytest.mark.parametrize(("overrides", "expected"), RECIPE)
    def test_recipe(self, overrides: list, expected: list[str], rejected: Callable) -> None:
        message = rejected(*overrides)
        assert all(part in message for part in expected), message

    def test_a_flip_that_nothing_explains(self, rejected: Callable, datasets_root: Path) -> None:
        for name in ("toy_train", "toy_val"):
            edit(
                datasets_root / name / "annotations.json",
                lambda content: [one.update(keypoints=["top", "left", "right"]) for one in content["categories"]],
            )
        message = rejected()
        for part in ("RANDOM_FLIP is 'horizontal'", "top, left, right", "set it to none", "flip_map"):
            assert part in message

    def test_other_keypoints_in_the_test_set(self, rejected: Callable, datasets_root: Path) -> None:
        edit(
            datasets_root / "toy_val/annotations.json",
            lambda content: [one.update(keypoints=POINTS[::-1]) for one in content["categories"]],
        )
        message = rejected()
        assert "toy_val/annotations.json has keypoints right_top, centre, left_top" in message
        assert "the same keypoints, in the same order" in message

    def test_check_finds_the_same(
        self, points_recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        words = ["check.py", "--config-file", points_recipe, *KEYS, *RECIPE[0][0], "TEST.KEYPOINT_OKS_SIGMAS", "[]"]
        monkeypatch.setattr("sys.argv", list(map(str, words)))
        with pytest.raises(SystemExit) as end:
            load_command("check").main()
        said = capsys.readouterr().out
        assert end.value.code == 2
        assert "NUM_KEYPOINTS is 17" in said
        assert "OKS_SIGMAS is empty" in said

    def test_a_miscounted_object_is_a_notice(self, points_recipe: Path, datasets_root: Path) -> None:
        edit(
            datasets_root / "toy_train/annotations.json",
            lambda content: content["annotations"][0].update(num_keypoints=2),
        )
        _, problems = inspect_coco(lookup("toy_train"), need_masks=False, need_keypoints=True)
        assert [(one.severity, one.first) for one in problems] == [("notice", ["101"])]

    @pytest.mark.detectron2
    def test_detectron2s_c4_heads_have_no_keypoints(self, points_recipe: Path, train: Callable) -> None:
        from scratch_det.errors import ConfigError

        with pytest.raises(ConfigError, match="'Res5ROIHeads', which has no keypoint head"):
            train(*KEYS, "MODEL.ROI_HEADS.NAME", "Res5ROIHeads", backend="detectron2")


@pytest.mark.parametrize("backend", BOTH)
class TestRuns:
    def test_trains_evaluates_and_resumes(
        self, backend: str, points_recipe: Path, train: Callable, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keys = (*KEYS, "SOLVER.MAX_ITER", 3, "SOLVER.CHECKPOINT_PERIOD", 1, "TEST.EVAL_PERIOD", 2)
        whole = train(*keys, name="whole", backend=backend)
        with interrupted_after(monkeypatch, 2):
            train(*keys, name="halves", backend=backend)
        assert is_same(train(*keys, name="halves", backend=backend, resume=True), whole)
        metrics = read(whole, "result.json")["metrics"]
        assert set(metrics) == {"bbox", "keypoints"}
        assert metrics["keypoints"]["AP"] is not None
        trained, *_ = (line for line in lines(whole) if "loss_keypoint" in line)
        assert trained["loss_keypoint"] > 0
        assert sum("keypoints/AP" in line for line in lines(whole)) == 2
        assert (whole / "predictions.png").stat().st_size > 10_000
        assert yaml.safe_load((whole / "config.yaml").read_text())["MODEL"]["ROI_KEYPOINT_HEAD"]["NUM_KEYPOINTS"] == 3
        results = read(whole, "inference/coco_instances_results.json")
        assert results
        for one in results:
            x, y, width, height = one["bbox"]
            for px, py, score in zip(*(one["keypoints"][i::3] for i in range(3)), strict=True):
                assert 0 < score <= 1
                assert x - 0.5 <= px <= x + max(width, 1) and y - 0.5 <= py <= y + max(height, 1)  # noqa: PT018

    def test_masks_too(self, backend: str, points_recipe: Path, train: Callable) -> None:
        folder = train(*KEYS, "MODEL.MASK_ON", True, "INPUT.RANDOM_FLIP", "horizontal", backend=backend)
        assert set(read(folder, "result.json")["metrics"]) == {"bbox", "segm", "keypoints"}

    def test_images_without_objects(self, backend: str, points_recipe: Path, train: Callable) -> None:
        empty = ("DATALOADER.FILTER_EMPTY_ANNOTATIONS", False, "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE", 0)
        folder = train(*KEYS, *empty, "SOLVER.MAX_ITER", 4, "DATASETS.TEST", "()", backend=backend)
        assert read(folder, "result.json")["iteration"] == 4

    def test_coco(
        self, backend: str, tiny_coco: Path, points_recipe: Path, train: Callable, datasets_root: Path
    ) -> None:
        catalog = datasets_root / "catalog.yaml"
        entries = {
            f"person_{part}": {
                "json": str(tiny_coco / f"annotations/person_keypoints_{part}2017.json"),
                "images": str(tiny_coco / f"{part}2017"),
                "drop_empty_boxes": True,
            }
            for part in ("train", "val")
        }
        catalog.write_text(catalog.read_text() + yaml.safe_dump(entries))
        sets = ("DATASETS.TRAIN", "('person_train',)", "DATASETS.TEST", "('person_val',)")
        folder = train(*KEYS, *sets, "TEST.KEYPOINT_OKS_SIGMAS", "[]", "SOLVER.MAX_ITER", 3, backend=backend)
        metrics = read(folder, "result.json")["metrics"]
        assert metrics["keypoints"]["AP"] is not None
        assert len(read(folder, "inference/coco_instances_results.json")[0]["keypoints"]) == 51


def test_truth_with_sigmas_of_its_own_scores_100(points_recipe: Path) -> None:
    """num_keypoints is not in this json: a missing one must not make COCO's evaluation ignore the object."""
    data = data_of("toy_val")
    results = [
        {"score": 1.0} | {key: one[key] for key in ("image_id", "category_id", "bbox", "keypoints")}
        for one in all_objects(data)
        if not one["iscrowd"]
    ]
    metrics = evaluate(data.entry.json_file, results, ("keypoints",), oks_sigmas=[0.1] * 3)
    assert metrics["keypoints"]["AP"] == pytest.approx(100)
