"""Renaming a detector's or backbone's weights for the other library, and what found no name there."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scratch_det.errors import UserError
from scratch_det.weights.load import named_for_detector
from scratch_det.weights.names import BOTTOM_UP, renamed, stage_of, without_stage
from scratch_det.weights.read import Pixels, Weights

BACKGROUND = {  # torchvision's layers with a slot for the background, by detectron2's names: numbers a slot takes
    "roi_heads.box_predictor.cls_score": 1,  # first there, last in detectron2
    "roi_heads.box_predictor.bbox_pred": 4,  # first there, none in detectron2: never trained, never used
    "roi_heads.mask_head.predictor": 1,  # the same
}
KEPT_BY_DETECTRON2 = "roi_heads.box_predictor.cls_score"
SCORES = f"{KEPT_BY_DETECTRON2}.weight"


@dataclass(frozen=True)
class Converted:
    """Tensors by their new names; how many of each module's found a name, and which did not."""

    tensors: dict[str, Tensor]
    found: Counter[str]
    total: Counter[str]
    lost: list[str]

    def describe(self) -> str:
        """A line for each module of the source."""
        width = max(map(len, self.total))
        return "\n".join(f"  {module:<{width}}  {self.found[module]:4d} of {n:4d}" for module, n in self.total.items())


def convert(weights: Weights, to: str, own_names: bool = False) -> Converted:
    """``weights`` in the names of ``to``, "torchvision" or "detectron2"; own_names as in ``renamed``.

    Raises UserError when they have them.
    """
    source = weights.scheme.library
    if source == to:
        raise UserError(f"{weights.path} is a {weights.kind} already; MODEL.WEIGHTS takes it as it is")
    if not weights.scheme.whole:
        full = named_for_detector(weights, to)
        kept = {
            name.removeprefix(BOTTOM_UP[to]): value for name, value in full.items() if name.startswith(BOTTOM_UP[to])
        }
        lost = [name for name in full if not name.startswith(BOTTOM_UP[to])]
        total = Counter({"backbone": len(full)})
        return Converted(kept, Counter({"backbone": len(kept)}), total, lost)
    names = renamed(weights.tensors, source, to, own_names)
    check_classes(weights, names)
    tensors = {
        new: _with_slots(names, name, value, to) for name, value in weights.tensors.items() if (new := names[name])
    }
    found = Counter(module_of(name) for name in names if names[name])
    return Converted(
        tensors, found, Counter(map(module_of, names)), [name for name, new in names.items() if new is None]
    )


def check_classes(weights: Weights, names: dict[str, str | None]) -> None:
    """Raise UserError for boxes or masks that are not predicted for each class, which torchvision's always are.

    But in a cascade, whose boxes never are.
    """
    classes, own = num_classes(weights), weights.scheme.library == "torchvision"
    for name, new in names.items():
        layer, _, leaf = ((new or "") if own else name).rpartition(".")
        if stage_of(name) and layer.endswith("bbox_pred"):
            continue
        if layer in BACKGROUND and layer != KEPT_BY_DETECTRON2 and classes is not None and leaf == "weight":
            rows, expected = len(weights.tensors[name]), BACKGROUND[layer] * (classes + own)
            if rows != expected:
                raise UserError(
                    f"{weights.path}: {name} has {rows} outputs, expected {expected} for {classes} classes; a detector "
                    "with CLS_AGNOSTIC_BBOX_REG or CLS_AGNOSTIC_MASK has no counterpart to be converted to"
                )


def checkpoint_of(converted: Converted, weights: Weights, recipe: Pixels | None, digest: str) -> dict[str, Any]:
    """What the new file holds; detectron2 finds a backbone's place by ``matching_heuristics``.

    recipe: the recipe's pixels, which are a detector's own unless its file says otherwise.
    """
    own = {"pixels": recipe.as_dict()} if recipe and weights.scheme.whole else {}
    return {
        "model": converted.tensors,
        "converted_from": {"file": weights.path.name, "sha256": digest, "kind": weights.kind},
        **own,
        **weights.traits(),
        **({} if weights.scheme.whole else {"matching_heuristics": True}),
    }


def num_classes(weights: Weights) -> int | None:
    """Classes without background, from the class scores; None for a backbone."""
    scores = (value for name, value in weights.tensors.items() if without_stage(name) == SCORES)
    return next((len(value) - 1 for value in scores), None)


def num_keypoints(weights: Weights) -> int | None:
    """Heat maps of the keypoint head, if there is one, in either library's names."""
    names = [f"roi_heads.{name}.bias" for name in ("keypoint_predictor.kps_score_lowres", "keypoint_head.score_lowres")]
    return next((len(weights.tensors[name]) for name in names if name in weights.tensors), None)


def module_of(name: str) -> str:
    """backbone.body, roi_heads.box_head, ...; the levels of a pyramid count as one."""
    module = ".".join(name.split(".")[:2])
    return "backbone.fpn" if module.startswith("backbone.fpn") else module


def _with_slots(names: dict[str, str | None], name: str, value: Tensor, to: str) -> Tensor:
    """Move, drop or add the background's slot of a layer that has one."""
    theirs = without_stage(name if to == "torchvision" else names[name] or "").rpartition(".")[0]
    size = BACKGROUND.get(theirs)
    if size is None or (stage_of(name) and theirs != KEPT_BY_DETECTRON2):
        return value
    if theirs == KEPT_BY_DETECTRON2:
        return value.roll(1 if to == "torchvision" else -1, 0)
    if to == "detectron2":
        return value[size:].clone()
    return torch.cat([value.new_zeros((size, *value.shape[1:])), value])
