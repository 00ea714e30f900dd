"""Reading weights without running code from their file.

The pixels that a network expects: their channels' order and what is subtracted and divided.

What a weights file is: whose names it has, and what its weights were trained with.
"""

import io
import pickle
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from scratch_det.errors import UserError
from scratch_det.weights.locate import find_checkpoint
from scratch_det.weights.names import OF_BOTTOM_UP, Scheme, from_caffe2, scheme_of

DAMAGE = (  # what reading a damaged file may raise: every byte of one was changed in turn
    zipfile.BadZipFile, pickle.UnpicklingError, struct.error, zlib.error, OSError, EOFError, RuntimeError,
    ValueError, OverflowError, LookupError, TypeError, AttributeError, AssertionError,
)  # fmt: skip
NUMBERS = re.compile(r"[?b]|[biuf][1248]")  # NumPy's codes of the types that weights have


def read_checkpoint(path: Path, pickled: bool = False) -> dict[str, Any]:
    """Load a file of torch.save onto the CPU, or a pickled dictionary of NumPy arrays.

    Raises UserError when it is missing or holds anything but plain tensors or arrays. NumPy's own unpickling trusts the
    file; here the file's bytes are only ever read as numbers.
    """
    path, expected = find_checkpoint(path), "dictionary of arrays" if pickled else "checkpoint or state dict"
    if not path.is_file():
        raise UserError(f"weights file {path} is missing; expected an existing .pth or .pkl file")
    try:
        if pickled:
            state = _with_arrays(_ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load())
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError as error:
        raise UserError(f"weights file {path} {error}") from None
    except Exception if pickled else DAMAGE as error:  # noqa: B030 - a damaged pickle may raise anything
        raise UserError(  # not torch's own words, which advise to load it unsafely
            f"weights file {path} is damaged or no pickle ({type(error).__name__}: {error})"
            if pickled
            else f"weights file {path} is damaged or not a PyTorch file of plain tensors ({type(error).__name__}); "
            "expected a checkpoint of this repository, or torch.save(model.state_dict(), PATH)"
        ) from None
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


class Pixels(NamedTuple):
    """Input is (grey value 0 to 255 - mean) / std, per channel in the order of ``format``, "BGR" or "RGB"."""

    format: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, cfg: CfgNode) -> "Pixels":
        """The pixel statistics of a recipe."""
        return cls(cfg.INPUT.FORMAT, tuple(cfg.MODEL.PIXEL_MEAN), tuple(cfg.MODEL.PIXEL_STD))

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint: plain text and numbers."""
        return {"format": self.format, "mean": list(self.mean), "std": list(self.std)}

    def reordered(self, order: str) -> "Pixels":
        """The same with the channels in the order of ``order``."""
        return self if order == self.format else Pixels(order, self.mean[::-1], self.std[::-1])


IMAGENET = Pixels("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))  # torchvision's and timm's, times 255
DETECTRON = Pixels("BGR", (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0))  # detectron/core/config.py, PIXEL_MEANS


def adapt_first_layer(weight: Tensor, trained_with: Pixels, used_with: Pixels) -> tuple[Tensor, str]:
    """The first convolution [C, 3, h, w] for pixels as in ``used_with``, and what was done, in words.

    Order and division are taken into the weights, exactly. Another mean is not: where the image ends, zeros are padded.
    """
    done = []
    if trained_with.format != used_with.format:
        weight = weight.flip(1)
        done.append(f"channels {trained_with.format} to {used_with.format}")
    there = trained_with.reordered(used_with.format)
    if there.std != used_with.std:
        ratio = (torch.tensor(used_with.std) / torch.tensor(there.std)).view(1, -1, 1, 1)
        weight = weight.float() * ratio
        now, then = (" ".join(f"{value:g}" for value in pixels.std) for pixels in (used_with, there))
        done.append(f"divided by PIXEL_STD {now} instead of {then}")
    apart = max(abs(one - other) for one, other in zip(there.mean, used_with.mean, strict=True))
    if apart:
        done.append(f"PIXEL_MEAN stays the recipe's, up to {apart:.2g} of 255 from the weights' own")
    return weight, "; ".join(done)


EPSILON = 1e-5  # of batch norm, in Detectron's AffineChannel taken as 0: a variance of 1 - EPSILON gives a scale of 1
ACCEPTED = (
    "a checkpoint of this repository, an ImageNet ResNet of torchvision or timm, torchvision's VGG-16, one of "
    "Detectron's (.pkl), or a model of detectron2's"
)
NO_WEIGHTS = re.compile(r"pixel_(mean|std)|.*\.anchor_generator\.cell_anchors\.\d+")  # in older detectron2 files
CLASSIFIER = re.compile(r"(stem\.)?(fc|linear|classifier\.6)\..*")  # an ImageNet model's last layer
CAFFE2_LEFTOVERS = re.compile(r".*_momentum|(pred|fc1000)_[wb]|lr|model_iter")


@dataclass(frozen=True)
class Weights:
    """A file's tensors by ``scheme``'s names, without a classifier's last layer.

    kind: what the file is, in words. pixels: those it was trained on, None when the file does not say.
    fused_norm: batch norm is folded into scale and shift, without statistics of its own. stride_in_1x1: where its
    bottlenecks have their stride; None when the file does not say.
    """

    path: Path
    tensors: dict[str, Tensor]
    scheme: Scheme
    kind: str = ""
    pixels: Pixels | None = None
    fused_norm: bool = False
    stride_in_1x1: bool | None = None

    def traits(self) -> dict[str, Any]:
        """What ``read_weights`` finds again in a file that holds it."""
        found = {"pixels": self.pixels.as_dict()} if self.pixels else {}
        found |= {"fused_norm": True} if self.fused_norm else {}
        return found | ({} if self.stride_in_1x1 is None else {"stride_in_1x1": self.stride_in_1x1})


def read_weights(path: Path, body: Any = None) -> Weights:
    """Read a file of one of the ACCEPTED kinds. Raises UserError for any other.

    body: one that knows its classifier's names, see ``scratch_det.modeling.backbones``; that is then accepted too.
    Detectron's names become those of a backbone in detectron2, fused batch norm gets statistics that change nothing.
    """
    content = read_checkpoint(path, pickled=path.suffix == ".pkl")
    inner = next((content[key] for key in ("model", "blobs", "state_dict") if isinstance(content.get(key), dict)), None)
    tensors = {
        name.removeprefix("module."): torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in (inner or content).items()
        if isinstance(value, np.ndarray | Tensor)
    }
    if not tensors:
        raise UserError(f"weights file {path} holds no tensors by name; expected a checkpoint or state dict")
    tensors = {name: value for name, value in tensors.items() if not NO_WEIGHTS.fullmatch(name)}
    scheme = scheme_of(tensors)
    if hasattr(body, "from_classifier") and not (scheme and scheme.whole):
        return Weights(path, body.from_classifier(tensors), OF_BOTTOM_UP, str(OF_BOTTOM_UP), body.pixels)
    if scheme is None:
        names = ", ".join(list(tensors)[:3])
        raise UserError(f"weights file {path} has names such as {names}; expected {ACCEPTED}")
    if scheme.library == "Detectron":
        return _from_detectron(path, tensors)
    if not scheme.whole:
        tensors = {name: value for name, value in tensors.items() if not CLASSIFIER.fullmatch(name)}
    from_imagenet = scheme == Scheme("torchvision", whole=False) or content.get("__author__") == "torchvision"
    stock_detector = "roi_heads.box_head.fc6.weight" in tensors and scheme.library == "torchvision"
    pixels = IMAGENET if from_imagenet or stock_detector else None  # what is known of its kind
    if isinstance(recorded := content.get("pixels"), dict) and "format" in recorded:
        pixels = Pixels(recorded["format"], tuple(recorded["mean"]), tuple(recorded["std"]))
    stride_in_1x1 = content.get("stride_in_1x1", False if from_imagenet else None)
    return Weights(path, tensors, scheme, str(scheme), pixels, content.get("fused_norm") is True, stride_in_1x1)


def _from_detectron(path: Path, blobs: dict[str, Tensor]) -> Weights:
    """detectron2's names. Raises UserError for layers beyond a backbone's; a convolution's biases before a norm go."""
    names = {blob: from_caffe2(blob) for blob in blobs if not CAFFE2_LEFTOVERS.fullmatch(blob)}
    if unknown := [blob for blob, name in names.items() if not name]:
        raise UserError(
            f"weights file {path} is one of Detectron's with {len(unknown)} blobs that no ImageNet ResNet has, such as "
            f"{unknown[0]}; expected a backbone's: detectors of Detectron are not converted"
        )
    named = {str(name): blobs[blob] for blob, name in names.items()}
    tensors = {n: v for n, v in named.items() if f"{n.removesuffix('.bias')}.norm.weight" not in named}
    fused = any(blob.endswith("_bn_s") for blob in blobs) and not any(n.endswith("running_var") for n in tensors)
    for name in [name for name in tensors if fused and name.endswith("norm.weight")]:  # statistics that change nothing
        tensors[name.replace("weight", "running_mean")] = torch.zeros_like(tensors[name])
        tensors[name.replace("weight", "running_var")] = torch.full_like(tensors[name], 1 - EPSILON)
    return Weights(path, tensors, Scheme("detectron2", whole=False), "Detectron classifier", DETECTRON, fused)
