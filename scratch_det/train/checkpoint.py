"""One checkpoint file: its name, whether it is whole, reading it without running code from it, using its weights."""

import hashlib
import io
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scratch_det.errors import UserError
from scratch_det.train.rundir import find_checkpoint

FINAL = "model_final.pth"
BEST = "model_best.pth"
REGULAR = re.compile(r"model_(\d{7})\.pth")
DAMAGE = (  # what reading a damaged file may raise: every byte of one was changed in turn
    zipfile.BadZipFile, pickle.UnpicklingError, struct.error, zlib.error, OSError, EOFError, RuntimeError,
    ValueError, OverflowError, LookupError, TypeError, AttributeError, AssertionError,
)  # fmt: skip


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


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint onto the CPU. Raises UserError when the file is missing or no PyTorch file of plain tensors."""
    path = find_checkpoint(path)
    if not path.is_file():
        raise UserError(f"weights file {path} is missing; expected an existing .pth file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        raise UserError(  # not torch's own words, which advise to load it unsafely
            f"weights file {path} is damaged or not a PyTorch file of plain tensors ({type(error).__name__}); "
            "expected a checkpoint of this repository, or torch.save(model.state_dict(), PATH)"
        ) from None
    if not isinstance(state, dict):
        raise UserError(f"weights file {path} holds a {type(state).__name__}; expected a checkpoint or state dict")
    return state


def load_weights(model: nn.Module, path: Path, backbone_prefix: str) -> str:
    """Fill ``model`` from a checkpoint of this backend or from a plain ImageNet classifier for its backbone body.

    Returns the coverage, one line. Raises UserError when a weight is missing or differs in shape: no layer stays random
    unnoticed.
    """
    state = read_checkpoint(path)
    state = state["model"] if isinstance(state.get("model"), dict) else state
    wanted = model.state_dict()
    prefix = "" if any(key in wanted for key in state) else backbone_prefix
    covered = [key for key in wanted if key.startswith(prefix)]
    values = {key: state.get(key.removeprefix(prefix)) for key in covered}
    wrong = [key for key, value in values.items() if value is None or value.shape != wanted[key].shape]
    unused = [key for key in state if prefix + key not in values and not _may_be_left_out(key)]
    if wrong or unused:
        raise UserError(
            f"weights file {path} covers {len(covered) - len(wrong)} of {len(covered)} tensors of "
            f"{'the backbone' if prefix else 'the model'}; first one "
            + (f"missing or of another shape: {wrong[0]}" if wrong else f"that has no place: {unused[0]}")
            + "\n  MODEL.WEIGHTS has to come from the same MODEL.* keys (norm, depth, widths, classes)"
        )
    model.load_state_dict(values, strict=False)
    return f"{path}: {len(covered)} of {len(wanted)} tensors loaded" + (" (backbone)" if prefix else "")


def _may_be_left_out(key: str) -> bool:
    """An ImageNet classifier's last layer, and the batch counters of BN, which FrozenBN does not have."""
    return key.startswith("fc.") or key.endswith(".num_batches_tracked")
