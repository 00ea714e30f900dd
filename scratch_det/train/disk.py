"""The disk space that a run's checkpoints take, known before the run starts."""

import errno
import shutil
from collections.abc import Collection
from pathlib import Path

from scratch_det.errors import UserError

FLOAT32 = 4  # bytes
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def checkpoint_bytes(weights: int, trainable: int, moments: int = 1) -> int:
    """About one checkpoint's size: ``weights`` numbers in the model, buffers included, ``moments`` a ``trainable`` one.

    SGD has one, its momentum. All are float32 with SOLVER.AMP too. What else is in the file takes less than 1 MB.
    """
    return FLOAT32 * (weights + moments * trainable)


def most_checkpoints(max_iter: int, period: int, keep_last: int, keep_at: Collection[int] = ()) -> int:
    """How many checkpoint files a run has at one time, at most.

    The last ``keep_last`` regular ones (0: all), those after ``keep_at`` completed iterations, the best, the final one,
    and the next one while it is being written: an old one goes only when the new one is complete.
    """
    regular = (max_iter - 1) // period if period > 0 else 0
    apart = [c for c in set(keep_at) if 0 < c <= max_iter and (keep_last or period <= 0 or c % period)]
    return (min(keep_last, regular) if keep_last else regular) + len(apart) + 3


def check_free_space(
    folder: Path, bytes_each: int, max_iter: int, period: int, keep_last: int, keep_at: Collection[int] = ()
) -> None:
    """Raise UserError unless the run's checkpoints fit on the disk of ``folder``, which need not exist yet.

    Checkpoints that are there already are counted as part of them.
    """
    most = most_checkpoints(max_iter, period, keep_last, keep_at)
    needed = most * bytes_each
    available = free_bytes(folder) + _bytes_in(folder)
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
    """Bytes for people: 370 MB, 4.1 GB."""
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.{0 if number >= 1e7 else 1}f} MB"


def _bytes_in(folder: Path) -> int:
    """Bytes of the checkpoints and of what is left of unfinished ones; a file with two names counts once."""
    found = [path.stat() for path in folder.glob("*.pth*")]
    return sum({file.st_ino: file.st_size for file in found}.values())
