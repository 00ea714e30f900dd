"""What a weights file is: whose names it has, and what its weights were trained with."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scratch_det.errors import UserError
from scratch_det.weights.files import read_checkpoint, read_pickle, tensors_of
from scratch_det.weights.names import OF_BODY, Scheme, from_caffe2, scheme_of
from scratch_det.weights.pixels import DETECTRON, IMAGENET, Pixels

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
        known = {"pixels": self.pixels and self.pixels.as_dict(), "fused_norm": self.fused_norm or None,
                 "stride_in_1x1": self.stride_in_1x1}  # fmt: skip
        return {name: value for name, value in known.items() if value is not None}


def read_weights(path: Path, body: Any = None) -> Weights:
    """Read a file of one of the ACCEPTED kinds. Raises UserError for any other.

    body: one that knows its classifier's names, see ``scratch_det.modeling.bodies``; that is then accepted too.
    Detectron's names become those of a backbone in detectron2, fused batch norm gets statistics that change nothing.
    """
    content = read_pickle(path) if path.suffix == ".pkl" else read_checkpoint(path)
    inner = next((content[key] for key in ("model", "blobs", "state_dict") if isinstance(content.get(key), dict)), None)
    tensors = {name.removeprefix("module."): value for name, value in tensors_of(path, inner or content).items()}
    tensors = {name: value for name, value in tensors.items() if not NO_WEIGHTS.fullmatch(name)}
    scheme = scheme_of(tensors)
    if hasattr(body, "from_classifier") and not (scheme and scheme.whole):
        return Weights(path, body.from_classifier(tensors), OF_BODY, str(OF_BODY), body.pixels)
    if scheme is None:
        names = ", ".join(list(tensors)[:3])
        raise UserError(f"weights file {path} has names such as {names}; expected {ACCEPTED}")
    if scheme.library == "Detectron":
        return _from_detectron(path, tensors)
    if not scheme.whole:
        tensors = {name: value for name, value in tensors.items() if not CLASSIFIER.fullmatch(name)}
    return Weights(path, tensors, scheme, str(scheme), **_traits(content, tensors, scheme))


def _traits(content: dict[str, Any], tensors: dict[str, Tensor], scheme: Scheme) -> dict[str, Any]:
    """What the file says of itself, else what is known of its kind."""
    recorded = content.get("pixels")
    from_imagenet = scheme == Scheme("torchvision", whole=False) or content.get("__author__") == "torchvision"
    stock_detector = "roi_heads.box_head.fc6.weight" in tensors and scheme.library == "torchvision"
    known = IMAGENET if from_imagenet or stock_detector else None
    return {
        "pixels": Pixels.from_dict(recorded) if isinstance(recorded, dict) and "format" in recorded else known,
        "fused_norm": content.get("fused_norm") is True,
        "stride_in_1x1": content.get("stride_in_1x1", False if from_imagenet else None),
    }


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
    tensors |= _statistics_of_nothing(tensors) if fused else {}
    return Weights(path, tensors, Scheme("detectron2", whole=False), "Detectron classifier", DETECTRON, fused)


def _statistics_of_nothing(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Running means of 0 and variances that give a scale of 1, for every norm."""
    scales = {name.removesuffix("weight"): value for name, value in named.items() if name.endswith("norm.weight")}
    means = {f"{norm}running_mean": torch.zeros_like(value) for norm, value in scales.items()}
    return means | {f"{norm}running_var": torch.full_like(value, 1 - EPSILON) for norm, value in scales.items()}
