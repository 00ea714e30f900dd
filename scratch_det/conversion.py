"""Converting a weights file between the backends, and whether two models see the same in an image."""

import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from fvcore.common.config import CfgNode
from hotcoco import mask as mask_api

from scratch_det import backends
from scratch_det.config.choices import backbone_names
from scratch_det.data.dataset import load_sample
from scratch_det.data.transforms import to_test_size
from scratch_det.detector import built, located, recipe_of
from scratch_det.engine.checkpointer import write_synced
from scratch_det.errors import ConfigError, UserError
from scratch_det.evaluation.inference import pasted
from scratch_det.files import sha256_of
from scratch_det.weights.convert import convert
from scratch_det.weights.origin import Weights, read_weights
from scratch_det.weights.pixels import Pixels

MODULE = re.compile(r"backbone\.fpn|[^.]+(\.[^.]+)?")  # roi_heads.box_head, ...; the levels of a pyramid count as one
MOST = 20  # detections of an image that are compared, the highest scores
SAME_BOX, SAME_SCORE, SAME_MASK = 0.5, 1e-3, 0.9  # pixels of the original image, score, IoU
SAME_POINTS = 0.9  # of the keypoints are as near as SAME_BOX: two peaks of a heat map may be equally high


class Agreement(NamedTuple):
    """Whether two models detect the same in an image, and how far their detections are apart, in words."""

    holds: bool
    text: str


def agreement(one: dict[str, Any], other: dict[str, Any]) -> Agreement:
    """Compare the predictions of two models for one image (see ``scratch_det.backends``), MOST at most.

    They agree if there are any, equally many, of the same classes, and pairs in the order of their scores are no
    further apart than SAME_BOX and so on. Where scores are closer than SAME_SCORE the order says nothing, so each
    detection is paired with the nearest box among those.
    """
    found = [min(len(side["scores"]), MOST) for side in (one, other)]
    first, second, free = list(range(min(found))), [], list(range(len(other["scores"])))
    for place in first:
        near = [i for i in free if abs(other["scores"][i] - one["scores"][place]) <= SAME_SCORE] or free[:1]
        apart = (other["boxes"][near] - one["boxes"][place]).abs().amax(1)
        wrong_class = other["labels"][near] != one["labels"][place]
        second.append(near[int((apart + wrong_class * 1e6).argmin())])
        free.remove(second[-1])
    text = f"{found[0]} and {found[1]} detections"
    if not second:
        return Agreement(False, text)
    classes = int((one["labels"][first] == other["labels"][second]).sum())
    box, score = ((one[key][first] - other[key][second]).abs().max().item() for key in ("boxes", "scores"))
    text += f": {classes} of the same class, boxes apart by up to {box:.2g} px, scores by {score:.2g}"
    holds = found[0] == found[1] == classes and box <= SAME_BOX and score <= SAME_SCORE
    if "masks" in one:
        masks = [[one["masks"][i], other["masks"][j]] for i, j in zip(first, second, strict=True)]
        iou = min(mask_api.iou([a], [b], [0]).item() if any(mask_api.area([a, b])) else 1.0 for a, b in masks)
        text, holds = f"{text}, masks' IoU at least {iou:.4f}", holds and iou >= SAME_MASK
    if "keypoints" in one:  # [N, K, 3]
        distances = (one["keypoints"][first] - other["keypoints"][second])[..., :2].norm(dim=-1)
        near_points = (distances <= SAME_BOX).float().mean().item()
        text += f", {near_points:.1%} of the keypoints at most {SAME_BOX} px"
        holds = holds and near_points >= SAME_POINTS
    return Agreement(holds, text)


def convert_file(
    source: str,
    destination: Path,
    to: str,
    config: Path | None = None,
    partial: bool = False,
    image: Path | None = None,
) -> None:
    """Write ``source``, a run's folder, a file or an address, to ``destination`` with names of backend ``to``.

    config: the recipe, by default the config.yaml of the run that ``source`` lies in. With it the result has to fill a
    model of backend ``to`` where that is installed, and pixel statistics are recorded. partial: leave out weights
    without a place. image: predict it before and after, with both backends, and compare.
    Raises UserError, with nothing written, when weights have no place, the model is not filled, or the two disagree.
    """
    if destination.suffix not in (".pth", ".pt"):
        raise UserError(f"{destination}: the result is a file of torch.save; name it .pth")
    if destination.exists():
        raise UserError(f"{destination} exists; name another file, or remove it first")
    path, part = located(source)
    weights = read_weights(path, part=part)
    cfg = recipe_of(path, config, weights)
    tensors, names = convert(weights, to, own_names=bool(cfg and cfg.MODEL.BACKBONE.NAME in backbone_names()))
    print(f"{path}: {weights.kind}; {len(tensors)} of {len(weights.tensors)} tensors have a place:")
    modules = {name: str(MODULE.search(name if weights.is_detector else "backbone")[0]) for name in names}
    found, width = Counter(modules[name] for name in names if names[name]), max(map(len, modules.values()))
    for module, number in Counter(modules.values()).items():
        print(f"  {module:<{width}}  {found[module]:4d} of {number:4d}")
    lost = [name for name, new in names.items() if new is None]
    if lost and not partial:
        raise UserError(
            f"{len(lost)} tensors of {path} have no place in a {to} model, the first is {lost[0]}; "
            f"use --backend {weights.library}, or give --partial to leave them out"
        )
    content = {"model": tensors, "converted_from": {"file": path.name, "sha256": sha256_of(path), "kind": weights.kind}}
    if not weights.is_detector:
        content["matching_heuristics"] = True  # by which detectron2 finds a backbone's place
    elif cfg:
        content["pixels"] = Pixels.of(cfg).as_dict()  # a detector's own, unless its file says otherwise
    destination.parent.mkdir(parents=True, exist_ok=True)
    trial = destination.with_name(destination.name + ".partial.pth")
    try:
        write_synced(trial, content | weights.traits())
        print(check_result(trial, to, cfg, weights))
        if image:
            print(f"{image}: {verify(f'{path}#{part}' if part else str(path), trial, weights, to, cfg, image)}")
        trial.replace(destination)
    finally:
        trial.unlink(missing_ok=True)
    print(f"wrote {destination}; use it with --backend {to} MODEL.WEIGHTS {destination}")


def check_result(file: Path, to: str, cfg: CfgNode | None, weights: Weights) -> str:
    """Load the new file into a model of backend ``to`` where both exist; returns whether that was done, as a line.

    Raises UserError when it does not fit.
    """
    if not cfg:
        return f"not loaded into a model: no --config-file, and {weights.path} lies in no run's folder"
    if not backends.is_installed(to):
        return f"not loaded into a model: {to} is not installed here"
    try:
        backends.check_keys(to, cfg)
    except ConfigError as problem:
        return f"not loaded into a model: {problem}"
    try:
        built(file, to, cfg)
    except UserError as error:
        problem = str(error).replace(str(file), f"converted from {weights.path}")
        raise UserError(f"nothing was written: {problem}") from None
    return f"it fills {'a' if weights.is_detector else 'the backbone of a'} {backends.library(to)} model of the recipe"


def verify(source: str, file: Path, weights: Weights, to: str, cfg: CfgNode | None, image: Path) -> str:
    """Compare what the two models detect in ``image``. Raises UserError when it differs, or cannot be compared."""
    if not weights.is_detector:
        raise UserError("--verify compares detections, but these weights are only a backbone; leave it out")
    if not cfg:
        raise UserError("--verify builds the model: give its recipe, --config-file FILE")
    sample = to_test_size(load_sample(image, cfg), cfg)
    sides = ((source, weights.library), (file, to))
    found = [backends.load(name).predict(built(path, name, cfg), [sample])[0] for path, name in sides]
    before, after = (pasted(sample, one) for one in found)
    if not len(before["scores"]) + len(after["scores"]):
        raise UserError(
            f"no model detects anything in {image} above MODEL.ROI_HEADS.SCORE_THRESH_TEST "
            f"{cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST}, nothing was written; give another image or a model that was "
            "trained for longer, or leave out --verify"
        )
    holds, text = agreement(before, after)
    if not holds:
        raise UserError(
            f"the models do not agree on {image}: {text}; expected as many of the same classes, boxes within "
            f"{SAME_BOX} px, scores within {SAME_SCORE}, masks' IoU from {SAME_MASK} and {SAME_POINTS:.0%} of the "
            f"keypoints within {SAME_BOX} px; nothing was written"
        )
    return text
