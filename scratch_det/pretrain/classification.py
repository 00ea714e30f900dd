"""What a run of classification is made of: see ``scratch_det.train.detection`` for the contract."""

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from scratch_det.data.dataset import evaluation_batches
from scratch_det.data.image_folder import ImageFolder
from scratch_det.distributed.group import Group
from scratch_det.distributed.stop import Stopped
from scratch_det.pretrain import model as classifier
from scratch_det.pretrain.dataset import EvaluationFolderSet, TrainingFolderSet
from scratch_det.progress import track
from scratch_det.train.checkpoint import rename_synced, write_synced
from scratch_det.train.log import logger
from scratch_det.train.pictures import draw
from scratch_det.train.rundir import RunDir
from scratch_det.train.state import State

BEST = ("classification", "top1")
training_set = TrainingFolderSet
BACKBONE = "backbone.pth"
FEW_CLASSES = 5  # up to here the right class is always among the first five


def load(backend: str) -> ModuleType:
    """See the contract; there is one model alone."""
    return classifier


def evaluate(
    backend: ModuleType, model: nn.Module, cfg: CfgNode, data: ImageFolder, out: Path, group: Group
) -> dict[str, Any]:
    """Percent of the images of ``data`` whose class scores highest and, with more than five, among the first five.

    The processes of ``group`` share the images. Raises Stopped when the run was asked to stop.
    """
    group.broadcast_buffers(model)  # plain BN's running statistics differ between processes
    found = torch.zeros(3, dtype=torch.float64)  # right, right among the first five, all
    size = cfg.SOLVER.IMS_PER_BATCH // group.size
    batches = evaluation_batches(EvaluationFolderSet(cfg, [data]), cfg, group.world, size)
    total = math.ceil(math.ceil(len(data.images) / group.size) / size)
    for batch in track(batches, f"classifying {data.entry.name}", total, say=logger.info):
        if group.stop.requested:
            break
        ranks = backend.ranks(model, batch)
        found += torch.stack([(ranks < 1).sum(), (ranks < FEW_CLASSES).sum(), torch.tensor(len(ranks))])
    if group.any(group.stop.requested):
        raise Stopped(group.stop)
    top1, top5, images = group.mean(found).tolist()
    metrics = {"top1": 100 * top1 / images}
    if len(data.classes) > FEW_CLASSES:
        metrics["top5"] = 100 * top5 / images
    accuracy = ", ".join(f"{name} {value:.1f} %" for name, value in metrics.items())
    logger.info(f"{data.entry.name}, {len(data.images):,} images: {accuracy}")
    return {"classification": metrics} if group.is_main else {}


def conclude(cfg: CfgNode, run_dir: RunDir, state: State, test: list[ImageFolder]) -> None:
    """Write the body's weights into backbone.pth, which MODEL.WEIGHTS accepts, and draw curves.png."""
    path, partial = run_dir.path / BACKBONE, run_dir.path / f"{BACKBONE}.partial"
    body = {name: value for name, value in state.model.state_dict().items() if not name.startswith("fc.")}
    try:
        write_synced(partial, {"model": body, **state.traits})
        rename_synced(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    logger.info(f"the body's weights, to start a detector from: MODEL.WEIGHTS {path}")
    draw(cfg, run_dir, test=[])
