"""Cascade R-CNN: its stages by hand, and the switch from a detector with one box head. See test_against_detectron2."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT
from fvcore.common.config import CfgNode
from run_folder import interrupted_after, is_same, read
from samples import boxes_of, sample

from scratch_det import backends
from scratch_det.backends import torchvision as backend
from scratch_det.config.load import load_config
from scratch_det.config.rules import check_config
from scratch_det.errors import ConfigError, UserError
from scratch_det.weights.convert import to_cascade
from scratch_det.weights.names import in_stage, renamed, stage_of, without_stage

SMALL = ROOT / "configs/Digits/quickstart.yaml"
CASCADE = ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True")
FOUR = ("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 1, "DATASETS.TEST", "()")
INSTALLED = [name for name in backends.BACKENDS if backends.is_installed(name)]

Config = Callable[..., CfgNode]


@pytest.fixture
def config(small_model: list[str]) -> Config:
    return lambda *keys: load_config(SMALL, [*small_model, "MODEL.ROI_HEADS.NUM_CLASSES", "10", *CASCADE, *keys]).cfg


def built(cfg: CfgNode) -> torch.nn.Module:
    torch.manual_seed(0)
    return backend.build(cfg)


class TestStages:
    def test_labels_follow_the_stages_iou(self, config: Config) -> None:
        truth = {"boxes": boxes_of((0, 0, 10, 10)), "labels": torch.tensor([3])}
        boxes = boxes_of((0, 0, 10, 10), (0, 0, 10, 6.5), (0, 0, 10, 5.5), (0, 0, 10, 4))  # IoU 1, 0.65, 0.55, 0.4
        found = [stage.label(boxes, truth)[0].tolist() for stage in built(config()).roi_heads.stages]
        assert found == [[3, 3, 3, 0], [3, 3, 0, 0], [3, 0, 0, 0]]

    def test_targets_lead_to_the_truth(self, config: Config) -> None:
        truth = {"boxes": boxes_of((4, 6, 24, 36)), "labels": torch.tensor([1])}
        boxes = boxes_of((5, 5, 25, 35))
        for stage in built(config()).roi_heads.stages:
            labels, deltas = stage.label(boxes, truth)
            assert labels.tolist() == [1]
            (refined,) = stage.refine([boxes], deltas, [(64, 64)])
            torch.testing.assert_close(refined, truth["boxes"])

    def test_without_objects_all_is_background(self, config: Config) -> None:
        stage = built(config()).roi_heads.stages[1]
        nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        labels, deltas = stage.label(boxes_of((0, 0, 9, 9)), nothing)
        assert labels.tolist() == [0]
        assert not deltas.any()

    def test_refined_boxes_stay_in_their_image_and_carry_no_gradient(self, config: Config) -> None:
        stage = built(config()).roi_heads.stages[0]
        deltas = torch.full((1, 4), 9.0, requires_grad=True)
        (refined,) = stage.refine([boxes_of((40, 20, 60, 30))], deltas, [(32, 64)])
        assert not refined.requires_grad
        assert refined.tolist()[0][2:] == [64, 32]

    def test_weights_that_are_nan_make_losses_that_are(self, config: Config) -> None:
        """As no box has an area then, later stages have none; the loop says that the training has diverged."""
        model = built(config())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(math.nan)
        assert sum(backend.losses(model, [sample()]).values()).isnan()

    def test_losses_have_detectron2s_names(self, config: Config) -> None:
        boxes = [f"{name}_stage{k}" for k in range(3) for name in ("loss_cls", "loss_box_reg")]
        losses = backend.losses(built(config()), [sample(), sample(objects=0, seed=1)])
        assert list(losses) == [*boxes, "loss_mask", "loss_rpn_cls", "loss_rpn_loc"]
        assert all(loss.isfinite() for loss in losses.values())

    def test_scores_are_the_mean_over_the_stages(self, config: Config) -> None:
        """With constant scores 1/11 in two stages, and all of class 4 in the third."""
        model = built(config("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.2"))
        with torch.no_grad():
            for stage in model.roi_heads.stages:
                stage.box_predictor.cls_score.weight.zero_()
            model.roi_heads.stages[2].box_predictor.cls_score.bias[5] = 100.0
        (found,) = backend.detect(model, [sample()])
        assert set(found["labels"].tolist()) == {4}
        assert found["scores"].tolist() == pytest.approx([(1 + 2 / 11) / 3] * len(found["scores"]))

    def test_the_backbone_gets_a_third_of_each_stages_gradient(self, config: Config) -> None:
        heads = built(config()).train().roi_heads
        features = {name: torch.ones(1, 32, 64 // s, 64 // s, requires_grad=True) for name, s in
                    heads.box_roi_pool.strides.items()}  # fmt: skip
        as_it_is = SimpleNamespace(box_head=lambda pooled: pooled, box_predictor=lambda pooled: (pooled, pooled))
        pooled, _ = heads.predict_boxes(as_it_is, features, [boxes_of((0, 0, 32, 32))])
        pooled.sum().backward()
        assert features["p2"].grad.sum().item() == pytest.approx(32 * 49 / 3, rel=1e-5)


class TestRules:
    @pytest.mark.parametrize(
        ("keys", "said"),
        [
            (("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "False"), "CLS_AGNOSTIC_BBOX_REG is False, but a stage"),
            (("MODEL.ROI_BOX_CASCADE_HEAD.IOUS", "(0.5, 0.6)"), "expected one of each a stage"),
            (("MODEL.ROI_HEADS.IOU_THRESHOLDS", "[0.6]"), r"first stage matches at IoU 0\.5; set it to \[0\.5\]"),
        ],
    )
    def test_what_is_no_cascade(self, keys: tuple[str, str], said: str, config: Config) -> None:
        with pytest.raises(ConfigError, match=said):
            check_config(config(*keys))

    def test_class_agnostic_boxes_are_a_cascades(self, small_model: list[str]) -> None:
        cfg = load_config(SMALL, [*small_model, *CASCADE[2:]]).cfg
        with pytest.raises(ConfigError, match="CLS_AGNOSTIC_BBOX_REG is True; allowed: False"):
            backends.check_keys("torchvision", cfg)


class TestNames:
    @pytest.mark.parametrize("fcs", ["0", "1", "2"])
    @pytest.mark.parametrize("convs", ["0", "2"])
    def test_there_and_back(self, convs: str, fcs: str, config: Config) -> None:
        numbers = ("MODEL.ROI_BOX_HEAD.NUM_CONV", convs, "MODEL.ROI_BOX_HEAD.NUM_FC", fcs)
        with torch.device("meta"):
            names = list(backend.build(config(*numbers)).state_dict())
        theirs = renamed(names, "torchvision", "detectron2")
        assert None not in theirs.values()
        assert renamed(theirs.values(), "detectron2", "torchvision") == {new: name for name, new in theirs.items()}
        assert theirs["roi_heads.stages.2.box_predictor.cls_score.bias"] == "roi_heads.box_predictor.2.cls_score.bias"

    def test_stages(self) -> None:
        plain, third = "roi_heads.box_head.conv1.norm.weight", "roi_heads.box_head.2.conv1.norm.weight"
        assert (stage_of(plain), stage_of(third)) == ("", "2")
        assert without_stage(third) == without_stage(plain) == plain
        assert in_stage(plain, "2", "detectron2") == third


@pytest.mark.parametrize("name", INSTALLED)
class TestSwitch:
    """On every backend that is installed."""

    def test_weights_of_the_stages(self, name: str, small_model: list[str], config: Config) -> None:
        plain, cascade = (
            backends.load(name).build(cfg)
            for cfg in (load_config(SMALL, [*small_model, "MODEL.ROI_HEADS.NUM_CLASSES", "10"]).cfg, config())
        )
        weights = plain.state_dict()
        made = to_cascade(weights, name, 3)
        assert {key: value.shape for key, value in made.items()} == {
            k: v.shape for k, v in cascade.state_dict().items()
        }
        boxes = weights["roi_heads.box_predictor.bbox_pred.weight"].unflatten(0, (-1, 4))[-10:].mean(0)
        for key, value in made.items():
            if not (stage_of(key) and key.endswith("bbox_pred.bias")):
                assert value.equal(boxes if stage_of(key) and "bbox_pred" in key else weights[without_stage(key)]), key
        with pytest.raises(UserError, match="is a cascade already"):
            to_cascade(made, name, 3)

    def test_goes_on_where_the_plain_run_was(
        self, name: str, train: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        """Its iterations, data and metrics continue; resumed, even before its first checkpoint, it is the same run."""
        plain = train(*FOUR, name="plain", backend=name)
        keys: dict[str, Any] = {"switch_from": str(plain / "model_0000001.pth"), "backend": name}
        whole = train(*FOUR, *CASCADE, name="whole", **keys)
        assert "3 stages begin as copies" in capsys.readouterr().out
        assert read(whole, "parent.json")["completed_iterations"] == 2
        assert read(whole, "result.json")["iteration"] == 4
        for steps in (0, 1):
            with interrupted_after(monkeypatch, steps):
                train(*FOUR, *CASCADE, name="halves", resume=True, **keys)
        assert is_same(train(*FOUR, *CASCADE, name="halves", resume=True, backend=name), whole)

    def test_rejections(self, name: str, train: Callable, tmp_path: Path) -> None:
        plain = train(*FOUR, name="plain", backend=name)
        keys: dict[str, Any] = {"switch_from": str(plain / "model_0000001.pth"), "backend": name}
        rejected = {
            ("MODEL.RESNETS.DEPTH", 34, *CASCADE): "MODEL.RESNETS.DEPTH was 18, now 34",
            ("SOLVER.BASE_LR", 0.02, *CASCADE): r"SOLVER\.BASE_LR was 0\.01, now 0\.02",
            (): "--switch-from starts a cascade, but MODEL.ROI_HEADS.NAME is StandardROIHeads",
        }
        for overrides, said in rejected.items():
            with pytest.raises(UserError, match=said):
                train(*FOUR, *overrides, name="other", **keys)
            assert not (tmp_path / "other/config.yaml").exists()
        with pytest.raises(UserError, match=r"SOLVER\.MAX_ITER is 4, but .* has 4 completed iterations, so nothing"):
            train(*FOUR, *CASCADE, name="other", switch_from=str(plain / "model_final.pth"), backend=name)
        with pytest.raises(UserError, match="starts from one checkpoint"):
            train(*FOUR, *CASCADE, name="other", branch_from=keys["switch_from"], **keys)
        with pytest.raises(UserError, match=r"MODEL\.ROI_HEADS\.NAME was (?s:.)*from a plain run with --switch-from"):
            train(*FOUR, *CASCADE, name="other", branch_from=keys["switch_from"], backend=name)
        cascade = train(*FOUR, *CASCADE, name="cascade", **keys)
        with pytest.raises(UserError, match="is a cascade already; continue it with --branch-from"):
            train(*FOUR, *CASCADE, name="other", switch_from=str(cascade / "model_0000002.pth"), backend=name)
