"""Filling models from checkpoints, classifiers and Detectron's files."""

import copy
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from four_maps import FourMaps
from fvcore.common.config import CfgNode
from run_folder import NO_TEST, weights
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50

from scratch_det import backends
from scratch_det.backends import torchvision as backend
from scratch_det.config.choices import BACKBONES, Choice
from scratch_det.config.load import load_config
from scratch_det.conversion import convert_file
from scratch_det.errors import UserError
from scratch_det.weights.convert import convert
from scratch_det.weights.load import load_weights
from scratch_det.weights.names import renamed
from scratch_det.weights.origin import read_weights
from scratch_det.weights.pixels import DETECTRON, IMAGENET, Pixels, adapt_first_layer
from scratch_det.weights.read import read_checkpoint

R50 = ROOT / "configs/COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_3x_gn.yaml"


def blobs_of(classifier: dict[str, Tensor], norm: str) -> dict[str, np.ndarray]:
    """A torchvision classifier under Detectron's names; ``norm`` is bn or gn."""
    found = {}
    for name, value in classifier.items():
        if name.startswith("fc.") or "running" in name or "num_batches" in name:
            continue
        layer, _, leaf = name.rpartition(".")
        layer = re.sub(r"layer(\d)\.(\d+)\.", lambda m: f"res{int(m[1]) + 1}_{m[2]}_branch", layer)
        layer = layer.replace("downsample.0", "1").replace("downsample.1", f"1_{norm}")
        layer = re.sub(r"branchconv(\d)", lambda m: f"branch2{'abc'[int(m[1]) - 1]}", layer)
        layer = re.sub(r"branchbn(\d)", lambda m: f"branch2{'abc'[int(m[1]) - 1]}_{norm}", layer)
        layer = layer.replace("bn1", "res_conv1_bn" if norm == "bn" else "conv1_gn")
        is_norm = layer.endswith(f"_{norm}")
        found[f"{layer}_{({'weight': 's', 'bias': 'b'} if is_norm else {'weight': 'w', 'bias': 'b'})[leaf]}"] = (
            value.numpy()
        )
    return found


def detector_blobs(norm: str) -> dict[str, tuple[int, ...]]:
    """Names and small shapes of a Mask R-CNN of Detectron, ResNet-50 with FPN.

    Its box head has four convolutions with ``norm`` gn, two fully connected layers with bn.
    """
    blocks = [f"res{stage}_{block}" for stage, count in zip((2, 3, 4, 5), (3, 4, 6, 3), strict=True)
              for block in range(count)]  # fmt: skip
    normed = ["conv1", *(f"{block}_branch2{letter}" for block in blocks for letter in "abc")]
    normed += [f"res{stage}_0_branch1" for stage in (2, 3, 4, 5)]
    tops = ["res2_2", "res3_3", "res4_5", "res5_2"]
    others = [f"fpn_inner_{top}_sum{'_lateral' * (top != 'res5_2')}" for top in tops]
    others += [f"fpn_{top}_sum" for top in tops] + [f"_[mask]_fcn{k}" for k in range(1, 5)]
    heads = ["conv_rpn_fpn2", "rpn_cls_logits_fpn2", "rpn_bbox_pred_fpn2", "fc6", "cls_score", "bbox_pred",
             "conv5_mask", "mask_fcn_logits"]  # fmt: skip
    if norm == "gn":
        normed, others = normed + others + [f"head_conv{k}" for k in range(1, 5)], []
    else:
        heads.append("fc7")
    names = [f"{layer}_{end}" for layer in normed for end in ("w", f"{norm}_s", f"{norm}_b")]
    names += [f"{layer}_{end}" for layer in others + heads for end in "wb"]
    return {name: (12, 2) if name.startswith("bbox_pred") else (3, 2) for name in names}


class TestLoading:
    @pytest.fixture
    def model(self, toy_recipe: Path) -> nn.Module:
        torch.manual_seed(0)
        return backend.build(load_config(toy_recipe, ["MODEL.RESNETS.NORM", "BN"]).cfg)

    @pytest.fixture
    def load(self, toy_recipe: Path, tmp_path: Path) -> Callable[..., str]:
        """``load(model, state, KEY, VALUE, ...)``: save ``state``, load it as the recipe's MODEL.WEIGHTS."""

        def load(model: nn.Module, state: dict[str, Any], *overrides: Any, name: str = "weights.pth") -> str:
            if name.endswith(".pkl"):
                (tmp_path / name).write_bytes(pickle.dumps(state, protocol=2))
            else:
                torch.save(state, tmp_path / name)
            return load_weights(model, tmp_path / name, "torchvision", load_config(toy_recipe, list(overrides)).cfg)

        return load

    def test_own_checkpoint(self, model: nn.Module, load: Callable[..., str]) -> None:
        changed = {key: value + 1 for key, value in model.state_dict().items()}
        total = len(changed)
        assert f"{total} of {total} tensors loaded" in load(model, {"model": changed, "iteration": 3})
        assert all(value.equal(changed[key]) for key, value in model.state_dict().items())

    def test_of_a_wrapped_model(self, model: nn.Module, load: Callable[..., str]) -> None:
        changed = {key: value + 1 for key, value in model.state_dict().items()}
        load(model, {"state_dict": {f"module.{key}": value for key, value in changed.items()}})
        assert all(value.equal(changed[key]) for key, value in model.state_dict().items())

    def test_imagenet_classifier_fills_the_backbone_alone(self, model: nn.Module, load: Callable[..., str]) -> None:
        torch.manual_seed(1)
        classifier = resnet18().state_dict()
        heads = {
            key: value.clone() for key, value in model.state_dict().items() if not key.startswith("backbone.body.")
        }
        said = load(model, classifier)
        number = len(classifier) - 2
        assert f"{number} of {number + len(heads)} tensors loaded, the backbone, from a torchvision or timm cl" in said
        assert "channels RGB to BGR; divided by PIXEL_STD 1 1 1 instead of 57.375 57.12 58.395" in said
        loaded = model.state_dict()
        first = loaded["backbone.body.conv1.weight"] * torch.tensor(IMAGENET.std[::-1]).view(1, 3, 1, 1)
        torch.testing.assert_close(first.flip(1), classifier.pop("conv1.weight"))
        assert all(loaded[f"backbone.body.{key}"].equal(value) for key, value in classifier.items() if key[:3] != "fc.")
        assert all(loaded[key].equal(value) for key, value in heads.items())

    def test_batch_norm_weights_do_not_pass_for_group_norm(self, toy_recipe: Path, load: Callable[..., str]) -> None:
        model = backend.build(load_config(toy_recipe, ["MODEL.RESNETS.NORM", "GN"]).cfg)
        with pytest.raises(UserError, match=r"without a place, the first is backbone\.body\.bn1\.running_mean"):
            load(model, resnet18().state_dict())

    @pytest.mark.parametrize(
        ("damage", "named"),
        [
            (lambda state: state.pop("rpn.head.cls_logits.bias"), "1 missing, the first is rpn.head.cls_logits.bias"),
            (
                lambda state: state.update({"backbone.fpn.inner_blocks.0.0.weight": torch.zeros(1)}),
                "1 of another shape, the first is backbone.fpn.inner_blocks.0.0.weight",
            ),
        ],
        ids=["missing", "other shape"],
    )
    def test_whatever_stays_random_is_rejected(
        self, damage: Callable, named: str, model: nn.Module, load: Callable[..., str]
    ) -> None:
        state = model.state_dict()
        total = len(state)
        before = copy.deepcopy(model.state_dict())
        damage(state)
        with pytest.raises(UserError, match=rf"does not fit the {total} tensors of the model: {re.escape(named)}"):
            load(model, state)
        assert all(value.equal(before[key]) for key, value in model.state_dict().items())

    def test_a_backbone_alone_is_not_evaluated(self, model: nn.Module, toy_recipe: Path, tmp_path: Path) -> None:
        torch.save(resnet18().state_dict(), tmp_path / "a.pth")
        with pytest.raises(UserError, match="timm classifier, which is a backbone, no detector; train one"):
            load_weights(model, tmp_path / "a.pth", "torchvision", load_config(toy_recipe).cfg, to_evaluate=True)

    def test_strangers_weights_are_rejected(self, model: nn.Module, load: Callable[..., str]) -> None:
        with pytest.raises(UserError, match=r"encoder\.weight: a Tensor; expected a checkpoint of this repo"):
            load(model, {"encoder.weight": torch.zeros(3)})

    @pytest.mark.parametrize("stated", ["", "imagenet", "caffe"])
    def test_the_stride_of_bottlenecks(self, stated: str, tmp_path: Path) -> None:
        """It is that of torchvision's ResNets, unless other pixels than theirs are stated."""
        keys = ["MODEL.RESNETS.NORM", "BN", "MODEL.RESNETS.STRIDE_IN_1X1", True, "MODEL.WEIGHTS_PIXELS", stated]
        cfg = load_config(R50, keys).cfg
        with torch.device("meta"):
            model = backend.build(cfg)
        torch.save(resnet50().state_dict(), tmp_path / "resnet50.pth")
        wrong = pytest.raises(UserError, match=r"STRIDE_IN_1X1 is True; set it to False")
        with nullcontext() if stated == "caffe" else wrong:
            load_weights(model, tmp_path / "resnet50.pth", "torchvision", cfg)

    @pytest.mark.parametrize("stated", ["", "imagenet"])
    def test_recorded_pixels_count(self, stated: str, model: nn.Module, load: Callable[..., str]) -> None:
        """A model that was trained with other pixel statistics sees the same image through the recipe's.

        A recipe still has the statement on the weights that its run began with when it evaluates its own checkpoint.
        """
        state = {key: value.clone() for key, value in model.state_dict().items()}
        recorded = Pixels("RGB", DETECTRON.mean[::-1], (2.0, 2.0, 2.0)).as_dict()
        said = load(model, {"model": state, "pixels": recorded}, "MODEL.WEIGHTS_PIXELS", stated)
        assert "channels RGB to BGR; divided by" in said
        assert ("MODEL.WEIGHTS_PIXELS does not count: the file says its pixels" in said) == bool(stated)
        name = "backbone.body.conv1.weight"
        torch.testing.assert_close(model.state_dict()[name], state[name].flip(1) / 2)

    def test_a_run_records_its_pixels_and_classes(self, train: Callable) -> None:
        folder = train("MODEL.PIXEL_STD", "[2.0, 3.0, 4.0]", *NO_TEST, backend="torchvision")
        content = read_checkpoint(folder / "model_final.pth")
        assert content["pixels"] == {"format": "BGR", "mean": list(DETECTRON.mean), "std": [2.0, 3.0, 4.0]}
        assert content["classes"]
        assert content["classes"] == load_config(folder / "config.yaml").cfg.DATASETS.CLASS_NAMES

    def test_training_starts_from_them(self, train: Callable, tmp_path: Path) -> None:
        torch.manual_seed(1)
        state = resnet18().state_dict()
        torch.save(state, tmp_path / "resnet18.pth")
        keys = ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.BACKBONE.FREEZE_AT", 2, "INPUT.FORMAT", "RGB",
                "MODEL.PIXEL_STD", list(IMAGENET.std), *NO_TEST)  # fmt: skip
        trained = weights(train("MODEL.WEIGHTS", tmp_path / "resnet18.pth", *keys, backend="torchvision"))
        moved = {key for key, value in state.items() if not trained.get(f"backbone.body.{key}", value).equal(value)}
        assert {key.split(".")[0] for key in moved} == {"layer2", "layer3", "layer4"}
        assert not [key for key in moved if "bn" in key or "num_batches" in key]


class TestDetectron:
    """Detectron's .pkl files, made here from torchvision's ResNets."""

    @pytest.mark.parametrize("library", [pytest.param("detectron2", marks=pytest.mark.detectron2), "torchvision"])
    def test_group_norm(self, library: str, tmp_path: Path) -> None:
        torch.manual_seed(0)
        classifier = resnet50(norm_layer=lambda channels: nn.GroupNorm(32, channels)).state_dict()
        blobs = blobs_of(classifier, "gn")
        assert {"conv1_w", "conv1_gn_s", "res2_0_branch1_gn_b", "res5_2_branch2c_gn_s"} < blobs.keys()
        extra = {"pred_w": np.zeros((9, 2048)), "conv1_w_momentum": blobs["conv1_w"], "conv1_b": np.ones(64)}
        (tmp_path / "R-50-GN.pkl").write_bytes(pickle.dumps({"blobs": {**blobs, **extra}, "cfg": ""}, protocol=2))
        cfg = load_config(R50).cfg
        model = backends.load(library).build(cfg)
        assert ", the backbone, from a Detectron" in load_weights(model, tmp_path / "R-50-GN.pkl", library, cfg)
        loaded = model.state_dict()
        names = renamed([f"backbone.body.{key}" for key in classifier], "torchvision", "detectron2")
        for key, value in classifier.items():
            if not key.startswith("fc."):
                name = f"backbone.body.{key}"
                assert loaded[name if library == "torchvision" else names[name]].equal(value), key

    @pytest.mark.parametrize("norm", ["gn", "bn"])
    def test_a_detector(self, norm: str, tmp_path: Path) -> None:
        """Every layer of a Mask R-CNN, as the released models of the paper's authors name it."""
        numbers = detector_blobs(norm)
        blobs = {name: np.full(shape, i, np.float32) for i, (name, shape) in enumerate(numbers.items())}
        (tmp_path / "a.pkl").write_bytes(pickle.dumps({"blobs": {**blobs, "kps_score_w": np.ones(1)}, "cfg": ""}))
        found = read_weights(tmp_path / "a.pkl")
        assert (found.kind, found.is_detector, found.pixels) == ("Detectron detector", True, DETECTRON)
        keys = [] if norm == "gn" else [
            "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "", "MODEL.ROI_BOX_HEAD.NAME",
            "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_CONV", 0, "MODEL.ROI_BOX_HEAD.NUM_FC", 2,
            "MODEL.ROI_BOX_HEAD.NORM", "", "MODEL.ROI_MASK_HEAD.NORM", ""]  # fmt: skip
        with torch.device("meta"):
            model = backend.build(load_config(R50, keys).cfg)
        assert set(found.tensors) == set(renamed(model.state_dict(), "torchvision", "detectron2").values())
        assert set(convert(found, "torchvision")[0]) == set(model.state_dict())
        first = "res2_0_branch2a_w"
        assert found.tensors["backbone.bottom_up.res2.0.conv1.weight"].flatten()[0] == list(blobs).index(first)

    def test_the_background_of_a_detector_is_its_first_class(self, tmp_path: Path) -> None:
        rows = {name: np.arange(count * 2, dtype=np.float32).reshape(count, 2)
                for name, count in (("cls_score_w", 3), ("bbox_pred_w", 12), ("mask_fcn_logits_w", 3))}  # fmt: skip
        blobs = {name: np.ones(shape, np.float32) for name, shape in detector_blobs("gn").items()} | rows
        (tmp_path / "a.pkl").write_bytes(pickle.dumps({"blobs": blobs}))
        found = read_weights(tmp_path / "a.pkl").tensors
        assert found["roi_heads.box_predictor.cls_score.weight"][:, 0].tolist() == [2, 4, 0]
        assert found["roi_heads.box_predictor.bbox_pred.weight"][:, 0].tolist() == list(range(8, 24, 2))
        assert found["roi_heads.mask_head.predictor.weight"][:, 0].tolist() == [2, 4]

    def test_a_layer_that_no_detector_here_has(self, tmp_path: Path) -> None:
        blobs = blobs_of(resnet18(norm_layer=lambda channels: nn.GroupNorm(32, channels)).state_dict(), "gn")
        blobs["retnet_cls_pred_fpn3_w"] = np.zeros((256, 256, 3, 3))
        (tmp_path / "a.pkl").write_bytes(pickle.dumps({"blobs": blobs}))
        with pytest.raises(UserError, match=r"1 blobs that no ResNet and no Faster.*, such as retnet_cls_pred_fpn3_w"):
            read_weights(tmp_path / "a.pkl")

    @pytest.mark.detectron2
    def test_a_model_without_pyramid(self, tmp_path: Path) -> None:
        """Its last stage is part of the heads."""
        torch.save(resnet50().state_dict(), tmp_path / "resnet50.pth")
        keys = ["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", "['res4']",
                "MODEL.RPN.IN_FEATURES", "['res4']", "MODEL.ROI_HEADS.IN_FEATURES", "['res4']", "MODEL.ROI_HEADS.NAME",
                "Res5ROIHeads", "MODEL.RESNETS.NORM", "BN", "MODEL.ANCHOR_GENERATOR.SIZES", "[[32, 64]]",
                "MODEL.ROI_BOX_HEAD.NAME", "", "MODEL.ROI_MASK_HEAD.NUM_CONV", 0]  # fmt: skip
        cfg = load_config(R50, keys, backends.defaults("detectron2")).cfg
        model = backends.load("detectron2").build(cfg)
        assert "318 of" in load_weights(model, tmp_path / "resnet50.pth", "detectron2", cfg)

    @pytest.mark.parametrize(("groups", "pixels", "in_1x1"), [(1, DETECTRON, True), (2, None, False)])
    def test_pixels_of_a_resnext_are_not_known(
        self, groups: int, pixels: Pixels | None, in_1x1: bool, tmp_path: Path
    ) -> None:
        """detectron2's X-101-32x8d was trained on others than Detectron's, and its batch norm is folded too."""
        blobs = {"conv1_w": np.ones((4, 3, 7, 7)), "res_conv1_bn_s": np.ones(4), "res2_0_branch2a_w": np.ones((4, 4)),
                 "res2_0_branch2b_w": np.ones((4, 4 // groups, 3, 3))}  # fmt: skip
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(blobs))
        found = read_weights(tmp_path / "a.pkl")
        assert (found.pixels, found.stride_in_1x1) == (pixels, in_1x1)
        assert read_weights(tmp_path / "a.pkl", stated=IMAGENET).pixels == IMAGENET

    def test_fused_batch_norm_is_for_frozen_bn(self, toy_recipe: Path, tmp_path: Path) -> None:
        torch.manual_seed(0)
        classifier = resnet18().state_dict()
        (tmp_path / "R-18.pkl").write_bytes(pickle.dumps(blobs_of(classifier, "bn"), protocol=2))
        convert_file(str(tmp_path / "R-18.pkl"), tmp_path / "converted.pth", "torchvision")
        for norm, file in product(("FrozenBN", "BN", "GN"), ("R-18.pkl", "converted.pth")):
            cfg = load_config(toy_recipe, ["MODEL.RESNETS.NORM", norm]).cfg
            model = backend.build(cfg)
            if norm == "FrozenBN":
                load_weights(model, tmp_path / file, "torchvision", cfg)
                x, layer = torch.randn(2, 64, 5, 5), model.backbone.body.bn1
                torch.testing.assert_close(layer(x), x * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1))
            else:
                with pytest.raises(UserError, match="which only FrozenBN can continue"):
                    load_weights(model, tmp_path / file, "torchvision", cfg)


class TestPixels:
    def test_order_and_division_go_into_the_weights(self) -> None:
        torch.manual_seed(0)
        weight, image = torch.randn(4, 3, 3, 3), torch.rand(1, 3, 9, 9) * 255
        recipe = Pixels("BGR", IMAGENET.mean[::-1], (1.0, 2.0, 3.0))
        adapted, said = adapt_first_layer(weight, IMAGENET, recipe)

        def see(pixels: Pixels, weight: Tensor) -> Tensor:
            values = image if pixels.format == "RGB" else image.flip(1)
            mean, std = (torch.tensor(numbers).view(1, 3, 1, 1) for numbers in (pixels.mean, pixels.std))
            return F.conv2d((values - mean) / std, weight, padding=1)

        torch.testing.assert_close(see(recipe, adapted), see(IMAGENET, weight))
        assert said == "channels RGB to BGR; divided by PIXEL_STD 1 2 3 instead of 57.375 57.12 58.395"

    def test_another_mean_is_told(self) -> None:
        _, said = adapt_first_layer(torch.zeros(1, 3, 1, 1), IMAGENET.reordered("BGR"), DETECTRON)
        assert said.endswith("PIXEL_MEAN stays the recipe's, up to 0.9 of 255 from the weights' own")

    def test_the_same_pixels_change_nothing(self) -> None:
        weight = torch.randn(2, 3, 1, 1)
        adapted, said = adapt_first_layer(weight, DETECTRON, DETECTRON)
        assert adapted is weight
        assert said == ""


class Trap(FourMaps):
    """Its second layer has the name of a ResNet's first."""

    first_layer = "res2.0.weight"

    def __init__(self, cfg: CfgNode):
        super().__init__([8] * 4)
        self.res3 = nn.Sequential(OrderedDict(conv1=self.res3[0]))


@pytest.mark.parametrize("stated", [True, False])
def test_the_first_layer_of_a_whole_detector_is_the_one_that_the_backbone_states(
    stated: bool, toy_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not stated:
        monkeypatch.delattr(Trap, "first_layer")
    with patch.dict(BACKBONES, trap=Choice(f"{__name__}:Trap")):
        cfg = load_config(toy_recipe, ["MODEL.BACKBONE.NAME", "build_trap_fpn_backbone"]).cfg
        model = backend.build(cfg)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    pixels = Pixels(cfg.INPUT.FORMAT, tuple(cfg.MODEL.PIXEL_MEAN), (50.0, 60.0, 70.0))
    torch.save({"model": state, "pixels": pixels.as_dict()}, tmp_path / "whole.pth")
    said = load_weights(model, tmp_path / "whole.pth", "torchvision", cfg)
    first = "backbone.body.res2.0.weight"
    if stated:
        assert "divided by PIXEL_STD 1 1 1 instead of 50 60 70" in said
        state[first] = state[first] / torch.tensor(pixels.std).view(1, 3, 1, 1)
    else:
        own = f"BGR, PIXEL_MEAN {' '.join(f'{value:g}' for value in pixels.mean)}, PIXEL_STD"
        assert f"not adapted to the recipe's pixels ({own} 1 1 1)" in said
        assert f"trained on other ones ({own} 50 60 70)" in said
        assert "state `first_layer` in the backbone" in said
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[key], msg=key)
