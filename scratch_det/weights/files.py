"""Reading weights without running code from their file."""

import io
import pickle
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scratch_det.errors import UserError
from scratch_det.weights.address import find_checkpoint

DAMAGE = (  # what reading a damaged file may raise: every byte of one was changed in turn
    zipfile.BadZipFile, pickle.UnpicklingError, struct.error, zlib.error, OSError, EOFError, RuntimeError,
    ValueError, OverflowError, LookupError, TypeError, AttributeError, AssertionError,
)  # fmt: skip
NUMBERS = re.compile(r"[?b]|[biuf][1248]")  # NumPy's codes of the types that weights have


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a file of torch.save onto the CPU. Raises UserError when it is missing or holds more than plain tensors."""
    path = _existing(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        raise UserError(  # not torch's own words, which advise to load it unsafely
            f"weights file {path} is damaged or not a PyTorch file of plain tensors ({type(error).__name__}); "
            "expected a checkpoint of this repository, or torch.save(model.state_dict(), PATH)"
        ) from None
    return _dictionary(path, state, "checkpoint or state dict")


def read_pickle(path: Path) -> dict[str, Any]:
    """Load a pickled dictionary of NumPy arrays. Raises UserError for a file that holds anything else.

    NumPy's own unpickling trusts the file; here the file's bytes are only ever read as numbers.
    """
    path = _existing(path)
    try:
        state = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        state = _with_arrays(state)
    except UserError as error:
        raise UserError(f"weights file {path} {error}") from None
    except Exception as error:
        raise UserError(f"weights file {path} is damaged or no pickle ({type(error).__name__}: {error})") from None
    return _dictionary(path, state, "dictionary of arrays")


def tensors_of(path: Path, state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Arrays and tensors of ``state`` by name. Raises UserError when there are none."""
    found = {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in state.items()
        if isinstance(value, np.ndarray | torch.Tensor)
    }
    if not found:
        raise UserError(f"weights file {path} holds no tensors by name; expected a checkpoint or state dict")
    return found


def _existing(path: Path) -> Path:
    path = find_checkpoint(path)
    if not path.is_file():
        raise UserError(f"weights file {path} is missing; expected an existing .pth or .pkl file")
    return path


def _dictionary(path: Path, state: Any, expected: str) -> dict[str, Any]:
    if not isinstance(state, dict):
        raise UserError(f"weights file {path} holds a {type(state).__name__}; expected a {expected}")
    return state


class _Type:
    """Stands for numpy.dtype: a kind of number, and the order of its bytes."""

    def __init__(self, code: str, *_: Any):
        if not NUMBERS.fullmatch(code):
            raise UserError(f"holds an array of type {code!r}, expected arrays of numbers")
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple) -> None:
        self.order = {"<": "<", ">": ">"}.get(state[1], "=")

    def array(self, content: bytes | str, shape: tuple[int, ...], order: str) -> np.ndarray:
        """``content`` as numbers; Python 2 wrote texts."""
        raw = content.encode("latin1") if isinstance(content, str) else bytes(content)
        found = np.frombuffer(raw, np.dtype(self.code).newbyteorder(self.order)).reshape(shape, order=order)
        return found.astype(np.dtype(self.code))


class _Array:
    """Stands for numpy.ndarray until all of it has been read."""

    def __init__(self, *_: Any):
        self.value = np.zeros(0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, is_fortran, content = state
        self.value = kind.array(content, tuple(shape), "F" if is_fortran else "C")


def _scalar(kind: _Type, content: bytes | str) -> np.ndarray:
    return kind.array(content, (), "C")


def _from_buffer(content: bytes, kind: _Type, shape: tuple[int, ...], order: str) -> np.ndarray:
    return kind.array(content, tuple(shape), order)


def _encode(text: str, _: str) -> bytes:
    return text.encode("latin1")


ARRAYS_ONLY = {  # what a pickle of NumPy arrays consists of, and what is built in its place
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): OrderedDict,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ARRAYS_ONLY:
            raise UserError(
                f"holds {module}.{name}, expected NumPy arrays alone: unpickling anything else could run code of the "
                "file; get the weights from their source again, or as a state dict of tensors"
            )
        return ARRAYS_ONLY[module, name]


def _with_arrays(state: Any) -> Any:
    """The same nested dictionaries with NumPy arrays in the place of what stood for them."""
    if isinstance(state, dict):
        return {name: _with_arrays(value) for name, value in state.items()}
    return state.value if isinstance(state, _Array) else state
