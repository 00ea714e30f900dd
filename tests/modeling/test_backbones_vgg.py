"""VGG-16 for both backends: layers, freezing, and ImageNet weights. Beside detectron2: tests/backends."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from fvcore.common.config import CfgNode
from torch import nn
from torchvision.models import vgg16

from scratch_det import backends
from scratch_det.config.load import load_config
from scratch_det.errors import ConfigError
from scratch_det.modeling.backbones import build_bottom_up
from scratch_det.modeling.norm import NORM_LAYERS
from scratch_det.weights.load import load_weights

RECIPE = ROOT / "configs/Digits/vgg16.yaml"
PAPER = ROOT / "configs/COCO-Detection/pretrained_faster_rcnn_VGG16_9x_train_aug.yaml"
SMALL = ["MODEL.DEVICE", "cpu", "MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.ROI_HEADS.NUM_CLASSES", "10"]
INSTALLED = [name for name in backends.BACKENDS if backends.is_installed(name)]


@pytest.fixture
def config() -> Callable[..., CfgNode]:
    return lambda *keys: load_config(RECIPE, [*SMALL, *keys]).cfg


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class TestBody:
    def test_is_torchvisions_without_the_classifier(self, config: Callable[..., CfgNode]) -> None:
        with torch.device("meta"):
            theirs = vgg16().features
        body = build_bottom_up(config())
        assert parameters(body) == parameters(theirs) == 14_714_688
        assert body(torch.zeros(1, 3, 100, 70))["conv5"].shape == (1, 512, 6, 4)  # sixteenths, rounded down
        assert not [layer for layer in body.modules() if isinstance(layer, NORM_LAYERS)]

    def test_signals_keep_their_scale(self, config: Callable[..., CfgNode]) -> None:
        """He's initialisation: after 13 layers the deviation is of the input's order."""
        torch.manual_seed(0)
        maps = build_bottom_up(config())(torch.randn(1, 3, 96, 96))["conv5"]
        assert 0.1 < maps.std().item() < 10

    @pytest.mark.parametrize(("freeze_at", "convolutions"), [(0, 0), (1, 2), (2, 4), (5, 13)])
    def test_freezes_whole_stages(self, freeze_at: int, convolutions: int, config: Callable[..., CfgNode]) -> None:
        body = build_bottom_up(config("MODEL.BACKBONE.FREEZE_AT", str(freeze_at)))
        layers = [layer for layer in body.modules() if isinstance(layer, nn.Conv2d)]
        assert [layer.weight.requires_grad for layer in layers] == [False] * convolutions + [True] * (13 - convolutions)

    @pytest.mark.parametrize("name", INSTALLED)
    def test_what_is_frozen_in_the_papers_recipes(self, name: str) -> None:
        """conv1 and conv2 of the pre-trained one, two convolutions each, as in Faster R-CNN; nothing from scratch."""
        scratch = PAPER.with_name("scratch_faster_rcnn_VGG16_11x_train_aug.yaml")
        for recipe, frozen in ((PAPER, [f"{layer}.{leaf}" for layer in (0, 2, 5, 7) for leaf in ("weight", "bias")]),
                               (scratch, [])):  # fmt: skip
            with torch.device("meta"):
                model = backends.load(name).build(load_config(recipe).cfg)
            names = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
            assert [name.rpartition("features.")[2] for name in names] == frozen

    def test_has_conv5_alone(self, config: Callable[..., CfgNode]) -> None:
        with pytest.raises(ConfigError, match=r"MODEL\.RPN\.IN_FEATURES is \['conv4'\], expected \['conv5'\]"):
            build_bottom_up(config("MODEL.RPN.IN_FEATURES", "['conv4']"))
        with pytest.raises(ConfigError, match=r"expected four maps of strides \[4, 8, 16, 32\]; .* \{'conv5': 16\}"):
            build_bottom_up(
                config("MODEL.BACKBONE.NAME", "build_vgg16_fpn_backbone", "MODEL.FPN.IN_FEATURES", "['conv5']")
            )


@pytest.mark.parametrize("name", INSTALLED)
class TestWeights:
    @pytest.fixture
    def file(self, tmp_path: Path, config: Callable[..., CfgNode]) -> Path:
        """What torchvision calls VGG-16's layers, with 32 instead of 4096 hidden units."""
        torch.manual_seed(1)
        classifier = nn.Sequential(
            nn.Linear(512 * 49, 32),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(32, 32),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(32, 9),
        )
        whole = nn.ModuleDict({"features": build_bottom_up(config()).features, "classifier": classifier})
        torch.save(whole.state_dict(), tmp_path / "vgg.pth")
        return tmp_path / "vgg.pth"

    def load(self, name: str, cfg: CfgNode, file: Path) -> tuple[dict, dict, str]:
        model = backends.load(name).build(cfg)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        said = load_weights(model, file, name, cfg)
        return before, model.state_dict(), said

    def test_body_and_box_head(self, name: str, file: Path, config: Callable[..., CfgNode]) -> None:
        _, after, said = self.load(name, config(), file)
        source, body = torch.load(file), "body" if name == "torchvision" else "bottom_up"
        assert "30 of 40 tensors loaded, the backbone and the box head" in said
        assert "channels RGB to BGR" in said
        first = source["features.0.weight"].flip(1)
        ratio = after[f"backbone.{body}.features.0.weight"] / first
        torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-4, rtol=0)
        assert after[f"backbone.{body}.features.28.weight"].equal(source["features.28.weight"])
        for layer, fc, place in (("classifier.0", "fc1", 1), ("classifier.3", "fc2", 3)):
            own = f"roi_heads.box_head.{place if name == 'torchvision' else fc}.weight"
            assert after[own].equal(source[f"{layer}.weight"])

    @pytest.mark.parametrize("lacks", ["", "classifier.3.bias"])
    def test_other_layers_than_the_box_heads(
        self, lacks: str, name: str, file: Path, config: Callable[..., CfgNode]
    ) -> None:
        torch.save({key: value for key, value in torch.load(file).items() if key != lacks}, file)
        before, after, said = self.load(name, config(*([] if lacks else ["MODEL.ROI_BOX_HEAD.FC_DIM", "64"])), file)
        assert "do not fit the box head, which stays random" in said
        heads = [key for key in before if key.startswith("roi_heads.box_head")]
        assert len(heads) == 4
        assert all(before[key].equal(after[key]) for key in heads)


def test_alike_the_signals_vanish(config: Callable[..., CfgNode]) -> None:
    """N(0, 0.01) in every layer: a 3x3 convolution of 512 channels scales by sqrt(4608 / 2) / 100, about a half."""
    torch.manual_seed(0)
    body = build_bottom_up(config())
    for layer in body.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.01)
    assert body(torch.randn(1, 3, 96, 96))["conv5"].std().item() < 1e-3
    assert math.sqrt(4608 / 2) / 100 == pytest.approx(0.48, abs=0.01)
