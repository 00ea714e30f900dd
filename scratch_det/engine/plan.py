"""From a command line to a plan: every check that needs no torch, written once, for all tools.

``make_plan`` is the list of these checks. A run raises the first error that it meets; scratch-det check collects all of
them. Never imports torch: a bad request is rejected at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from scratch_det import backends
from scratch_det.config.choices import EACH_ONCE, backbone_names
from scratch_det.config.load import LoadedConfig, load_config
from scratch_det.config.rules import check_config, mirrored_views
from scratch_det.config.schedule import settle_batch
from scratch_det.distributed.launch import ALONE, World
from scratch_det.engine.run_dir import RunDir
from scratch_det.errors import ConfigError, Report, Section, raise_problems
from scratch_det.weights.locate import check_weights, find_checkpoint

DETECTION, CLASSIFICATION = "detection", "classification"  # the tasks; see ``engine.train.task_of``
LIBRARY = "torchvision"  # pre-training builds its ResNets; both backends read its weight names
TRAINING_FLAGS = ("branch_from", "switch_from", "keep_at", "stop_at", "trial", "epochs", "scale_to_batch",
                  "accumulate", "init_std", "waive")  # fmt: skip
RUN_FILES = "config.yaml environment.json status.json metrics.json log.txt checkpoints/ inference/ result.json *.png"
OF_WRITERS = {"tensorboard": "tensorboard/", "wandb": "wandb/ wandb.json", "mlflow": "mlflow.json"}


@dataclass(frozen=True)
class Request:
    """The flags and overrides of a command line; see ``scratch-det train --help``."""

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
    trial: int | None = None
    epochs: float | None = None
    scale_to_batch: int | None = None
    accumulate: int = 1
    init_std: float | None = None
    waive: tuple[str, ...] = ()

    @property
    def kept(self) -> tuple[int, ...]:
        """Completed iterations whose checkpoints are kept: the numbers of --keep-at, and --stop-at."""
        return self.keep_at if self.stop_at is None else (*self.keep_at, self.stop_at)


@dataclass(frozen=True)
class Plan:
    """A request that passed the checks, with its resolved config, the data sets that were read, and the run folder.

    A data set has an ``entry`` with its name, ``images``, and ``recorded(cfg)``, what environment.json
    has of it.
    """

    task: str
    request: Request
    cfg: CfgNode
    backend: str
    training: list[Any]
    test: list[Any]
    run_dir: RunDir

    @property
    def is_finished(self) -> bool:
        """Whether --resume finds a complete run, so that there is nothing to train."""
        return self.request.resume and not self.request.eval_only and self.run_dir.result.exists()


def make_plan(request: Request, world: World = ALONE, task: str = DETECTION, report: Report | None = None) -> Plan:
    """All checks in their order, the cheap ones first, section by section of ``report``.

    A strict report, the default, raises UserError at the first error. A report that is not strict collects every error
    and notice, and the plan holds what could be planned despite the errors. Raises UserError in both cases when the
    recipe cannot be read at all.
    """
    report = report or Report()
    with report.section("recipe") as section:
        chosen = section.attempt(choose_backend, request, task)
        backend, recipe = chosen or choose_backend(without_errors(request, task), task)  # to check the rest
        cfg, run_dir = recipe.cfg, RunDir(recipe.cfg.OUTPUT_DIR, writes=world.is_main)
        library = backends.library(backend)
        section.add(f"{request.config_file}, backend {library}", config_file=request.config_file, backend=backend)
        batch = check_recipe(section, request, recipe, backend, world.size, task)
        if not (request.resume and run_dir.holds_run()):
            section.attempt(check_weights, cfg.MODEL.WEIGHTS)
    if batch:
        with report.section("batch") as section:
            for line in batch:
                section.add(line)
    with report.section("output") as section:
        files = " ".join([RUN_FILES, *(OF_WRITERS.get(name, "") for name in cfg.WRITERS)])
        section.add(f"{cfg.OUTPUT_DIR}/: {files}", output_dir=cfg.OUTPUT_DIR)
        section.attempt(run_dir.check, request.resume or request.eval_only)
        section.attempt(raise_problems, flag_problems(request, cfg, run_dir))
        note_start(section, request, cfg, run_dir, task)
    with report.section("data") as section:
        from scratch_det.engine.datasets import read_data  # NumPy, hotcoco: not for --help

        training, test = read_data(section, recipe, detection=task == DETECTION, trains=not request.eval_only)
    return Plan(task, request, cfg, backend, training, test, run_dir)


def is_finished(request: Request, task: str) -> bool:
    """``Plan.is_finished``, from the recipe alone. Raises UserError when it cannot be read."""
    finishes = request.resume and not request.eval_only
    return finishes and RunDir(choose_backend(request, task)[1].cfg.OUTPUT_DIR).result.exists()


def check_launch(request: Request, processes: int, task: str) -> None:
    """Raise UserError, before any process is started, for what each would find in the recipe alone."""
    if request.epochs is None:  # with it the data has to be read
        backend, recipe = choose_backend(request, task)
        check_recipe(Section(strict=True), request, recipe, backend, processes, task)


def choose_backend(request: Request, task: str = DETECTION) -> tuple[str, LoadedConfig]:
    """The backend that builds the model, and the recipe in its keys.

    With --resume, ``auto`` means the backend that began the run. Pre-training supports only one backend.
    """
    if task == CLASSIFICATION:
        if request.backend not in (LIBRARY, backends.AUTO):
            raise ConfigError(
                f"--backend {request.backend}: pre-training builds {LIBRARY}'s backbone, and its weights serve both "
                "backends; leave the flag out"
            )
        return LIBRARY, read_recipe(request, LIBRARY)
    backend = backends.choose(request.backend)
    recipe = read_recipe(request, backend)
    if request.resume and request.backend == backends.AUTO:
        began = RunDir(recipe.cfg.OUTPUT_DIR).recorded("backend")
        if began not in (None, backend):
            return choose_backend(replace(request, backend=began))
    return backend, recipe


def read_recipe(request: Request, backend: str) -> LoadedConfig:
    """The recipe of a request; --trial has a folder of its own."""
    recipe = load_config(request.config_file, request.overrides, backends.defaults(backend))
    if request.trial is not None:
        recipe.cfg.OUTPUT_DIR = f"{recipe.cfg.OUTPUT_DIR.rstrip('/')}_trial"
    return recipe


def without_errors(request: Request, task: str) -> Request:
    """``request`` without the overrides that cannot be read."""
    words, ignored = request.overrides, Section()
    pairs = [list(pair) for pair in zip(words[::2], words[1::2], strict=False)]
    valid = [pair for pair in pairs if ignored.attempt(choose_backend, replace(request, overrides=pair), task)]
    return replace(request, overrides=[word for pair in valid for word in pair])


def check_recipe(
    section: Section, request: Request, recipe: LoadedConfig, backend: str, processes: int, task: str
) -> list[str]:
    """Check every rule on a recipe and settle its batch size; returns lines for the log that describe the batch."""
    cfg, batch, notices = recipe.cfg, None, None
    if request.eval_only:  # one image at a time: rules on the batch do not apply
        section.attempt(raise_problems, evaluation_problems(request, cfg))
        section.attempt(check_config, cfg)
        notices = list(mirrored_views(cfg))
    else:
        epochs, images = request.epochs, 0
        if epochs is not None:
            from scratch_det.engine.datasets import count_training_images  # NumPy, hotcoco: not for --help

            images = section.attempt(count_training_images, cfg, task == DETECTION) or 0
        batch = section.attempt(settle_batch, recipe, processes, request.scale_to_batch, request.accumulate,
                                request.trial, epochs if images else None, images)  # fmt: skip
        notices = section.attempt(check_config, cfg, processes, max(request.accumulate, 1), request.waive)
    for notice in notices or []:
        section.problem("notice", notice)
    if task == CLASSIFICATION:
        as_detector = cfg.clone()
        as_detector.INPUT.CROP.ENABLED = False  # this trainer supports it only for classification
        section.attempt(backends.check_keys, backend, as_detector)
        section.attempt(raise_problems, classification_problems(cfg))
    else:
        section.attempt(backends.check_keys, backend, cfg)
    return batch or []


def evaluation_problems(request: Request, cfg: CfgNode) -> Iterator[str]:
    """With --eval-only: training flags, no test data, no weights."""
    checkpoints = RunDir(cfg.OUTPUT_DIR).checkpoints
    if not cfg.MODEL.WEIGHTS and not (request.resume and any(checkpoints.glob("*.pth"))):
        own = "give --resume to scratch-det train --eval-only, or"  # scratch-det eval does not have it
        own = f"there is no checkpoint in {checkpoints}: give" if request.resume else own
        yield f'MODEL.WEIGHTS is "", so there is nothing to evaluate; {own} MODEL.WEIGHTS FILE'
    given = [name for name in TRAINING_FLAGS if getattr(request, name) != getattr(Request, name)]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        yield f"{flags}: not allowed with --eval-only; leave out one of the two"
    if not cfg.DATASETS.TEST:
        yield "DATASETS.TEST is empty: name what to evaluate on, such as DATASETS.TEST \"('digits_val',)\""


def classification_problems(cfg: CfgNode) -> Iterator[str]:
    """Problems of a recipe for pre-training. It describes a detector, and only the detector's backbone is trained."""
    if cfg.MODEL.WEIGHTS:
        yield f'MODEL.WEIGHTS is {cfg.MODEL.WEIGHTS}, but pre-training starts at random; set MODEL.WEIGHTS ""'
    if (sampler := cfg.DATALOADER.SAMPLER_TRAIN) != EACH_ONCE:
        yield f"DATALOADER.SAMPLER_TRAIN is {sampler}, which detectors have; pre-training has {EACH_ONCE}"
    if (name := cfg.MODEL.BACKBONE.NAME) in backbone_names():
        yield f"MODEL.BACKBONE.NAME is {name}: only ResNets are pre-trained here; take weights from elsewhere"
    if cfg.VIS_PERIOD:
        yield f"VIS_PERIOD is {cfg.VIS_PERIOD}, which draws boxes; pre-training has none: set VIS_PERIOD 0"
    sizes, test = tuple(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MIN_SIZE_TEST
    if len(sizes) > 1:
        yield f"INPUT.MIN_SIZE_TRAIN is {sizes}, expected one side, the side of the square crops, such as (224,)"
    elif test < sizes[0]:
        yield (
            f"INPUT.MIN_SIZE_TEST is {test}, expected INPUT.MIN_SIZE_TRAIN {sizes[0]} or more: a centre crop "
            "of the training size is evaluated"
        )
    crop = cfg.INPUT.CROP
    if crop.ENABLED and crop.TYPE != "relative_range":
        yield f"INPUT.CROP.TYPE is '{crop.TYPE}', expected 'relative_range', the only crop that classification supports"
    elif crop.ENABLED and (len(crop.SIZE) != 2 or not all(0 < side <= 1 for side in crop.SIZE)):
        yield f"INPUT.CROP.SIZE is {crop.SIZE}, expected the smallest fraction of height and width, such as [0.8, 0.8]"


def flag_problems(request: Request, cfg: CfgNode, run_dir: RunDir) -> Iterator[str]:
    """Problems of the flags on checkpoints and initialisation."""
    max_iter, heads = cfg.SOLVER.MAX_ITER, cfg.MODEL.ROI_HEADS.NAME
    for flag, numbers in (("--keep-at", request.keep_at), ("--stop-at", request.kept[len(request.keep_at) :])):
        if wrong := [str(number) for number in numbers if not 0 < number <= max_iter]:
            yield f"{flag} is {', '.join(wrong)}, expected completed iterations from 1 to SOLVER.MAX_ITER {max_iter}"
    if request.keep_last < 0:
        yield f"--keep-last is {request.keep_last}, expected 1 or more, or 0 to keep every checkpoint"
    if request.switch_from and request.branch_from:
        yield "--branch-from and --switch-from: a run starts from one checkpoint; leave one of them out"
    elif request.switch_from and heads != "CascadeROIHeads":
        yield (
            f"--switch-from starts a cascade, but MODEL.ROI_HEADS.NAME is {heads}; give a recipe "
            "with configs/_base_/head/cascade.yaml, or use --branch-from"
        )
    parent, goes_on = request.branch_from or request.switch_from, request.resume and run_dir.holds_run()
    if parent and not goes_on and not find_checkpoint(Path(parent)).is_file():
        flag = "--branch-from" if request.branch_from else "--switch-from"
        yield f"{flag} {parent}: no such file; expected a checkpoint in the folder of its run"
    if goes_on and not request.eval_only and request.init_std != (began := run_dir.recorded("init_std")):
        yield (
            f"--init-std is {request.init_std}, but {run_dir.path} holds a run that began with {began}; keep "
            "that value, or name another folder: OUTPUT_DIR PATH"
        )
    if request.init_std is None:
        return
    if source := parent or cfg.MODEL.WEIGHTS:
        yield f"--init-std initialises random weights, but this run starts from {source}; leave one out"
    if not 0 < request.init_std < 1:
        yield f"--init-std is {request.init_std:g}, expected above 0 and below 1, such as 0.01"


def note_start(section: Section, request: Request, cfg: CfgNode, run_dir: RunDir, task: str) -> None:
    """Notices about the start of the run. The run itself compares its config with the config of its parent."""
    parent = request.branch_from or request.switch_from
    goes_on = request.eval_only or request.resume or parent or cfg.MODEL.WEIGHTS
    if task == DETECTION and cfg.MODEL.ROI_HEADS.NAME == "CascadeROIHeads" and not goes_on:
        fix = "the paper switches to it: --switch-from FILE"
        section.problem("notice", f"this trains a cascade from its first iteration on; {fix}")
    if not section.strict and (parent or (request.resume and run_dir.holds_run())):
        what = "the checkpoint given by --resume, --branch-from or --switch-from"
        section.problem("notice", f"{what} is compared only when the run starts")
