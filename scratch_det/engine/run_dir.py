"""The run folder: the contract between a run and whoever starts, watches or reports it. Never imports torch.

config.yaml        the recipe, resolved: every key with its value
environment.json   versions, hardware, git state, data set digests, the exact command
metrics.json       JSON lines in detectron2's format
checkpoints/       model_0000499.pth, ..., model_best.pth, model_final.pth, last_checkpoint, index.json
inference/         predictions of the last evaluation as COCO results; inference_TTA/ those with test-time augmentation,
                   inference_EMA/ and inference_EMA_TTA/ those of the averaged weights (MODEL_EMA)
status.json        what the run is doing
parent.json        for a branch: the checkpoint that it started from
result.json        written last: backend, iteration, epochs, seconds, metrics, SHA-256 of metrics.json and of the final
                   weights; "ended_early", why, when TEST.PATIENCE ended the run
log.txt, tensorboard/, curves.png, predictions.png; with VIS_PERIOD training.png
wandb.json, wandb/, mlflow.json   with these trackers: the run there, and what it has got
backbone.pth       only after pre-training (classification): the backbone's weights
nonfinite.json     when a loss was not finite: losses, gradient norms and images, to find out why
lock               held while a process trains here
"""

import contextlib
import errno
import json
import os
import platform
import shutil
import tempfile
import traceback
from collections.abc import Collection
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import msgspec
from fvcore.common.config import CfgNode

from scratch_det.config.choices import choice_of
from scratch_det.config.load import read_resolved
from scratch_det.distributed.stop import Stopped
from scratch_det.errors import UserError
from scratch_det.files import try_lock, write_atomically
from scratch_det.log import logger
from scratch_det.reading import RESTORE, read_json, read_lines

FLOAT32 = 4  # bytes
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ANEW = f"{RESTORE}, or make the run anew in another folder: OUTPUT_DIR PATH"

Score = float | None | dict[str, float | None]  # a dict: of one of several data sets
Count = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(ge=0, lt=1e10)]


class Facts(msgspec.Struct):
    """What a study reads of status.json, result.json and environment.json; ``best``: of a search."""

    iteration: Count | None = None
    seconds: Seconds | None = None
    eta: Seconds | None = None
    metrics: dict[str, dict[str, Score]] = {}
    weights_sha256: str | None = None
    epochs: float | None = None
    ended_early: str = ""
    best: dict[str, Any] = {}
    git: dict[str, str] | None = None
    packages: dict[str, str | None] | None = None
    datasets: dict[str, dict[str, Any]] | list[str] | None = None  # names, in the result.json of scratch-det eval


class Parent(msgspec.Struct):
    """What is read of a parent.json."""

    checkpoint: str
    switch: bool = False


class Environment(msgspec.Struct):
    """What a run that continues reads of an environment.json."""

    backend: str
    datasets: dict[str, dict[str, Any]]
    trained_on: list[str]
    packages: dict[str, str | None]
    processes: int
    accumulate: int
    threads: int
    earlier_starts: list[dict[str, Any]] = []


class Index(msgspec.Struct):
    """The index.json of checkpoints."""

    sha256: dict[str, list[str]] = {}
    keep_at: list[int] = []
    best: dict[str, float] | None = None


def checkpoint_bytes(cfg: CfgNode, weights: int, trainable: int) -> int:
    """Approximate size of one checkpoint: ``weights`` numbers in the model, the optimizer's per ``trainable`` number.

    ``weights`` includes buffers, and counts twice with MODEL_EMA. All are float32, also with SOLVER.AMP. The rest of
    the file takes less than 1 MB.
    """
    return FLOAT32 * (weights * (1 + cfg.MODEL_EMA.ENABLED) + choice_of(cfg, "SOLVER.OPTIMIZER").moments * trainable)


def most_checkpoints(max_iter: int, period: int, keep_last: int, keep_at: Collection[int] = ()) -> int:
    """How many checkpoint files a run has at one time, at most.

    The last ``keep_last`` regular ones (0: all), the ones at the iterations ``keep_at``, the best, the final one, and
    the next one while it is written: an old checkpoint is deleted only when the new one is complete.
    """
    regular = (max_iter - 1) // period if period > 0 else 0
    apart = [c for c in set(keep_at) if 0 < c <= max_iter and (keep_last or period <= 0 or c % period)]
    return (min(keep_last, regular) if keep_last else regular) + len(apart) + 3


def check_free_space(folder: Path, bytes_each: int, most: int) -> None:
    """Raise UserError unless ``most`` checkpoints fit on the disk of ``folder``, which need not exist yet.

    Existing checkpoints count as part of ``most``.
    """
    files = [path.stat() for path in folder.glob("*.pth*")]
    own = sum({file.st_ino: file.st_size for file in files}.values())  # a file with two names counts once
    needed, available = most * bytes_each, free_bytes(folder) + own
    if needed > available:
        raise UserError(
            f"{folder}: this run keeps up to {most} checkpoints of {size(bytes_each)} and needs {size(needed)} "
            f"for them; available are {size(available)}\n"
            "  free space, or keep fewer (--keep-last 1, a larger SOLVER.CHECKPOINT_PERIOD), "
            "or name a folder on another disk: OUTPUT_DIR PATH"
        )


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of ``folder`` or, while it does not exist, of its nearest parent that does."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


def size(number: float) -> str:
    """Bytes in readable form: 370 MB, 4.1 GB."""
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.{0 if number >= 1e7 else 1}f} MB"


def keep_lines(source: Path, target: Path, completed: int) -> None:
    """Write the lines of ``source`` on the first ``completed`` iterations to ``target``."""
    kept = [json.dumps(line, sort_keys=True) + "\n" for line in read_lines(source) if line["iteration"] < completed]
    write_atomically(target, "".join(kept))


def is_evaluated(path: Path, iteration: int) -> bool:
    """Whether metrics.json has AP numbers of ``iteration``; their keys have a task and a slash."""
    return any(line["iteration"] == iteration and any("/" in key for key in line) for line in read_lines(path))


class RunDir:
    """Paths inside OUTPUT_DIR, and atomic writes of whole files.

    ``writes``: whether this process writes (rank 0); in the other processes of a run every write does nothing.
    """

    def __init__(self, path: str | Path, writes: bool = True):
        self.path, self.writes = Path(path), writes
        self.lock_file: IO[str] | Literal[False] | None = None  # False on a file system without locks
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.json"
        self.checkpoints = self.path / "checkpoints"
        self.result = self.path / "result.json"
        self.environment = self.path / "environment.json"
        self.parent = self.path / "parent.json"

    def holds_run(self) -> bool:
        """Whether the folder has metrics or a checkpoint; False for a run that failed before the first of them."""
        written = self.metrics.exists() and self.metrics.stat().st_size > 0
        return written or any(self.checkpoints.glob("*.pth"))

    def recorded(self, name: str) -> Any:
        """An entry of the run's environment.json, such as "backend"; None when there is no run or no such entry."""
        if not (self.holds_run() and self.environment.exists()):
            return None
        return self.read_environment().get(name)

    def read_environment(self) -> dict[str, Any]:
        """The environment.json of the run. Raises DataError as ``read_json``."""
        return read_json(self.environment, Environment, ANEW)

    def read_config(self, needed: Collection[str] = ()) -> CfgNode:
        """The config with which the run was started, see ``read_resolved``."""
        return read_resolved(self.config, needed)

    def check(self, allow_existing: bool) -> None:
        """Raise UserError, without writing anything, when the folder cannot be written to or already holds a run.

        ``allow_existing``: it may hold a run.
        """
        existing = self.path
        try:
            if self.holds_run() and not allow_existing:
                raise UserError(
                    f"OUTPUT_DIR {self.path} already holds a run; continue it with --resume, "
                    "or name another folder: OUTPUT_DIR PATH"
                )
            if pipe := next((path for path in self.path.glob("*") if path.is_fifo()), None):
                raise UserError(f"{pipe} is a pipe, which has no end; move it away, or name another: OUTPUT_DIR PATH")
            existing = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            raise UserError(
                f"OUTPUT_DIR {self.path} cannot be written to ({existing}: {error.strerror}); "
                "name another folder: OUTPUT_DIR PATH"
            ) from None

    def create(self) -> None:
        """Create the folder and checkpoints/, and lock it. Raises UserError as ``lock`` does."""
        if self.writes:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.lock()

    def lock(self) -> None:
        """Prevent other processes from training here while this process lives; does nothing if there is no folder yet.

        Raises UserError when another process trains here. A file system without locks gets a warning.
        """
        if not self.writes or not self.path.is_dir() or self.lock_file is not None:
            return
        try:
            self.lock_file = try_lock(self.path / "lock")
        except UserError as error:
            reason, self.lock_file = getattr(error.__cause__, "strerror", error), False
            logger.warning(f"{self.path} cannot be locked ({reason}): start no second run in it")
        if self.lock_file is None:
            raise UserError(
                f"another process is training in OUTPUT_DIR {self.path} (its status.json has host and pid); wait for "
                "it, end it, or name another folder: OUTPUT_DIR PATH"
            )

    def close(self) -> None:
        """Release the lock; the end of the process releases it too."""
        if self.lock_file:
            self.lock_file.close()
            self.lock_file = None

    def write_json(self, name: str, content: Any) -> None:
        """Replace a json file atomically."""
        if self.writes:
            write_atomically(self.path / name, json.dumps(content, indent=2, allow_nan=False) + "\n")

    def record_failure(self, iteration: int, error: BaseException | str) -> str:
        """Record why the run ended early in status.json and log.txt, unless the disk is full.

        A string is the reason why another process failed. Returns the state, "stopped" or "failed".
        """
        state = "stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed"
        reason = detail = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        if isinstance(error, BaseException):
            is_expected = state == "stopped" or isinstance(error, UserError)
            detail = str(error) if is_expected else "".join(traceback.format_exception(error))
        if self.writes:
            with contextlib.suppress(OSError):
                self.set_status(state, iteration=iteration, error=reason)
                with open(self.path / "log.txt", "a") as log:
                    log.write(detail.rstrip() + "\n")
        return state

    def set_status(self, state: str, **details: Any) -> None:
        """Record what the run is doing: training, evaluating, paused, finished, failed or stopped."""
        self.write_json("status.json", {"state": state, "host": platform.node(), "pid": os.getpid(), **details})
