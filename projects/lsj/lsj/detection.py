"""What a run with large-scale jitter is made of; ``scratch_det.train.detection`` says what has to be here."""

from types import SimpleNamespace

from fvcore.common.config import CfgNode

from lsj.jitter import jitter
from lsj.recipe import without_keys
from scratch_det import backends
from scratch_det.data.coco import CocoDataset
from scratch_det.data.dataset import TrainingSet
from scratch_det.train.detection import BEST, conclude, evaluate

__all__ = ["BEST", "conclude", "evaluate", "load", "training_set"]


def load(backend: str) -> SimpleNamespace:
    """The backend, which builds its model from the keys that it knows: detectron2 refuses others."""
    module = backends.load(backend)
    return SimpleNamespace(**{**vars(module), "build": lambda cfg: module.build(without_keys(cfg))})


def training_set(cfg: CfgNode, data: list[CocoDataset]) -> TrainingSet:
    """Training samples with large-scale jitter."""
    return TrainingSet(cfg, data, jitter)
