"""Whether two models see the same in an image.

Converting a checkpoint file between the backends, and checking the result on an image.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from faster_coco_eval.core import mask as mask_api
from fvcore.common.config import CfgNode
from torch import nn

from scratch_det import backends
from scratch_det.config import load_config
from scratch_det.config.choices import backbone_names
from scratch_det.data.dataset import load_sample
from scratch_det.data.transforms import output_size, resize
from scratch_det.engine.checkpointer import write_synced
from scratch_det.engine.run_dir import RunDir
from scratch_det.errors import ConfigError, UserError
from scratch_det.files import sha256_of
from scratch_det.weights.convert import checkpoint_of, convert, num_classes, num_keypoints
from scratch_det.weights.load import load_weights
from scratch_det.weights.locate import fetch
from scratch_det.weights.read import Pixels, Weights, read_weights

MOST = 20  # detections of an image that are compared, the highest scores
SAME_BOX, SAME_SCORE, SAME_MASK = 0.5, 1e-3, 0.9  # pixels of the original image, score, IoU
SAME_POINTS = 0.9  # of the keypoints are as near as SAME_BOX: two peaks of a heat map may be equally high


@dataclass(frozen=True)
class Agreement:
    """How far two lists of detections are apart, pairs taken in the order of their scores.

    found: how many detections both have, up to MOST. compared: pairs. classes: pairs of one class. box, score: largest
    difference in pixels and in score. mask: smallest IoU of two masks, 1 without masks. points: share of the keypoints
    that are at most SAME_BOX apart, None without keypoints.
    """

    found: tuple[int, int]
    compared: int
    classes: int
    box: float
    score: float
    mask: float
    points: float | None = None

    @property
    def holds(self) -> bool:
        """Whether there are any, equally many, of the same classes, apart by less than SAME_BOX and so on."""
        same_number = self.found == (self.compared, self.compared)
        same_place = self.box <= SAME_BOX and self.score <= SAME_SCORE and self.mask >= SAME_MASK
        same_points = self.points is None or self.points >= SAME_POINTS
        return same_number and same_place and same_points and 0 < self.compared == self.classes

    def __str__(self) -> str:
        one, other = self.found
        return (
            f"{one} and {other} detections: {self.classes} of the same class, boxes apart by up to {self.box:.2g} px, "
            f"scores by {self.score:.2g}, masks' IoU at least {self.mask:.4f}"
            + ("" if self.points is None else f", {self.points:.1%} of the keypoints at most {SAME_BOX} px")
        )


def agreement(one: dict[str, Any], other: dict[str, Any]) -> Agreement:
    """Compare the predictions of two models for one image (see ``scratch_det.backends``), MOST at most.

    Where scores are closer than SAME_SCORE the order says nothing, so each detection meets the nearest box among those.
    """
    found = min(len(one["scores"]), MOST), min(len(other["scores"]), MOST)
    pairs = list(_pairs(one, other, min(found)))
    if not pairs:
        return Agreement(found, 0, 0, 0.0, 0.0, 1.0)
    first, second = (torch.tensor(places) for places in zip(*pairs, strict=True))
    return Agreement(
        found=found,
        compared=len(pairs),
        classes=int((one["labels"][first] == other["labels"][second]).sum()),
        box=(one["boxes"][first] - other["boxes"][second]).abs().max().item(),
        score=(one["scores"][first] - other["scores"][second]).abs().max().item(),
        mask=min(_mask_ious(one, other, pairs), default=1.0),
        points=_same_points(one["keypoints"][first], other["keypoints"][second]) if "keypoints" in one else None,
    )


def _pairs(one: dict[str, Any], other: dict[str, Any], number: int) -> Iterable[tuple[int, int]]:
    free = list(range(len(other["scores"])))
    for place in range(number):
        near = [i for i in free if abs(other["scores"][i] - one["scores"][place]) <= SAME_SCORE] or free[:1]
        apart = (other["boxes"][near] - one["boxes"][place]).abs().amax(1)
        wrong_class = other["labels"][near] != one["labels"][place]
        best = near[int((apart + wrong_class * 1e6).argmin())]
        free.remove(best)
        yield place, best


def _mask_ious(one: dict[str, Any], other: dict[str, Any], pairs: list[tuple[int, int]]) -> Iterable[float]:
    if "masks" in one and "masks" in other:
        for first, second in pairs:
            masks = one["masks"][first], other["masks"][second]
            both_empty = not any(mask_api.area(list(masks)))
            yield 1.0 if both_empty else mask_api.iou([masks[0]], [masks[1]], [0]).item()


def _same_points(one: torch.Tensor, other: torch.Tensor) -> float:
    """Keypoints [N, K, 3] of pairs that are at most SAME_BOX apart, as a share."""
    apart = (one[..., :2] - other[..., :2]).norm(dim=-1)
    return (apart <= SAME_BOX).float().mean().item()


def convert_file(
    source: str,
    destination: Path,
    to: str,
    config_file: Path | None = None,
    partial: bool = False,
    image: Path | None = None,
    say: Callable[[str], object] = print,
) -> None:
    """Write ``source``, a file or an address, to ``destination`` with the weights' names of backend ``to``.

    config_file: the recipe, by default the config.yaml of the run that ``source`` lies in. With it the result has to
    fill a model of backend ``to`` where that is installed, and pixel statistics are recorded. partial: leave out
    weights without a place. image: predict it before and after, with both backends, and compare.
    Raises UserError, with nothing written, when weights have no place, the model is not filled, or the two disagree.
    """
    if destination.suffix not in (".pth", ".pt"):
        raise UserError(f"{destination}: the result is a file of torch.save; name it .pth")
    if destination.exists():
        raise UserError(f"{destination} exists; name another file, or remove it first")
    path = fetch(source)
    weights = read_weights(path)
    cfg = recipe_of(path, config_file, weights)
    converted = convert(weights, to, own_names=bool(cfg and cfg.MODEL.BACKBONE.NAME in backbone_names()))
    say(f"{path}: {weights.kind}; {sum(converted.found.values())} of {len(weights.tensors)} tensors have a place:")
    say(converted.describe())
    if converted.lost and not partial:
        raise UserError(
            f"{len(converted.lost)} tensors of {path} have no place in a {to} model, the first is {converted.lost[0]}; "
            "give --partial to leave them out"
        )
    destination.parent.mkdir(parents=True, exist_ok=True)
    trial = destination.with_name(destination.name + ".partial.pth")
    content = checkpoint_of(converted, weights, Pixels.of(cfg) if cfg else None, sha256_of(path))
    try:
        write_synced(trial, content)
        check_result(trial, to, cfg, weights, say)
        if image:
            say(f"{image}: {verify(path, trial, weights, to, cfg, image)}")
        trial.replace(destination)
    finally:
        trial.unlink(missing_ok=True)
    say(f"wrote {destination}; use it with --backend {to} MODEL.WEIGHTS {destination}")


def recipe_of(path: Path, config_file: Path | None, weights: Weights) -> CfgNode | None:
    """The recipe of the weights, with as many classes and keypoints as they have; None when nothing says it."""
    if config_file:
        cfg = load_config(config_file, defaults=backends.defaults(backends.choose(backends.AUTO))).cfg
    else:
        run = RunDir(path.parent.parent if path.parent.name == "checkpoints" else path.parent)
        if not (run.config.is_file() and run.environment.is_file()):
            return None
        cfg = run.read_config()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes(weights) or cfg.MODEL.ROI_HEADS.NUM_CLASSES
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD
    keypoints.NUM_KEYPOINTS = num_keypoints(weights) or keypoints.NUM_KEYPOINTS
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def check_result(file: Path, to: str, cfg: CfgNode | None, weights: Weights, say: Callable[[str], object]) -> None:
    """Load the new file into a model of backend ``to``, where there are both. Raises UserError when it does not fit."""
    if not cfg:
        return say(f"not loaded into a model: no --config-file, and {weights.path} lies in no run's folder")
    if not backends.is_installed(to):
        return say(f"not loaded into a model: {to} is not installed here")
    try:
        backends.check_keys(to, cfg)
    except ConfigError as problem:
        return say(f"not loaded into a model: {problem}")
    try:
        built(file, to, cfg)
    except UserError as problem:
        raise UserError(
            f"nothing was written: {problem}".replace(str(file), f"converted from {weights.path}")
        ) from None
    say(f"it fills {'a' if weights.scheme.whole else 'the backbone of a'} {backends.library(to)} model of the recipe")


def verify(source: Path, file: Path, weights: Weights, to: str, cfg: CfgNode | None, image: Path) -> Agreement:
    """What the two models see in ``image``. Raises UserError when that differs, or cannot be compared."""
    if not weights.scheme.whole:
        raise UserError("--verify compares detections, and these are weights of a backbone alone; leave it out")
    if not cfg:
        raise UserError("--verify builds the model: give its recipe, --config-file FILE")
    sample, keys = load_sample(image, cfg), cfg.INPUT
    size = output_size(sample["height"], sample["width"], keys.MIN_SIZE_TEST, keys.MAX_SIZE_TEST)
    sample = resize(sample, size)
    models = [(name, built(path, name, cfg)) for path, name in ((source, weights.scheme.library), (file, to))]
    before, after = (backends.load(name).predict(model, [sample])[0] for name, model in models)
    found = agreement(before, after)
    if not any(found.found):
        raise UserError(
            f"neither model detects anything in {image} above MODEL.ROI_HEADS.SCORE_THRESH_TEST "
            f"{cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST}: nothing to compare, nothing was written; use another image, "
            "a model that was trained for longer, or leave out --verify"
        )
    if not found.holds:
        raise UserError(
            f"the models do not agree on {image}: {found}; expected as many of the same classes, boxes within "
            f"{SAME_BOX} px, scores within {SAME_SCORE}, masks' IoU from {SAME_MASK} and {SAME_POINTS:.0%} of the "
            f"keypoints within {SAME_BOX} px; nothing was written"
        )
    return found


def built(path: Path, name: str, cfg: CfgNode) -> nn.Module:
    """The recipe's model in backend ``name`` with the weights of ``path``."""
    backend = backends.load(backends.choose(name))
    torch.manual_seed(0)
    model = backend.build(cfg)
    load_weights(model, path, name, cfg)
    return model
