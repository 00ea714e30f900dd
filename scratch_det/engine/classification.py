"""The task classification, which pre-trains a detector's backbone: its model, its data and its evaluation.

With ``build`` and ``losses`` the module is also the backend of this task. A sample is a dictionary:
    image        uint8 [3, S, S], channels in INPUT.FORMAT order, S = INPUT.MIN_SIZE_TRAIN
    label        the class, a 0-based number
    image_id     path below the data set's root
    position     place in the stream                         (training only)
    height, width   the original image's size, pixels
"""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.transforms.v2 import functional as transforms

from scratch_det.data.catalog import ImageFolder
from scratch_det.data.dataset import SampleSet, Stream, load_sample
from scratch_det.data.transforms import Sample, contiguous, flip
from scratch_det.distributed.group import Group
from scratch_det.engine.checkpointer import rename_synced, write_synced
from scratch_det.engine.state import State
from scratch_det.evaluation.inference import predict_share
from scratch_det.log import logger
from scratch_det.modeling.backbones import build_bottom_up
from scratch_det.modeling.init import he_fill, initialize, normal_fill
from scratch_det.modeling.norm import NORM_LAYERS

BACKBONE = "backbone.pth"
BEHIND_STAGES = ("avgpool", "fc", "classifier")  # parts of torchvision's models that a detector does not use
LAST_NORM = {BasicBlock: "bn2", Bottleneck: "bn3"}
ASPECT = 4 / 3  # of a crop, at most, either way (Szegedy et al. 2015, *Going Deeper with Convolutions*, section 6)
ATTEMPTS = 10  # to draw a crop that fits into the image
FEW_CLASSES = 5  # up to here the right class is always among the first five


class Classifier(nn.Module):
    """The stages of a bottom-up network one after another, the mean over all places, one linear layer.

    The weights have the names of a torchvision classifier: the stages' own and ``fc``.
    """

    def __init__(self, cfg: CfgNode):
        super().__init__()
        bottom_up = build_bottom_up(cfg)
        self.stages = [name for name, _ in bottom_up.named_children() if name not in BEHIND_STAGES]
        for name in self.stages:
            self.add_module(name, bottom_up.get_submodule(name))
        channels = [layer.out_channels for layer in self.modules() if isinstance(layer, nn.Conv2d)][-1]
        self.fc = nn.Linear(channels, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
        for name, values in (("pixel_mean", cfg.MODEL.PIXEL_MEAN), ("pixel_std", cfg.MODEL.PIXEL_STD)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def forward(self, batch: list[dict[str, Any]]) -> Tensor:
        """Class scores before the softmax [N, classes] of images of one size."""
        return self.fc(self.features(batch))

    def features(self, batch: list[dict[str, Any]]) -> Tensor:
        """What the backbone has of each image, its mean over all places [N, channels]."""
        x = torch.stack([sample["image"] for sample in batch]).to(self.pixel_mean.device)
        x = (x - self.pixel_mean) / self.pixel_std
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return x.mean((2, 3))


def build(cfg: CfgNode) -> Classifier:
    """The model on the CPU. He initialisation as in a detector, but every residual block starts as the identity.

    The last layer's weights are drawn from N(0, 0.01), and the scale of each block's last norm is 0 (Goyal et al. 2017,
    section 5.1; Wu & He 2018, section 4.1).
    """
    model = Classifier(cfg)
    initialize(model, {**dict.fromkeys(model.stages, he_fill), "fc": normal_fill(0.01)})
    for block in model.modules():
        norm = getattr(block, LAST_NORM.get(type(block), ""), None)
        if isinstance(norm, NORM_LAYERS):
            nn.init.zeros_(norm.weight)
    return model


def losses(model: nn.Module, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The cross entropy of a batch. Puts the model into training mode."""
    scores = model.train()(batch)
    return {"loss_cls": F.cross_entropy(scores, torch.tensor([sample["label"] for sample in batch]).to(scores.device))}


@torch.no_grad()
def ranks(model: nn.Module, batch: list[dict[str, Any]]) -> Tensor:
    """How many other classes score no lower than the right one, int64 [N]. Puts the model into evaluation mode."""
    scores = model.eval()(batch).cpu()
    right = scores.gather(1, torch.tensor([[sample["label"]] for sample in batch]))
    return (~(scores < right)).sum(1) - 1


class FolderSet(SampleSet):
    """Training samples by stream position, or centre-cropped test samples in folder order."""

    def __init__(self, cfg: CfgNode, datasets: list[ImageFolder], is_training: bool = True):
        self.cfg = cfg
        self.roots = [data.entry.root for data in datasets]
        images = [(k, os.fsencode(path), label) for k, data in enumerate(datasets) for path, label in data.images]
        # workers would copy a list page by page, as reading an object writes to it
        self.items = np.rec.fromrecords(images, names=("root", "path", "label"))
        self.description = f"{len(self):,} training images"
        self.stream = Stream(cfg.SEED, len(self)) if is_training else None

    def __getitem__(self, item: int) -> Sample:
        index, rng = self.stream.at(item) if self.stream else (item, None)
        root, path, label = self.items[index].item()
        path = os.fsdecode(path)
        sample = {**load_sample(self.roots[root] / path, self.cfg), "image_id": path, "label": label}
        if rng:
            sample = {"position": item, **self.augment(sample, rng)}
        else:
            sample = middle(sample, self.cfg.INPUT.MIN_SIZE_TEST, self.cfg.INPUT.MIN_SIZE_TRAIN[0])
        return {**sample, "image": contiguous(sample["image"])}

    def augment(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """What is trained on; every random number comes from ``rng``."""
        return augment(sample, self.cfg, rng)


def augment(sample: Sample, cfg: CfgNode, rng: np.random.Generator) -> Sample:
    """A random part of the image with INPUT.CROP, else its middle, as a square; then RANDOM_FLIP with probability 1/2.

    INPUT.CROP.SIZE is the smallest fraction of height and width: the area is drawn between the product of the
    two and the whole image, and the aspect between 3/4 and 4/3.
    """
    side = cfg.INPUT.MIN_SIZE_TRAIN[0]
    if cfg.INPUT.CROP.ENABLED:
        crop = draw_crop(*sample["image"].shape[-2:], math.prod(cfg.INPUT.CROP.SIZE), rng)
        sample = {**sample, "image": transforms.resized_crop(sample["image"], *crop, [side, side], antialias=True)}
    else:
        sample = middle(sample, side, side)
    if cfg.INPUT.RANDOM_FLIP != "none" and rng.random() < 0.5:
        sample = flip(sample, cfg.INPUT.RANDOM_FLIP)
    return sample


def draw_crop(height: int, width: int, least_area: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width in pixels: ``least_area`` to 1 of the image, log-uniform aspect from 3/4 to 4/3.

    The largest square in the middle where no such part fits.
    """
    for _ in range(ATTEMPTS):
        area = height * width * rng.uniform(least_area, 1)
        aspect = math.exp(rng.uniform(-math.log(ASPECT), math.log(ASPECT)))
        h, w = max(1, round(math.sqrt(area / aspect))), max(1, round(math.sqrt(area * aspect)))
        if h <= height and w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def middle(sample: Sample, short_side: int, side: int) -> Sample:
    """Scale the shorter side to ``short_side`` and cut a square of ``side`` out of the middle, pixels."""
    height, width = sample["image"].shape[-2:]
    scale = short_side / min(height, width)
    size = [max(short_side, round(height * scale)), max(short_side, round(width * scale))]
    image = transforms.resize(sample["image"], size, antialias=True) if size != [height, width] else sample["image"]
    return {**sample, "image": transforms.center_crop(image, [side, side])}


def evaluate(
    backend: Any, model: nn.Module, cfg: CfgNode, data: ImageFolder, _out: Path, group: Group, suffix: str = ""
) -> dict[str, Any]:
    """Percent of the images of ``data`` whose class scores highest and, with more than five, among the first five.

    ``suffix`` ends the task's name. The ranks of ``group`` share the images. Raises Stopped when the run was asked to
    stop.
    """
    dataset, size = FolderSet(cfg, [data], is_training=False), cfg.SOLVER.IMS_PER_BATCH // group.size
    described = f"classifying {data.entry.name}"
    group.broadcast_buffers(model)  # the running statistics of plain BN differ between ranks
    found = predict_share(lambda batch: backend.ranks(model, batch).tolist(), dataset, group, described, size)
    counts = [sum(rank < 1 for rank in found), sum(rank < FEW_CLASSES for rank in found), len(found)]
    top1, top5, images = group.mean(torch.tensor(counts, dtype=torch.float64)).tolist()
    metrics = {"top1": 100 * top1 / images}
    if len(data.classes) > FEW_CLASSES:
        metrics["top5"] = 100 * top5 / images
    accuracy = ", ".join(f"{name} {value:.1f} %" for name, value in metrics.items())
    logger.info(f"{data.entry.name}, {len(data.images):,} images{suffix}: {accuracy}")
    return {f"classification{suffix}": metrics} if group.is_main else {}


def save_backbone(folder: Path, state: State) -> None:
    """Write the backbone's weights into backbone.pth, which MODEL.WEIGHTS accepts."""
    path, partial = folder / BACKBONE, folder / f"{BACKBONE}.partial"
    backbone = {name: value for name, value in state.model.state_dict().items() if not name.startswith("fc.")}
    try:
        write_synced(partial, {"model": backbone, **state.traits})
        rename_synced(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    logger.info(f"the backbone's weights, to start a detector from: MODEL.WEIGHTS {path}")
