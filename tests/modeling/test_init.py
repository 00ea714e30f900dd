"""Initialisation of every kind of layer, by the formula and as measured in detectron2."""

import math
from collections.abc import Callable

import pytest
import torch
from conftest import ROOT
from fvcore.common.config import CfgNode
from torch import nn

from scratch_det.backends import torchvision as backend
from scratch_det.config.load import load_config
from scratch_det.modeling.init import fill_alike, he_fill, initialize

CONFIGS = ROOT / "configs"
R50 = CONFIGS / "COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_3x_gn.yaml"
SMALL = CONFIGS / "Digits/quickstart.yaml"

Config = Callable[..., CfgNode]


@pytest.fixture(scope="module")
def mask_rcnn_r50() -> nn.Module:
    torch.manual_seed(0)
    return backend.build(load_config(R50).cfg)


def built(cfg: CfgNode, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return backend.build(cfg)


# layer, its standard deviation by the formula (peers.md 3.2, detectron2), the one measured in detectron2, distribution
INITIALISED = [
    ("backbone.body.conv1", math.sqrt(2 / (64 * 49)), 0.0254, "normal"),
    ("backbone.body.layer1.0.conv3", math.sqrt(2 / 256), None, "normal"),
    ("backbone.body.layer1.0.conv2", math.sqrt(2 / (64 * 9)), 0.0590, "normal"),
    ("backbone.body.layer4.0.downsample.0", math.sqrt(2 / 2048), None, "normal"),
    ("backbone.fpn.inner_blocks.3.0", math.sqrt(1 / 2048), 0.0221, "uniform"),
    ("backbone.fpn.layer_blocks.3.0", math.sqrt(1 / (256 * 9)), 0.0208, "uniform"),
    ("rpn.head.conv.0.0", 0.01, 0.0100, "normal"),
    ("rpn.head.cls_logits", 0.01, 0.0100, "normal"),
    ("rpn.head.bbox_pred", 0.01, 0.0100, "normal"),
    ("roi_heads.box_head.0.0", math.sqrt(2 / (256 * 9)), 0.0295, "normal"),
    ("roi_heads.box_head.3.0", math.sqrt(2 / (256 * 9)), 0.0295, "normal"),
    ("roi_heads.box_head.5", math.sqrt(1 / (256 * 49)), 0.0089, "uniform"),
    ("roi_heads.box_predictor.cls_score", 0.01, 0.0100, "normal"),
    ("roi_heads.box_predictor.bbox_pred", 0.001, 0.0010, "normal"),
    ("roi_heads.mask_head.0.0", math.sqrt(2 / (256 * 9)), 0.0295, "normal"),
    ("roi_heads.mask_predictor.conv5_mask", math.sqrt(2 / (256 * 4)), 0.0443, "normal"),
    ("roi_heads.mask_predictor.mask_fcn_logits", 0.001, 0.0010, "normal"),
]


class TestInitialisation:
    @pytest.mark.parametrize(("name", "std", "measured", "distribution"), INITIALISED, ids=[i[0] for i in INITIALISED])
    def test_standard_deviation(
        self, name: str, std: float, measured: float | None, distribution: str, mask_rcnn_r50: nn.Module
    ) -> None:
        weight = mask_rcnn_r50.get_submodule(name).weight
        tolerance = 4 / math.sqrt(2 * weight.numel())  # four standard errors of a measured standard deviation
        assert weight.std().item() == pytest.approx(std, rel=tolerance)
        assert weight.mean().item() == pytest.approx(0, abs=4 * std / math.sqrt(weight.numel()))
        assert measured is None or weight.std().item() == pytest.approx(measured, rel=0.02 + tolerance, abs=5e-5)
        widest = weight.abs().max().item() / std
        assert widest <= math.sqrt(3) + 1e-4 if distribution == "uniform" else widest > 2.5

    def test_every_hidden_convolution_of_the_rpn(self, config: Config) -> None:
        hidden = built(config("MODEL.RPN.CONV_DIMS", "[-1, -1, -1]")).rpn.head.conv
        assert len(hidden) == 3
        for layer, activation in hidden:
            assert layer.weight.std().item() == pytest.approx(0.01, rel=4 / math.sqrt(2 * layer.weight.numel()))
            assert not layer.bias.any()
            assert isinstance(activation, nn.ReLU)

    def test_every_row_of_the_table_is_tested(self) -> None:
        tested = {prefix for prefix in backend.FILLS if any(f"{n}.".startswith(f"{prefix}.") for n, *_ in INITIALISED)}
        elsewhere = {prefix for prefix in backend.FILLS if "keypoint" in prefix}  # test_torchvision_heads_keypoints.py
        assert tested == set(backend.FILLS) - elsewhere

    def test_norms_are_the_identity_and_biases_zero(self, mask_rcnn_r50: nn.Module) -> None:
        for name, layer in mask_rcnn_r50.named_modules():
            if isinstance(layer, nn.GroupNorm):
                assert (layer.weight == 1).all(), name
            if getattr(layer, "bias", None) is not None:
                assert (layer.bias == 0).all(), name

    def test_is_a_function_of_the_seed(self, config: Config) -> None:
        first, again, other = (nn.utils.parameters_to_vector(built(config(), seed).parameters()) for seed in (1, 1, 2))
        assert first.equal(again)
        assert not first.equal(other)

    def test_a_layer_that_no_entry_covers_is_rejected(self) -> None:
        model = nn.ModuleDict({"known": nn.Conv2d(1, 1, 1), "stray": nn.Linear(1, 1)})
        with pytest.raises(ValueError, match="'stray' has weights but no entry"):
            initialize(model, {"known": he_fill})

    def test_a_kind_of_layer_without_rule_is_rejected(self) -> None:
        with pytest.raises(ValueError, match=r"'lookup' \(Embedding\) has weights but no rule"):
            initialize(nn.ModuleDict({"lookup": nn.Embedding(2, 2)}), {"lookup": he_fill})

    def test_alike_leaves_no_width_of_its_own(self, config: Config) -> None:
        model = built(config())
        fill_alike(model, 0.01)
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear) and layer.weight.numel() > 5000:
                assert layer.weight.std().item() == pytest.approx(0.01, rel=0.1), name
            if isinstance(layer, nn.GroupNorm):
                assert layer.weight.eq(1).all()

    def test_prefixes_end_at_a_dot(self) -> None:
        model = nn.ModuleDict({"head": nn.Linear(1, 1), "head2": nn.Linear(1, 1)})
        with pytest.raises(ValueError, match="'head2'"):
            initialize(model, {"head": he_fill})
