"""Checkpoints in the layouts of the projects whose users come here, made of one random ResNet-50 of narrow bottlenecks.

Names and structure are those that each project's training or its script of conversion writes. A row of LAYOUTS has all
that a test has to know of one layout.
"""

import argparse
import enum
import pickle
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from conftest import SMALL_MODEL
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.models import ResNet, resnet50
from torchvision.models.resnet import Bottleneck

from scratch_det.config.choices import PIXELS

Tensors = dict[str, Tensor]
WIDTH = 4  # channels a group, so that a file has 13 MB
KEYS = SMALL_MODEL | {"MODEL.RESNETS.DEPTH": "50", "MODEL.RESNETS.RES2_OUT_CHANNELS": "256",
                      "MODEL.RESNETS.WIDTH_PER_GROUP": str(WIDTH)}  # fmt: skip
EPSILON = 1e-5  # of batch norm


def write(path: Path, content: Any) -> None:
    """In the format of the file's suffix; bytes as they are. ReSim's script gives torch.save a .pkl."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".safetensors":
        save_file(content, path)
    elif path.suffix == ".pkl" and "backbone.fpn_lateral2.weight" not in content.get("model", {}):
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)


class Config(dict):
    """Stands for what omegaconf, lightning and others put beside the tensors."""


class Phase(enum.Enum):
    """Stands for an object of a class that no reader of weights knows."""

    TRAIN = 1


class Layout(NamedTuple):
    """A file of ``make``'s content of a network.

    pixels: those that it is trained on, of PIXELS. stated: MODEL.WEIGHTS_PIXELS that a user has to give, as the file
    does not say it. said: what the log has, as a pattern. part: of the network's prefix, behind the # of MODEL.WEIGHTS.
    caffe: the stride is in the 1x1, and batch norm folded into scale and shift.
    """

    make: Callable[[Tensors], Any]
    pixels: str = "imagenet"
    stated: str = ""
    said: str = ""
    part: str = ""
    suffix: str = ".pth"
    caffe: bool = False


@cache
def image() -> Tensor:
    """Grey values [3, 96, 128] in RGB, that change slowly, as in photographs."""
    noise = torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(0)) * 255
    return interpolate(noise, scale_factor=8, mode="bilinear")[0].byte()


def seen(pixels: str) -> Tensor:
    """The image [1, 3, H, W] as a network that is trained on ``pixels`` sees it."""
    order, mean, std = PIXELS[pixels]
    values = (image() if order == "RGB" else image().flip(0)).float()
    return ((values - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))[None]


@cache
def network(pixels: str = "imagenet", caffe: bool = False) -> ResNet:
    """A random ResNet-50 whose batch norms have seen the image in ``pixels``; with ``caffe`` as in Layout."""
    torch.manual_seed(1)
    net = resnet50(width_per_group=WIDTH, num_classes=10)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
        if caffe and isinstance(module, Bottleneck):
            module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
    with torch.no_grad():
        net(seen(pixels))
        for module in net.modules():
            if caffe and isinstance(module, nn.BatchNorm2d):
                module.weight /= (module.running_var + EPSILON).sqrt()
                module.bias -= module.running_mean * module.weight
                module.running_mean.zero_()
                module.running_var.fill_(1 - EPSILON)  # as of no batch norm
    return net.eval()


@torch.no_grad()
def features(layout: Layout) -> list[Tensor]:
    """res2 to res5 of a layout's network, of the image."""
    net, maps = network(layout.pixels, layout.caffe), []
    x = net.maxpool(net.relu(net.bn1(net.conv1(seen(layout.pixels)))))
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        maps.append(x := stage(x))
    return maps


def under(prefix: str, net: Tensors) -> Tensors:
    return {prefix + name: value for name, value in net.items()}


def body(net: Tensors) -> Tensors:
    return {name: value for name, value in net.items() if not name.startswith("fc.")}


def also(prefix: str, net: Tensors) -> Tensors:
    """Begins as a second network, of other values."""
    names = [name for name in net if name.startswith(("conv1", "bn1", "layer1.0"))]
    return {prefix + name: net[name] + 1 for name in names}


def mlp(*prefixes: str) -> Tensors:
    ends = {f".{i}.{leaf}": torch.ones(4) for i in (0, 3) for leaf in ("weight", "bias")}
    return {prefix + end: value for prefix in prefixes for end, value in ends.items()}


def converted(net: Tensors) -> dict[str, np.ndarray]:
    """As MoCo's script names them for detectron2, which most projects have copied."""
    found = {}
    for name, value in net.items():
        name = name if "layer" in name else f"stem.{name}"
        name = re.sub(r"layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
        name = re.sub(r"bn(\d)", r"conv\1.norm", name)
        found[name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")] = value.numpy()
    return found


def for_detectron2(net: Tensors, author: str = "", **more: Any) -> dict[str, Any]:
    named = {"__author__": author} if author else {}
    return {"model": converted(body(net)) | more, **named, "matching_heuristics": True}


def blobs(net: Tensors, with_statistics: bool = False) -> dict[str, np.ndarray]:
    """By Detectron's names."""
    found, leaves = {}, {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}
    for name, value in body(net).items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "num_batches_tracked" or (leaf.startswith("running") and not with_statistics):
            continue
        layer = re.sub(r"layer(\d)\.(\d+)\.", lambda m: f"res{int(m[1]) + 1}_{m[2]}_branch", layer)
        layer = re.sub(r"branch(conv|bn)(\d)", lambda m: f"branch2{'abc'[int(m[2]) - 1]}{m[1]}", layer)
        layer = layer.replace("downsample.0", "1conv").replace("downsample.1", "1bn")
        layer = {"conv1": "conv1conv", "bn1": "res_conv1bn"}.get(layer, layer)
        is_norm = layer.endswith("bn")
        layer = layer.removesuffix("bn").removesuffix("conv") if is_norm else layer.removesuffix("conv")
        found[f"{layer}_bn_{leaves[leaf]}" if is_norm else f"{layer}_w"] = value.numpy()
    return found


def sequential(prefix: str, net: Tensors) -> Tensors:
    """As in nn.Sequential(*resnet.children()), of which lightly's and fastai's networks are made."""
    places = {"conv1": 0, "bn1": 1} | {f"layer{k}": k + 3 for k in range(1, 5)}
    return {re.sub(r"^\w+", lambda match: f"{prefix}{places[match[0]]}", name): net[name] for name in body(net)}


def transformers(prefix: str, net: Tensors) -> Tensors:
    found = {}
    for name, value in body(net).items():
        name = re.sub(r"layer(\d)\.(\d+)", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}", name)
        name = name.replace("downsample.0", "shortcut.convolution").replace("downsample.1", "shortcut.normalization")
        name = re.sub(r"^(conv|bn)1", r"embedder.embedder.\1", name)
        name = re.sub(r"\.(conv|bn)(\d)\.", lambda m: f".layer.{int(m[2]) - 1}.{m[1]}.", name)
        found[prefix + name.replace(".conv.", ".convolution.").replace(".bn.", ".normalization.")] = value
    return found


def openmmlab(net: Tensors, recipe: str, key: str = "cfg", *tops: str) -> dict[str, Any]:
    """With the text of its recipe, as MMEngine (cfg) and MMCV (config) write it."""
    state = under("backbone.", body(net)) | mlp(*(tops or ("head.fc",)))
    return {"meta": {key: recipe, "epoch": 12, "CLASSES": ("a", "b")}, "state_dict": state, "message_hub": Config()}


MMENGINE = """model = dict(
    backbone=dict(depth=50, frozen_stages=1, norm_cfg=dict(type='BN'), style='pytorch', type='ResNet'),
    bbox_head=dict(init_cfg=dict(mean=0.0, std=0.01, type='Normal'), target_means=[0.0, 0.0], target_stds=[0.1, 0.2]),
    data_preprocessor=dict(
        bgr_to_rgb=True,
        mean=[
            123.675,
            116.28,
            103.53,
        ],
        std=[
            58.395,
            57.12,
            57.375,
        ],
        type='DetDataPreprocessor'))
"""
MMCV = """model = dict(backbone=dict(type='ResNet', depth=50, norm_eval=True, style='caffe'))
img_norm_cfg = dict(
    mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0], to_rgb=False)
"""
SELFSUP = "data_preprocessor=dict(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), bgr_to_rgb=True))"
OPENSELFSUP = "img_norm_cfg = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])"
DETECTOR = ("neck.lateral_convs", "rpn_head.rpn_conv", "roi_head.bbox_head.fc_cls")
UNKNOWN = "does not say which pixels it was trained on"
ARGS = argparse.Namespace(lr=0.1)

LAYOUTS = {
    "torchvision": Layout(lambda net: net, said=r"left out fc \(2\)"),
    "torchvision's reference script": Layout(lambda net: {
        "model": net, "optimizer": {"state": {0: {"momentum_buffer": torch.ones(1)}}}, "epoch": 3, "args": ARGS}),
    "and its average": Layout(lambda net: {
        "model": also("", net), "model_ema": {"n_averaged": torch.tensor(3), **under("module.", net)}, "args": ARGS},
        part="model_ema", said=r"left out fc \(2\), model \(30\), model_ema.n_averaged \(1\);"),
    "PyTorch's ImageNet example": Layout(lambda net: {
        "arch": "resnet50", "state_dict": under("module.", net), "best_acc1": torch.tensor(76.0)}),
    "two flat networks": Layout(lambda net: {**net, **also("teacher.", net)}, part="."),
    "texts beside the tensors": Layout(lambda net: {
        "state_dict": net, "classes": np.array(["cat", "dog"]), "names": np.array(["a", None], object)}),
    "MoCo": Layout(lambda net: {"epoch": 200, "arch": "resnet50", "state_dict": {
        **under("module.encoder_q.", body(net)), **mlp("module.encoder_q.fc"), "module.queue": torch.ones(4, 8)}},
        said=r"left out fc \(4\), state_dict.module.queue \(1\)"),
    "MoCo, training": Layout(lambda net: {"state_dict": {
        **under("module.encoder_q.", net), **also("module.encoder_k.", net)}}, part="encoder_q"),
    "MoCo v3": Layout(lambda net: {"state_dict": {
        **under("module.base_encoder.", net), **also("module.momentum_encoder.", net), **mlp("module.predictor")}},
        part="base_encoder"),
    "MoCo, converted": Layout(lambda net: for_detectron2(net, "MOCO", **{"stem.fc.0.weight": np.ones(3)}),
                              suffix=".pkl"),
    "SwAV": Layout(lambda net: under("module.", body(net)) | mlp("module.projection_head", "module.prototypes")),
    "SwAV, training": Layout(lambda net: {"epoch": 9, "state_dict": under("module.", body(net)), "amp": {}}),
    "DINO": Layout(lambda net: {
        "student": under("module.backbone.", body(net)) | mlp("module.head.mlp"), "args": ARGS,
        "teacher": also("backbone.", net), "dino_loss": {"center": torch.zeros(1, 8)}}, part="student"),
    "DINO, backbone": Layout(body),
    "Barlow Twins": Layout(lambda net: {
        "model": under("module.backbone.", body(net)) | mlp("module.projector", "module.bn")}),
    "VICReg": Layout(lambda net: {"epoch": 1000, "model": {
        **under("module.backbone.", body(net)), **mlp("module.projector")}, "optimizer": {"state": {}}}),
    "SimSiam": Layout(lambda net: {"state_dict": {
        **under("module.encoder.", body(net)), **mlp("module.encoder.fc", "module.predictor")}}),
    "BYOL, converted from JAX": Layout(lambda net: {
        name: value for name, value in net.items() if not name.endswith("num_batches_tracked")}),
    "BYOL": Layout(lambda net: {"online_backbone": body(net), "target_encoder": also("net.", net)},
                   part="online_backbone"),
    "BYOL of lucidrains": Layout(lambda net: {
        **under("online_encoder.net.", net), **mlp("online_encoder.projector", "online_predictor.net"),
        **also("target_encoder.net.", net)}, part="online_encoder"),
    "SimCLR, converted from TensorFlow": Layout(lambda net: {"state_dict": net}, pixels="0-1", stated="0-1"),
    "ImageNet-21k of MIIL": Layout(lambda net: {"state_dict": body(net)}, pixels="0-1", stated="0-1"),
    "PixPro": Layout(lambda net: {"opt": ARGS, "model": {
        **under("module.encoder.", body(net)), **also("module.encoder_k.", net), **mlp("module.projector")}},
        part="module.encoder"),
    "PixPro, converted": Layout(partial(for_detectron2, author="PixPro"), suffix=".pkl"),
    "ReSim, converted, by torch.save": Layout(lambda net: for_detectron2(net, "MOCO", **{
        "backbone.fpn_lateral2.weight": np.ones((4, 4, 1, 1))}), suffix=".pkl", said=r"left out backbone \(1\)"),
    "SoCo": Layout(lambda net: {
        "model": under("module.encoder.", body(net)) | mlp("module.neck.lateral_convs", "module.head.conv1"),
        "model_ema": also("encoder.", net)}, part="module.encoder", said=r"left out model\.module\.neck \(4\)"),
    "SoCo, converted": Layout(lambda net: for_detectron2(
        net, "Yue", **{"fpn_lateral2.weight": np.ones(1), "box_head.conv1.weight": np.ones(1)}), suffix=".pkl"),
    "OpenSelfSup, extracted (DenseCL, DetCo)": Layout(lambda net: {"state_dict": body(net), "author": "OpenSelfSup"}),
    "OpenSelfSup, training (DenseCL)": Layout(lambda net: {"meta": {"config": OPENSELFSUP}, "state_dict": {
        **under("encoder_q.0.", body(net)), **mlp("encoder_q.1.mlp"), **also("encoder_k.0.", net),
        **under("backbone.", body(net)), "queue": torch.ones(4)}}, part="backbone"),
    "OpenSelfSup, converted": Layout(partial(for_detectron2, author="OpenSelfSup"), suffix=".pkl"),
    "MMSelfSup": Layout(lambda net: openmmlab(net, SELFSUP, "cfg", "neck.mlp", "head.predictor"),
                        said="mmpretrain classifier"),
    "MMSelfSup, converted": Layout(lambda net: for_detectron2(
        net, "MMSelfSup", **{"stem.head.fc.weight": np.ones(1)}), suffix=".pkl", said=r"left out stem \(1\)"),
    "SparK": Layout(body),
    "SparK, training": Layout(lambda net: {"args": "", "module": {
        **under("sparse_encoder.sp_cnn.", body(net)), **mlp("dense_decoder.dec"), "mask_tokens.0": torch.ones(1)}}),
    "SparK, converted": Layout(partial(for_detectron2, author="https://github.com/keyu-tian/SparK"), suffix=".pkl"),
    "solo-learn": Layout(lambda net: {"hyper_parameters": Config(lr=1), "callbacks": {Phase.TRAIN: {}}, "state_dict": {
        **under("backbone.", body(net)), **mlp("projector", "classifier"), **also("momentum_backbone.", net)}},
        part="state_dict.backbone"),
    "solo-learn, converted": Layout(partial(for_detectron2, author="solo-learn"), suffix=".pkl"),
    "VISSL": Layout(lambda net: {"phase": Phase.TRAIN, "classy_state_dict": {"base_model": {"model": {
        "trunk": under("_feature_blocks.", body(net)), "heads": mlp("0.clf")}}}}),
    "VISSL, another trunk (PIRL)": Layout(lambda net: {"classy_state_dict": {"base_model": {"model": {
        "trunk": under("base_model._feature_blocks.", body(net))}}}}),
    "VISSL, converted": Layout(for_detectron2, stated="imagenet"),
    "lightly": Layout(lambda net: {"state_dict": sequential("backbone.", net) | mlp("projection_head.layers")}),
    "lightly, backbone": Layout(partial(sequential, "")),
    "lightly, named": Layout(lambda net: under("backbone.", body(net))),
    "OBoW": Layout(lambda net: {"epoch": 200, "network": body(net), "meters": None}),
    "OBoW, converted": Layout(lambda net: {"blobs": blobs(net, with_statistics=True)}, stated="imagenet",
                              suffix=".pkl"),
    "InfoMin (PyContrast)": Layout(lambda net: {"opt": ARGS, "model_ema": also("encoder.", net), "model": {
        **under("module.encoder.", body(net)), **mlp("module.head")}}, part="model"),
    "InfoMin, converted": Layout(partial(for_detectron2, author="Yonglong"), suffix=".pkl"),
    "VirTex, converted": Layout(partial(for_detectron2, author="Karan Desai")),
    "timm": Layout(lambda net: net, suffix=".safetensors"),
    "timm, training (Objects365)": Layout(lambda net: {
        "arch": "resnet50", "args": ARGS, "version": 2, "state_dict": also("", net), "state_dict_ema": net},
        part="state_dict_ema"),
    "transformers": Layout(partial(transformers, "resnet."), suffix=".safetensors"),
    "transformers, backbone": Layout(partial(transformers, ""), suffix=".bin"),
    "mmpretrain": Layout(lambda net: openmmlab(net, MMENGINE)),
    "mmcls": Layout(lambda net: openmmlab(net, "img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], "
                                               "std=[58.395, 57.12, 57.375], to_rgb=True)", "config")),
    "mmdetection": Layout(lambda net: openmmlab(net, MMENGINE, "cfg", *DETECTOR), said=(
        r"mmdetection or mmpretrain classifier, state_dict.backbone; left out state_dict.neck \(4\), "
        r"state_dict.rpn_head \(4\), state_dict.roi_head \(4\)")),
    "mmdetection, caffe": Layout(lambda net: openmmlab(net, MMCV, "config", *DETECTOR), pixels="caffe", caffe=True),
    "OpenMMLab's resnet50_caffe": Layout(body, pixels="caffe", stated="caffe", caffe=True),
    "torch.compile": Layout(lambda net: {"model": under("_orig_mod.", net)}),
    "DeepSpeed": Layout(lambda net: {"module": net, "buffer_names": [], "optimizer": None, "ds_config": Config()}),
    "DistributedDataParallel in torch.compile": Layout(partial(under, "_orig_mod.module.")),
    "Lightning": Layout(lambda net: {"state_dict": under("model.", net), "hyper_parameters": Config(lr=1),
                                     "loops": {"fit_loop": {}}, "pytorch-lightning_version": "2.0"}),
    "fastai": Layout(lambda net: {"model": sequential("0.", net) | mlp("1"), "opt": {"state": [], "hypers": []}}),
    "MSRA's R-50 of detectron2": Layout(blobs, pixels="caffe", caffe=True, suffix=".pkl", said="Detectron"),
    "Detectron's R-50": Layout(lambda net: {"blobs": blobs(net) | {"pred_w": np.ones(3)}}, pixels="caffe", caffe=True,
                               suffix=".pkl"),
    "torchvision's, converted": Layout(partial(for_detectron2, author="torchvision"), suffix=".pkl"),
    "converted by nobody known": Layout(partial(for_detectron2, author="me"), stated="imagenet", suffix=".pkl"),
}  # fmt: skip
