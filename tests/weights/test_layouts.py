"""Checkpoints of other projects: each fills a detector whose features are the source network's, or is rejected."""

import gzip
import io
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from fvcore.common.config import CfgNode
from layouts import KEYS, LAYOUTS, Config, Layout, Tensors, body, features, image, network, under, write
from torch import Tensor, nn
from torchvision.models import resnet18

from scratch_det import backends
from scratch_det.config.choices import PIXELS
from scratch_det.config.load import load_config
from scratch_det.errors import UserError
from scratch_det.weights.load import load_weights
from scratch_det.weights.pixels import Pixels

R50 = ROOT / "configs/COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_2x_gn.yaml"
APART = {"imagenet": "0-255", "0-1": "caffe", "caffe": "imagenet"}  # pixels of quite another scale
LIBRARIES = ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)]


def recipe(layout: Layout, library: str, stated: str) -> CfgNode:
    """Of the mean that the network was trained with, BGR, not divided."""
    keys: dict[str, Any] = {"MODEL.RESNETS.NORM": "FrozenBN" if layout.caffe else "BN"}
    keys |= {"MODEL.RESNETS.STRIDE_IN_1X1": layout.caffe, "MODEL.WEIGHTS_PIXELS": stated}
    pixels = Pixels(*PIXELS[layout.pixels]).reordered("BGR")
    keys["MODEL.PIXEL_MEAN"] = list(pixels.mean)
    words = [word for pair in (KEYS | keys).items() for word in pair]
    return load_config(R50, words, backends.defaults(library)).cfg


@cache
def built(library: str, caffe: bool) -> nn.Module:
    return backends.load(library).build(recipe(Layout(dict, caffe=caffe), library, "")).eval()


def load(file: Path, layout: Layout, library: str, stated: str, doubts: list[str]) -> str:
    """What is said; the file's network is in ``built``."""
    cfg, model = recipe(layout, library, stated), built(library, layout.caffe)
    source = f"{file}#{layout.part}" if layout.part else file
    return load_weights(model, source, library, cfg, image().flip(0), doubt=doubts.append)


@torch.no_grad()
def found_features(layout: Layout, library: str) -> list[Tensor]:
    cfg, backbone = recipe(layout, library, ""), built(library, layout.caffe).backbone
    mean = torch.tensor(cfg.MODEL.PIXEL_MEAN).view(3, 1, 1)
    seen = (image().flip(0) - mean)[None]
    return list((backbone.body if library == "torchvision" else backbone.bottom_up)(seen).values())


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_loads(name: str, library: str, tmp_path: Path) -> None:
    layout, doubts = LAYOUTS[name], []
    file = tmp_path / f"weights{layout.suffix}"
    write(file, layout.make(network(layout.pixels, layout.caffe).state_dict()))
    said = load(file, layout, library, layout.stated, doubts)
    assert not [doubt for doubt in doubts if "which pixels" in doubt or "variance" in doubt]
    assert ("which convolution of a bottleneck has the stride" in "".join(doubts)) == bool(layout.stated)
    assert re.search(layout.said, said)
    for ours, theirs in zip(found_features(layout, library), features(layout), strict=True):
        assert (ours - theirs).abs().max() < 1e-3 * theirs.abs().max()
    if layout.stated:
        assert re.search("which pixels|running variance", rejected_or_doubted(file, layout, library, ""))
    assert rejected_or_doubted(file, layout, library, APART[layout.pixels])


def rejected_or_doubted(file: Path, layout: Layout, library: str, stated: str) -> str:
    """Why the file is not loaded, or what is not sure, or said, of it."""
    doubts: list[str] = []
    try:
        said = load(file, layout, library, stated, doubts)
    except UserError as error:
        return str(error)
    return said * ("does not count" in said) + "\n".join(doubts)


def traced(net: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(net, torch.zeros(1, 2)), file)
    return file.getvalue()


def archive(arrays: dict[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def named(*names: str) -> Tensors:
    return {name: torch.ones(4) for name in names}


def deep_stem(net: Tensors) -> Tensors:
    """resnet50d's: three convolutions, and a pooling before the shortcut's."""
    moved = {name.replace("downsample.1", "downsample.2").replace("downsample.0", "downsample.1"): value
             for name, value in net.items()}  # fmt: skip
    return {name: value for name, value in moved.items() if name != "conv1.weight"} | {
        f"conv1.{i}.weight": torch.ones(32, 3, 3, 3) for i in (0, 3, 6)}  # fmt: skip


VIT = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight")
REJECTED: dict[str, tuple[str, Callable[[Tensors], Any], str]] = {  # what is saved as NAME, and why it is rejected
    "timm's resnet50d": ("a.pth", deep_stem, r"its stem has several convolutions \(ResNet-C, -D or CLIP's\)"),
    "CLIP": ("a.pth", lambda net: under("visual.", body(net) | {
        "conv1.weight": torch.ones(32, 3, 3, 3), **named("conv2.weight", "conv3.weight", "attnpool.q_proj.weight")}),
        "its stem has several convolutions"),
    "OpenMMLab's resnetv1d": ("a.pth", lambda net: under("backbone.", {
        name: value for name, value in net.items() if name != "conv1.weight"} | named("stem.0.weight")),
        "1 missing, the first is .*its stem has several convolutions"),
    "squeeze and excitation": ("a.pth", lambda net: net | named("layer1.0.se.fc1.weight"),
                               r"1 without a place, the first is .*layer1\.0\.se\.fc1\.weight"),
    "group norm": ("a.pth", lambda net: {name: value for name, value in net.items() if "running" not in name},
                   r"53 missing, the first is .*running_mean|106 missing"),
    "another depth": ("a.pth", lambda net: resnet18().state_dict(),
                      r"2, 2, 2, 2 of 2 convolutions \(MODEL.RESNETS.DEPTH 18, RES2_OUT_CHANNELS 64\) in the file, "
                      r"3, 4, 6, 3 of 3 convolutions \(MODEL.RESNETS.DEPTH 50, RES2_OUT_CHANNELS 256\) in the model"),
    "SimCLR v2, converted": ("a.pth", lambda net: {"resnet": named("net.0.0.weight", "net.1.blocks.0.net.0.weight")},
                             "holds no network that is known, but resnet: a dict of 2"),
    "a vision transformer": ("a.pth", lambda net: {"model": named(*VIT)},
                             r"no network that is known, but model: 4 tensors \(cls_token, pos_embed, \.\.\.\)"),
    "ConvNeXt": ("a.pth", lambda net: {"model": named("downsample_layers.0.0.weight", "stages.0.0.dwconv.weight")},
                 "no network that is known"),
    "BYOL of DeepMind": ("a.pkl", lambda net: {"experiment_state": Config(a=1), "step": 1}, "holds .*layouts.Config"),
    "Big Transfer": ("a.npz", lambda net: archive({"resnet/root_block/standardized_conv2d/kernel": np.ones(3)}),
                     r"a\.npz is an archive of NumPy's"),
    "a whole model": ("a.pth", lambda net: {"model": nn.Linear(2, 2)},
                      r"holds no network that is known, but model: an object of torch\.nn\.modules\.linear\.Linear"),
    "TorchScript": ("a.pth", lambda net: traced(nn.Linear(2, 2)), "is a TorchScript archive; give the model's state_d"),
    "ONNX": ("a.pth", lambda net: b"\x08\x07\x12\x07pytorch\x1a\x052.1.0", "is an ONNX model"),
    "an archive": ("a.tar.gz", lambda net: gzip.compress(b"text"), "is compressed by gzip; unpack it"),
    "a web page": ("a.pth", lambda net: b"\n<!DOCTYPE html><html>", "is a web page in the place of a file"),
    "a pointer": ("a.pth", lambda net: b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
    "half of a file": ("a.pth", lambda net: b"PK\x03\x04" + bytes(100), "is damaged or no PyTorch file"),
}  # fmt: skip


@pytest.mark.parametrize("name", REJECTED)
def test_is_rejected(name: str, tmp_path: Path) -> None:
    file, make, reason = REJECTED[name]
    write(tmp_path / file, make(network().state_dict()))
    before = {name: value.clone() for name, value in built("torchvision", False).state_dict().items()}
    with pytest.raises(UserError, match=reason):
        load(tmp_path / file, Layout(make), "torchvision", "", [])
    assert all(value.equal(before[name]) for name, value in built("torchvision", False).state_dict().items())


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.part])
def test_of_several_networks_none_is_guessed(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    write(tmp_path / "a.pth", layout.make(network().state_dict()))
    with pytest.raises(UserError, match=r"holds [23] networks: .*name one: MODEL\.WEIGHTS"):
        load(tmp_path / "a.pth", layout._replace(part=""), "torchvision", "", [])
