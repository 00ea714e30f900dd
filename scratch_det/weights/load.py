"""Filling a model from a weights file, all of it or its backbone, so that nothing stays random unnoticed."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from scratch_det.config.choices import backbone_names, is_resnet
from scratch_det.errors import UserError, listed, quoted
from scratch_det.log import logger
from scratch_det.weights.classes import check_classes, with_new_classes
from scratch_det.weights.locate import fetch, split_part
from scratch_det.weights.names import BOTTOM_UP, BOX_HEAD, renamed
from scratch_det.weights.origin import Weights, read_weights
from scratch_det.weights.pixels import FAR, Pixels, adapt_first_layer, check_pixels, stated_pixels

Doubt = Callable[[str], object]  # takes a message on what a file does not say
VGG_FCS = {"classifier.0": "1", "classifier.3": "3"}  # become the box head's, after flattening (Ren et al. 2015)
DEEP_STEM = re.compile(r"(.*\.)?(conv1\.\d|stem\.conv3)\..*|conv3|stem")  # of several convolutions
BLOCK = re.compile(r"\b(?:layer|res)(\d)\.(\d+)\.(conv3)?")  # stage, block, and whether it is a bottleneck
SHALLOWEST_BOTTLENECKS = 50  # the ResNet


def load_weights(
    model: nn.Module,
    source: str | Path,
    library: str,
    cfg: CfgNode,
    image: Tensor | None = None,
    to_evaluate: bool = False,
    doubt: Doubt = logger.warning,
) -> str:
    """Fill ``model``, whose names are ``library``'s, from MODEL.WEIGHTS; returns what was loaded, one line.

    source: a file or an address, see ``locate.fetch``. A detector's weights have to be ``library``'s and cover the
    whole model; a classifier's have to cover the backbone. Otherwise raises UserError and does not change the model.
    The first layer is adapted to the pixels of ``cfg`` where it is known on which pixels it was trained. image: one to
    train on, [3, H, W] of grey values, to see whether those were the pixels, see ``check_pixels``; a file that says its
    pixels is believed. to_evaluate: it has to be a whole detector of the same classes. doubt: is called with what the
    file does not say, a message each.
    """
    bottom_up = getattr(model.backbone, "body", getattr(model.backbone, "bottom_up", model.backbone))
    registered = bottom_up if cfg.MODEL.BACKBONE.NAME in backbone_names() else None
    stated = stated_pixels(cfg)
    weights = read_weights(fetch(str(source)), registered, split_part(str(source))[1], stated)
    check_fits(weights, library, cfg, to_evaluate)
    for what in weights.unsaid:
        doubt(f"weights file {weights.path} does not say {what}")
    place = next(name for name, module in model.named_modules() if module is bottom_up)
    values, prefix, wanted, heads, notes = weights.tensors, "", model.state_dict(), "", []
    if weights.left_out:
        notes.append("left out " + listed([f"{name} ({count})" for name, count in weights.left_out.items()]))
    if not weights.is_detector:
        own, prefix = named_for_detector(weights, library), f"{place}."
        values = {name.replace(BOTTOM_UP[library], prefix): value for name, value in own.items()}
        if hasattr(model.roi_heads, "res5"):  # detectron2's models without a pyramid have the last stage there
            values = {name.replace(f"{prefix}res5.", "roi_heads.res5."): value for name, value in values.items()}
        fcs, own = ({name: one.shape for name, one in tensors.items() if name.startswith(BOX_HEAD)}
                    for tensors in (values, wanted))  # fmt: skip
        heads = " and the box head" if fcs else ""
        if fcs and fcs != own:
            values, heads = {name: value for name, value in values.items() if name not in fcs}, ""
            notes.append("VGG's fully connected layers do not fit the box head, which stays random")
    elif cfg.MODEL.get("WEIGHTS_NEW_CLASSES") and not to_evaluate:
        values, note = with_new_classes(weights, cfg.DATASETS.get("CLASS_NAMES", ()), wanted)
        notes.append(note)
    else:
        check_classes(weights, cfg.DATASETS.get("CLASS_NAMES", ()), to_evaluate)
    if weights.says_pixels and stated not in (None, weights.pixels):
        notes.append("MODEL.WEIGHTS_PIXELS does not count: the file says its pixels")
    covered, total = fill(model, values, prefix, weights)
    notes += see_pixels(bottom_up, values.get(f"{place}.{first_layer(bottom_up)}"), weights, cfg, image, doubt)
    part = f", the backbone{heads}, from a {weights.kind}" if prefix else ""
    part += f", {weights.prefix.rstrip('.')}" if weights.prefix not in ("", "model.", "state_dict.", "blobs.") else ""
    return "; ".join([f"{weights.path}: {covered} of {total} tensors loaded{part}", *notes])


def see_pixels(
    bottom_up: nn.Module, raw: Tensor | None, weights: Weights, cfg: CfgNode, image: Tensor | None, doubt: Doubt
) -> list[str]:
    """Adapt the first layer of a filled network to the recipe's pixels; returns what was done.

    raw: its weight in the file. Raises UserError as ``check_pixels`` does with ``image``.
    """
    notes, used, first = [], Pixels.of(cfg), first_layer(bottom_up)
    if raw is not None and weights.pixels:
        adapted, note = adapt_first_layer(raw, weights.pixels, used)
        with torch.no_grad():
            bottom_up.get_parameter(first).copy_(adapted)
        notes += [note] * bool(note)
        if (own := weights.pixels.reordered(used.format)).apart(used) > FAR:
            doubt(f"weights file {weights.path} was trained with MODEL.PIXEL_MEAN {list(own.mean)}: set it")
    elif weights.pixels and weights.pixels != used:
        notes.append(
            f"not adapted to the recipe's pixels ({used}): it was trained on other ones ({weights.pixels}), and the "
            "backbone does not name its first layer; state `first_layer` in the backbone"
        )
    if not (image is None or raw is None or weights.fused_norm or weights.says_pixels):
        seen = check_pixels(bottom_up, first, raw, image, weights.pixels or used, used, weights.path)
        if seen:
            doubt(seen)
    return notes


def check_fits(weights: Weights, library: str, cfg: CfgNode, to_evaluate: bool) -> None:
    """Raise UserError for another library's detector, and for another norm or stride, which names do not show.

    With ``to_evaluate`` also for a classifier.
    """
    if to_evaluate:
        require_detector(weights)
    if weights.is_detector and weights.library != library:
        raise UserError(
            f"weights file {weights.path} is a {weights.library} checkpoint, the backend is {library}; "
            f"convert it: scratch-det convert {quoted(weights.path)} converted.pth --to {library}\n"
            f"  or use --backend {weights.library}"
        )
    resnets, has = cfg.MODEL.RESNETS, f"weights file {weights.path} is a {weights.kind}"
    if weights.fused_norm and resnets.NORM != "FrozenBN":
        raise UserError(
            f"{has} with batch norm fused into scale and shift, which only FrozenBN can continue; MODEL.RESNETS.NORM "
            f"is {resnets.NORM!r}: choose weights that were trained with it"
        )
    in_1x1, bottlenecks = weights.stride_in_1x1, is_resnet(cfg) and resnets.DEPTH >= SHALLOWEST_BOTTLENECKS
    if bottlenecks and in_1x1 not in (None, resnets.STRIDE_IN_1X1):
        raise UserError(
            f"{has}, whose bottlenecks have their stride in the {'1x1' if in_1x1 else '3x3'} convolution, but "
            f"MODEL.RESNETS.STRIDE_IN_1X1 is {resnets.STRIDE_IN_1X1}; set it to {in_1x1}"
        )


def require_detector(weights: Weights) -> None:
    """Raise UserError for a backbone alone: the rest of its detector would be random."""
    if not weights.is_detector:
        raise UserError(
            f"weights file {weights.path} holds a {weights.kind}, which is a backbone, no detector; train one that "
            f"begins with it: scratch-det train --config-file FILE MODEL.WEIGHTS {quoted(weights.path)}"
        )


def first_layer(bottom_up: nn.Module) -> str:
    """The name of the weight that sees the pixels."""
    return getattr(bottom_up, "first_layer", "stem.conv1.weight")  # of detectron2's ResNets; other networks say it


def named_for_detector(weights: Weights, library: str) -> dict[str, Tensor]:
    """A classifier's weights by the names that they have in a detector of ``library``, as far as it has such layers."""
    source, full = weights.library or library, {}
    for name, value in weights.tensors.items():
        layer, _, leaf = name.rpartition(".")
        is_fc = weights.library and layer in VGG_FCS
        full[f"{BOX_HEAD}{VGG_FCS[layer]}.{leaf}" if is_fc else BOTTOM_UP[source] + name] = value
    if source != library:
        names = renamed(full, source, library)
        full = {names[name] or name: value for name, value in full.items()}
    return full


def depth_of(names: Iterable[str]) -> str:
    """A ResNet in words: its blocks in each stage, of 2 or 3 convolutions; empty for other networks."""
    found = {match.groups() for match in map(BLOCK.search, names) if match}
    counts = Counter(stage for stage, _ in sorted({groups[:2] for groups in found}))
    blocks, each = counts.values(), 3 if any(conv3 for _, _, conv3 in found) else 2
    depth, width = each * sum(blocks) + 2, {2: 64, 3: 256}[each]
    keys = f" (MODEL.RESNETS.DEPTH {depth}, RES2_OUT_CHANNELS {width})" if depth in (18, 34, 50, 101, 152) else ""
    return f"{', '.join(map(str, blocks))} of {each} convolutions{keys}" if blocks else ""


def fill(model: nn.Module, values: dict[str, Tensor], prefix: str, weights: Weights) -> tuple[int, int]:
    """Put ``values`` into ``model``: all tensors that begin with ``prefix``, with nothing left over.

    Returns how many tensors were filled and how many the model has. Raises UserError when a tensor is missing, left
    over or of another shape; batch norm's counter of batches may be missing or left over, as FrozenBN has none. A model
    on the meta device is compared only.
    """
    wanted, counter = model.state_dict(), ".num_batches_tracked"
    covered = [name for name in wanted if name.startswith(prefix) or name in values]
    missing = [name for name in covered if name not in values and not name.endswith(counter)]
    misshaped = [name for name in covered if name in values and values[name].shape != wanted[name].shape]
    unused = [name for name in values if name not in wanted and not name.endswith(counter)]
    if missing or misshaped or unused:
        problems = {"missing": missing, "of another shape": misshaped, "without a place": unused}
        reasons = [f"{len(names)} {what}, the first is {names[0]}" for what, names in problems.items() if names]
        for name in misshaped[:1]:
            shapes = f"{tuple(values[name].shape)} in the file, {tuple(wanted[name].shape)} in the model"
            reasons.append(f"{name} is {shapes}")
        there, here = depth_of(values), depth_of(covered)
        reasons += [f"blocks of the stages are {there} in the file, {here} in the model"] * (there != here)
        if weights.library and any(map(DEEP_STEM.fullmatch, [*values, *weights.left_out])):
            reasons.append("its stem has several convolutions (ResNet-C, -D or CLIP's), which no recipe here has")
        norms = [any(name.endswith("running_mean") for name in names) for names in (unused, wanted)]
        is_stock = weights.is_detector and weights.library == "torchvision" and not weights.says_pixels
        raise UserError(
            f"weights file {weights.path} ({weights.kind}) does not fit the {len(covered)} tensors of "
            f"{'the backbone' if prefix else 'the model'}: {'; '.join(reasons)}\n"
            "  MODEL.WEIGHTS has to come from the same MODEL.* keys (norm, depth, widths, classes)"
            + "; these are BN's: set MODEL.RESNETS.NORM FrozenBN, BN or SyncBN" * (norms == [True, False])
            + "; torchvision's own detectors have their recipes in configs/Torchvision" * is_stock
            + "; train other keypoints with MODEL.WEIGHTS_NEW_CLASSES True" * any(".keypoint" in n for n in misshaped)
        )
    if not any(parameter.is_meta for parameter in model.parameters()):
        model.load_state_dict({name: values[name] for name in covered if name in values}, strict=False)
    return len(covered), len(wanted)
