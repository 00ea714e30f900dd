"""Making, reading and damaging the checkpoints of a run in tests."""

import errno
import os
from pathlib import Path
from typing import Any

import torch

from scratch_det.engine.checkpointer import (
    Checkpointer,
    checkpoint_name,
    read_checkpoint,
)

NUMBERS = 10_000
PREFIX = 16  # bytes written before a crash


class Killed(BaseException):
    """Stands for kill -9: nothing in the package handles it."""


class Bomb:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def state(completed: int) -> dict[str, Any]:
    """As the loop's: every number of the weights is ``completed``."""
    return {"model": {"weight": torch.full((NUMBERS,), float(completed))}, "iteration": completed - 1}


def fill(folder: Path, *completed: int, **options: Any) -> Checkpointer:
    kept = Checkpointer(folder, **options)
    for number in completed:
        kept.save(state(number), number)
    return kept


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.pth*")}


def regular(*completed: int) -> set[str]:
    return {checkpoint_name(number - 1) for number in completed}


def completed_in(path: Path | None) -> int:
    """The iterations behind an undamaged checkpoint, by its content."""
    assert path is not None
    weight = read_checkpoint(path)["model"]["weight"]
    assert weight.unique().numel() == 1
    return int(weight[0])


def flip(path: Path, where: float = 0.5) -> None:
    """Change one bit; half-way through the file there are weights."""
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: NUMBERS // 2])


def no_space(*arguments: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
