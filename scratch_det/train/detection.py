"""What a run of detection is made of.

A module like this one tells a run what is trained; everything else is the same for all of them:

``BEST``: task and name of the metric that model_best.pth is chosen by.
``load(backend) -> ModuleType``: who builds the model and computes losses, see ``scratch_det.backends``.
``training_set(cfg, data) -> Dataset``: samples by stream position, with a length and, for the log, ``describe()``.
``evaluate(backend, model, cfg, data, out, group) -> dict``: metrics in percent by task and name on one test set, in the
    main process; nothing in the others. Files go into the folder ``out``.
``conclude(cfg, run_dir, state, test)``: what a complete run leaves beside checkpoints and metrics.
"""

from fvcore.common.config import CfgNode

from scratch_det.backends import load
from scratch_det.data.coco import CocoDataset
from scratch_det.data.dataset import TrainingSet
from scratch_det.evaluation.inference import evaluate
from scratch_det.train.pictures import draw
from scratch_det.train.rundir import RunDir
from scratch_det.train.state import State

__all__ = ["BEST", "conclude", "evaluate", "load", "training_set"]
BEST = ("bbox", "AP")
training_set = TrainingSet


def conclude(cfg: CfgNode, run_dir: RunDir, state: State, test: list[CocoDataset]) -> None:
    """Draw curves.png and predictions.png."""
    draw(cfg, run_dir, test)
