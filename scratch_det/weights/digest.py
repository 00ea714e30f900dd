"""A digest of a checkpoint's model, without torch: whether two runs ended with the same weights, to the last bit."""

import hashlib
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

BLOCK = 1 << 20


class Tensor(NamedTuple):
    """Where a tensor lies: in which storage of which type, from where on, with which shape and strides."""

    storage: tuple[str, str]
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def rebuilt(cls, storage: tuple[str, str], offset: int, size: Any, stride: Any, *_: Any) -> "Tensor":
        return cls(storage, offset, tuple(size), tuple(stride))


class Layout(pickle.Unpickler):
    """Reads what torch.save pickles beside the storages of a zip archive; anything but plain tensors is refused."""

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        _, kind, key, *_ = pid
        return kind, key

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return Tensor.rebuilt
        if module == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"{module}.{name} is no plain tensor")


def weights_sha256(path: Path) -> str:
    """Of the model's tensors by name, with type, shape and bytes, whatever else is in the checkpoint, such as times.

    Empty where the file is gone, or is no checkpoint that can be read like this.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _digest(archive)
    except Exception:  # missing, or whatever a damaged archive and a damaged pickle make of themselves
        return ""


def _digest(archive: zipfile.ZipFile) -> str:
    (layout,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
    with archive.open(layout) as file:
        model: dict[str, Tensor] = Layout(file).load()["model"]
    digest = hashlib.sha256()
    for name, tensor in sorted(model.items()):
        kind, key = tensor.storage
        digest.update(f"{name} {kind} {tensor.offset} {tensor.size} {tensor.stride}\n".encode())
        with archive.open(layout.removesuffix("data.pkl") + f"data/{key}") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()
