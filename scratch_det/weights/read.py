"""Reading weights files without running code from them."""

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from scratch_det.errors import UserError
from scratch_det.log import logger
from scratch_det.weights.locate import SUFFIXES, find_checkpoint

LEARNED = ("weight", "bias", "running_mean", "running_var")  # how the names of a layer's numbers end
IS_FOLDER = 0x10  # of a zip's file attributes, as MS-DOS has them
NUMBERS = re.compile(r"[?b]|[biuf][1248]")  # NumPy's codes of the types that weights have
OTHERS = (  # how a file begins, and names in a zip, that is no checkpoint; what it is, and the way on
    (rb"PK.*/constants\.pkl", "is a TorchScript archive; give the model's state_dict()"),
    (rb"PK.*\.npy", "is an archive of NumPy's (.npz), which no network here is saved as; give one of PyTorch"),
    (rb"\x1f\x8b", "is compressed by gzip; unpack it"),
    (rb"\s*<", "is a web page in the place of a file; fetch it again, with a browser if need be"),
    (rb"version https://git-lfs", "is a pointer of Git LFS; fetch the file itself with git lfs pull"),
    (rb"\x08.\x12.{1,2}pytorch", "is an ONNX model; give the state_dict() of the model that was exported"),
)


def read_checkpoint(path: Path, foreign: bool = False) -> dict[str, Any]:
    """Load a file of torch.save onto the CPU, tensors of safetensors, or a pickled dictionary of NumPy arrays (.pkl).

    foreign: also a file with objects of other classes beside its tensors, such as ``argparse.Namespace``; each becomes
    a ``StandIn``. No code of the file runs: of a pickle only tensors, arrays and plain values are made.
    Raises UserError when the file is missing or damaged, or holds anything else.
    """
    path = find_checkpoint(path)
    if not path.is_file():
        raise UserError(f"weights file {path} is missing; expected an existing {', '.join(SUFFIXES)} file")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        elif not _is_zip(path) and path.suffix == ".pkl":
            state = _with_arrays(_Unpickler(io.BytesIO(path.read_bytes()), foreign, encoding="latin1").load())
        else:
            state = _load_plain(path, foreign)
    except UserError as error:
        raise UserError(f"weights file {path} {error}") from None
    except Exception as error:  # a damaged file may raise anything
        kinds = {".pkl": f"pickle ({type(error).__name__}: {error})", ".safetensors": f"safetensors file ({error})"}
        kind = kinds.get(path.suffix, f"PyTorch file of plain tensors ({type(error).__name__})")
        raise UserError(  # not torch's own words, which advise to load it unsafely
            f"weights file {path} is damaged or no {kind}; expected a checkpoint of this repository, or "
            "torch.save(model.state_dict(), PATH)"
        ) from None
    if not isinstance(state, dict):
        raise UserError(
            f"weights file {path} holds {described(state)}; expected a checkpoint or tensors by name, such as "
            "torch.save(model.state_dict(), PATH) writes"
        )
    return state


def _is_zip(path: Path) -> bool:
    """Whether a file is a zip. Raises UserError for one that is damaged, and for what is no checkpoint."""
    with open(path, "rb") as file:
        beginning = file.read(64)
    if is_zip := zipfile.is_zipfile(path):  # torch.load does not check the CRC-32, and reads nothing of a folder
        with zipfile.ZipFile(path) as archive:
            folders = (one.filename for one in archive.infolist() if one.external_attr & IS_FOLDER)
            if damaged := archive.testzip() or next(folders, None):
                raise UserError(f"is damaged: its part {damaged} is not as it was saved; restore it from a copy")
            beginning += "\n".join(archive.namelist()).encode()
    for sign, what in OTHERS:
        if re.match(sign, beginning, re.DOTALL):
            raise UserError(what)
    return is_zip


def _load_plain(path: Path, foreign: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # which also names classes that weights_only does not know
        if not foreign:
            raise
    reader = SimpleNamespace(__name__="inert", Unpickler=_Unpickler, load=lambda *a, **k: _Unpickler(*a, **k).load())
    return _with_arrays(torch.load(path, map_location="cpu", pickle_module=reader, weights_only=False))


def described(value: Any) -> str:
    """A value of a checkpoint in a few words: its class, and of tensors by name the number and the first names."""
    if isinstance(value, StandIn):
        return f"an object of {type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, dict):
        names = [str(name) for name, one in value.items() if isinstance(one, torch.Tensor | np.ndarray)]
        return f"{len(names)} tensors ({', '.join(names[:2])}, ...)" if len(names) > 2 else f"a dict of {len(value)}"
    return f"a {type(value).__name__}"


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
            kind = tensor.type().removeprefix("torch.").replace("Tensor", "Storage")  # as torch.save calls it
            digest.update(f"{name} {kind} {layout}\n".encode())
            digest.update(torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy())
    except UserError as error:
        logger.warning(f"{path}: no digest of its weights: {error}")
        return ""
    return digest.hexdigest()


class _Type:
    """Stands for numpy.dtype: a kind of number, and the order of its bytes."""

    def __init__(self, code: str, *_: Any):
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple) -> None:
        self.order = {"<": "<", ">": ">"}.get(state[1], "=")

    def array(self, content: bytes | str, shape: tuple[int, ...], order: str) -> np.ndarray | str:
        """``content`` as numbers; Python 2 wrote texts. Of texts, objects and the like only a word of what they are."""
        if not NUMBERS.fullmatch(self.code):
            return f"an array of type {self.code}"
        raw = content.encode("latin1") if isinstance(content, str) else bytes(content)
        found = np.frombuffer(raw, np.dtype(self.code).newbyteorder(self.order)).reshape(shape, order=order)
        return found.astype(np.dtype(self.code))


class _Array:
    """Stands for numpy.ndarray until all of it has been read."""

    def __init__(self, *_: Any):
        self.value: np.ndarray | str = np.zeros(0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, is_fortran, content = state
        self.value = kind.array(content, tuple(shape), "F" if is_fortran else "C")


class StandIn:
    """In the place of an object of another class: takes everything that a pickle does to it, and does nothing."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def nothing(self, *_: Any, **__: Any) -> "StandIn":
        """What a pickle may call."""
        return self

    __call__ = __setstate__ = __setitem__ = append = extend = add = nothing  # type: ignore[misc, assignment]


PLAIN: dict[str, Any] = {  # what a pickle of tensors or arrays consists of, and what is built in its place
    "numpy.ndarray": _Array,
    "numpy.dtype": _Type,
    "_codecs.encode": lambda text, _: text.encode("latin1"),
    "collections.OrderedDict": OrderedDict,
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy.core.multiarray.scalar": lambda kind, content: kind.array(content, (), "C"),
    "numpy.core.numeric._frombuffer": lambda content, kind, shape, order: kind.array(content, tuple(shape), order),
}
TORCH: dict[str, Any] = {  # the same for torch.save; torch itself makes the storages
    "torch._utils._rebuild_tensor": torch._utils._rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    "torch.Size": tuple,
    "collections.defaultdict": lambda *_: {},
}


class _Unpickler(pickle.Unpickler):
    """Makes what PLAIN names, and with ``foreign`` also tensors, and a StandIn for all else."""

    def __init__(self, file: Any, foreign: bool = True, **arguments: Any):
        super().__init__(file, **arguments)
        self.foreign = foreign

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}".replace("numpy._core.", "numpy.core.")  # numpy._core since NumPy 2
        if full in PLAIN:
            return PLAIN[full]
        if not self.foreign:
            raise UserError(
                f"holds {module}.{name}, expected only NumPy arrays: unpickling anything else could run code of the "
                "file; get the weights from their source again, or as a state dict of tensors"
            )
        if module == "torch" and isinstance(kind := getattr(torch, name, None), torch.dtype):
            return kind
        return TORCH.get(full) or type(name, (StandIn,), {"__module__": module})


def _with_arrays(state: Any) -> Any:
    """The same nested dictionaries with NumPy arrays in the place of what stood for them."""
    if isinstance(state, dict):
        return {name: _with_arrays(value) for name, value in state.items()}
    return state.value if isinstance(state, _Array) else state
