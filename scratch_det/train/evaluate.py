"""Evaluations of a run: when they are due, where their numbers go, which weights are the best."""

import math
from pathlib import Path
from types import ModuleType
from typing import Any

from fvcore.common.config import CfgNode
from torch import nn

from scratch_det.data.coco import CocoDataset
from scratch_det.distributed.group import Group
from scratch_det.distributed.stop import Stopped
from scratch_det.evaluation.inference import evaluate
from scratch_det.train.loop import Run, due
from scratch_det.train.metrics import flat_metrics, is_evaluated


def evaluate_now(run: Run, test: list[CocoDataset], iteration: int) -> dict[str, Any]:
    """Evaluate the weights as they are; a run that is asked to stop meanwhile leaves a checkpoint first."""
    completed, max_iter = run.state.iteration, run.cfg.SOLVER.MAX_ITER
    run.run_dir.set_status("evaluating", iteration=completed, max_iter=max_iter)
    try:
        out, last = run.run_dir.path / "inference", iteration == max_iter
        found = evaluate_all(run.cfg, run.backend, run.state.model, test, out, run.group, augmented=last)
    except Stopped:
        run.save()
        raise
    if found:
        keep_if_best(run, found if len(test) == 1 else found[test[0].entry.name])
        run.metrics.write(iteration, flat_metrics(found))  # last: the sign that this evaluation is done
    return found


def evaluate_if_missing(run: Run, test: list[CocoDataset]) -> None:
    """The evaluation of the checkpoint that the run continues from, if it was cut off after the checkpoint."""
    completed = run.state.iteration
    if test and 0 < completed < run.cfg.SOLVER.MAX_ITER and due(completed, run.cfg.TEST.EVAL_PERIOD):
        missing = run.group.is_main and not is_evaluated(run.run_dir.metrics, completed - 1)
        if run.group.any(missing):
            evaluate_now(run, test, completed - 1)


def keep_if_best(run: Run, metrics: dict[str, Any]) -> None:
    """With evaluations on the way, keep the weights of the best box AP as model_best.pth."""
    ap = metrics["bbox"]["AP"]
    if run.cfg.TEST.EVAL_PERIOD > 0 and not math.isnan(ap) and ap > run.checkpoints.best_ap():
        run.checkpoints.save_best(run.content(), ap, run.state.iteration)


def evaluate_all(
    cfg: CfgNode,
    backend: ModuleType,
    model: nn.Module,
    test: list[CocoDataset],
    out: Path,
    group: Group,
    augmented: bool,
) -> dict[str, Any]:
    """Metrics by task, in the main process; with several test sets, by their names first.

    augmented: with TEST.AUG.ENABLED, evaluate with test-time augmentation too.
    """
    if len(test) == 1:
        return evaluate(backend, model, cfg, test[0], out, group, augmented)
    found = {
        data.entry.name: evaluate(backend, model, cfg, data, out / data.entry.name, group, augmented) for data in test
    }
    return found if group.is_main else {}
