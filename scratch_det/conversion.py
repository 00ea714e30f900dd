"""Converting a checkpoint file between the backends, and checking the result on an image."""

from collections.abc import Callable
from pathlib import Path

import torch
from fvcore.common.config import CfgNode
from torch import nn

from scratch_det import backends
from scratch_det.config import load_config
from scratch_det.config.bodies import body_names
from scratch_det.data.dataset import as_sample
from scratch_det.data.image import read_image
from scratch_det.data.transforms import resize
from scratch_det.errors import ConfigError, UserError
from scratch_det.evaluation.agreement import SAME_BOX, SAME_MASK, SAME_POINTS, SAME_SCORE, Agreement, agreement
from scratch_det.train.checkpoint import sha256_of, write_synced
from scratch_det.train.rundir import RunDir
from scratch_det.weights.address import fetch
from scratch_det.weights.convert import checkpoint_of, convert, num_classes, num_keypoints
from scratch_det.weights.load import load_weights
from scratch_det.weights.pixels import Pixels
from scratch_det.weights.read import Weights, read_weights


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
    converted = convert(weights, to, own_body=bool(cfg and cfg.MODEL.BACKBONE.NAME in body_names()))
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
    sample = as_sample(read_image(image), cfg.INPUT.FORMAT)
    sample = resize(sample, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
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
