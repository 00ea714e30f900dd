"""What a recipe has to say for a classification. Never imports torch."""

from collections.abc import Collection, Iterator

from fvcore.common.config import CfgNode

from scratch_det import backends
from scratch_det.config import check_config
from scratch_det.config.bodies import body_names
from scratch_det.config.load import LoadedConfig
from scratch_det.data.agreement import NUM_CLASSES
from scratch_det.data.catalog import lookup_folder
from scratch_det.data.image_folder import ImageFolder, class_mismatch, read_image_folder
from scratch_det.errors import ConfigError, DataError, refuse

LIBRARY = "torchvision"  # whose bodies are trained, and whose names the weights have; both backends take them


def check_recipe(cfg: CfgNode, num_processes: int, accumulate: int, waived: Collection[str] = ()) -> list[str]:
    """Notices for the log. Raises ConfigError when ``cfg`` cannot train a classifier as written.

    The recipe's model is a detector's, of which the body is trained.
    """
    notices = check_config(cfg, num_processes, accumulate, waived)
    as_detector = cfg.clone()
    as_detector.INPUT.CROP.ENABLED = False  # which this loop has for classification alone
    backends.check_keys(LIBRARY, as_detector)
    refuse(_problems(cfg))
    return notices


def _problems(cfg: CfgNode) -> Iterator[str]:
    if cfg.MODEL.WEIGHTS:
        yield f'MODEL.WEIGHTS is {cfg.MODEL.WEIGHTS}, but pre-training starts at random; set MODEL.WEIGHTS ""'
    if (name := cfg.MODEL.BACKBONE.NAME) in body_names():
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
