"""When a loss is not finite: what is needed to find out why, saved before the run ends."""

import math
from dataclasses import dataclass

from torch import nn

from scratch_det.data.dataset import Sample
from scratch_det.distributed.group import Group
from scratch_det.errors import UserError
from scratch_det.train.rundir import RunDir

REPORT = "nonfinite.json"
MOST_LINES = 50  # iterations of losses kept
MOST_IMAGES = 8  # named in the message; the report has all
LOWER = "lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS, or set SOLVER.CLIP_GRADIENTS.ENABLED True"
RISEN = 2.0  # a loss that has grown by this factor within the last iterations speaks for the learning rate


@dataclass(frozen=True)
class Moment:
    """When it happened; ``history``: the losses of the iterations before, averaged over processes."""

    iteration: int
    lr: float
    warmup_iters: int
    history: list[dict[str, float]]


def report_divergence(
    run_dir: RunDir, group: Group, model: nn.Module, moment: Moment, own_losses: dict[str, float], batch: list[Sample]
) -> UserError:
    """Write nonfinite.json and return the error that names the likely cause; called in all processes at once.

    ``own_losses`` and ``batch`` are those of this process.
    """
    own = {
        "losses": {key: _plain(value) for key, value in own_losses.items()},
        "images": [{"image_id": sample["image_id"], "position": sample["position"]} for sample in batch],
    }
    processes = group.gather(own) or [own]
    cause = likely_cause([one["losses"]["total_loss"] for one in processes], moment)
    report = {
        "iteration": moment.iteration,
        "lr": moment.lr,
        "likely_cause": cause,
        "processes": processes,
        "gradient_norms": gradient_norms(model),
        "last_losses": moment.history,
    }
    run_dir.write_json(REPORT, report)
    images = [image["image_id"] for one in processes for image in one["images"]]
    named = ", ".join(map(str, images[:MOST_IMAGES])) + (", ..." if len(images) > MOST_IMAGES else "")
    parts = ", ".join(f"{key} {value}" for key, value in own["losses"].items())
    message = (
        f"the loss is not finite at iteration {moment.iteration} (learning rate {moment.lr:g}): {parts}\n"
        f"  images: {named}\n  likely cause: {cause}\n"
        f"  losses, gradient norms and images are in {run_dir.path / REPORT}; earlier checkpoints are kept"
    )
    return UserError(group.broadcast(message))  # only the main process knows of all images


def likely_cause(totals: list[float | str], moment: Moment) -> str:
    """One sentence; ``totals`` are the processes' total losses, as text where they are not finite."""
    before = [line["total_loss"] for line in moment.history]
    bad = [rank for rank, total in enumerate(totals) if isinstance(total, str)]
    if len(before) > 1 and before[-1] > RISEN * min(before):
        return f"training diverged, total_loss rose from {min(before):.3g} to {before[-1]:.3g} before: {LOWER}"
    if len(bad) < len(totals):
        ranks = ", ".join(map(str, bad))
        return f"only process {ranks} of {len(totals)} has it, so look at its images: boxes, masks, sizes"
    if moment.iteration < moment.warmup_iters:
        return f"iteration {moment.iteration} is within the warm-up of {moment.warmup_iters}: {LOWER}"
    return f"the losses before did not rise, so look at the images; if they are sound, {LOWER}"


def gradient_norms(model: nn.Module) -> dict[str, float | str]:
    """Norm of the gradient of each part of the model, two levels deep ("backbone.body", "rpn.head")."""
    squares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            part = ".".join(name.split(".")[:2])
            squares[part] = squares.get(part, 0.0) + parameter.grad.float().square().sum().item()
    return {part: _plain(math.sqrt(square)) for part, square in squares.items()}


def _plain(value: float) -> float | str:
    """JSON has no NaN: as text."""
    return value if math.isfinite(value) else str(value)
