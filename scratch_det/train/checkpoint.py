"""Checkpoints: detectron2's names, written atomically, read without running code from them."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scratch_det.errors import UserError
from scratch_det.train.rundir import RunDir, find_checkpoint, write_atomically

FINAL = "model_final.pth"


def checkpoint_name(iteration: int) -> str:
    """detectron2's file name for the state after iteration ``iteration`` (0-based): 499 -> model_0000499.pth."""
    return f"model_{iteration:07d}.pth"


def save_checkpoint(run_dir: RunDir, name: str, state: dict[str, Any]) -> None:
    """Write ``state`` to checkpoints/``name`` (temporary file, fsync, rename), then point last_checkpoint at it."""
    path = run_dir.checkpoints / name
    partial = path.with_name(name + ".partial")
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    write_atomically(run_dir.checkpoints / "last_checkpoint", name)


def last_checkpoint(run_dir: RunDir) -> Path | None:
    """The file that last_checkpoint names, or None when there is none yet."""
    pointer = run_dir.checkpoints / "last_checkpoint"
    return run_dir.checkpoints / pointer.read_text().strip() if pointer.exists() else None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint onto the CPU. Raises UserError when the file is missing or no PyTorch file of plain tensors."""
    path = find_checkpoint(path)
    if not path.is_file():
        raise UserError(f"weights file {path} is missing; expected an existing .pth file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
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
