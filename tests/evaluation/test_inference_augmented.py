"""Test-time augmentation: views and merging by hand, against detectron2, and in a run of either backend."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fvcore.common.config import CfgNode
from pycocotools import mask as mask_api
from run_folder import lines, read
from samples import boxes_of, sample

from scratch_det import backends
from scratch_det.config.load import load_config
from scratch_det.config.rules import check_config
from scratch_det.errors import ConfigError
from scratch_det.evaluation.inference import merge, pasted, predict_augmented, relative_cost, views_of
from scratch_det.modeling.ops import decode_keypoints

SMALL = Path(__file__).parents[2] / "configs/Digits/quickstart.yaml"
AUG = (
    "TEST.AUG.ENABLED",
    "True",
    "TEST.AUG.MIN_SIZES",
    "(48, 64)",
    "TEST.AUG.MAX_SIZE",
    "120",
    "TEST.AUG.FLIP",
    "True",
)
INSTALLED = [name for name in backends.BACKENDS if backends.is_installed(name)]

Config = Callable[..., CfgNode]


@pytest.fixture
def config(small_model: list[str]) -> Config:
    return lambda *keys: load_config(SMALL, [*small_model, "MODEL.ROI_HEADS.NUM_CLASSES", "10", *AUG, *keys]).cfg


class TestViews:
    def test_sizes_and_mirrors(self, config: Config) -> None:
        one = sample(60, 90)
        views = views_of(one, config())
        assert [(tuple(view["image"].shape[1:]), mirrored) for view, mirrored in views] == [
            ((48, 72), False), ((48, 72), True), ((64, 96), False), ((64, 96), True)
        ]  # fmt: skip
        assert views[1][0]["image"].equal(views[0][0]["image"].flip(-1))
        assert len(views_of(one, config("TEST.AUG.FLIP", "False"))) == 2

    def test_longest_side(self, config: Config) -> None:
        assert views_of(sample(40, 120), config())[2][0]["image"].shape[1:] == (40, 120)

    def test_cost(self, config: Config) -> None:
        """A 60 x 90 image, plainly 64 x 96; two passes over two sizes and their mirrors."""
        expected = 2 * 2 * (48 * 72 + 64 * 96) / (64 * 96)
        assert relative_cost(config(), 60, 90) == pytest.approx(expected)
        assert relative_cost(config("MODEL.MASK_ON", "False"), 60, 90) == pytest.approx(expected / 2)


class TestMerging:
    def test_one_of_a_class_stays(self, config: Config) -> None:
        one = {"boxes": boxes_of((0, 0, 10, 10)), "scores": torch.tensor([0.6]), "labels": torch.tensor([2])}
        moved = {**one, "boxes": boxes_of((1, 0, 10, 10)), "scores": torch.tensor([0.9])}
        other = {**one, "labels": torch.tensor([3]), "scores": torch.tensor([0.7])}
        found = merge([one, moved, other], config())
        assert found["scores"].tolist() == pytest.approx([0.9, 0.7])
        assert found["labels"].tolist() == [2, 3]
        assert len(merge([one, moved, other], config("TEST.DETECTIONS_PER_IMAGE", "1"))["scores"]) == 1

    @pytest.mark.parametrize(("threshold", "kept"), [("0.49", [0.9]), ("0.51", [0.9, 0.6])])
    def test_nms_threshold(self, threshold: str, kept: list[float], config: Config) -> None:
        """An IoU of 0.5; the one that stays has its own score and box, not a mean."""
        one, other = ({"scores": torch.tensor([score]), "labels": torch.tensor([2])} for score in (0.6, 0.9))
        views = [{**one, "boxes": boxes_of((0, 0, 10, 10))}, {**other, "boxes": boxes_of((0, 0, 10, 20))}]
        found = merge(views, config("MODEL.ROI_HEADS.NMS_THRESH_TEST", threshold))
        assert found["scores"].tolist() == pytest.approx(kept)
        assert found["boxes"][0].tolist() == [0, 0, 10, 20]

    def test_vote(self, config: Config) -> None:
        """The second of the class overlaps the first by 0.96, the third by 0.67: x1 is (0.9 * 0 + 0.6 * 2) / 1.5."""
        boxes = boxes_of((0, 0, 100, 100), (2, 0, 102, 100), (20, 0, 120, 100), (4, 0, 104, 100))
        every = {"boxes": boxes, "scores": torch.tensor([0.9, 0.6, 0.5, 0.7]), "labels": torch.tensor([1, 1, 1, 2])}
        found = merge([every], config("TEST.AUG.VOTE_THRESH", "0.9"))
        assert found["scores"].tolist() == pytest.approx([0.9, 0.7])
        torch.testing.assert_close(found["boxes"], boxes_of((0.8, 0, 100.8, 100), (4, 0, 104, 100)))
        found = merge([every], config("TEST.AUG.VOTE_THRESH", "0.97"))
        torch.testing.assert_close(found["boxes"], boxes[[0, 3]])

    @pytest.mark.parametrize(("threshold", "expected"), [("0.0", False), ("0.9", True)])
    def test_candidates_are_asked_for_where_boxes_vote(self, threshold: str, expected: bool, config: Config) -> None:
        def detect(model: None, batch: list[dict[str, Any]], candidates: bool = False) -> list[dict[str, torch.Tensor]]:
            asked.append(candidates)
            return [{"boxes": boxes_of((0, 0, 9, 9)), "scores": torch.tensor([0.9]), "labels": torch.tensor([4])}]

        asked: list[bool] = []
        cfg = config("MODEL.MASK_ON", "False", "TEST.AUG.VOTE_THRESH", threshold)
        predict_augmented(SimpleNamespace(detect=detect), None, cfg, sample(60, 90))
        assert asked == [expected] * 4

    @pytest.mark.parametrize("heads", ["StandardROIHeads", "CascadeROIHeads"])
    @pytest.mark.parametrize("name", INSTALLED)
    def test_candidates_are_all_boxes_above_the_threshold(self, name: str, heads: str, config: Config) -> None:
        """NMS of the candidates and the limit give the plain detections, and the model keeps its own limits."""
        cascade = ("MODEL.ROI_HEADS.NAME", heads, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", str("Cascade" in heads))
        cfg = config(*cascade, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.02", "MODEL.MASK_ON", "False")
        backend = backends.load(name)
        torch.manual_seed(0)
        model = backend.build(cfg)
        (plain,), (every,) = backend.detect(model, [sample(64, 96)]), backend.detect(model, [sample(64, 96)], True)
        assert len(every["scores"]) > len(plain["scores"]) > 0
        found = merge([every], cfg)
        torch.testing.assert_close(found["boxes"], plain["boxes"])
        (again,) = backend.detect(model, [sample(64, 96)])
        assert again["boxes"].equal(plain["boxes"])

    @pytest.mark.parametrize(("flipped", "columns"), [(0.3, (0, 89)), (0.2, (0, 44))])
    def test_masks_are_the_mean_over_the_views(self, flipped: float, columns: tuple[int, int], config: Config) -> None:
        """0.9 in the left half of the box, 0.75 in the right one; flipped views say ``flipped`` of the right one."""

        def detect(model: None, batch: list[dict[str, Any]], candidates: bool = False) -> list[dict[str, torch.Tensor]]:
            height, width = batch[0]["image"].shape[1:]
            size = boxes_of((0, 0, width, height))
            return [{"boxes": size, "scores": torch.tensor([0.9]), "labels": torch.tensor([4])}]

        def shapes(model: None, batch: list[dict[str, Any]], found: list[dict]) -> list[dict[str, torch.Tensor]]:
            maps = torch.full((1, 28, 28), 0.9)
            if batch[0]["image"][0, 0, 0] < batch[0]["image"][0, 0, -1]:
                maps[..., :14] = flipped
            else:
                maps[..., 14:] = 0.75
            return [{"masks": maps}]

        image = torch.arange(90, 0, -1, dtype=torch.uint8).expand(3, 60, 90)  # falls to the right
        one = {"image": image, "height": 60, "width": 90}
        found = predict_augmented(SimpleNamespace(detect=detect, shapes=shapes), None, config(), one)
        where = np.flatnonzero(mask_api.decode(pasted(one, found)["masks"][0]).any(0))
        assert (where.min(), where.max()) == pytest.approx(columns, abs=2)

    def test_boxes_are_clipped_and_empty_ones_dropped(self, config: Config) -> None:
        def detect(model: None, batch: list[dict[str, Any]], candidates: bool = False) -> list[dict[str, torch.Tensor]]:
            height, width = batch[0]["image"].shape[1:]
            boxes = boxes_of((-9, -9, 2 * width, 2 * height), (-5, 0, 0, 10))
            return [{"boxes": boxes, "scores": torch.tensor([0.9, 0.8]), "labels": torch.tensor([4, 5])}]

        keys = ("MODEL.MASK_ON", "False", "TEST.AUG.FLIP", "False")
        found = predict_augmented(SimpleNamespace(detect=detect), None, config(*keys), sample(60, 90))
        assert {key: value.tolist() for key, value in found.items()} == {
            "boxes": [[0, 0, 90, 60]], "scores": pytest.approx([0.9]), "labels": [4]
        }  # fmt: skip

    def test_a_detector_that_is_always_right(self, config: Config) -> None:
        """Boxes and masks that are exact in every view come back exact: nothing is shifted, stretched or mirrored."""
        box, half = torch.tensor([15.0, 12, 60, 48]), torch.zeros(28, 28)
        half[:, :14] = 1  # the object fills the left half of its box

        def is_mirrored(view: dict[str, Any]) -> bool:
            return bool(view["image"][0, 0, 0] < view["image"][0, 0, -1])

        def detect(model: None, batch: list[dict[str, Any]], candidates: bool = False) -> list[dict[str, torch.Tensor]]:
            height, width = batch[0]["image"].shape[1:]
            x1, y1, x2, y2 = box * torch.tensor([width / 90, height / 60] * 2)
            found = (width - x2, y1, width - x1, y2) if is_mirrored(batch[0]) else (x1, y1, x2, y2)
            return [{"boxes": boxes_of(found), "scores": torch.tensor([0.9]), "labels": torch.tensor([4])}]

        def shapes(model: None, batch: list[dict[str, Any]], found: list[dict]) -> list[dict[str, torch.Tensor]]:
            assert found[0]["boxes"].allclose(detect(model, batch)[0]["boxes"], atol=1e-3)
            return [{"masks": (half.flip(-1) if is_mirrored(batch[0]) else half)[None]}]

        image = torch.arange(90, 0, -1, dtype=torch.uint8).expand(3, 60, 90)  # falls to the right
        one = {"image": image, "height": 60, "width": 90}
        found = predict_augmented(SimpleNamespace(detect=detect, shapes=shapes), None, config(), one)
        torch.testing.assert_close(found["boxes"], box[None], atol=1e-3, rtol=0)
        mask = mask_api.decode(pasted(one, found)["masks"][0])
        columns = np.flatnonzero(mask.any(0))
        assert (columns.min(), columns.max()) == (15, 37)  # 15 + 45 / 2 = 37.5
        assert mask.sum() == pytest.approx(36 * 22.5, rel=0.03)

    def test_keypoints_change_sides_in_a_mirror(self, config: Config) -> None:
        """The left one at row 5, column 2 of 28 in the box, the right one at row 9, column 25: so seen in all views."""
        box = torch.tensor([0.0, 0, 56, 56])

        def shapes(model: None, batch: list[dict[str, Any]], found: list[dict]) -> list[dict[str, torch.Tensor]]:
            is_mirrored = batch[0]["image"][0, 0, 0] < batch[0]["image"][0, 0, -1]
            maps = torch.zeros(1, 2, 28, 28)
            for point, (row, column) in enumerate(((9, 2), (5, 25)) if is_mirrored else ((5, 2), (9, 25))):
                maps[0, point, row, column] = 9.0
            return [{"heat_maps": maps}]

        def detect(model: None, batch: list[dict[str, Any]], candidates: bool = False) -> list[dict[str, torch.Tensor]]:
            height, width = batch[0]["image"].shape[1:]
            x1, y1, x2, y2 = box * torch.tensor([width / 56, height / 56] * 2)
            return [{"boxes": boxes_of((x1, y1, x2, y2)), "scores": torch.tensor([0.9]), "labels": torch.tensor([0])}]

        image = torch.arange(56, 0, -1, dtype=torch.uint8).expand(3, 56, 56)
        keys = ("MODEL.MASK_ON", "False", "MODEL.KEYPOINT_ON", "True")
        found = predict_augmented(
            SimpleNamespace(detect=detect, shapes=shapes),
            None,
            config(*keys),
            {"image": image, "height": 56, "width": 56},
            flip_indices=(1, 0),
        )
        expected = torch.tensor([[5.0, 11], [51, 19]])  # the middle of a cell of 2 x 2 px
        torch.testing.assert_close(found["keypoints"][0, :, :2], expected, atol=1.0, rtol=0)
        (plain,) = shapes(None, [{"image": image}], [])
        torch.testing.assert_close(found["keypoints"], decode_keypoints(plain["heat_maps"], box[None]))  # the score too

    def test_nothing_found(self, config: Config) -> None:
        model = backends.load("torchvision").build(cfg := config("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.99"))
        found = predict_augmented(backends.load("torchvision"), model, cfg, sample())
        assert found["boxes"].shape == (0, 4)
        assert found["masks"].shape == (0, 28, 28)


class TestRules:
    @pytest.mark.parametrize(
        ("keys", "said"),
        [
            (("TEST.AUG.MIN_SIZES", "()"), "expected sides in whole pixels"),
            (("TEST.AUG.MIN_SIZES", "(1,)"), "32 at least"),
            (("TEST.AUG.MIN_SIZES", "(128.5,)"), "in whole pixels"),
            (("TEST.AUG.MAX_SIZE", "50"), "a longest side above the shorter"),
        ],
    )
    def test_rejected(self, keys: tuple[str, str], said: str, config: Config) -> None:
        with pytest.raises(ConfigError, match=said):
            check_config(config(*keys))

    def test_mirrored_views_of_what_is_never_mirrored(self, config: Config) -> None:
        assert "half of the views will be mirrored" in "".join(check_config(config()))
        assert check_config(config("INPUT.RANDOM_FLIP", "horizontal")) == []


@pytest.mark.parametrize("name", INSTALLED)
class TestRun:
    @pytest.mark.parametrize("heads", ["StandardROIHeads", "CascadeROIHeads"])
    def test_one_plain_view_is_the_plain_prediction(self, name: str, heads: str, config: Config) -> None:
        """Masks and keypoints included."""
        cascade = ("MODEL.ROI_HEADS.NAME", heads, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", str("Cascade" in heads))
        view = ("TEST.AUG.MIN_SIZES", "(64,)", "TEST.AUG.FLIP", "False", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0")
        points = ("MODEL.KEYPOINT_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(32,)")
        torch.manual_seed(0)
        backend, one = backends.load(name), sample(64, 96)
        model = backend.build(cfg := config(*cascade, *view, *points))
        plain, found = backend.predict(model, [one])[0], predict_augmented(backend, model, cfg, one)
        assert plain.keys() == found.keys() == {"boxes", "scores", "labels", "masks", "keypoints"}
        assert len(plain["scores"]) == 10
        assert plain["labels"].equal(found["labels"])
        assert pasted(one, plain)["masks"] == pasted(one, found)["masks"]
        for key in ("scores", "boxes", "keypoints"):
            torch.testing.assert_close(found[key], plain[key], atol=1e-4, rtol=1e-4)

    def test_after_the_last_iteration_alone(
        self, name: str, train: Callable[..., Path], capsys: pytest.CaptureFixture
    ) -> None:
        keys = (*AUG, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "SOLVER.MAX_ITER", 3, "TEST.EVAL_PERIOD", 1)
        folder = train(*keys, backend=name)
        said = capsys.readouterr().out
        assert (
            said.count(
                "4 views of each of 4 images, two passes (boxes, then masks and keypoints in them); 6 times the pixels"
            )
            == 1
        )
        metrics = read(folder, "result.json")["metrics"]
        assert set(metrics) == {"bbox", "segm", "bbox_TTA", "segm_TTA"}
        evaluated = [line for line in lines(folder) if "bbox/AP" in line]
        assert ["bbox_TTA/AP" in line for line in evaluated] == [False, False, True]
        assert read(folder, "inference_TTA/coco_instances_results.json")


@pytest.mark.detectron2
@pytest.mark.parametrize("heads", ["StandardROIHeads", "CascadeROIHeads"])
def test_finds_what_detectron2s_own_finds(heads: str, config: Config) -> None:
    """The same model and views: the original size and its mirror, so that no resizing differs."""
    from detectron2.modeling import GeneralizedRCNNWithTTA

    from scratch_det.backends.detectron2 import stock_cfg

    torch.manual_seed(0)
    backend, one_size = backends.load("detectron2"), ("TEST.AUG.MIN_SIZES", "(64,)", "TEST.AUG.MAX_SIZE", "1000")
    cascade = ("MODEL.ROI_HEADS.NAME", heads, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", str("Cascade" in heads))
    cfg = config(*one_size, *cascade, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0")
    model, one = backend.build(cfg).eval(), sample(64, 96, seed=3)
    with torch.no_grad():
        expected = GeneralizedRCNNWithTTA(stock_cfg(cfg, "cpu"), model)([one])[0]["instances"]
    found = predict_augmented(backend, model, cfg, one)
    assert len(found["scores"]) == len(expected) == 10
    torch.testing.assert_close(found["scores"], expected.scores)
    torch.testing.assert_close(found["boxes"], expected.pred_boxes.tensor, atol=1e-3, rtol=1e-4)
    assert found["labels"].equal(expected.pred_classes)
    masks = np.stack([mask_api.decode(rle) for rle in pasted(one, found)["masks"]])
    assert (masks != expected.pred_masks.numpy()).mean() < 1e-3
