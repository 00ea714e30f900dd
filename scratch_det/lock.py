"""Locks between processes, also of several machines: gone when every process that holds one has ended, however."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from scratch_det.errors import UserError


def try_lock(path: Path) -> IO[str] | None:
    """The open file that holds the lock, emptied of what an earlier holder wrote; None when another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+")  # noqa: SIM115 - the lock goes with the file
    try:
        _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    file.truncate(0)
    return file


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for the lock, then hold it."""
    with open(path, "a") as file:
        _flock(file, fcntl.LOCK_EX)
        yield


def _flock(file: IO[str], how: int) -> None:
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        raise
    except OSError as error:
        raise UserError(
            f"{file.name} cannot be locked ({error.strerror}), and processes share the folder by locks; "
            "name a folder on another file system: --out DIR"
        ) from None
