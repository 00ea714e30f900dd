"""Losses and AP as they come: metrics.json, TensorBoard, log lines."""

import json
import math
import statistics
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from scratch_det.engine.run_dir import RunDir
from scratch_det.files import read_lines, write_atomically
from scratch_det.log import clock

PERIOD = 20  # iterations per line, as detectron2's writers have it


class Metrics:
    """Collects scalars per iteration and writes the median of every 20 iterations (detectron2's line format).

    Args:
        start_iteration: completed iterations; what an earlier start wrote about later ones is dropped.
        window: ``window`` of the checkpoint that the run continues from.
    """

    def __init__(self, run_dir: RunDir, start_iteration: int, max_iter: int, window: list[dict[str, float]]):
        self.max_iter, self.window = max_iter, window
        self.board: SummaryWriter | None = None  # of rank 0 only
        if run_dir.writes:
            keep_lines(run_dir.metrics, run_dir.metrics, start_iteration)
            self.file = open(run_dir.metrics, "a")  # noqa: SIM115 - open for as long as the run
            self.board = SummaryWriter(str(run_dir.path / "tensorboard"), purge_step=start_iteration)

    def add(self, iteration: int, scalars: dict[str, float]) -> dict[str, float] | None:
        """Take one iteration's scalars; at the end of a window (and of training) write and return their medians."""
        self.window.append(scalars)
        if (iteration + 1) % PERIOD and iteration + 1 != self.max_iter:
            return None
        medians = {key: statistics.median(one[key] for one in self.window) for key in scalars}
        self.window.clear()
        medians["lr"] = scalars["lr"]
        medians["eta_seconds"] = medians["time"] * (self.max_iter - iteration - 1)
        self.write(iteration, medians)
        return medians

    def write(self, iteration: int, scalars: dict[str, float]) -> None:
        """One line of metrics.json (NaN becomes null) and one TensorBoard point per scalar."""
        if self.board is None:
            return
        line = {key: None if math.isnan(value) else value for key, value in scalars.items()}
        self.file.write(json.dumps({"iteration": iteration, **line}, sort_keys=True) + "\n")
        self.file.flush()
        for key, value in scalars.items():
            self.board.add_scalar(key, value, iteration)

    def close(self) -> None:
        """Flush and close both."""
        if self.board:
            self.file.close()
            self.board.close()


def keep_lines(source: Path, target: Path, completed: int) -> None:
    """Write to ``target`` what ``source`` has about the first ``completed`` iterations."""
    kept = [json.dumps(line, sort_keys=True) + "\n" for line in read_lines(source) if line["iteration"] < completed]
    write_atomically(target, "".join(kept))


def is_evaluated(path: Path, iteration: int) -> bool:
    """Whether metrics.json has AP numbers of ``iteration``; their keys have a task and a slash."""
    return any(line["iteration"] == iteration and any("/" in key for key in line) for line in read_lines(path))


def log_line(iteration: int, max_iter: int, medians: dict[str, float]) -> str:
    """A window's medians for the log."""
    losses = "  ".join(f"{key} {value:.4f}" for key, value in medians.items() if key.startswith("loss_"))
    return (
        f"iter {iteration + 1}/{max_iter}  eta {clock(medians['eta_seconds'])}  total_loss {medians['total_loss']:.4f}"
        f"  {losses}  lr {medians['lr']:.6f}  {medians['time']:.3f} s/iter  data {medians['data_time']:.3f} s"
    )
