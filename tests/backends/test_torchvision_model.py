"""The torchvision backend: layers, frozen stages and predictions."""

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT
from fvcore.common.config import CfgNode
from pycocotools import mask as mask_api
from samples import boxes_of, sample
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from scratch_det.backends import torchvision as backend
from scratch_det.config.load import load_config
from scratch_det.evaluation.inference import pasted
from scratch_det.modeling.backbones import build_bottom_up
from scratch_det.modeling.norm import SyncBatchNorm

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
NORM_PARTS = {  # key -> the layers it governs
    "MODEL.RESNETS.NORM": "backbone.body",
    "MODEL.FPN.NORM": "backbone.fpn",
    "MODEL.ROI_BOX_HEAD.NORM": "roi_heads.box_head",
    "MODEL.ROI_MASK_HEAD.NORM": "roi_heads.mask_head",
}

Config = Callable[..., CfgNode]


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
            body = build_bottom_up(load_config(R50, ["MODEL.RESNETS.STRIDE_IN_1X1", in_1x1]).cfg)
        found = [
            (stage[0].conv1.stride[0], stage[0].conv2.stride[0]) for stage in (body.layer2, body.layer3, body.layer4)
        ]
        assert found == [strides] * 3
        assert {block.conv2.stride for block in [*body.layer1, *body.layer2[1:]]} == {(1, 1)}


class Fixed(nn.Module):
    """Detections that are known: input 32 x 48 px, 0-based labels, full masks."""

    roi_heads = SimpleNamespace(shapes=lambda features, found: [{"masks": torch.ones(3, 28, 28)}])

    def detect(self, batch: list[dict[str, Any]]) -> tuple[list[dict[str, Tensor]], dict]:
        boxes = boxes_of((8, 4, 16, 12), (40, 20, 60, 40), (4, 4, 4, 9))
        found = {"boxes": boxes, "scores": torch.tensor([0.9, 0.8, 0.7]), "labels": torch.tensor([0, 9, 2])}
        return [found], {}


class TestPredictions:
    def test_are_in_pixels_of_the_original_image(self) -> None:
        image = {"image": torch.zeros(3, 32, 48, dtype=torch.uint8), "height": 64, "width": 144}
        (found,) = backend.predict(Fixed(), [image])
        expected = boxes_of((24, 8, 48, 24), (120, 40, 144, 64))  # x times 3, y times 2; clipped; the empty box dropped
        assert found["boxes"].equal(expected)
        assert found["labels"].tolist() == [0, 9]
        assert found["scores"].tolist() == pytest.approx([0.9, 0.8])
        for rle, (x1, y1, x2, y2) in zip(pasted(image, found)["masks"], expected.int().tolist(), strict=True):
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
            assert found["masks"].shape == (number, 28, 28)
            assert {tuple(rle["size"]) for rle in pasted(image, found)["masks"]} == {(image["height"], image["width"])}

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
        assert found["masks"].shape == (0, 28, 28)

    def test_leaves_no_gradient_and_evaluation_mode(self, config: Config) -> None:
        model = built(config("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0")).train()
        (found,) = backend.predict(model, [sample()])
        assert not model.training
        assert not found["scores"].requires_grad
        backend.losses(model, [sample()])
        assert model.training
