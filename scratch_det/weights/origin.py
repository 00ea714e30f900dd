"""What a weights file is: whose names its tensors have, and the pixels, norm and stride they were trained with."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scratch_det.config.choices import PIXELS
from scratch_det.errors import UserError, listed, quoted
from scratch_det.weights.classes import BY_ID, COCO, ROWS, num_classes, reordered, without_unused
from scratch_det.weights.names import BOTTOM_UP, from_caffe2, from_stock, in_torchvision
from scratch_det.weights.networks import Network, networks_in, tensors_by_name
from scratch_det.weights.pixels import DETECTRON, IMAGENET, Pixels
from scratch_det.weights.read import described, read_checkpoint, require_numbers

NO_WEIGHTS = re.compile(r"(.*\.)?(pixel_(mean|std)|anchor_generator\.cell_anchors\.\d+)")  # of old detectron2
BODY = {  # layers of a classifier that a detector has a use for; VGG's fully connected ones become its box head
    "torchvision": re.compile(r"(conv1|bn1|layer\d|features|classifier\.[03])\..*"),
    "detectron2": re.compile(r"(stem\.conv\d|res\d)\..*"),
}
AUTHORS = (  # as converted files for detectron2 name them: those whose pixels and stride are torchvision's
    "torchvision", "MOCO", "OpenSelfSup", "MMSelfSup", "solo-learn", "PixPro", "https://github.com/keyu-tian/SparK",
    "Yonglong", "Yue", "Karan Desai",  # InfoMin, SoCo, VirTex
)  # fmt: skip
ZOO = "Detectron2 Model Zoo"  # the same of detectron2's own models
STOCK_ONLY = {"roi_heads.box_head.fc6.weight", "rpn.head.conv.1.0.weight"}  # of torchvision's detectors, v1 and v2
CAFFE2_LEFTOVERS = re.compile(r".*_momentum|(pred|fc1000|kps_score)_[wb]|lr|model_iter|weight_order")
PARTS = ("backbone.", "proposal_generator.", "roi_heads.")  # of a detector of detectron2's
EXPECTED = (
    "expected a checkpoint of this repository, or under any prefix an ImageNet ResNet by torchvision's or detectron2's "
    "or transformers' names, torchvision's VGG-16, one of Detectron's (.pkl), or a model of detectron2's; networks of "
    "timm, such as ConvNeXt and EfficientNet, need --project projects/timm_backbones and a recipe of it"
)
OPENMMLAB = re.compile(  # in a recipe's text; a single number as mean is that of an initialisation
    r"\b(?:bgr_)?(mean|std|to_rgb|style)'?\s*[=:]\s*(True|False|'\w+'|[\[(][^])]*)"
)
AVERAGE = "model_ema"  # the moving average of the weights in a checkpoint, beside its "model"; torchvision's word, too
MOST_NAMED = 8  # networks of a file
EPSILON = 1e-5  # of batch norm, which Detectron's AffineChannel lacks: a variance of 1 - EPSILON gives a scale of 1


@dataclass(frozen=True)
class Weights:
    """A file's tensors by the names of ``library``, without a classifier's last layer.

    library: torchvision or detectron2; "" where the names are those of the bottom-up network itself, in both.
    is_detector: a whole detector, else a classifier, whose names are the bottom-up network's without their prefix.
    pixels: those it was trained on, None when nobody says so. says_pixels: whether the file does.
    fused_norm: batch norm is folded into scale and shift, without statistics of its own.
    stride_in_1x1: which convolution of its bottlenecks has the stride; None when the file does not say.
    trained_by: another library than ``library``, whose names have been translated.
    classes: a detector's, by name, in the order of its labels; empty when the file does not name them.
    prefix: what the names have in the file before them. left_out: how many tensors of which layers are of no use.
    """

    path: Path
    tensors: dict[str, Tensor]
    library: str
    is_detector: bool
    pixels: Pixels | None = None
    says_pixels: bool = False
    fused_norm: bool = False
    stride_in_1x1: bool | None = None
    trained_by: str = ""
    classes: tuple[str, ...] = ()
    prefix: str = ""
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """What the file is, in words."""
        either = "torchvision or timm" if self.library == "torchvision" and not self.is_detector else self.library
        return f"{self.trained_by or either} {'detector' if self.is_detector else 'classifier'}".strip()

    @property
    def unsaid(self) -> list[str]:
        """What neither the file nor anybody says of it, in words, and what counts then."""
        pixels = f"which pixels it was trained on: state them, MODEL.WEIGHTS_PIXELS {' or '.join(PIXELS)}, or recipe, "
        stride = "which convolution of a bottleneck has the stride: it is the recipe's MODEL.RESNETS.STRIDE_IN_1X1"
        is_own = self.is_detector and self.says_pixels
        asks_stride = self.stride_in_1x1 is None and not is_own and any(".conv3." in name for name in self.tensors)
        return [f"{pixels}which is assumed"] * (self.pixels is None) + [stride] * asks_stride

    def traits(self) -> dict[str, Any]:
        """What a file has to hold beside these tensors so that ``read_weights`` knows as much of them."""
        found = {"pixels": self.pixels and self.pixels.as_dict(), "fused_norm": self.fused_norm or None}
        found |= {"stride_in_1x1": self.stride_in_1x1, "classes": list(self.classes) or None}
        return {key: value for key, value in found.items() if value is not None}


def read_weights(path: Path, bottom_up: Any = None, part: str = "", stated: Pixels | None = None) -> Weights:
    """Read the network that a file holds. Raises UserError where it holds none that is known, or several.

    bottom_up: the model's network, see ``scratch_det.modeling.backbones``, where it may be no ResNet; a classifier with
    its names is accepted too. part: of the network's prefix, where the file holds several networks. stated: the pixels
    of a file that does not say them, in the place of those that are known of its kind; then the stride is not known.
    Detectron's names become those of detectron2, and fused batch norm gets statistics that change nothing.
    """
    content = read_checkpoint(path, foreign=True)
    named = getattr(bottom_up, "own_name", str)
    whole = {named(name): value for name, value in tensors_by_name(content).items() if not NO_WEIGHTS.fullmatch(name)}
    prefix, library, is_detector, lacks = _chosen(path, content, networks_in(whole, bottom_up), part)
    tensors = {name.removeprefix(prefix): value for name, value in whole.items() if name.startswith(prefix)}
    left_out: Counter[str] = Counter()
    recipe = _recipe_of_openmmlab(content)
    if library == "RESNETS":
        tensors, library = {in_torchvision(name): value for name, value in tensors.items()}, "torchvision"
    if library != "Detectron" and not is_detector:
        tops = {name.removeprefix(lacks).split(".")[0] for name in bottom_up.state_dict()} if not library else set()
        used = {name: BODY[library].fullmatch(name) if library else name.split(".")[0] in tops for name in tensors}
        left_out = Counter(name.split(".")[0] for name in tensors if not used[name])
        tensors = {lacks + name: value for name, value in tensors.items() if used[name]}
    # of what is beside the network, the name up to where it leaves its prefix
    place, apart = prefix.split("."), [name.split(".") for name in whole if not name.startswith(prefix)]
    left_out += Counter(".".join(part for i, part in enumerate(one) if one[:i] == place[:i]) for one in apart)
    require_numbers(tensors, f"weights file {path}")
    if library == "Detectron":
        return _from_detectron(path, tensors, stated)
    recorded, author = content.get("pixels", recipe.get("pixels")), content.get("__author__")
    folded = library == "torchvision" and "pixels" not in content and _is_folded(tensors)
    is_stock = library == "torchvision" and recorded is None and bool(STOCK_ONLY & tensors.keys())
    tensors = _from_torchvision(tensors) if is_stock else tensors
    is_cocos = (is_stock or author == ZOO) and num_classes(tensors) == len(COCO)
    names = content.get("classes", COCO if is_cocos else ())
    is_torchvisions = library == "torchvision" and (is_stock or not is_detector)
    from_imagenet = (is_torchvisions and not folded) or author in AUTHORS
    known = (IMAGENET if from_imagenet else None) if library else getattr(bottom_up, "pixels", None)
    is_as_known = from_imagenet and stated in (None, IMAGENET)
    return Weights(
        path, tensors, library, is_detector,
        pixels=(stated or known) if recorded is None else Pixels.read(recorded, path),
        says_pixels=recorded is not None,
        fused_norm=folded or content.get("fused_norm") is True,
        stride_in_1x1=content.get("stride_in_1x1", recipe.get("stride_in_1x1", False if is_as_known else None)),
        trained_by="mmdetection or mmpretrain" if recipe else "",
        classes=tuple(map(str, names)) if isinstance(names, list | tuple) and is_detector else (),
        prefix=prefix, left_out=left_out,
    )  # fmt: skip


def _chosen(path: Path, content: dict[str, Any], found: list[Network], part: str) -> Network:
    """The one of ``found`` whose prefix is ``part`` or has this part, or the only one; "." stands for no prefix.

    Of a model and its average it is the model.
    """
    named = {network.prefix.rstrip(".") or ".": network for network in found}
    part = part or "model" * (named.keys() == {"model", AVERAGE})
    chosen = [network for name, network in named.items() if part == name]
    chosen = chosen or [network for network in found if not part or f".{part}." in f".{network.prefix}"]
    if len(chosen) == 1:
        return chosen[0]
    if not found:
        there = listed([f"{key}: {described(value)}" for key, value in content.items()], separator="; ") or "nothing"
        raise UserError(f"weights file {path} holds no network that is known, but {there}; {EXPECTED}")
    if part == AVERAGE and not chosen:
        raise UserError(f"{path} has no average of the weights: it was trained without MODEL_EMA; leave out #{AVERAGE}")
    raise UserError(
        f"weights file {path} holds {len(found)} network{'s' * (len(found) > 1)}: {listed(list(named), MOST_NAMED)}; "
        + (f"'{part}' is a whole part, between dots, of {len(chosen)} names; " if part else "")
        + f"name one: MODEL.WEIGHTS {quoted(f'{path}#{max(named, key=len)}')}"
    )


def _is_folded(tensors: Mapping[str, Tensor]) -> bool:
    """Whether batch norm is all in its scale and shift, as in the caffe ResNets that were converted for OpenMMLab."""
    leaves = ("running_mean", "running_var", "weight")
    mean, var, scale = (tensors.get(f"bn1.{leaf}", torch.ones(1)) for leaf in leaves)
    return not mean.any() and bool(var.min() == var.max() and scale.min() != scale.max())


def _recipe_of_openmmlab(content: Mapping[str, Any]) -> dict[str, Any]:
    """Pixels and stride of the recipe that checkpoints of OpenMMLab's projects carry as a text; empty for others."""
    meta = content.get("meta")
    text = str(meta.get("cfg", meta.get("config"))) if isinstance(meta, dict) else ""  # the latter before MMEngine
    found = dict(reversed(OPENMMLAB.findall(text)))  # the first counts
    if not {"mean", "std", "to_rgb"} <= found.keys():
        return {}
    mean, std = ([float(number) for number in re.findall(r"\d+\.?\d*", found[key])] for key in ("mean", "std"))
    pixels = {"format": "RGB" if found["to_rgb"] == "True" else "BGR", "mean": mean, "std": std}
    return {"pixels": pixels, "stride_in_1x1": "caffe" in found.get("style", "")}


def _from_torchvision(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's own detector by the names here, for COCO's 80 classes where it has an output for each id.

    Its FrozenBN (v1) adds nothing to the variance, which is at times as good as 0: there the weight takes it in.
    """
    named = {from_stock(name): value for name, value in tensors.items()}
    is_frozen = not any(name.endswith("num_batches_tracked") for name in named)
    for name in [name for name in named if is_frozen and name.endswith("running_var")]:
        weight, var = name.replace("running_var", "weight"), named[name].double()
        new = torch.where(var > EPSILON, var, 1) - EPSILON
        named[weight] = (named[weight] * ((new + EPSILON) / var).sqrt()).float()
        named[name] = new.float()
    return without_unused(named) if num_classes(named) == len(BY_ID) - 1 else named


def _from_detectron(path: Path, blobs: dict[str, Tensor], stated: Pixels | None) -> Weights:
    """The tensors by detectron2's names, without biases of convolutions before a norm, which has its own.

    Of a detector, the background's class comes last and has neither box nor mask, as in detectron2. Raises UserError
    for layers that no detector here has.
    """
    names = {blob: from_caffe2(blob) for blob in blobs if not CAFFE2_LEFTOVERS.fullmatch(blob)}
    if unknown := [blob for blob, name in names.items() if not name]:
        raise UserError(
            f"weights file {path} is one of Detectron's with {len(unknown)} blobs that no ResNet and no Faster, Mask "
            f"or Keypoint R-CNN has, such as {unknown[0]}; expected one of these"
        )
    named = {str(name): blobs[blob] for blob, name in names.items()}
    is_detector = any(name.startswith("proposal_generator.") for name in named)
    if is_detector:
        named = {n if n.startswith(PARTS) else BOTTOM_UP["detectron2"] + n: value for n, value in named.items()}
    for name, layer in ((name, name.rpartition(".")[0]) for name in named):
        if layer in ROWS:
            named[name] = reordered(layer, named[name], "Detectron", "detectron2")
    tensors = {n: v for n, v in named.items() if f"{n.removesuffix('.bias')}.norm.weight" not in named}
    fused = any(blob.endswith("_bn_s") for blob in blobs) and not any(n.endswith("running_var") for n in tensors)
    for name in [name for name in tensors if fused and name.endswith("norm.weight")]:  # statistics that change nothing
        tensors[name.replace("weight", "running_mean")] = torch.zeros_like(tensors[name])
        tensors[name.replace("weight", "running_var")] = torch.full_like(tensors[name], 1 - EPSILON)
    # Only MSRA's have the stride in the 1x1. detectron2's X-101-32x8d was trained on other pixels than Detectron's.
    is_plain = all(len(v) == v.shape[1] for n, v in tensors.items() if n.endswith("res2.0.conv2.weight"))
    pixels = stated or (DETECTRON if is_plain or is_detector else None)
    stride = fused and is_plain if stated in (None, DETECTRON) else None
    names = COCO if num_classes(tensors) == len(COCO) else ()
    return Weights(path, tensors, "detectron2", is_detector, pixels, False, fused, stride, "Detectron", names)
