"""Evaluations of a run: when they are due, where their numbers go, which weights are the best."""

import math
from pathlib import Path
from types import ModuleType
from typing import Any

from fvcore.common.config import CfgNode
from torch import nn

from scratch_det.config import flatten
from scratch_det.distributed.group import Group
from scratch_det.distributed.stop import Stopped
from scratch_det.train import detection
from scratch_det.train.loop import Run, due
from scratch_det.train.metrics import is_evaluated


def evaluate_now(run: Run, test: list[Any], iteration: int) -> dict[str, Any]:
    """Evaluate the weights as they are; a run that is asked to stop meanwhile leaves a checkpoint first."""
    completed, max_iter, cfg = run.state.iteration, run.cfg.SOLVER.MAX_ITER, run.cfg
    if iteration < max_iter:
        cfg = cfg.clone()
        cfg.TEST.AUG.ENABLED = False  # many times the work: once, of the final weights
    run.run_dir.set_status("evaluating", iteration=completed, max_iter=max_iter)
    try:
        out = run.run_dir.path / "inference"
        found = evaluate_all(cfg, run.backend, run.state.model, test, out, run.group, run.task)
    except Stopped:
        run.save()
        raise
    if found:
        keep_if_best(run, found if len(test) == 1 else found[test[0].entry.name])
        run.metrics.write(iteration, flatten(found, "/"))  # last: the sign that this evaluation is done
    return found


def evaluate_if_missing(run: Run, test: list[Any]) -> None:
    """The evaluation of the checkpoint that the run continues from, if it was cut off after the checkpoint."""
    completed = run.state.iteration
    if test and 0 < completed < run.cfg.SOLVER.MAX_ITER and due(completed, run.cfg.TEST.EVAL_PERIOD):
        missing = run.group.is_main and not is_evaluated(run.run_dir.metrics, completed - 1)
        if run.group.any(missing):
            evaluate_now(run, test, completed - 1)


def keep_if_best(run: Run, metrics: dict[str, Any]) -> None:
    """With evaluations on the way, keep the weights of the best box AP, or the task's like, as model_best.pth."""
    task, name = run.task.BEST
    score = metrics[task][name]
    if run.cfg.TEST.EVAL_PERIOD > 0 and not math.isnan(score) and score > run.checkpoints.best_ap():
        run.checkpoints.save_best(run.content(), score, run.state.iteration)


def evaluate_all(
    cfg: CfgNode,
    backend: ModuleType,
    model: nn.Module,
    test: list[Any],
    out: Path,
    group: Group,
    task: ModuleType = detection,
) -> dict[str, Any]:
    """Metrics by task, in the main process; with several test sets, by their names first."""
    if len(test) == 1:
        return task.evaluate(backend, model, cfg, test[0], out, group)
    found = {data.entry.name: task.evaluate(backend, model, cfg, data, out / data.entry.name, group) for data in test}
    return found if group.is_main else {}
