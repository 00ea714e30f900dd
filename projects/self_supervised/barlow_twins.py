"""Barlow Twins (Zbontar et al. 2021, arXiv 2103.03230) in the place of classification; loss and head are lightly's.

The two views of an image get features that correlate, each channel with itself and with no other. It has what
``scratch_det.engine.classification`` has: build, losses, FolderSet, evaluate. A sample has a second image, "view".
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from lightly.loss import BarlowTwinsLoss
from lightly.models.modules.heads import ProjectionHead
from lightly.utils.dist import gather
from torch import Tensor, nn
from torch.distributed import is_initialized
from torchvision.transforms import v2 as transforms

from scratch_det.data.catalog import ImageFolder, lookup_folder, read_image_folder
from scratch_det.data.transforms import Sample, contiguous
from scratch_det.distributed.group import Group
from scratch_det.engine import classification
from scratch_det.errors import UserError
from scratch_det.evaluation.inference import predict_share
from scratch_det.log import logger
from scratch_det.modeling.norm import SyncBatchNorm

RIDGE = 0.004  # of the squares' mean: the penalty of the linear classifier


class HeadNorm(SyncBatchNorm):
    """Batch norm of [N, C] over the images of all processes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[..., None, None]).flatten(1)


def build(cfg: CfgNode) -> nn.Module:
    """The classifier's backbone; in the place of its last layer the projection head, with PyTorch's initialisation."""
    model, width = classification.build(cfg), cfg.MODEL.BARLOW_TWINS.WIDTH
    sizes = ((model.fc.in_features, width), (width, width))
    hidden = [(before, after, HeadNorm(after), nn.ReLU(inplace=True), False) for before, after in sizes]
    model.fc = ProjectionHead([*hidden, (width, width, None, None, False)])
    model.redundancy, model.images = cfg.MODEL.BARLOW_TWINS.LAMBDA, cfg.SOLVER.IMS_PER_BATCH
    return model


def losses(model: nn.Module, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The loss of the images of all processes together, a channel. Puts the model into training mode.

    Both views are one batch of the network, and of its batch norms. Raises UserError for less than an iteration.
    """
    views = [{"image": sample[view]} for view in ("image", "view") for sample in batch]
    pair = model.train()(views).float().chunk(2)
    first, second = (torch.cat(gather(one)) if is_initialized() else one for one in pair)
    net = getattr(model, "module", model)
    if len(first) != net.images:
        raise UserError(f"MODEL.PRETRAINING barlow_twins sees {len(first)} images at once, expected all {net.images} "
                        "of an iteration: leave out --accumulate")  # fmt: skip
    return {"loss_barlow_twins": BarlowTwinsLoss(net.redundancy)(first, second) / first.shape[1]}


class FolderSet(classification.FolderSet):
    """Training samples have two views; their labels are not used."""

    def augment(self, sample: Sample, rng: np.random.Generator) -> Sample:
        first, second = (self.coloured(super(FolderSet, self).augment(sample, rng), rng) for _ in range(2))
        return {**first, "view": contiguous(second["image"])}

    def coloured(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Other colours, grey, blurred, each by chance. torchvision draws from torch's generator: seeded by ``rng``."""
        side, order = sample["image"].shape[-1], (2, 1, 0) if self.cfg.INPUT.FORMAT == "BGR" else (0, 1, 2)
        change = transforms.Compose([
            transforms.RandomApply([transforms.ColorJitter(*self.cfg.INPUT.VIEWS.COLOURS)], p=0.8),
            transforms.RandomGrayscale(self.cfg.INPUT.VIEWS.GREY),
            transforms.RandomApply([transforms.GaussianBlur(side // 20 * 2 + 1, (0.1, 2.0))], p=0.5),
        ])  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(rng.integers(2**63)))  # of the CPU alone
            return {**sample, "image": change(sample["image"][list(order)])[list(order)]}


@torch.no_grad()
def evaluate(
    _backend: Any, model: nn.Module, cfg: CfgNode, data: ImageFolder, _out: Path, group: Group, suffix: str = ""
) -> dict[str, Any]:
    """Percent of the images of ``data`` that a linear classifier of the backbone's features has right.

    The classifier is fitted to DATASETS.TRAIN by least squares: the only use of labels. ``suffix`` ends the task's
    name. Raises Stopped when the run was asked to stop.
    """
    group.broadcast_buffers(model)
    channels, classes = model.fc.layers[0].in_features, len(data.classes)
    moments = torch.zeros(channels + 1, channels + 1 + classes, dtype=torch.float64)

    def collect(batch: list[Sample]) -> list[None]:
        x, labels = features_of(model, batch)
        moments.addmm_(x.T, torch.cat([x, F.one_hot(labels, classes)], 1))
        return [None] * len(batch)

    def predict(batch: list[Sample]) -> list[bool]:
        x, labels = features_of(model, batch)
        return ((x @ weights).argmax(1) == labels).tolist()

    def each(found: Callable[[list[Sample]], list[Any]], folder: ImageFolder, described: str) -> list[Any]:
        dataset, size = classification.FolderSet(cfg, [folder], is_training=False), cfg.SOLVER.IMS_PER_BATCH
        return predict_share(found, dataset, group, f"{described} {folder.entry.name}", max(1, size // group.size))

    for name in cfg.DATASETS.TRAIN:
        each(collect, read_image_folder(lookup_folder(name)), "a linear classifier of")
    squares, products = group.mean(moments).split([channels + 1, classes], dim=1)
    # an equal penalty for every channel, whatever its scale; some may be 0 everywhere
    weights = torch.linalg.solve(squares + torch.diag(RIDGE * squares.diag() + squares.trace() * 1e-9), products)
    right = each(predict, data, "classifying")
    number, total = group.mean(torch.tensor([sum(right), len(right)], dtype=torch.float64)).tolist()
    logger.info(f"{data.entry.name}, {len(data.images):,} images: top-1 {100 * number / total:.1f} %, linear{suffix}")
    return {f"classification{suffix}": {"top1": 100 * number / total}} if group.is_main else {}


def features_of(model: nn.Module, batch: list[Sample]) -> tuple[Tensor, Tensor]:
    """The backbone's features and a 1 [N, C + 1], float64, and labels [N], on the CPU."""
    features = model.eval().features(batch).double().cpu()
    return F.pad(features, (0, 1), value=1.0), torch.tensor([sample["label"] for sample in batch])
