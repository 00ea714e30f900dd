"""One checkpoint file of a run: its name, writing it, whether it is whole."""

import hashlib
import io
import os
import re
import zipfile
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from scratch_det.errors import UserError
from scratch_det.weights.files import DAMAGE, read_checkpoint

FINAL = "model_final.pth"
BEST = "model_best.pth"
REGULAR = re.compile(r"model_(\d{7})\.pth")


def checkpoint_name(iteration: int) -> str:
    """detectron2's file name for the state after iteration ``iteration`` (0-based): 499 -> model_0000499.pth."""
    return f"model_{iteration:07d}.pth"


def write_synced(path: Path, state: dict[str, Any]) -> str:
    """Write ``state`` to a file and flush it to the disk; returns the SHA-256 of what was written."""
    with _HashingFile(io.FileIO(path, "w")) as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
        return file.sha256.hexdigest()


class _HashingFile(io.BufferedWriter):
    """Computes the SHA-256 of what is written, in order, as torch.save does; no second reading is needed."""

    def __init__(self, file: io.FileIO):
        super().__init__(file)
        self.sha256 = hashlib.sha256()

    def write(self, content: Any) -> int:
        self.sha256.update(content)
        return super().write(content)


def rename_synced(path: Path, new: Path) -> None:
    """Rename within a folder, and flush the folder's entry to the disk too, on file systems that can do that."""
    os.replace(path, new)
    folder = os.open(new.parent, os.O_RDONLY)
    with suppress(OSError):
        os.fsync(folder)
    os.close(folder)


def tensor_bytes(state: Any) -> int:
    """Bytes of every tensor in nested dictionaries, lists and tuples."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    if isinstance(state, dict):
        return sum(map(tensor_bytes, state.values()))
    return sum(map(tensor_bytes, state)) if isinstance(state, list | tuple) else 0


def damage(path: Path, digests: Collection[str] = ()) -> str | None:
    """Why ``path`` is no complete, unchanged checkpoint; None when it is one.

    It has to have one of the SHA-256 ``digests``. Without any, the CRC-32 that torch.save leaves for each part of the
    file (a zip archive) have to be right, which torch.load does not look at, and the file has to load.
    """
    try:
        if digests:
            return None if sha256_of(path) in digests else "its SHA-256 is not the recorded one"
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
        if wrong:
            return f"the CRC-32 of its part {wrong} is wrong"
        read_checkpoint(path)
    except DAMAGE as error:
        return f"{type(error).__name__}: {error}"
    except UserError:
        return "it holds something else than plain tensors"
    return None


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, as ``sha256sum`` prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def completed_iterations(path: Path) -> int | None:
    """The number of iterations behind a checkpoint: from its name, else from inside; None when it cannot be read."""
    if match := REGULAR.fullmatch(path.name):
        return int(match[1]) + 1
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["iteration"] + 1
    except DAMAGE:
        return None
