"""Filling a model from a weights file, all of it or its backbone, so that nothing stays random unnoticed.

``to_cascade`` makes the weights of a cascade from those of a detector with one box head.
"""

from pathlib import Path

from fvcore.common.config import CfgNode
from torch import Tensor, nn

from scratch_det.config.choices import is_resnet
from scratch_det.errors import UserError
from scratch_det.weights.locate import fetch
from scratch_det.weights.names import BOTTOM_UP, BOX_HEAD, OF_BOTTOM_UP, in_stage, renamed, stage_of
from scratch_det.weights.read import Pixels, Weights, adapt_first_layer, read_weights

FIRST_LAYERS = {"torchvision": "conv1.weight", "detectron2": "stem.conv1.weight"}  # of a ResNet
BOX_PREDICTOR = "roi_heads.box_predictor."
VGG_LAYERS = {  # become the box head's (Faster R-CNN, Ren et al. 2015)
    "torchvision": {"classifier.0": "1", "classifier.3": "3"},  # after flattening
    "detectron2": {"classifier.0": "fc1", "classifier.3": "fc2"},
}
BACKGROUND_SLOT = {"torchvision": 1, "detectron2": 0}  # torchvision regresses a box for the background too
SHALLOWEST_BOTTLENECKS = 50  # the ResNet
C4_HEAD = "roi_heads.res5."  # where detectron2's models without a pyramid have the last stage


def load_weights(model: nn.Module, source: str | Path, library: str, cfg: CfgNode) -> str:
    """Fill ``model``, whose names are ``library``'s, from MODEL.WEIGHTS; returns what was loaded, one line.

    source: a file or an address, see ``locate.fetch``. A detector's weights have to be ``library``'s and cover the
    whole model; a classifier's have to cover the backbone. Otherwise raises UserError and does not change the model.
    """
    bottom_up = getattr(model.backbone, "body", getattr(model.backbone, "bottom_up", None))
    weights = read_weights(fetch(str(source)), bottom_up)
    check_fits(weights, library, cfg)
    values, prefix = weights.tensors, ""
    if not weights.scheme.whole:
        values, prefix = placed_in(model, named_for_detector(weights, library), library)
    wanted, said = model.state_dict(), []
    heads = [name for name in values if prefix and name.startswith(BOX_HEAD)]
    if any(name not in wanted or wanted[name].shape != values[name].shape for name in heads):
        values = {name: value for name, value in values.items() if name not in heads}
        said, heads = ["VGG's fully connected layers do not fit the box head, which stays random"], []
    own = [bottom_up.first_layer] if weights.scheme == OF_BOTTOM_UP else []
    firsts = (FIRST_LAYERS[library], "features.0.weight", *own)
    first = next((name for name in wanted if name.endswith(firsts)), "")
    if weights.pixels and first in values:
        adapted, done = adapt_first_layer(values[first], weights.pixels, Pixels.of(cfg))
        values, said = {**values, first: adapted}, [*said, *[done] * bool(done)]
    elif prefix:
        said += ["the file does not say which pixels it was trained on: the recipe's are assumed"]
    covered, total = fill(model, values, prefix, weights)
    part = f", the backbone{' and the box head' if heads else ''}, from a {weights.kind}" if prefix else ""
    return "; ".join([f"{weights.path}: {covered} of {total} tensors loaded{part}", *said])


def check_fits(weights: Weights, library: str, cfg: CfgNode) -> None:
    """Raise UserError for another library's detector, and for another norm or stride, which names do not show."""
    if weights.scheme.whole and weights.scheme.library != library:
        raise UserError(
            f"weights file {weights.path} is a {weights.scheme.library} checkpoint, the backend is {library}; "
            f"convert it: python tools/convert_checkpoint.py {weights.path} converted.pth --to {library}\n"
            f"  or use --backend {weights.scheme.library}"
        )
    resnets, has = cfg.MODEL.RESNETS, f"weights file {weights.path} is a {weights.kind}"
    if weights.fused_norm and resnets.NORM != "FrozenBN":
        raise UserError(
            f"{has} with batch norm fused into scale and shift, which only FrozenBN can continue; MODEL.RESNETS.NORM "
            f"is {resnets.NORM!r}: choose weights that were trained with it"
        )
    bottlenecks = is_resnet(cfg) and resnets.DEPTH >= SHALLOWEST_BOTTLENECKS
    known = weights.stride_in_1x1 is not None and bottlenecks
    if known and weights.stride_in_1x1 != resnets.STRIDE_IN_1X1:
        raise UserError(
            f"{has}, whose bottlenecks have their stride in the {'1x1' if weights.stride_in_1x1 else '3x3'} "
            f"convolution, but MODEL.RESNETS.STRIDE_IN_1X1 is {resnets.STRIDE_IN_1X1}; set it to "
            f"{weights.stride_in_1x1}"
        )


def named_for_detector(weights: Weights, library: str) -> dict[str, Tensor]:
    """A classifier's weights by the names that they have in a detector of ``library``, as far as it has such layers."""
    if weights.scheme == OF_BOTTOM_UP:
        return {BOTTOM_UP[library] + name: value for name, value in weights.tensors.items()}
    source, full, fcs = weights.scheme.library, {}, {}
    for name, value in weights.tensors.items():
        layer, _, leaf = name.rpartition(".")
        if layer in VGG_LAYERS[library]:
            fcs[f"{BOX_HEAD}{VGG_LAYERS[library][layer]}.{leaf}"] = value
        else:
            full[BOTTOM_UP[source] + name] = value
    if source != library:
        names = renamed(full, source, library)
        full = {names[name] or name: value for name, value in full.items()}
    return full | fcs


def placed_in(model: nn.Module, values: dict[str, Tensor], library: str) -> tuple[dict[str, Tensor], str]:
    """A backbone's weights by the names that they have in ``model``, and what all names of its backbone begin with."""
    names, prefix = model.state_dict().keys(), BOTTOM_UP[library]
    if any(name.startswith(prefix) for name in names):
        return values, prefix
    placed = {}
    for name, value in values.items():  # detectron2's, without a pyramid around it
        places = (name.replace(prefix + "res5.", C4_HEAD), name.replace(prefix, "backbone."))
        placed[next((place for place in places if place in names), name)] = value
    return placed, "backbone."


def fill(model: nn.Module, values: dict[str, Tensor], prefix: str, weights: Weights) -> tuple[int, int]:
    """Put ``values`` into ``model``: all tensors that begin with ``prefix``, with nothing left over.

    Returns how many tensors were filled and how many the model has. Raises UserError unless that works out; batch
    norm's counter of batches may be missing or left over, as FrozenBN has none. A model on the meta device is compared
    only.
    """
    wanted = model.state_dict()
    covered = [name for name in wanted if name.startswith(prefix) or name in values]
    counter = ".num_batches_tracked"
    missing = [name for name in covered if name not in values and not name.endswith(counter)]
    misshaped = [name for name in covered if name in values and values[name].shape != wanted[name].shape]
    unused = [name for name in values if name not in wanted and not name.endswith(counter)]
    if missing or misshaped or unused:
        problems = {"missing": missing, "of another shape": misshaped, "without a place": unused}
        reasons = [f"{len(names)} {what}, the first is {names[0]}" for what, names in problems.items() if names]
        of_bn = any(name.endswith("running_mean") for name in unused)
        raise UserError(
            f"weights file {weights.path} ({weights.kind}) covers {len(covered) - len(missing) - len(misshaped)} of "
            f"{len(covered)} tensors of {'the backbone' if prefix else 'the model'}: {'; '.join(reasons)}\n"
            "  MODEL.WEIGHTS has to come from the same MODEL.* keys (norm, depth, widths, classes)"
            + ("; these are BN's, which FrozenBN, BN and SyncBN continue" if of_bn else "")
        )
    if not any(parameter.is_meta for parameter in model.parameters()):
        model.load_state_dict({name: values[name] for name in covered if name in values}, strict=False)
    return len(covered), len(wanted)


def to_cascade(tensors: dict[str, Tensor], library: str, stages: int) -> dict[str, Tensor]:
    """The weights of a cascade of ``stages`` that begins as the plain detector of ``tensors``; names are ``library``'s.

    Every stage gets the plain box head, its class layer and, for the one box that it regresses, the mean of the plain
    layer over the classes; all else stays. A stage that starts from refined boxes moves them less, as its own weights
    (ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS) divide what it predicts. Raises UserError when it is a cascade already.
    """
    if any(stage_of(name) for name in tensors):
        raise UserError("it is a cascade already; continue it with --branch-from")
    cascade = {}
    for name, tensor in tensors.items():
        if name.startswith(f"{BOX_PREDICTOR}bbox_pred."):
            tensor = tensor.unflatten(0, (-1, 4))[BACKGROUND_SLOT[library] :].mean(0)
        of_stages = name.startswith((BOX_HEAD, BOX_PREDICTOR))
        cascade |= (
            {in_stage(name, str(k), library): tensor.clone() for k in range(stages)} if of_stages else {name: tensor}
        )
    return cascade
