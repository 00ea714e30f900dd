"""From a command line to a run: everything that can be refused is refused here, before torch is imported."""

import sys
from dataclasses import dataclass
from pathlib import Path

from scratch_det import backends
from scratch_det.config import LoadedConfig, check_config, load_config
from scratch_det.data.catalog import lookup
from scratch_det.data.coco import CocoDataset, read_coco
from scratch_det.errors import ConfigError, DataError, UserError
from scratch_det.train.log import close_logging, logger, set_up_logging
from scratch_det.train.rundir import RunDir, find_checkpoint


@dataclass(frozen=True)
class Request:
    """What the command line asks for; see ``tools/train_net.py --help``."""

    config_file: str
    overrides: list[str]
    backend: str = backends.AUTO
    resume: bool = False
    eval_only: bool = False


def start(request: Request) -> None:
    """Check the request, then train and evaluate (or only evaluate). Raises UserError for what the user can mend."""
    set_up_logging()
    try:
        recipe = load_config(request.config_file, request.overrides)
        cfg, backend = recipe.cfg, backends.choose(request.backend)
        notices = check_config(cfg)
        backends.check_keys(backend, cfg)
        run_dir = RunDir(cfg.OUTPUT_DIR)
        run_dir.check(allow_existing=request.resume or request.eval_only)
        if not (request.resume and run_dir.holds_run()):
            check_weights_path(cfg.MODEL.WEIGHTS)
        training, test = read_datasets(recipe, request.eval_only)
        logger.info(f"recipe {request.config_file}, backend {backend}")
        for notice in notices:
            logger.warning(notice)

        from scratch_det.train.run import evaluate_only, train_and_evaluate

        if request.eval_only:
            evaluate_only(cfg, backend, test, run_dir, request.resume)
        else:
            train_and_evaluate(cfg, backend, training, test, run_dir, request.resume)
    finally:
        sys.stdout.flush()
        close_logging()


def check_weights_path(weights: str) -> None:
    """Refuse, early, what MODEL.WEIGHTS cannot be."""
    if "://" in weights:
        raise ConfigError(
            f"MODEL.WEIGHTS is {weights}; weights are read from local .pth files. Download them, convert a .pkl to a "
            "state dict with torchvision's ResNet names, and give the path: MODEL.WEIGHTS PATH"
        )
    if weights and not find_checkpoint(Path(weights)).is_file():
        problem = "is a folder" if Path(weights).is_dir() else "is missing"
        raise UserError(
            f"MODEL.WEIGHTS: file {weights} {problem}; give the path of a .pth file, "
            'or MODEL.WEIGHTS "" to start at random'
        )


def read_datasets(recipe: LoadedConfig, eval_only: bool) -> tuple[list[CocoDataset], list[CocoDataset]]:
    """Read DATASETS.TRAIN (unless ``eval_only``) and TEST and settle the number of classes, which the json decides.

    Sets MODEL.ROI_HEADS.NUM_CLASSES. Raises ConfigError when there is nothing to evaluate or the recipe names another
    number of classes, DataError when the data sets do not have the same categories.
    """
    cfg = recipe.cfg
    if eval_only and not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty: name what to evaluate on, such as DATASETS.TEST \"('digits_val',)\"")
    training, test = (
        [read_coco(lookup(name), need_masks=cfg.MODEL.MASK_ON) for name in names]
        for names in (() if eval_only else cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)
    )
    first, *others = training + test
    for other in others:
        if (other.category_ids, other.classes) != (first.category_ids, first.classes):
            raise DataError(
                f"{other.entry.json_file} has {_categories(other)}\n"
                f"  {first.entry.json_file} has {_categories(first)}\n"
                "  training and test data need the same category ids and names"
            )
    key, found = "MODEL.ROI_HEADS.NUM_CLASSES", cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if key in recipe.explicit and found != len(first.classes):
        raise ConfigError(
            f"{key} is {found}, but {first.entry.json_file} has {len(first.classes)} categories; "
            f"set {key} {len(first.classes)}, or leave the key out: the json decides"
        )
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(first.classes)
    return training, test


def _categories(data: CocoDataset) -> str:
    pairs = [f"{i} {name}" for i, name in zip(data.category_ids, data.classes, strict=True)]
    return f"{len(pairs)} categories: " + ", ".join(pairs[:6]) + (", ..." if len(pairs) > 6 else "")
