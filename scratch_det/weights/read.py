"""Reading weights files without running code from them."""

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scratch_det.errors import UserError
from scratch_det.log import logger
from scratch_det.weights.locate import find_checkpoint

STORAGES = {  # what torch.save calls the storage of each type, in a model's digest
    torch.float64: "DoubleStorage", torch.float32: "FloatStorage", torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage", torch.int64: "LongStorage", torch.int32: "IntStorage",
    torch.int16: "ShortStorage", torch.int8: "CharStorage", torch.uint8: "ByteStorage", torch.bool: "BoolStorage",
}  # fmt: skip
LEARNED = ("weight", "bias", "running_mean", "running_var")  # how the names of a layer's numbers end
NUMBERS = re.compile(r"[?b]|[biuf][1248]")  # NumPy's codes of the types that weights have


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a file of torch.save onto the CPU, or a pickled dictionary of NumPy arrays (.pkl).

    Raises UserError when it is missing or damaged, or holds anything but plain tensors or arrays. NumPy's own
    unpickling trusts the file; here the file's bytes are only ever read as numbers.
    """
    path, pickled = find_checkpoint(path), path.suffix == ".pkl"
    if not path.is_file():
        raise UserError(f"weights file {path} is missing; expected an existing .pth or .pkl file")
    try:
        if pickled:
            state = _with_arrays(_ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load())
        else:
            if zipfile.is_zipfile(path):  # of which torch.load does not check the CRC-32
                with zipfile.ZipFile(path) as archive:
                    if wrong := archive.testzip():
                        raise UserError(f"is damaged: the CRC-32 of its part {wrong} is wrong; restore it from a copy")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError as error:
        raise UserError(f"weights file {path} {error}") from None
    except Exception as error:  # a damaged file may raise anything
        raise UserError(  # not torch's own words, which advise to load it unsafely
            f"weights file {path} is damaged or no pickle ({type(error).__name__}: {error})"
            if pickled
            else f"weights file {path} is damaged or not a PyTorch file of plain tensors ({type(error).__name__}); "
            "expected a checkpoint of this repository, or torch.save(model.state_dict(), PATH)"
        ) from None
    if not isinstance(state, dict):
        raise UserError(f"weights file {path} holds a {type(state).__name__}; expected a checkpoint or tensors by name")
    return state


def require_numbers(tensors: Mapping[str, Any], what: str) -> None:
    """Raise UserError, after ``what``, for what is no dense tensor of finite numbers; a count may be integers."""
    for name, value in tensors.items():
        found = getattr(value, "dtype", type(value).__name__)
        if isinstance(value, torch.Tensor) and (value.is_meta or value.layout != torch.strided):
            found = "no numbers (a meta tensor)" if value.is_meta else f"a tensor of layout {value.layout}"
        elif getattr(found, "is_floating_point", False):
            found = ("finite" if value.float().isfinite().all() else "nan or inf") if value.numel() else "nothing"
        if found != "finite" and (found != torch.int64 or name.endswith(LEARNED)):
            raise UserError(f"{what} has {found} in {name}, expected finite numbers of a float type; get another file")


def weights_sha256(path: Path) -> str:
    """Digest of a checkpoint's model: whether two runs ended with the same weights, to the last bit.

    Of the model's tensors by name, with type, layout and bytes, whatever else is in the checkpoint, such as times.
    Empty, with a warning, where the file is missing or holds no model.
    """
    digest = sha256()
    try:
        model = read_checkpoint(path).get("model")
        if not isinstance(model, dict) or not all(isinstance(value, torch.Tensor) for value in model.values()):
            raise UserError("it holds no model")
        for name, tensor in sorted(model.items()):
            layout = f"{tensor.storage_offset()} {tuple(tensor.shape)} {tuple(tensor.stride())}"
            digest.update(f"{name} {STORAGES[tensor.dtype]} {layout}\n".encode())
            digest.update(torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy())
    except (UserError, KeyError) as error:  # KeyError: of a type that no model here has
        logger.warning(f"{path}: no digest of its weights: {error}")
        return ""
    return digest.hexdigest()


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


ARRAYS_ONLY: dict[str, Any] = {  # what a pickle of NumPy arrays consists of, and what is built in its place
    "numpy.ndarray": _Array,
    "numpy.dtype": _Type,
    "_codecs.encode": lambda text, _: text.encode("latin1"),
    "collections.OrderedDict": OrderedDict,
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy.core.multiarray.scalar": lambda kind, content: kind.array(content, (), "C"),
    "numpy.core.numeric._frombuffer": lambda content, kind, shape, order: kind.array(content, tuple(shape), order),
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if (known := full.replace("numpy._core.", "numpy.core.")) not in ARRAYS_ONLY:  # numpy._core since NumPy 2
            raise UserError(
                f"holds {full}, expected only NumPy arrays: unpickling anything else could run code of the "
                "file; get the weights from their source again, or as a state dict of tensors"
            )
        return ARRAYS_ONLY[known]


def _with_arrays(state: Any) -> Any:
    """The same nested dictionaries with NumPy arrays in the place of what stood for them."""
    if isinstance(state, dict):
        return {name: _with_arrays(value) for name, value in state.items()}
    return state.value if isinstance(state, _Array) else state
