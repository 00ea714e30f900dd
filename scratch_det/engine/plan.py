"""From a command line to a run: everything that can be refused is refused here, before torch is imported.

What a recipe has to say for a classification. Never imports torch.

From a command line to a pre-training: what can be refused is refused here, before torch is imported.
"""

import os
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from itertools import product
from typing import Any

from fvcore.common.config import CfgNode

from scratch_det import backends
from scratch_det.config import LoadedConfig, check_config, load_config, settle_batch
from scratch_det.config.choices import backbone_names
from scratch_det.config.rules import mirrored_views
from scratch_det.data.catalog import lookup, lookup_folder
from scratch_det.data.coco import CocoDataset, read_coco
from scratch_det.data.image_folder import ImageFolder, class_mismatch, read_image_folder
from scratch_det.distributed.launch import ALONE, World
from scratch_det.distributed.stop import StopFlag, Stopped
from scratch_det.engine.datasets import (
    NUM_CLASSES,
    category_mismatch,
    class_count_conflict,
    keypoint_conflicts,
    settle_counts,
    shared_images,
)
from scratch_det.engine.run_dir import RunDir
from scratch_det.errors import ConfigError, DataError, refuse
from scratch_det.log import close_logging, logger, set_up_logging
from scratch_det.weights.locate import check_weights


@dataclass(frozen=True)
class Request:
    """What the command line asks for; see ``tools/train_net.py --help``."""

    config_file: str
    overrides: list[str]
    backend: str = backends.AUTO
    resume: bool = False
    eval_only: bool = False
    branch_from: str | None = None
    switch_from: str | None = None
    keep_at: tuple[int, ...] = ()
    keep_last: int = 3
    stop_at: int | None = None
    scale_to_batch: int | None = None
    accumulate: int = 1
    init_std: float | None = None
    waive: tuple[str, ...] = ()

    @property
    def kept(self) -> tuple[int, ...]:
        """Completed iterations whose checkpoints stay: those of --keep-at and the one of --stop-at."""
        return self.keep_at if self.stop_at is None else (*self.keep_at, self.stop_at)


@dataclass(frozen=True)
class Plan:
    """A request that nothing speaks against so far: its recipe, resolved, its data sets, read, and its folder.

    A data set has an ``entry`` with its name, ``images``, ``digest`` and, in a word, what that is of: ``described_by``.
    """

    request: Request
    cfg: CfgNode
    backend: str
    training: list[Any]
    test: list[Any]
    run_dir: RunDir


def start(request: Request, world: World = ALONE) -> None:
    """Check the request, then train and evaluate (or only evaluate), as one of the processes of ``world``.

    Raises UserError for what the user can mend, Stopped when the run was asked to stop.
    """
    with planned(request, world, make_plan) as (plan, stop):
        from scratch_det.engine.train import evaluate_only, train_and_evaluate

        (evaluate_only if request.eval_only else train_and_evaluate)(plan, world, stop)


@contextmanager
def planned(request: Request, world: World, make: Callable[[Request, World], Plan]) -> Iterator[tuple[Plan, StopFlag]]:
    """Log, listen for signals that ask to stop, and plan; only the main process of ``world`` prints anything."""
    set_up_logging(speaks=world.is_main)
    stop = StopFlag()
    with stop.listening(), ExitStack() as stack:
        stack.callback(close_logging)
        stack.callback(sys.stdout.flush)
        if not world.is_main:
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        plan = make(request, world)
        if stop.requested:
            raise Stopped(stop)
        yield plan, stop


def make_plan(request: Request, world: World) -> Plan:
    """Refuse what can be refused without torch, the cheap checks first; then say what was found."""
    backend, recipe = choose_backend(request)
    cfg = recipe.cfg
    batch: list[str] = []
    if request.eval_only:
        check_evaluation(request, cfg)
        check_config(cfg)  # images are shared one by one, so the batch says nothing
        notices = list(mirrored_views(cfg))
    else:
        batch = settle_batch(recipe, world.size, request.scale_to_batch, request.accumulate)
        notices = check_config(cfg, world.size, request.accumulate, request.waive)
    backends.check_keys(backend, cfg)
    run_dir = RunDir(cfg.OUTPUT_DIR, writes=world.is_main)
    run_dir.check(allow_existing=request.resume or request.eval_only)
    check_flags(request, cfg)
    if not (request.resume and run_dir.holds_run()):
        check_weights(cfg.MODEL.WEIGHTS)
    training, test = read_datasets(recipe, request.eval_only)

    notices += [*switch_notices(request, cfg), *data_notices(training, test)]
    plan = Plan(request, cfg, backend, training, test, run_dir)
    announce(plan, f"backend {backends.library(backend)}", batch, notices)
    return plan


def announce(plan: Plan, library: str, batch: list[str], notices: list[str]) -> None:
    """Log what is about to be run, with what batch, and what is worth knowing about it."""
    logger.info(f"recipe {plan.request.config_file}, {library}, writing to {plan.run_dir.path}/")
    for line in batch:
        logger.info(line)
    for notice in notices:
        logger.warning(notice)


def choose_backend(request: Request) -> tuple[str, LoadedConfig]:
    """Who builds the model, and the recipe in its keys; with --resume ``auto`` is the backend that began the run."""
    backend = backends.choose(request.backend)
    recipe = load_config(request.config_file, request.overrides, backends.defaults(backend))
    began = (
        RunDir(recipe.cfg.OUTPUT_DIR).recorded("backend")
        if request.resume and request.backend == backends.AUTO
        else None
    )
    if began in (None, backend):
        return backend, recipe
    return backends.choose(began), load_config(request.config_file, request.overrides, backends.defaults(began))


def check_evaluation(request: Request, cfg: CfgNode) -> None:
    """Refuse flags that would do nothing with --eval-only, and random weights in the place of a run's."""
    if not (cfg.MODEL.WEIGHTS or request.resume) and RunDir(cfg.OUTPUT_DIR).holds_run():
        raise ConfigError(
            f'MODEL.WEIGHTS is "" and OUTPUT_DIR {cfg.OUTPUT_DIR} holds a run, whose predictions those of random '
            "weights would replace; give --resume to evaluate its last checkpoint, or MODEL.WEIGHTS FILE"
        )
    flags = {"--branch-from": request.branch_from, "--switch-from": request.switch_from, "--keep-at": request.keep_at,
             "--stop-at": request.stop_at is not None, "--accumulate": request.accumulate > 1,
             "--scale-to-batch": request.scale_to_batch, "--init-std": request.init_std,
             "--waive": request.waive}  # fmt: skip
    if given := [flag for flag, value in flags.items() if value]:
        raise ConfigError(
            f"{', '.join(given)}: an evaluation has no use for it; leave it out, or leave out --eval-only"
        )


def check_flags(request: Request, cfg: CfgNode) -> None:
    """Refuse what the flags on checkpoints and initialisation cannot mean."""
    check_kept(request, cfg.SOLVER.MAX_ITER)
    check_switch(request, cfg)
    check_init(request, cfg)


def check_switch(request: Request, cfg: CfgNode) -> None:
    """Refuse a switch to what is no cascade, and a branch that is a switch as well."""
    if request.switch_from and request.branch_from:
        raise ConfigError("--branch-from and --switch-from: a run starts from one checkpoint; leave one of them out")
    if request.switch_from and cfg.MODEL.ROI_HEADS.NAME != "CascadeROIHeads":
        raise ConfigError(
            f"--switch-from starts a cascade, but MODEL.ROI_HEADS.NAME is {cfg.MODEL.ROI_HEADS.NAME}; give a recipe "
            "with configs/_base_/head/cascade.yaml, or use --branch-from"
        )


def check_init(request: Request, cfg: CfgNode) -> None:
    """Refuse a width of random weights where there are none, one that is none, and another than the run began with."""
    run_dir = RunDir(cfg.OUTPUT_DIR)
    if request.resume and run_dir.holds_run() and run_dir.recorded("init_std") != request.init_std:
        raise ConfigError(
            f"--init-std is {request.init_std}, but {run_dir.path} holds a run that began with "
            f"{run_dir.recorded('init_std')}; give the flag as it was, or name another folder: OUTPUT_DIR PATH"
        )
    if request.init_std is not None and (request.branch_from or request.switch_from):
        raise ConfigError("--init-std is of random weights, but this run starts from a checkpoint; leave one out")
    if request.init_std is not None and cfg.MODEL.WEIGHTS:
        raise ConfigError(f"--init-std is of random weights, but MODEL.WEIGHTS is {cfg.MODEL.WEIGHTS}; leave one out")
    if request.init_std is not None and not 0 < request.init_std < 1:
        raise ConfigError(f"--init-std is {request.init_std:g}, expected above 0 and below 1, such as 0.01")


def check_kept(request: Request, max_iter: int) -> None:
    """Refuse numbers of iterations that no checkpoint will ever have."""
    wrong = [number for number in request.keep_at if not 0 < number <= max_iter]
    if wrong:
        raise ConfigError(
            f"--keep-at has {', '.join(map(str, wrong))}, expected numbers of completed iterations from 1 to "
            f"SOLVER.MAX_ITER {max_iter}"
        )
    if request.stop_at is not None and not 0 < request.stop_at <= max_iter:
        raise ConfigError(
            f"--stop-at is {request.stop_at}, expected a number of completed iterations from 1 to SOLVER.MAX_ITER "
            f"{max_iter}"
        )
    if request.keep_last < 0:
        raise ConfigError(f"--keep-last is {request.keep_last}, expected 1 or more, or 0 to keep every checkpoint")


def read_datasets(recipe: LoadedConfig, eval_only: bool) -> tuple[list[CocoDataset], list[CocoDataset]]:
    """Read DATASETS.TRAIN (unless ``eval_only``) and TEST; the json decides on the numbers of classes and keypoints.

    Sets both in ``recipe.cfg``. Raises ConfigError when there is nothing to evaluate or the recipe says something else
    about classes or keypoints, DataError when the data sets do not have the same categories.
    """
    cfg = recipe.cfg
    if eval_only and not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty: name what to evaluate on, such as DATASETS.TEST \"('digits_val',)\"")
    training, test = (
        [read_coco(lookup(name), cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON) for name in names]
        for names in (() if eval_only else cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)
    )
    first, *others = training + test
    for other in others:
        if mismatch := category_mismatch(first, other):
            raise DataError(mismatch)
    if conflict := class_count_conflict(recipe, first):
        raise ConfigError(conflict)
    refuse(keypoint_conflicts(recipe, training, test))
    settle_counts(cfg, first)
    return training, test


def switch_notices(request: Request, cfg: CfgNode) -> Iterator[str]:
    """From scratch the paper's cascades begin as plain detectors."""
    is_cascade = cfg.MODEL.ROI_HEADS.NAME == "CascadeROIHeads"
    if is_cascade and not (
        request.eval_only or request.resume or request.branch_from or request.switch_from or cfg.MODEL.WEIGHTS
    ):
        yield "this trains a cascade from its first iteration on; the paper switches to it: --switch-from FILE"


def data_notices(training: list[CocoDataset], test: list[CocoDataset]) -> Iterator[str]:
    """What is worth knowing about the data sets, though it is no reason to refuse them."""
    for data in training + test:
        yield from (f"{data.entry.name}: {notice}" for notice in data.notices)
    for one, other in product(training, test):
        yield from (f"{other.entry.name}: {notice}" for notice in shared_images(one, other))


LIBRARY = "torchvision"  # whose bodies are trained, and whose names the weights have; both backends take them


def check_recipe(cfg: CfgNode, num_processes: int, accumulate: int, waived: Collection[str] = ()) -> list[str]:
    """Notices for the log. Raises ConfigError when ``cfg`` cannot train a classifier as written.

    The recipe's model is a detector's, of which the body is trained.
    """
    notices = check_config(cfg, num_processes, accumulate, waived)
    as_detector = cfg.clone()
    as_detector.INPUT.CROP.ENABLED = False  # which this loop has for classification alone
    backends.check_keys(LIBRARY, as_detector)
    refuse(classification_problems(cfg))
    return notices


def classification_problems(cfg: CfgNode) -> Iterator[str]:
    if cfg.MODEL.WEIGHTS:
        yield f'MODEL.WEIGHTS is {cfg.MODEL.WEIGHTS}, but pre-training starts at random; set MODEL.WEIGHTS ""'
    if (name := cfg.MODEL.BACKBONE.NAME) in backbone_names():
        yield f"MODEL.BACKBONE.NAME is {name}: only ResNets are pre-trained here; take weights from elsewhere"
    sizes, test = tuple(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MIN_SIZE_TEST
    if len(sizes) > 1:
        yield f"INPUT.MIN_SIZE_TRAIN is {sizes}, expected one side: that of the square crops, such as (224,)"
    elif test < sizes[0]:
        yield (
            f"INPUT.MIN_SIZE_TEST is {test}, expected INPUT.MIN_SIZE_TRAIN {sizes[0]} or more: its middle is cut out "
            "in the size that was trained on"
        )
    crop = cfg.INPUT.CROP
    if not crop.ENABLED:
        return
    if crop.TYPE != "relative_range":
        yield f"INPUT.CROP.TYPE is '{crop.TYPE}', expected 'relative_range', the only crop of a classification"
    elif len(crop.SIZE) != 2 or not all(0 < side <= 1 for side in crop.SIZE):
        yield f"INPUT.CROP.SIZE is {crop.SIZE}, expected the least part of height and width, such as [0.8, 0.8]"


def read_folders(recipe: LoadedConfig) -> tuple[list[ImageFolder], list[ImageFolder]]:
    """List DATASETS.TRAIN and TEST, and set MODEL.ROI_HEADS.NUM_CLASSES, which the folders decide.

    Raises DataError for a folder that is no data set, or when their classes differ; ConfigError when the recipe names
    another number of classes.
    """
    cfg = recipe.cfg
    training, test = (
        [read_image_folder(lookup_folder(name)) for name in names] for names in (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)
    )
    first, *others = training + test
    for other in others:
        if mismatch := class_mismatch(first, other):
            raise DataError(mismatch)
    named, found = cfg.MODEL.ROI_HEADS.NUM_CLASSES, len(first.classes)
    if NUM_CLASSES in recipe.explicit and named != found:
        raise ConfigError(f"{NUM_CLASSES} is {named}, but {first.entry.root} has {found} classes; leave the key out")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = found
    return training, test


def start_pretraining(request: Request, world: World = ALONE) -> None:
    """Check the request, then train a classifier, as one of the processes of ``world``.

    Raises UserError for what the user can mend, Stopped when the run was asked to stop.
    """
    with planned(request, world, make_pretraining_plan) as (plan, stop):
        from scratch_det.engine import classification
        from scratch_det.engine.train import train_and_evaluate

        train_and_evaluate(plan, world, stop, classification)


def make_pretraining_plan(request: Request, world: World) -> Plan:
    """Refuse what can be refused without torch, the cheap checks first; then say what was found."""
    if request.backend not in (LIBRARY, backends.AUTO):
        raise ConfigError(
            f"--backend {request.backend}: the body is {LIBRARY}'s here, and its weights serve both backends; "
            "leave the flag out"
        )
    recipe = load_config(request.config_file, request.overrides)
    cfg = recipe.cfg
    batch = settle_batch(recipe, world.size, request.scale_to_batch, request.accumulate)
    notices = check_recipe(cfg, world.size, request.accumulate, request.waive)
    run_dir = RunDir(cfg.OUTPUT_DIR, writes=world.is_main)
    run_dir.check(allow_existing=request.resume)
    check_flags(request, cfg)
    training, test = read_folders(recipe)

    plan = Plan(request, cfg, LIBRARY, training, test, run_dir)
    announce(plan, backends.library(LIBRARY), batch, notices)
    return plan
