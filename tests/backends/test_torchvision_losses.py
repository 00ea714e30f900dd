"""The torchvision backend: anchors, pooling and losses, by hand and against detectron2."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from fvcore.common.config import CfgNode
from samples import boxes_of, sample
from torch import nn
from torchvision.models.detection.image_list import ImageList

from scratch_det.backends import torchvision as backend
from scratch_det.backends.torchvision import Backbone
from scratch_det.backends.torchvision_heads import RPN, ImageAnchors, ROIPooler, box_losses
from scratch_det.config.load import get_cfg
from scratch_det.distributed.group import Group
from scratch_det.distributed.launch import ALONE
from scratch_det.distributed.stop import StopFlag
from scratch_det.engine.loop import Trainer
from scratch_det.engine.state import State

CONFIGS = ROOT / "configs"
SMALL = CONFIGS / "Digits/quickstart.yaml"
PYRAMID = [4, 8, 16, 32, 64]
STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}

Config = Callable[..., CfgNode]


def built(cfg: CfgNode, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return backend.build(cfg)


class TestAnchors:
    def test_by_hand(self) -> None:
        anchors = ImageAnchors([[16], [32], [64], [128], [256]], [[0.5, 1.0, 2.0]], PYRAMID, offset=0.0)
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
        anchors = ImageAnchors([[8, 16]], [[1.0, 4.0]], [4], offset=0.5)
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
        ours = ImageAnchors(shapes, ratios, PYRAMID, offset)(ImageList(torch.zeros(2, 3, *size), [size, size]), maps)
        assert len(ours) == 2
        torch.testing.assert_close(ours[1], expected)


class TestPooling:
    def test_boxes_go_to_the_level_of_their_size(self) -> None:
        """A 224 px box pools p4 (Lin et al., equation 1); constant maps tell the level that was read."""
        sides = [1, 111, 112, 223, 224, 447, 448, 2000]
        levels = {name: torch.full((1, 1, 512 >> i, 512 >> i), 2.0 + i) for i, name in enumerate(STRIDES)}
        boxes = boxes_of(*[(10, 10, 10 + side, 10 + side) for side in sides])
        pooled = ROIPooler("ROIAlignV2", STRIDES, 7, 2)(levels, [boxes])
        assert pooled[:, 0, 0, 0].tolist() == [2, 2, 3, 3, 4, 4, 5, 5]

    def test_images_keep_their_order(self) -> None:
        levels = {name: torch.arange(2.0).reshape(2, 1, 1, 1).expand(2, 1, 64, 64) for name in STRIDES}
        boxes = [boxes_of((0, 0, 9, 9)), boxes_of((0, 0, 500, 500), (0, 0, 9, 9))]
        assert ROIPooler("ROIAlign", STRIDES, 1, 1)(levels, boxes).flatten().tolist() == [0, 1, 1]

    @pytest.mark.parametrize("kind", ["ROIAlignV2", "ROIPool"])
    def test_values_and_gradients_are_those_of_each_level_alone(self, kind: str) -> None:
        """Bit for bit; the boxes of two images, in any order."""
        torch.manual_seed(0)
        side, level = torch.tensor([[447, 1, 224, 2000, 112, 223, 448, 111], [2, 0, 2, 3, 1, 1, 3, 0]])
        image = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
        rois = torch.stack([image, *[torch.full_like(side, 10)] * 2, 10 + side, 10 + side], dim=1).float()
        maps = {name: torch.randn(2, 3, 64 >> i, 64 >> i, requires_grad=True) for i, name in enumerate(STRIDES)}
        pooler, weights = ROIPooler(kind, STRIDES, 7, 2), torch.randn(8, 3, 7, 7)
        pooled = pooler(maps, [rois[:3, 1:], rois[3:, 1:]])
        pooled.backward(weights)
        for number, (name, stride) in enumerate(STRIDES.items()):
            own, alone = level == number, maps[name].detach().requires_grad_()
            expected = pooler.pool(alone, rois[own], 7, 1 / stride)
            expected.backward(weights[own])
            assert pooled[own].equal(expected)
            assert maps[name].grad.equal(alone.grad)

    def test_no_boxes(self) -> None:
        levels = {name: torch.ones(1, 3, 8, 8) for name in STRIDES}
        assert ROIPooler("ROIAlignV2", STRIDES, 7, 2)(levels, [torch.zeros(0, 4)]).shape == (0, 3, 7, 7)

    @pytest.mark.parametrize(("kind", "expected"), [("ROIAlignV2", 2.5), ("ROIAlign", 3.0)])
    def test_alignment(self, kind: str, expected: float) -> None:
        """A map whose value is the column, a box from column 2 to 4: its centre, with or without the half pixel."""
        columns = torch.arange(16.0).expand(1, 1, 16, 16)
        pooled = ROIPooler(kind, STRIDES, 1, 1)(dict.fromkeys(STRIDES, columns), [boxes_of((8, 8, 16, 16))])
        assert pooled.item() == expected

    @pytest.mark.detectron2
    @pytest.mark.parametrize("kind", ["ROIAlign", "ROIAlignV2", "ROIPool"])
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
        torch.testing.assert_close(ROIPooler(kind, STRIDES, 7, ratio)(levels, boxes), expected)


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
        images, _ = model.extract_features([{"image": white}, {"image": small}])
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
        model.rpn.head.register_forward_hook(lambda *arguments: types.update(rpn=arguments[2][0][0].dtype))
        with state.forward():
            assert {loss.dtype for loss in backend.losses(model, [sample()]).values()} == {torch.float32}
        before = model.rpn.head.cls_logits.weight.clone()
        trainer = Trainer(cfg, backend, Group(ALONE, "cpu", StopFlag()), state, None, None, None)
        losses = trainer.step(0, 0.01, [[sample(), sample(objects=0, seed=1)]])()
        assert types == {"body": torch.bfloat16, "rpn": torch.float32}
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
