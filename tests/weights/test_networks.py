"""Finding the network in a checkpoint, and telling what was found; test_layouts.py has the layouts of projects."""

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fvcore.common.config import CfgNode
from layouts import Tensors, under
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18

from scratch_det.backends import torchvision as backend
from scratch_det.config.load import load_config
from scratch_det.errors import UserError
from scratch_det.weights.load import load_weights
from scratch_det.weights.networks import networks_in
from scratch_det.weights.origin import read_weights


class Bomb:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.fixture
def cfg(toy_recipe: Path) -> CfgNode:
    return load_config(toy_recipe, ["MODEL.RESNETS.NORM", "BN"]).cfg


@pytest.fixture(scope="module")
def net() -> Tensors:
    torch.manual_seed(1)
    return resnet18().state_dict()


@pytest.fixture
def model(cfg: CfgNode) -> nn.Module:
    torch.manual_seed(0)
    return backend.build(cfg)


def is_filled(model: nn.Module, net: Tensors) -> bool:
    loaded = model.backbone.body.state_dict()
    return all(loaded[name].equal(value) for name, value in net.items() if not name.startswith(("fc.", "conv1.")))


def test_no_code_of_a_file_runs(net: Tensors, model: nn.Module, cfg: CfgNode, tmp_path: Path) -> None:
    for old in (False, True):  # both of torch.save's formats
        content = {"state_dict": net, "args": [Bomb(tmp_path / "touched")], "n": np.float64(1), "type": torch.float32}
        torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not old)
        load_weights(model, tmp_path / "a.pth", "torchvision", cfg)
        assert is_filled(model, net)
    assert not (tmp_path / "touched").exists()


def test_safetensors(net: Tensors, model: nn.Module, cfg: CfgNode, tmp_path: Path) -> None:
    save_file(net, tmp_path / "a.safetensors")
    load_weights(model, tmp_path / "a.safetensors", "torchvision", cfg)
    assert is_filled(model, net)
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"a\.safetensors is damaged or no safetensors file"):
        load_weights(model, tmp_path / "a.safetensors", "torchvision", cfg)


@pytest.mark.parametrize(("one", "other"), [("student.module.backbone.", "teacher.backbone."), ("q.", "k.")])
def test_of_several_networks_one_is_named(
    one: str, other: str, net: Tensors, model: nn.Module, cfg: CfgNode, tmp_path: Path
) -> None:
    file, second = tmp_path / "a.pth", {name: value + 1 for name, value in net.items()}
    torch.save({"state_dict": under(one, net) | under(other, second)}, file)
    both = f"{'state_dict.' + one.rstrip('.')}, {'state_dict.' + other.rstrip('.')}"
    with pytest.raises(UserError, match=rf"holds 2 networks: {both}; name one: MODEL\.WEIGHTS ") as caught:
        load_weights(model, file, "torchvision", cfg)
    load_weights(model, str(caught.value).partition("MODEL.WEIGHTS ")[2].strip('"'), "torchvision", cfg)
    assert is_filled(model, net)
    with pytest.raises(UserError, match="'ema' is a whole part, between dots, of 0 names"):
        load_weights(model, f"{file}#ema", "torchvision", cfg)
    assert f"classifier, state_dict.{other[:-1]}" in load_weights(model, f"{file}#{other[:-1]}", "torchvision", cfg)
    assert is_filled(model, second)
    load_weights(model, f"{file}#{one.split('.')[0]}", "torchvision", cfg)
    assert is_filled(model, net)


def test_a_network_in_another_ones_prefix(net: Tensors, tmp_path: Path) -> None:
    torch.save(
        {"model": {**net, **under("teacher.", {name: value + 1 for name, value in net.items()})}}, tmp_path / "a.pth"
    )
    for part, added in (("model", 0), ("teacher", 1)):
        found = read_weights(tmp_path / "a.pth", part=part).tensors
        assert found["conv1.weight"].equal(net["conv1.weight"] + added)


def test_a_detector_and_its_average(model: nn.Module, cfg: CfgNode, tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save({"model": state, "model_ema": {name: value + 1 for name, value in state.items()}}, tmp_path / "a.pth")
    assert [network.prefix for network in networks_in(under("model.", state) | under("model_ema.", state))] == [
        "model.", "model_ema.",
    ]  # fmt: skip
    load_weights(model, f"{tmp_path / 'a.pth'}#model_ema", "torchvision", cfg)
    assert all(value.equal(state[name] + 1) for name, value in model.state_dict().items())


class TestRejected:
    def rejected(self, content: Any, tmp_path: Path) -> str:
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(UserError) as caught:
            read_weights(tmp_path / "a.pth")
        return str(caught.value)

    def test_unknown_names(self, tmp_path: Path) -> None:
        content = {
            "net": {f"encoder.{i}.weight": torch.ones(1) for i in range(3)},
            "args": argparse.Namespace(),
            "n": 3,
        }
        said = self.rejected(content, tmp_path)
        assert "net: 3 tensors (encoder.0.weight, encoder.1.weight, ...); args: an object of argparse.Namespace" in said

    def test_another_depth_is_told_by_the_blocks(
        self, net: Tensors, model: nn.Module, cfg: CfgNode, tmp_path: Path
    ) -> None:
        deeper = {name.replace("layer3.1.", "layer3.2."): value for name, value in net.items() if "layer3.1." in name}
        torch.save(net | deeper, tmp_path / "a.pth")
        with pytest.raises(
            UserError,
            match=r"stages are 2, 2, 3, 2 of 2 convolutions in the file, 2, 2, 2, 2 of 2 convolutions \(MODEL",
        ):
            load_weights(model, tmp_path / "a.pth", "torchvision", cfg)

    @pytest.mark.parametrize(("name", "shape"), [("layer1.0.conv1.weight", (32, 64, 3, 3)),
                                                 ("conv1.weight", (64, 1, 7, 7)),
                                                 ("conv1.weight", (64, 4, 7, 7))])  # fmt: skip
    def test_another_width_is_told_by_the_shapes(
        self, name: str, shape: tuple[int, ...], net: Tensors, model: nn.Module, cfg: CfgNode, tmp_path: Path
    ) -> None:
        """A first layer for one channel is not spread over three."""
        torch.save(net | {name: torch.zeros(shape)}, tmp_path / "a.pth")
        with pytest.raises(UserError, match=rf"{re.escape(f'{name} is {shape} in the file, (64, ')}"):
            load_weights(model, tmp_path / "a.pth", "torchvision", cfg)
