"""Which pixels a backbone was trained on, as far as its first batch norm can tell."""

import re
from pathlib import Path

import pytest
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.models import resnet18

from scratch_det.backends import torchvision as backend
from scratch_det.config.choices import PIXELS
from scratch_det.config.load import load_config
from scratch_det.errors import UserError
from scratch_det.weights.load import load_weights
from scratch_det.weights.pixels import Pixels, variance_ratio


@pytest.fixture(scope="module")
def image() -> Tensor:
    """Grey values [3, 96, 128] that change slowly, as in photographs."""
    torch.manual_seed(0)
    return nn.functional.interpolate(torch.rand(1, 3, 12, 16) * 255, scale_factor=8, mode="bilinear")[0].byte()


@pytest.fixture(scope="module", params=list(PIXELS))
def trained(request: pytest.FixtureRequest, image: Tensor) -> tuple[str, dict[str, Tensor]]:
    """A name of PIXELS, and a ResNet whose first batch norm has seen such pixels."""
    torch.manual_seed(1)
    network, (order, mean, std) = resnet18(), PIXELS[request.param]
    seen = image if order == "RGB" else image.flip(0)
    network.bn1.momentum = 1.0
    with torch.no_grad():
        x = (seen.float() - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        network.bn1(network.conv1(x[None]))
    return request.param, network.state_dict()


def recipe(toy_recipe: Path, *keys: str) -> CfgNode:
    return load_config(toy_recipe, ["MODEL.RESNETS.NORM", "BN", "INPUT.FORMAT", "RGB", *keys]).cfg


def test_the_wrong_pixels_are_rejected_and_the_right_ones_named(
    trained: tuple[str, dict[str, Tensor]], image: Tensor, toy_recipe: Path, tmp_path: Path
) -> None:
    name, state = trained
    torch.save(state, tmp_path / "a.pth")
    alike = {"caffe", "0-255"} if name in ("caffe", "0-255") else {"0-1", "inception", "imagenet"}
    cfg = recipe(toy_recipe)
    model = backend.build(cfg)
    for stated in PIXELS:
        cfg.MODEL.WEIGHTS_PIXELS = stated
        if stated in alike:
            load_weights(model, tmp_path / "a.pth", "torchvision", cfg, image)
            ratio = variance_ratio(model.backbone.body, image, Pixels.of(cfg))  # the mean stays the recipe's
            assert stated != name or ratio == pytest.approx(1, abs=0.3)
            continue
        with pytest.raises(
            UserError, match=r"its pixels were not \w+, PIXEL_MEAN.*; set MODEL\.WEIGHTS_PIXELS"
        ) as caught:
            load_weights(model, tmp_path / "a.pth", "torchvision", cfg, image)
        named = re.search("WEIGHTS_PIXELS (.*), whose", str(caught.value))[1].split(" or ")
        assert {one.split()[0] for one in named} == alike


@pytest.mark.parametrize("trained", ["0-1"], indirect=True)
def test_a_file_that_says_its_pixels_is_believed(
    trained: tuple[str, dict[str, Tensor]], image: Tensor, toy_recipe: Path, tmp_path: Path
) -> None:
    """It may have been trained on darker images."""
    cfg, recorded = recipe(toy_recipe, "MODEL.WEIGHTS_PIXELS", "imagenet"), Pixels(*PIXELS[trained[0]])
    torch.save({"model": trained[1] | {"bn1.running_var": trained[1]["bn1.running_var"] / 1e4},
                "pixels": recorded.as_dict()}, tmp_path / "a.pth")  # fmt: skip
    load_weights(backend.build(cfg), tmp_path / "a.pth", "torchvision", cfg, image)


def test_what_shows_nothing(image: Tensor, toy_recipe: Path) -> None:
    """GN has no statistics, a batch norm that saw nothing has the same for all channels, and an image may be dark."""
    for norm, is_used, shown in (("GN", True, image), ("BN", False, image), ("BN", True, image // 16)):
        cfg = recipe(toy_recipe, "MODEL.RESNETS.NORM", norm)
        body = backend.build(cfg).backbone.body
        if is_used and norm == "BN":
            body.bn1.running_var[0] = 2
            assert variance_ratio(body, image, Pixels.of(cfg))
        assert variance_ratio(body, shown, Pixels.of(cfg)) is None


def test_a_dead_channel_does_not_count(image: Tensor, toy_recipe: Path) -> None:
    cfg = recipe(toy_recipe)
    body = backend.build(cfg).backbone.body
    with torch.no_grad():
        body.conv1.weight[0], body.bn1.running_var[0] = 0, 0
    assert variance_ratio(body, image, Pixels.of(cfg)) > 0
