"""The torchvision backend: layers, initialisation, losses and predictions, by hand and against detectron2."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from fvcore.common.config import CfgNode
from pycocotools import mask as mask_api
from samples import boxes_of, sample
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d

from scratch_det.backends.torchvision import model as backend
from scratch_det.backends.torchvision.backbone import Backbone, build_resnet
from scratch_det.backends.torchvision.keys import ALLOWED, RESNETS, check
from scratch_det.backends.torchvision.roi_heads import ROIPooler, box_losses
from scratch_det.backends.torchvision.rpn import RPN, Anchors
from scratch_det.config import flatten, get_cfg, load_config, set_key
from scratch_det.distributed.group import Group
from scratch_det.distributed.launch import ALONE
from scratch_det.distributed.stop import StopFlag
from scratch_det.engine.loop import Trainer
from scratch_det.engine.state import State
from scratch_det.errors import ConfigError
from scratch_det.modeling.init import FILLS, fill_alike, initialize
from scratch_det.modeling.norm import SyncBatchNorm
from scratch_det.modeling.ops import mask_targets, paste_masks

CONFIGS = ROOT / "configs"
R50 = CONFIGS / "COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_3x_gn.yaml"
SMALL = CONFIGS / "Digits/quickstart.yaml"
NORM_CLASSES = {
    "GN": nn.GroupNorm,
    "BN": nn.BatchNorm2d,
    "SyncBN": SyncBatchNorm,
    "FrozenBN": FrozenBatchNorm2d,
    "": None,
}
PYRAMID = [4, 8, 16, 32, 64]
STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}
NORM_PARTS = {  # key -> the layers it governs
    "MODEL.RESNETS.NORM": "backbone.body",
    "MODEL.FPN.NORM": "backbone.fpn",
    "MODEL.ROI_BOX_HEAD.NORM": "roi_heads.box_head",
    "MODEL.ROI_MASK_HEAD.NORM": "roi_heads.mask_head",
}

Config = Callable[..., CfgNode]


@pytest.fixture
def config(small_model: list[str]) -> Config:
    """``config(KEY, VALUE, ...)``: the quickstart's Mask R-CNN made tiny, with ten classes."""
    return lambda *overrides: load_config(SMALL, [*small_model, "MODEL.ROI_HEADS.NUM_CLASSES", "10", *overrides]).cfg


@pytest.fixture(scope="module")
def mask_rcnn_r50() -> nn.Module:
    torch.manual_seed(0)
    return backend.build(load_config(R50).cfg)


def on_meta(cfg: CfgNode) -> nn.Module:
    """The model without memory: shapes and layer types only."""
    with torch.device("meta"):
        return backend.build(cfg)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def built(cfg: CfgNode, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return backend.build(cfg)


class TestLayers:
    def test_the_papers_model_has_detectron2s_parameters_and_the_background_slots(
        self, mask_rcnn_r50: nn.Module
    ) -> None:
        detectron2s, background = 45_711_152, 4_357
        assert background == 4 * (1024 + 1) + (256 + 1)  # a box and a mask; detectron2 too scores background
        heads = mask_rcnn_r50.roi_heads
        slots = [heads.box_predictor.cls_score, heads.box_predictor.bbox_pred, heads.mask_predictor.mask_fcn_logits]
        assert count(mask_rcnn_r50) == detectron2s + background
        assert all(parameter.requires_grad for parameter in mask_rcnn_r50.parameters())
        assert [layer.weight.shape[0] for layer in slots] == [81, 324, 81]

    @pytest.mark.parametrize(
        ("depth", "groups", "width", "parameters"),  # torchvision's published counts without the classifier
        [
            (18, 1, 64, 11_689_512 - 513_000),
            (34, 1, 64, 21_797_672 - 513_000),
            (50, 1, 64, 25_557_032 - 2_049_000),
            (101, 1, 64, 44_549_160 - 2_049_000),
            (152, 1, 64, 60_192_808 - 2_049_000),
            (101, 32, 8, 88_791_336 - 2_049_000),
        ],
    )
    def test_bodies(self, depth: int, groups: int, width: int, parameters: int) -> None:
        keys = {"DEPTH": depth, "NUM_GROUPS": groups, "WIDTH_PER_GROUP": width}
        res2 = 64 if depth < 50 else 256
        overrides = [word for key, value in keys.items() for word in (f"MODEL.RESNETS.{key}", str(value))]
        model = on_meta(load_config(R50, [*overrides, "MODEL.RESNETS.RES2_OUT_CHANNELS", str(res2)]).cfg)
        assert count(model.backbone.body) == parameters
        assert [block[0].in_channels for block in model.backbone.fpn.inner_blocks] == [
            res2,
            2 * res2,
            4 * res2,
            8 * res2,
        ]

    def test_pyramid_strides(self, config: Config) -> None:
        maps = built(config()).backbone(torch.zeros(1, 3, 96, 160))
        assert {name: tuple(level.shape[1:]) for name, level in maps.items()} == {
            "p2": (32, 24, 40),
            "p3": (32, 12, 20),
            "p4": (32, 6, 10),
            "p5": (32, 3, 5),
            "pool": (32, 2, 3),
        }

    @pytest.mark.parametrize("norm", NORM_CLASSES)
    @pytest.mark.parametrize("key", NORM_PARTS)
    def test_each_norm_key_acts_on_its_own_part(self, key: str, norm: str, config: Config) -> None:
        other = "GN" if norm == "BN" else "BN"
        norms = {**dict.fromkeys(NORM_PARTS, other), key: norm}
        model = on_meta(config(*[word for pair in norms.items() for word in pair]))
        for of_part, prefix in NORM_PARTS.items():
            found = {type(m) for m in model.get_submodule(prefix).modules() if isinstance(m, norm_classes())}
            assert found == {NORM_CLASSES[norms[of_part]]} - {None}, of_part
        rest = {n for n, m in model.named_modules() if isinstance(m, norm_classes())}
        assert {n for n in rest if not n.startswith(tuple(NORM_PARTS.values()))} == set()

    @pytest.mark.parametrize("norm", NORM_CLASSES)
    def test_convolutions_have_a_bias_only_without_norm(self, norm: str, config: Config) -> None:
        model = on_meta(config(*[word for key in NORM_PARTS for word in (key, norm)]))
        for key, prefix in NORM_PARTS.items():
            biases = {m.bias is not None for m in model.get_submodule(prefix).modules() if isinstance(m, nn.Conv2d)}
            assert biases == {norm == "" and key != "MODEL.RESNETS.NORM"}, key

    def test_group_norm_has_32_groups(self, mask_rcnn_r50: nn.Module) -> None:
        norms = [m for m in mask_rcnn_r50.modules() if isinstance(m, nn.GroupNorm)]
        assert len(norms) == 69  # counted in detectron2's model
        assert {(norm.num_groups, norm.eps) for norm in norms} == {(32, 1e-5)}

    @pytest.mark.parametrize("convs", [0, 2])
    @pytest.mark.parametrize("fcs", [0, 1, 2])
    def test_box_head_depths(self, convs: int, fcs: int, config: Config) -> None:
        numbers = ("MODEL.ROI_BOX_HEAD.NUM_CONV", str(convs), "MODEL.ROI_BOX_HEAD.NUM_FC", str(fcs))
        heads = built(config(*numbers)).roi_heads
        kinds = [type(m) for m in heads.box_head.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert kinds == [nn.Conv2d] * convs + [nn.Linear] * fcs
        logits, deltas = heads.box_predictor(heads.box_head(torch.zeros(3, 32, 7, 7)))
        assert (logits.shape, deltas.shape) == ((3, 11), (3, 44))

    def test_faster_rcnn_has_no_mask_head(self, config: Config) -> None:
        model = built(config("MODEL.MASK_ON", "False"))
        assert not [name for name, _ in model.named_parameters() if "mask" in name]
        assert "loss_mask" not in backend.losses(model, [sample()])
        assert "masks" not in backend.predict(model, [sample()])[0]


def norm_classes() -> tuple[type, ...]:
    return tuple(kind for kind in NORM_CLASSES.values() if kind)


class TestFreezing:
    @pytest.mark.parametrize("norm", ["GN", "BN"])
    @pytest.mark.parametrize("freeze_at", range(6))
    def test_freezes_exactly_the_first_stages(self, freeze_at: int, norm: str, config: Config) -> None:
        cfg = config("MODEL.BACKBONE.FREEZE_AT", str(freeze_at), "MODEL.RESNETS.NORM", norm)
        model = on_meta(cfg)
        stages = ["(conv|bn)1", "layer1", "layer2", "layer3", "layer4"]
        frozen = re.compile(rf"backbone\.body\.({'|'.join(stages[:freeze_at]) or 'none'})\.")
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (not frozen.match(name)), name
        for name, layer in model.backbone.body.named_modules(prefix="backbone.body"):
            if isinstance(layer, norm_classes()):
                expected = FrozenBatchNorm2d if norm == "BN" and frozen.match(name + ".") else NORM_CLASSES[norm]
                assert type(layer) is expected, name

    def test_frozen_norms_keep_their_statistics(self, config: Config) -> None:
        cfg = config("MODEL.BACKBONE.FREEZE_AT", "2", "MODEL.RESNETS.NORM", "BN")
        model = built(cfg)
        before = {name: value.clone() for name, value in model.backbone.body.state_dict().items()}
        backend.losses(model, [sample(), sample(seed=1)])
        changed = {name for name, value in model.backbone.body.state_dict().items() if not value.equal(before[name])}
        assert changed
        assert {name.split(".")[0] for name in changed} == {"layer2", "layer3", "layer4"}

    @pytest.mark.parametrize(("in_1x1", "strides"), [("True", (2, 1)), ("False", (1, 2))])
    def test_stride_in_1x1(self, in_1x1: str, strides: tuple[int, int]) -> None:
        with torch.device("meta"):
            body = build_resnet(load_config(R50, ["MODEL.RESNETS.STRIDE_IN_1X1", in_1x1]).cfg)
        found = [
            (stage[0].conv1.stride[0], stage[0].conv2.stride[0]) for stage in (body.layer2, body.layer3, body.layer4)
        ]
        assert found == [strides] * 3
        assert {block.conv2.stride for block in [*body.layer1, *body.layer2[1:]]} == {(1, 1)}


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

    def test_table_covers_every_layer_type(self) -> None:
        types = {backend.LAYER_TYPES.get(name.rpartition(".")[0]) for name, *_ in INITIALISED}
        tested = {
            prefix for prefix in backend.LAYER_TYPES if any(f"{n}.".startswith(f"{prefix}.") for n, *_ in INITIALISED)
        }
        elsewhere = {prefix for prefix in backend.LAYER_TYPES if "keypoint" in prefix}  # test_keypoint_head.py
        assert tested == set(backend.LAYER_TYPES) - elsewhere
        assert types <= {*FILLS, None}

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

    def test_a_layer_that_no_entry_covers_is_refused(self) -> None:
        model = nn.ModuleDict({"known": nn.Conv2d(1, 1, 1), "stray": nn.Linear(1, 1)})
        with pytest.raises(ValueError, match="'stray' has weights but no entry"):
            initialize(model, {"known": "backbone"})

    def test_a_kind_of_layer_without_rule_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"'lookup' \(Embedding\) has weights but no rule"):
            initialize(nn.ModuleDict({"lookup": nn.Embedding(2, 2)}), {"lookup": "backbone"})

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
            initialize(model, {"head": "cls_score"})


class TestAnchors:
    def test_by_hand(self) -> None:
        anchors = Anchors([[16], [32], [64], [128], [256]], [[0.5, 1.0, 2.0]], PYRAMID, offset=0.0)
        maps = [torch.zeros(1, 1, *size) for size in [(2, 3), (1, 2), (1, 1), (1, 1), (2, 2)]]
        (found,) = anchors(ImageList(torch.zeros(1, 3, 8, 12), [(8, 12)]), maps)
        assert found.shape == ((6 + 2 + 1 + 1 + 4) * 3, 4)
        wide, tall = 16 * math.sqrt(2) / 2, 16 / math.sqrt(2) / 2  # half sides at height / width = 0.5
        first = boxes_of((-wide, -tall, wide, tall), (-8, -8, 8, 8), (-tall, -wide, tall, wide))
        torch.testing.assert_close(found[:3], first)
        torch.testing.assert_close(found[3:6], first + boxes_of((4, 0, 4, 0)))  # the next column, stride 4
        torch.testing.assert_close(found[9:12], first + boxes_of((0, 4, 0, 4)))  # the next row
        torch.testing.assert_close(found[-2], boxes_of((64 - 128, 64 - 128, 64 + 128, 64 + 128))[0])  # p6, stride 64

    def test_sizes_come_before_ratios_and_the_offset_moves_centres(self) -> None:
        anchors = Anchors([[8, 16]], [[1.0, 4.0]], [4], offset=0.5)
        (found,) = anchors(ImageList(torch.zeros(1, 3, 4, 4), [(4, 4)]), [torch.zeros(1, 1, 1, 1)])
        half_sides = boxes_of((4, 4, 4, 4), (2, 8, 2, 8), (8, 8, 8, 8), (4, 16, 4, 16))
        torch.testing.assert_close(found, half_sides * torch.tensor([-1, -1, 1, 1]) + 2)

    @pytest.mark.detectron2
    @pytest.mark.parametrize("size", [(64, 64), (96, 160), (224, 32)])
    @pytest.mark.parametrize("offset", [0.0, 0.5])
    def test_equal_detectron2s(self, size: tuple[int, int], offset: float, config: Config) -> None:
        from detectron2.modeling.anchor_generator import DefaultAnchorGenerator

        shapes, ratios = [[8], [16], [33], [64], [128.5]], [[0.5, 1.0, 2.0]]
        maps = list(Backbone(config())(torch.zeros(1, 3, *size)).values())
        theirs = DefaultAnchorGenerator(sizes=shapes, aspect_ratios=ratios, strides=PYRAMID, offset=offset)
        expected = torch.cat([boxes.tensor for boxes in theirs(maps)])
        ours = Anchors(shapes, ratios, PYRAMID, offset)(ImageList(torch.zeros(2, 3, *size), [size, size]), maps)
        assert len(ours) == 2
        torch.testing.assert_close(ours[1], expected)


class TestPooling:
    def test_boxes_go_to_the_level_of_their_size(self) -> None:
        """A 224 px box pools p4 (Lin et al., equation 1); constant maps tell the level that was read."""
        sides = [1, 111, 112, 223, 224, 447, 448, 2000]
        levels = {name: torch.full((1, 1, 512 >> i, 512 >> i), 2.0 + i) for i, name in enumerate(STRIDES)}
        boxes = boxes_of(*[(10, 10, 10 + side, 10 + side) for side in sides])
        pooled = ROIPooler(STRIDES, 7, 2, aligned=True)(levels, [boxes])
        assert pooled[:, 0, 0, 0].tolist() == [2, 2, 3, 3, 4, 4, 5, 5]

    def test_images_keep_their_order(self) -> None:
        levels = {name: torch.arange(2.0).reshape(2, 1, 1, 1).expand(2, 1, 64, 64) for name in STRIDES}
        boxes = [boxes_of((0, 0, 9, 9)), boxes_of((0, 0, 500, 500), (0, 0, 9, 9))]
        assert ROIPooler(STRIDES, 1, 1, aligned=False)(levels, boxes).flatten().tolist() == [0, 1, 1]

    def test_no_boxes(self) -> None:
        levels = {name: torch.ones(1, 3, 8, 8) for name in STRIDES}
        assert ROIPooler(STRIDES, 7, 2, aligned=True)(levels, [torch.zeros(0, 4)]).shape == (0, 3, 7, 7)

    @pytest.mark.parametrize(("aligned", "expected"), [(True, 2.5), (False, 3.0)])
    def test_alignment(self, aligned: bool, expected: float) -> None:
        """A map whose value is the column, a box from column 2 to 4: its centre, with or without the half pixel."""
        columns = torch.arange(16.0).expand(1, 1, 16, 16)
        pooled = ROIPooler(STRIDES, 1, 1, aligned)(dict.fromkeys(STRIDES, columns), [boxes_of((8, 8, 16, 16))])
        assert pooled.item() == expected

    @pytest.mark.detectron2
    @pytest.mark.parametrize("kind", ["ROIAlign", "ROIAlignV2"])
    @pytest.mark.parametrize("ratio", [0, 2])
    def test_equals_detectron2s(self, kind: str, ratio: int) -> None:
        from detectron2.modeling.poolers import ROIPooler as TheirPooler
        from detectron2.structures import Boxes

        torch.manual_seed(0)
        levels = {name: torch.randn(2, 8, 96 >> i, 96 >> i) for i, name in enumerate(STRIDES)}
        corners = torch.rand(2, 40, 2) * 200
        boxes = list(torch.cat([corners, corners + torch.rand(2, 40, 2) ** 3 * 900], dim=2))
        theirs = TheirPooler(7, [1 / 4, 1 / 8, 1 / 16, 1 / 32], ratio, kind)
        expected = theirs(list(levels.values()), [Boxes(one) for one in boxes])
        torch.testing.assert_close(ROIPooler(STRIDES, 7, ratio, kind == "ROIAlignV2")(levels, boxes), expected)


class TestLosses:
    @pytest.mark.parametrize("beta", [0.0, 0.5])
    def test_box_head_losses_by_hand(self, beta: float) -> None:
        logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        labels = torch.tensor([2, 0, 1])
        deltas = torch.full((3, 12), 9.0)  # slots of other classes must not count
        targets = torch.zeros(3, 4)
        deltas[0, 8:] = torch.tensor([0.1, -0.3, 1.0, 2.0])
        deltas[2, 4:8] = 0.0
        keys = get_cfg().MODEL.ROI_BOX_HEAD
        keys.SMOOTH_L1_BETA = beta
        found = box_losses(logits, deltas, labels, targets, keys)
        classification = -(F.log_softmax(logits, 1)[0, 2] + F.log_softmax(logits, 1)[1, 0] + math.log(1 / 3)) / 3
        assert found["loss_cls"].item() == pytest.approx(classification.item(), rel=1e-5)
        squared = (0.1**2 + 0.3**2) / (2 * beta) if beta else 0.1 + 0.3
        assert found["loss_box_reg"].item() == pytest.approx((squared + (1.0 + 2.0) - 2 * beta / 2) / 3, rel=1e-5)

    @pytest.mark.parametrize(("beta", "weight", "box_weight"), [(0.0, 1, 1), (0.25, 2, 3)])
    def test_rpn_losses_are_sums_over_the_nominal_sample(
        self, beta: float, weight: float, box_weight: float, config: Config
    ) -> None:
        keys = {"SMOOTH_L1_BETA": beta, "LOSS_WEIGHT": float(weight), "BBOX_REG_LOSS_WEIGHT": float(box_weight)}
        rpn = RPN(
            config(*[word for key, value in keys.items() for word in (f"MODEL.RPN.{key}", str(value))]), 32, PYRAMID
        )
        labels = [torch.tensor([1.0, 0.0, -1.0]), torch.tensor([0.0, -1.0, 0.0])]
        objectness = torch.tensor([2.0, -1.0, 50.0, 0.0, 50.0, 1.0])[:, None]
        deltas = torch.full((6, 4), 7.0)
        deltas[0] = torch.tensor([0.1, -0.5, 0.0, 0.0])
        loss_cls, loss_loc = rpn.compute_loss(objectness, deltas, labels, [torch.zeros(3, 4)] * 2)
        entropy = math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)) + math.log(2) + math.log1p(math.exp(1))
        distance = 0.1**2 / (2 * beta) + 0.5 - beta / 2 if beta else 0.6
        assert loss_cls.item() == pytest.approx(weight * entropy / (32 * 2), rel=1e-5)
        assert loss_loc.item() == pytest.approx(weight * box_weight * distance / (32 * 2), rel=1e-5)

    @pytest.mark.parametrize(
        ("key", "factors"),
        [
            ("MODEL.RPN.LOSS_WEIGHT", {"loss_rpn_cls": 3, "loss_rpn_loc": 3}),
            ("MODEL.RPN.BBOX_REG_LOSS_WEIGHT", {"loss_rpn_loc": 3}),
            ("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT", {"loss_box_reg": 3}),
        ],
    )
    def test_loss_weights_reach_the_model(self, key: str, factors: dict[str, float], config: Config) -> None:
        plain, weighted = (self._losses(cfg) for cfg in (config(), config(key, "3.0")))
        assert min(plain.values()) > 0
        assert {name: round(weighted[name] / plain[name], 4) for name in plain} == dict.fromkeys(plain, 1) | factors

    @pytest.mark.parametrize(
        ("key", "smaller"),
        [("MODEL.RPN.SMOOTH_L1_BETA", "loss_rpn_loc"), ("MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", "loss_box_reg")],
    )
    def test_betas_reach_the_model(self, key: str, smaller: str, config: Config) -> None:
        sharp, smooth = (self._losses(cfg) for cfg in (config(key, "0.0"), config(key, "1.0")))
        assert {name for name in sharp if smooth[name] != sharp[name]} == {smaller}
        assert smooth[smaller] < sharp[smaller]

    @staticmethod
    def _losses(cfg: CfgNode) -> dict[str, float]:
        model = built(cfg)
        torch.manual_seed(0)
        return {name: loss.item() for name, loss in backend.losses(model, [sample(), sample(seed=1)]).items()}

    def test_names_are_detectron2s(self, config: Config) -> None:
        names = {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"}
        losses = backend.losses(built(config()), [sample()])
        assert set(losses) == names
        assert all(loss.shape == () for loss in losses.values())

    @pytest.mark.parametrize("norm", ["GN", "BN", ""])
    def test_images_without_objects(self, norm: str, config: Config) -> None:
        """The mask head sees no box at all, which some norms do not like."""
        model = built(config("MODEL.ROI_BOX_HEAD.NORM", norm, "MODEL.ROI_MASK_HEAD.NORM", norm))
        losses = backend.losses(model, [sample(objects=0), sample(objects=0, seed=1)])
        sum(losses.values()).backward()
        assert (losses["loss_box_reg"], losses["loss_mask"], losses["loss_rpn_loc"]) == (0, 0, 0)
        assert losses["loss_cls"] > 0
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

    def test_images_of_different_sizes_and_one_without_objects(self, config: Config) -> None:
        losses = backend.losses(built(config()), [sample(64, 90), sample(97, 64, seed=1), sample(33, 40, objects=0)])
        assert all(loss.isfinite() for loss in losses.values())
        assert losses["loss_mask"] > 0

    def test_padding_is_zero_after_normalisation(self, config: Config) -> None:
        """Zero is the mean image, so padding looks like nothing in particular."""
        model = built(config("MODEL.PIXEL_MEAN", "[1.0, 2.0, 3.0]", "MODEL.PIXEL_STD", "[2.0, 4.0, 5.0]"))
        white, small = torch.full((3, 40, 64), 255, dtype=torch.uint8), torch.zeros((3, 20, 33), dtype=torch.uint8)
        images = model.preprocess([{"image": white}, {"image": small}])
        assert images.tensors.shape == (2, 3, 64, 64)
        assert images.image_sizes == [(40, 64), (20, 33)]
        torch.testing.assert_close(images.tensors[0, :, 39, 63], torch.tensor([254 / 2, 253 / 4, 252 / 5]))
        torch.testing.assert_close(images.tensors[1, :, 19, 32], torch.tensor([-1 / 2, -2 / 4, -3 / 5]))
        assert (images.tensors[0, :, 40:] == 0).all()
        assert (images.tensors[1, :, 20:] == 0).all()
        assert (images.tensors[1, :, :, 33:] == 0).all()

    def test_bf16_autocast_on_the_cpu(self, config: Config) -> None:
        cfg = config("SOLVER.AMP.ENABLED", "True")
        model = built(cfg)
        state = State(cfg, model, torch.device("cpu"))
        types = {}
        model.backbone.body.conv1.register_forward_hook(lambda *arguments: types.update(body=arguments[2].dtype))
        model.roi_heads.box_predictor.register_forward_hook(lambda *arguments: types.update(box=arguments[2][0].dtype))
        with state.forward():
            assert {loss.dtype for loss in backend.losses(model, [sample()]).values()} == {torch.float32}
        before = model.rpn.head.cls_logits.weight.clone()
        trainer = Trainer(cfg, backend, Group(ALONE, state.device, StopFlag()), state, None, None, None)
        losses, _ = trainer.step(0, 0.01, [[sample(), sample(objects=0, seed=1)]])
        assert types == {"body": torch.bfloat16, "box": torch.float32}
        assert all(math.isfinite(value) for value in losses.values())
        assert losses["total_loss"] == pytest.approx(sum(losses.values()) - losses["total_loss"], rel=1e-5)
        assert all(p.grad.isfinite().all() and p.dtype == torch.float32 for p in model.parameters())
        assert not model.rpn.head.cls_logits.weight.equal(before)

    def test_bf16_losses_are_close_to_float32s(self, config: Config) -> None:
        losses = {}
        for amp in ("False", "True"):
            cfg = config("SOLVER.AMP.ENABLED", amp, "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "4096")
            state = State(cfg, built(cfg), torch.device("cpu"))
            with state.forward():
                losses[amp] = backend.losses(state.model, [sample()])
        for name in ("loss_rpn_cls", "loss_rpn_loc"):
            assert losses["True"][name].item() == pytest.approx(losses["False"][name].item(), rel=0.02)


class TestMasks:
    def test_targets_by_hand(self) -> None:
        """An 8 x 8 mask, left half set. Boxes of 4 x 4 px at resolution 4 read pixels; half-covered cells count."""
        mask = torch.zeros(2, 8, 8, dtype=torch.uint8)
        mask[1, :, :4] = 1
        boxes = boxes_of((2, 2, 6, 6), (2, 2, 6, 6), (0, 0, 4, 4), (3.5, 0, 7.5, 4))
        found = mask_targets(mask, torch.tensor([1, 0, 1, 1]), boxes, 4)
        rows = [[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
        assert found.dtype == torch.float32
        assert found.tolist() == [[row] * 4 for row in rows]

    def test_target_of_a_large_box_averages(self) -> None:
        mask = torch.zeros(1, 8, 8, dtype=torch.uint8)
        mask[0, :4, :3] = 1  # of the upper left 4 x 4 px, 12 of 16
        mask[0, 4:, 4] = 1  # of the lower right, 4 of 16
        found = mask_targets(mask, torch.tensor([0]), boxes_of((0, 0, 8, 8)), 2)
        assert found.tolist() == [[[1, 0], [0, 0]]]

    def test_paste_by_hand(self) -> None:
        """A 2 x 2 mask, top row set, over columns 2-5 and rows 1-4: bilinear, so the border lies at the middle."""
        masks, boxes = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]]), boxes_of((2, 1, 6, 5))
        expected = np.zeros((1, 8, 10), dtype=np.uint8)
        expected[0, 1:3, 2:6] = 1
        assert (paste_masks(masks, boxes, 8, 10) != expected).sum() == 0

    def test_paste_across_the_border_of_the_image(self) -> None:
        pasted = paste_masks(torch.ones(2, 28, 28), boxes_of((-4, -4, 3, 3), (6, 2, 30, 4)), 8, 10)
        assert pasted.shape == (2, 8, 10)
        assert pasted.dtype == np.uint8
        assert [np.argwhere(one).min(0).tolist() for one in pasted] == [[0, 0], [2, 6]]
        assert [np.argwhere(one).max(0).tolist() for one in pasted] == [[2, 2], [3, 9]]

    def test_paste_of_nothing(self) -> None:
        assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), 8, 10).shape == (0, 8, 10)
        assert not paste_masks(torch.ones(1, 28, 28), boxes_of((20, 20, 30, 30)), 8, 10).any()

    @pytest.mark.detectron2
    def test_targets_equal_detectron2s(self) -> None:
        from detectron2.structures import BitMasks

        masks, boxes = self._random(resolution=60)
        masks = (masks > 0.4).to(torch.uint8)
        matched = torch.randint(0, len(masks), (len(boxes),))
        expected = BitMasks(masks[matched]).crop_and_resize(boxes, 28)
        assert mask_targets(masks, matched, boxes, 28).equal(expected.float())

    @pytest.mark.detectron2
    def test_pasting_equals_detectron2s(self) -> None:
        from detectron2.layers import paste_masks_in_image

        masks, boxes = self._random(resolution=28)
        expected = paste_masks_in_image(masks, boxes, (50, 70), threshold=0.5).numpy()
        assert (paste_masks(masks, boxes, 50, 70) != expected).mean() < 1e-5  # a probability of 0.5 to the last bit

    @staticmethod
    def _random(resolution: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        smooth = F.interpolate(torch.rand(20, 1, 5, 5), (resolution, resolution), mode="bilinear")[:, 0]
        corners = torch.rand(20, 2) * 50 - 10
        return smooth, torch.cat([corners, corners + 1 + torch.rand(20, 2) * 30], dim=1)


class Fixed(nn.Module):
    """Detections that are known: input 32 x 48 px, 0-based labels, full masks."""

    def extract_features(self, batch: list[dict[str, Any]]) -> tuple[list, list]:
        return batch, batch

    def detect(self, images: list, features: list) -> list[dict[str, Tensor]]:
        boxes = boxes_of((8, 4, 16, 12), (40, 20, 60, 40), (4, 4, 4, 9))
        return [{"boxes": boxes, "scores": torch.tensor([0.9, 0.8, 0.7]), "labels": torch.tensor([0, 9, 2])}]

    def shapes(self, features: list, found: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        return [{"masks": torch.ones(3, 28, 28)}]


class TestPredictions:
    def test_are_in_pixels_of_the_original_image(self) -> None:
        image = {"image": torch.zeros(3, 32, 48, dtype=torch.uint8), "height": 64, "width": 144}
        (found,) = backend.predict(Fixed(), [image])
        expected = boxes_of((24, 8, 48, 24), (120, 40, 144, 64))  # x times 3, y times 2; clipped; the empty box dropped
        assert found["boxes"].equal(expected)
        assert found["labels"].tolist() == [0, 9]
        assert found["scores"].tolist() == pytest.approx([0.9, 0.8])
        for rle, (x1, y1, x2, y2) in zip(found["masks"], expected.int().tolist(), strict=True):
            decoded = mask_api.decode(rle)
            assert decoded.shape == (64, 144)
            assert decoded.sum() == decoded[y1:y2, x1:x2].sum() == (x2 - x1) * (y2 - y1)

    def test_of_an_untrained_model_on_images_of_different_sizes(self, config: Config) -> None:
        model = built(config("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"))
        batch = [sample(64, 96, seed=1, scale=1.7), sample(90, 50, seed=2, scale=0.5)]
        for image, found in zip(batch, backend.predict(model, batch), strict=True):
            number = len(found["scores"])
            assert number == 10  # TEST.DETECTIONS_PER_IMAGE
            assert {key: found[key].dtype for key in ("boxes", "scores", "labels")} == {
                "boxes": torch.float32,
                "scores": torch.float32,
                "labels": torch.int64,
            }
            assert found["scores"].tolist() == sorted(found["scores"].tolist(), reverse=True)
            assert set(found["labels"].tolist()) <= set(range(10))
            assert found["boxes"].shape == (number, 4)
            assert (found["boxes"] >= 0).all()
            assert (found["boxes"][:, 2] <= image["width"]).all()
            assert (found["boxes"][:, 3] <= image["height"]).all()
            assert {tuple(rle["size"]) for rle in found["masks"]} == {(image["height"], image["width"])}
            assert len(found["masks"]) == number

    def test_one_image_is_predicted_as_in_a_batch(self, config: Config) -> None:
        model = built(config("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"))
        batch = [sample(seed=seed) for seed in range(2)]
        together = backend.predict(model, batch)
        alone = [backend.predict(model, [one])[0] for one in batch]
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one["scores"], other["scores"], rtol=1e-4, atol=1e-6)

    def test_a_high_threshold_leaves_nothing(self, config: Config) -> None:
        (found,) = backend.predict(built(config("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.99")), [sample()])
        assert found["boxes"].shape == (0, 4)
        assert found["masks"] == []

    def test_leaves_no_gradient_and_evaluation_mode(self, config: Config) -> None:
        model = built(config("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0")).train()
        (found,) = backend.predict(model, [sample()])
        assert not model.training
        assert not found["scores"].requires_grad
        backend.losses(model, [sample()])
        assert model.training


WRONG = {  # a value of the right type that this backend does not have
    "MODEL.META_ARCHITECTURE": "RetinaNet",
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.BACKBONE.FREEZE_AT": 6,
    "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL.FPN.FUSE_TYPE": "avg",
    "MODEL.RESNETS.DEPTH": 26,
    "MODEL.RESNETS.OUT_FEATURES": ["res4"],
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 32,
    "MODEL.RESNETS.RES5_DILATION": 2,
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, True, True, True],
    "MODEL.PROPOSAL_GENERATOR.NAME": "RRPN",
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": 4,
    "MODEL.ANCHOR_GENERATOR.NAME": "RotatedAnchorGenerator",
    "MODEL.RPN.HEAD_NAME": "OtherHead",
    "MODEL.RPN.IN_FEATURES": ["p3", "p4", "p5"],
    "MODEL.RPN.BOUNDARY_THRESH": 0,
    "MODEL.RPN.IOU_LABELS": [0, 1],
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": "giou",
    "MODEL.ROI_HEADS.NAME": "Res5ROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3"],
    "MODEL.ROI_HEADS.IOU_LABELS": [0, -1, 1],
    "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": False,
    "MODEL.ROI_BOX_HEAD.NAME": "",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": "diou",
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIPool",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
    "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": True,
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": True,
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": True,
    "MODEL.ROI_MASK_HEAD.NAME": "PointRendMaskHead",
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": "ROIAlignRotated",
    "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": True,
    "MODEL.ROI_KEYPOINT_HEAD.NAME": "KRCNNHead",
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE": "ROIPool",
    "MODEL.LOAD_PROPOSALS": True,
    "INPUT.CROP.ENABLED": True,
    "DATALOADER.SAMPLER_TRAIN": "RepeatFactorTrainingSampler",
    "TEST.PRECISE_BN.ENABLED": True,
}


class TestRefusals:
    def test_every_restricted_key_has_a_wrong_value_here(self) -> None:
        chosen = {"MODEL.BACKBONE.NAME", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG"}
        assert set(WRONG) == set(ALLOWED) | set(RESNETS) | chosen

    @pytest.mark.parametrize("key", WRONG)
    def test_a_value_it_does_not_have_is_refused_by_name(self, key: str, config: Config) -> None:
        cfg = config("MODEL.KEYPOINT_ON", "True")
        set_key(cfg, key, WRONG[key])
        with pytest.raises(ConfigError, match=f"{re.escape(key)} is {re.escape(repr(WRONG[key]))}") as refusal:
            check(cfg)
        assert {line.split()[0] for line in str(refusal.value).splitlines()[1:] if " is " in line} <= {
            key,
            "MODEL.RESNETS.RES2_OUT_CHANNELS",  # follows from the depth
        }

    def test_all_problems_at_once(self, config: Config) -> None:
        with pytest.raises(ConfigError) as refusal:
            check(config("INPUT.CROP.ENABLED", "True", "MODEL.LOAD_PROPOSALS", "True"))
        assert all(key in str(refusal.value) for key in ("INPUT.CROP.ENABLED", "MODEL.LOAD_PROPOSALS"))

    @pytest.mark.parametrize(
        ("overrides", "named"),
        [
            (("MODEL.RESNETS.DEPTH", "50"), "MODEL.RESNETS.RES2_OUT_CHANNELS is 64"),
            (("MODEL.PIXEL_STD", "[1.0]"), "MODEL.PIXEL_STD is [1.0]; it takes 3 values"),
            (("MODEL.RPN.IOU_THRESHOLDS", "[0.5]"), "MODEL.RPN.IOU_THRESHOLDS is [0.5]; it takes 2 values"),
            (("MODEL.ROI_HEADS.IOU_THRESHOLDS", "[0.5, 0.7]"), "MODEL.ROI_HEADS.IOU_THRESHOLDS is [0.5, 0.7]"),
            (("MODEL.RESNETS.NUM_GROUPS", "32"), "MODEL.RESNETS.NUM_GROUPS"),
            (("MODEL.RPN.CONV_DIMS", "[-1, 64]"), "MODEL.RPN.CONV_DIMS is [-1, 64]"),
            (("MODEL.ANCHOR_GENERATOR.SIZES", "[[8],[16]]"), "MODEL.ANCHOR_GENERATOR.SIZES has 2 lists"),
            (
                ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[1.0],[1.0],[1.0],[1.0],[0.5,1.0]]"),
                "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS is",
            ),
        ],
    )
    def test_what_does_not_go_together(self, overrides: tuple[str, str], named: str, config: Config) -> None:
        with pytest.raises(ConfigError, match=re.escape(named)):
            check(config(*overrides))

    @pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/[!_]*.yaml")), ids=lambda path: path.stem)
    def test_every_recipe_is_accepted(self, path: Path) -> None:
        if path.parent.parent == CONFIGS and path.parent.name not in ("_base_", "Pretraining"):
            check(load_config(path).cfg)

    @pytest.mark.parametrize(
        "overrides",
        [
            ("MODEL.MASK_ON", "False", "MODEL.ROI_MASK_HEAD.NAME", "PointRendMaskHead"),  # not built, so not asked
            ("MODEL.ANCHOR_GENERATOR.SIZES", "[[8, 16]]"),  # one list for all levels
            ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlign"),
            ("MODEL.RPN.CONV_DIMS", "[]"),
            ("MODEL.RPN.CONV_DIMS", "[-1, 32]"),
        ],
    )
    def test_what_is_accepted_also_trains(self, overrides: tuple[str, ...], config: Config) -> None:
        cfg = config(*overrides)
        check(cfg)
        assert all(loss.isfinite() for loss in backend.losses(built(cfg), [sample()]).values())

    def test_every_key_is_known(self, config: Config) -> None:
        assert set(ALLOWED) | set(RESNETS) <= set(flatten(config()))
