"""What a weights file is: whose names its tensors have, and the pixels, norm and stride they were trained with."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from scratch_det.errors import UserError
from scratch_det.weights.names import from_caffe2
from scratch_det.weights.read import read_checkpoint, require_numbers

SIGNS = (  # the first prefix that a name begins with: the library, and whether the file holds a whole detector
    ("backbone.body.", "torchvision", True),
    ("backbone.", "detectron2", True),
    ("layer1.", "torchvision", False),
    ("features.", "torchvision", False),
    ("res2.", "detectron2", False),
    ("res2_", "Detectron", False),
)
NO_WEIGHTS = re.compile(r"(module\.)?(pixel_(mean|std)|.*\.anchor_generator\.cell_anchors\.\d+)")  # of old detectron2
CLASSIFIER = re.compile(r"(stem\.)?(fc|linear|classifier\.6)\..*")  # an ImageNet model's last layer
CAFFE2_LEFTOVERS = re.compile(r".*_momentum|(pred|fc1000)_[wb]|lr|model_iter")
EPSILON = 1e-5  # of batch norm, which Detectron's AffineChannel lacks: a variance of 1 - EPSILON gives a scale of 1

Positive = Annotated[float, msgspec.Meta(gt=0)]


class Pixels(NamedTuple):
    """Input is (grey value 0 to 255 - mean) / std, per channel in the order of ``format``, "BGR" or "RGB"."""

    format: Literal["BGR", "RGB"]
    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]

    @classmethod
    def of(cls, cfg: CfgNode) -> "Pixels":
        """The pixel statistics of a recipe."""
        return cls(cfg.INPUT.FORMAT, tuple(cfg.MODEL.PIXEL_MEAN), tuple(cfg.MODEL.PIXEL_STD))

    def __str__(self) -> str:
        mean, std = (" ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"{self.format}, PIXEL_MEAN {mean}, PIXEL_STD {std}"

    @classmethod
    def read(cls, recorded: Any, path: Path) -> "Pixels":
        """Those that ``as_dict`` gave. Raises UserError, which names the file, for others."""
        try:
            return msgspec.convert([recorded[name] for name in cls._fields], cls)
        except (msgspec.ValidationError, LookupError, TypeError):
            raise UserError(
                f"weights file {path} has pixels {recorded!r:.100}, expected format RGB or BGR, mean and std, three "
                "numbers each, std above 0; get another file"
            ) from None

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint: plain text and numbers."""
        return {"format": self.format, "mean": list(self.mean), "std": list(self.std)}

    def reordered(self, order: str) -> "Pixels":
        """The same with the channels in the order of ``order``."""
        return self if order == self.format else Pixels(order, self.mean[::-1], self.std[::-1])


IMAGENET = Pixels("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))  # torchvision's and timm's, times 255
DETECTRON = Pixels("BGR", (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0))  # detectron/core/config.py, PIXEL_MEANS


@dataclass(frozen=True)
class Weights:
    """A file's tensors by the names of ``library``, without a classifier's last layer.

    library: torchvision or detectron2; "" where the names are those of the bottom-up network itself, in both.
    is_detector: a whole detector, else a classifier, whose names are the bottom-up network's without their prefix.
    pixels: those it was trained on, None when the file does not say.
    fused_norm: batch norm is folded into scale and shift, without statistics of its own.
    stride_in_1x1: which convolution of its bottlenecks has the stride; None when the file does not say.
    trained_by: another library than ``library``, whose names have been translated.
    """

    path: Path
    tensors: dict[str, Tensor]
    library: str
    is_detector: bool
    pixels: Pixels | None = None
    fused_norm: bool = False
    stride_in_1x1: bool | None = None
    trained_by: str = ""

    @property
    def kind(self) -> str:
        """What the file is, in words."""
        either = "torchvision or timm" if self.library == "torchvision" and not self.is_detector else self.library
        return f"{self.trained_by or either} {'detector' if self.is_detector else 'classifier'}".strip()

    def traits(self) -> dict[str, Any]:
        """What a file has to hold beside these tensors so that ``read_weights`` knows as much of them."""
        found = {"pixels": self.pixels and self.pixels.as_dict(), "fused_norm": self.fused_norm or None}
        found["stride_in_1x1"] = self.stride_in_1x1
        return {key: value for key, value in found.items() if value is not None}


def origin_of(names: Iterable[str]) -> tuple[str, bool] | None:
    """The library that has these names, and whether they name a whole detector; None when they are unknown."""
    names = list(names)
    return next(((library, whole) for sign, library, whole in SIGNS if any(n.startswith(sign) for n in names)), None)


def read_weights(path: Path, bottom_up: Any = None) -> Weights:
    """Read a file of a kind that is known. Raises UserError for any other.

    bottom_up: the model's network, see ``scratch_det.modeling.backbones``; a classifier whose names it knows is
    accepted too. Detectron's names become those of a classifier of detectron2, and fused batch norm gets statistics
    that change nothing.
    """
    content = read_checkpoint(path)
    inner = next((content[key] for key in ("model", "blobs", "state_dict") if isinstance(content.get(key), dict)), None)
    tensors = {
        name.removeprefix("module."): torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in (inner or content).items()
        if isinstance(value, np.ndarray | Tensor) and isinstance(name, str) and not NO_WEIGHTS.fullmatch(name)
    }
    if not tensors:
        raise UserError(f"weights file {path} holds no tensors by name; expected a checkpoint or state dict")
    require_numbers(tensors, f"weights file {path}")
    library, is_detector = origin_of(tensors) or ("", False)
    if hasattr(bottom_up, "from_classifier") and not is_detector:
        return Weights(path, bottom_up.from_classifier(tensors), "", False, bottom_up.pixels)
    if not library:
        raise UserError(
            f"weights file {path} has names such as {', '.join(list(tensors)[:3])}; expected a checkpoint of this "
            "repository, an ImageNet ResNet of torchvision or timm, torchvision's VGG-16, one of Detectron's (.pkl), "
            "or a model of detectron2's"
        )
    if library == "Detectron":
        return _from_detectron(path, tensors)
    if not is_detector:
        tensors = {name: value for name, value in tensors.items() if not CLASSIFIER.fullmatch(name)}
    from_imagenet = (library, is_detector) == ("torchvision", False) or content.get("__author__") == "torchvision"
    stock_detector = "roi_heads.box_head.fc6.weight" in tensors and library == "torchvision"
    pixels = IMAGENET if from_imagenet or stock_detector else None  # what is known of files of this kind
    if inner and (recorded := content.get("pixels")) is not None:
        pixels = Pixels.read(recorded, path)
    stride_in_1x1 = content.get("stride_in_1x1", False if from_imagenet else None)
    return Weights(path, tensors, library, is_detector, pixels, content.get("fused_norm") is True, stride_in_1x1)


def _from_detectron(path: Path, blobs: dict[str, Tensor]) -> Weights:
    """The tensors by detectron2's names, without biases of convolutions before a norm, which has its own.

    Raises UserError for layers beyond a backbone's.
    """
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
    return Weights(path, tensors, "detectron2", False, DETECTRON, fused, trained_by="Detectron")
