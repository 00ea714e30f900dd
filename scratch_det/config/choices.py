"""The lists from which a recipe chooses by name: learning-rate schedules, optimizers, augmentations, and so on.

To add one, write its function and add a line to its list, here or in a project's ``add()`` (see projects/README.md).
The functions are named, not imported: this package never imports torch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

from fvcore.common.config import CfgNode

# Dotted keys with their defaults that detectron2 does not have: this repository's own, and those that projects add.
PROJECT_KEYS: dict[str, Any] = {
    "DATASETS.CLASS_NAMES": [],  # the data decides; a run notes them here, for its labels in their order
    "MODEL.ANCHOR_GENERATOR.ROUNDING": "",  # of the anchors' sides: "", Detectron or torchvision, whose weights need it
    "MODEL.CHANNELS_LAST": False,  # memory of 4-dimensional weights and maps: [N, H, W, C]; not with GN
    "MODEL.COMPILE": False,  # torch.compile for the backbone; needs a C++ compiler, and minutes at every start
    "MODEL_EMA.DECAY": 0.999,  # share of the average that stays at each iteration, after a start that forgets faster
    "MODEL_EMA.ENABLED": False,  # d2go's word: keep a moving average of the weights, and evaluate it too
    "MODEL.WEIGHTS_NEW_CLASSES": False,  # a detector's weights are of other classes, whose layers start anew
    "MODEL.WEIGHTS_PIXELS": "",  # one of PIXELS: those that the file of MODEL.WEIGHTS was trained on
    "TEST.PATIENCE": 0,  # the run ends when the metric of model_best.pth has not risen in so many evaluations; 0: never
    "TEST.AUG.VOTE_THRESH": 0.0,  # IoU from which boxes of all views vote for the place of one; 0: no vote
    "WRITERS": ["tensorboard"],  # where curves and pictures are written beside metrics.json: some of WRITERS
}

RECIPES = "recipe"  # PIXEL_MEAN and PIXEL_STD of the recipe itself
# Order of the channels, mean and standard deviation of grey values from 0 to 255, by the names of MODEL.WEIGHTS_PIXELS.
PIXELS: dict[str, tuple[str, tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),  # torchvision, timm, most self-supervised
    "caffe": ("BGR", (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0)),  # Detectron, MSRA, mmdetection's caffe ResNets
    "0-1": ("RGB", (0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),
    "0-255": ("RGB", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "inception": ("RGB", (127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),  # -1 to 1: some of timm's
}


@dataclass(frozen=True)
class Choice:
    """One entry of a list.

    function: ``module:function``; the list says how it is called.
    keys: dotted keys that this entry reads and another one does not; a recipe that sets only another entry's keys is
        rejected.
    rule: yields one line for each problem of the keys that the function reads; checked before anything is built.
    moments: optimizers only: numbers per weight that the optimizer keeps, and a checkpoint holds.
    """

    function: str
    keys: tuple[str, ...] = ()
    rule: Callable[[CfgNode], Iterator[str]] | None = None
    moments: int = 0


def drops_happen(cfg: CfgNode) -> Iterator[str]:
    """SOLVER.STEPS increase and lie inside the run."""
    steps, max_iter = tuple(cfg.SOLVER.STEPS), cfg.SOLVER.MAX_ITER
    if any(later <= earlier for earlier, later in pairwise((0, *steps))):
        yield (
            f"SOLVER.STEPS is {steps}, expected positive and strictly increasing iterations; "
            f'set SOLVER.STEPS "{tuple(sorted({step for step in steps if step > 0}))}"'
        )
    late = [step for step in steps if step >= max_iter]
    if late and max_iter >= 1:
        kept = tuple(step for step in steps if step < max_iter)
        yield (
            f"SOLVER.STEPS has {', '.join(map(str, late))}, but training ends at SOLVER.MAX_ITER {max_iter}: "
            f'drop them (set SOLVER.STEPS "{kept}") or train longer'
        )


def cosine_ends(cfg: CfgNode) -> Iterator[str]:
    """The cosine falls, and SOLVER.STEPS, which it ignores, is empty."""
    end, base = cfg.SOLVER.BASE_LR_END, cfg.SOLVER.BASE_LR
    if cfg.SOLVER.STEPS:
        yield f'SOLVER.STEPS is {tuple(cfg.SOLVER.STEPS)}, but {COSINE} has no drops; set SOLVER.STEPS "()"'
    if base > 0 and not 0 <= end <= base:
        yield f"SOLVER.BASE_LR_END is {end}, expected from 0 to SOLVER.BASE_LR {base}"


# SOLVER.LR_SCHEDULER_NAME (detectron2's names) -> function(cfg.SOLVER, iteration): the learning rate of an iteration,
# counted from 0, as float. It depends only on its arguments, so that a resumed or branched run has the same rates. It
# is called at every iteration and checks nothing; checks belong in the rule.
MULTI_STEP, COSINE = "WarmupMultiStepLR", "WarmupCosineLR"
LR_SCHEDULES = {
    MULTI_STEP: Choice("scratch_det.config.schedule:multi_step", rule=drops_happen),
    COSINE: Choice("scratch_det.config.schedule:cosine", rule=cosine_ends, keys=("SOLVER.BASE_LR_END",)),
}

# SOLVER.OPTIMIZER -> function(cfg, model): a torch.optim.Optimizer over the trainable parameters. Every parameter group
# has an "lr_factor", which multiplies the rate of the schedule. detectron2 supports only SGD and has no key for it:
# a project that adds an optimizer adds the key too.
SGD = "SGD"
OPTIMIZERS = {SGD: Choice("scratch_det.engine.state:build_sgd", moments=1)}


def training_sizes(cfg: CfgNode) -> Iterator[str]:
    """Sides that are sampled from a range are its two ends."""
    sizes = tuple(cfg.INPUT.MIN_SIZE_TRAIN)
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and sizes and not (len(sizes) == 2 and sizes[0] <= sizes[1]):
        yield (
            f"INPUT.MIN_SIZE_TRAIN is {sizes}, but sampling from a range needs its two ends; "
            f'set INPUT.MIN_SIZE_TRAIN "{min(sizes), max(sizes)}" or INPUT.MIN_SIZE_TRAIN_SAMPLING choice'
        )


# INPUT.AUGMENTATION -> a function like ``scratch_det.data.transforms.augment``, which has the contract. detectron2
# resizes and has no key for it: a project that adds an augmentation adds the key too.
RESIZE = "resize"
AUGMENTATIONS = {
    RESIZE: Choice(
        "scratch_det.data.transforms:augment",
        keys=("INPUT.MIN_SIZE_TRAIN", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "INPUT.MAX_SIZE_TRAIN"),
        rule=training_sizes,
    )
}

# net -> function(cfg): a module as ``scratch_det.modeling.backbones`` describes it. An entry ``net`` is known by two
# values of MODEL.BACKBONE.NAME, build_net_backbone and build_net_fpn_backbone. A key MODEL.NET.NORM among its keys is
# under the same rules as a ResNet's. The ResNets are the backends' own and not in this list.
BACKBONES = {"vgg16": Choice("scratch_det.modeling.backbones:VGG16")}

# MODEL.PRETRAINING -> a module that has what ``scratch_det.engine.classification`` has and scratch-det pretrain needs:
# build, losses, FolderSet, evaluate. A project that adds one adds the key too, which detectors do not read.
CLASSIFY = "classification"
PRETRAININGS = {CLASSIFY: Choice("scratch_det.engine.classification")}


def installed(package: str) -> Callable[[CfgNode], Iterator[str]]:
    """The rule that a package is there, which is also the name of the extra that installs it."""

    def rule(cfg: CfgNode) -> Iterator[str]:
        if find_spec(package) is None:
            yield f"WRITERS is {cfg.WRITERS}, but {package} is not installed: pip install 'scratch_det[{package}]'"

    return rule


# WRITERS, a list of these names -> a class like ``scratch_det.engine.writers.Writer``. metrics.json is always written.
WRITERS = {
    "tensorboard": Choice("scratch_det.engine.writers:TensorBoard"),
    "wandb": Choice("scratch_det.engine.tracker_wandb:WandB", rule=installed("wandb")),
    "mlflow": Choice("scratch_det.engine.tracker_mlflow:MLflow", rule=installed("mlflow")),
}

# DATALOADER.SAMPLER_TRAIN, by detectron2's names: every image once in a pass, or those with rare classes more often.
SAMPLERS = EACH_ONCE, REPEATS = "TrainingSampler", "RepeatFactorTrainingSampler"

LISTS = {  # the key -> its entries
    "SOLVER.LR_SCHEDULER_NAME": LR_SCHEDULES,
    "SOLVER.OPTIMIZER": OPTIMIZERS,
    "INPUT.AUGMENTATION": AUGMENTATIONS,
    "MODEL.PRETRAINING": PRETRAININGS,
    "WRITERS": WRITERS,
}


def choice_of(cfg: CfgNode, key: str) -> Choice:
    """The entry that a recipe which passed ``check_config`` names, or the first one where there is no such key."""
    section, name = key.split(".")
    entries = LISTS[key]
    return entries[cfg[section].get(name, next(iter(entries)))]


def backbone_names() -> dict[str, str]:
    """MODEL.BACKBONE.NAME -> name in BACKBONES."""
    return {f"build_{name}{fpn}_backbone": name for name in BACKBONES for fpn in ("", "_fpn")}


def is_resnet(cfg: CfgNode) -> bool:
    """Whether the backbone is a backend's own ResNet."""
    name = cfg.MODEL.BACKBONE.NAME
    return "resnet" in name and name not in backbone_names()


def has_fpn(cfg: CfgNode) -> bool:
    """Whether the backbone ends in a feature pyramid."""
    return cfg.MODEL.BACKBONE.NAME.endswith("_fpn_backbone")


def model_name(cfg: CfgNode) -> str:
    """What results/models.csv calls the recipe's detector, from its keys: ``mask_rcnn_R_50_FPN_gn + cascade``."""
    model, resnets = cfg.MODEL, cfg.MODEL.RESNETS
    parts = ["keypoint" if model.KEYPOINT_ON else "mask" if model.MASK_ON else "faster", "rcnn"]
    if is_resnet(cfg):
        groups = f"_{resnets.NUM_GROUPS}x{resnets.WIDTH_PER_GROUP}d" if resnets.NUM_GROUPS > 1 else ""
        parts.append(f"{'X' if groups else 'R'}_{resnets.DEPTH}{groups}")
    else:
        parts.append(backbone_names().get(model.BACKBONE.NAME, model.BACKBONE.NAME).upper())
    parts += ["FPN"] * has_fpn(cfg) + [resnets.NORM.lower() or "none"] * is_resnet(cfg)
    parts += [f"fc{model.ROI_BOX_HEAD.FC_DIM}"] * (model.ROI_BOX_HEAD.FC_DIM != 1024)
    return "_".join(parts) + (" + cascade" if model.ROI_HEADS.NAME == "CascadeROIHeads" else "")
