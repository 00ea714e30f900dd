"""Rules on initialisation and normalisation: the mistakes that cost days without an error message.

detectron2's defaults (FrozenBN, FREEZE_AT 2) are made for fine-tuning; with no weights they silently leave random
layers frozen for ever. In Detectron's released runs that mistake cost 3.3 box AP (R50, 3x: 36.2 against 39.5).

Rules on the schedule and the batch.

Cross-field rules: what cannot train as written is refused before iteration 1, with the change that mends it.

A rule is a generator of problems, one line each: what was found, what is expected, the key, the mend.
"""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from fvcore.common.config import CfgNode

from scratch_det.config.choices import (
    Choice,
    backbone_keys,
    backbone_names,
    has_fpn,
    is_resnet,
    known_augmentation,
    known_choice,
    section_of,
)
from scratch_det.config.defaults import PROJECT_KEYS, flatten, get_cfg
from scratch_det.config.schedule import COSINE, is_cosine
from scratch_det.errors import did_you_mean, refuse

NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN")
GN_GROUPS = 32  # Wu & He, Group Normalization (2018); fixed in Detectron's and detectron2's recipes
# In that paper's Fig. 1 BN's ImageNet error rises as images per GPU fall from 32 to 2, GN's stays; the knee is near 8.
SMALLEST_BN_BATCH = 8  # images


def norms(cfg: CfgNode) -> dict[str, str]:
    """The norm of each part that has one, by key.

    The backbone's name says whether RESNETS and FPN are read, and which section of a project's.
    """
    own = backbone_names().get(cfg.MODEL.BACKBONE.NAME)
    theirs = [key.split(".")[1] for key in PROJECT_KEYS if key.endswith(".NORM") and own and section_of(key) == own]
    parts = ["RESNETS"] * is_resnet(cfg) + ["FPN"] * has_fpn(cfg) + theirs + ["ROI_BOX_HEAD", "ROI_MASK_HEAD"]
    return {f"MODEL.{part}.NORM": cfg.MODEL[part].NORM for part in parts}


def known_norms(cfg: CfgNode) -> Iterator[str]:
    for key, norm in norms(cfg).items():
        if norm not in NORMS:
            expected = ", ".join(repr(name) for name in NORMS)
            yield f"{key} is '{norm}', expected one of {expected}{did_you_mean(norm, list(NORMS))}"


def nothing_random_is_frozen(cfg: CfgNode) -> Iterator[str]:
    if cfg.MODEL.WEIGHTS:
        return
    frozen_stages = cfg.MODEL.BACKBONE.FREEZE_AT
    if frozen_stages > 0:
        yield (
            f'MODEL.BACKBONE.FREEZE_AT is {frozen_stages} while MODEL.WEIGHTS is "": these stages would stay '
            "random for ever; set MODEL.BACKBONE.FREEZE_AT 0, or name weights"
        )
    for key, norm in norms(cfg).items():
        if norm == "FrozenBN":
            yield (
                f'{key} is FrozenBN while MODEL.WEIGHTS is "": without statistics it normalises nothing; '
                f"set {key} GN (or SyncBN), or name weights"
            )


def gn_channels_divide(cfg: CfgNode) -> Iterator[str]:
    for norm_key, norm in norms(cfg).items():
        for key, channels in _normalised_channels(cfg, norm_key).items():
            if norm == "GN" and channels % GN_GROUPS:
                nearest = max(GN_GROUPS, round(channels / GN_GROUPS) * GN_GROUPS)
                yield (
                    f"{key} makes {channels} channels, which GN ({norm_key}) cannot split into {GN_GROUPS} groups; "
                    f"use a multiple of {GN_GROUPS} such as {nearest}"
                )


def bn_has_images(cfg: CfgNode, num_processes: int, accumulate: int) -> Iterator[str]:
    """BN sees the images of one process at a time, SyncBN those of all processes: neither sees an accumulated batch."""
    images = cfg.SOLVER.IMS_PER_BATCH // num_processes
    for key, norm in norms(cfg).items():
        if norm in ("BN", "SyncBN") and accumulate > 1:
            whole = images if norm == "BN" else cfg.SOLVER.IMS_PER_BATCH
            yield (
                f"{key} is {norm} with --accumulate {accumulate}: it would normalise with the statistics of "
                f"{whole // accumulate} images, not of {whole}, which is another training; "
                f"set {key} GN, which normalises each image alone, or leave out --accumulate"
            )
        elif norm == "BN" and images < SMALLEST_BN_BATCH:
            yield (
                f"{key} is BN with {images} images per process: BN's error grows steeply below {SMALLEST_BN_BATCH} "
                f"(Wu & He 2018, Group Normalization, Fig. 1); set {key} GN, or SyncBN with several processes"
            )


def sync_bn_notices(cfg: CfgNode, num_processes: int) -> Iterator[str]:
    keys = [key for key, norm in norms(cfg).items() if norm == "SyncBN"]
    if keys and num_processes == 1:
        yield (
            f"{', '.join(keys)}: SyncBN in a single process is plain BN over its {cfg.SOLVER.IMS_PER_BATCH} images; "
            f"the paper's SyncBN sees 16. GN does not depend on the batch"
        )


def _normalised_channels(cfg: CfgNode, norm_key: str) -> dict[str, int]:
    """The channels that the norm of ``norm_key`` sees; a ResNet's later stages are multiples of res2's.

    None where no key says it: a project's backbone.
    """
    part = norm_key.split(".")[1]
    if part != "RESNETS":
        name = "OUT_CHANNELS" if part == "FPN" else "CONV_DIM"
        return {f"MODEL.{part}.{name}": cfg.MODEL[part][name]} if name in cfg.MODEL[part] else {}
    resnets = cfg.MODEL.RESNETS
    return {
        "MODEL.RESNETS.STEM_OUT_CHANNELS": resnets.STEM_OUT_CHANNELS,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": resnets.RES2_OUT_CHANNELS,
        "MODEL.RESNETS.NUM_GROUPS x WIDTH_PER_GROUP": resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP,
    }


@dataclass(frozen=True, kw_only=True)
class Optimizer(Choice):
    """``function`` is called with the recipe and the model; ``moments`` numbers are kept a weight."""

    moments: int


SGD = "SGD"  # the only one in detectron2, which has no key for it
OPTIMIZERS = {SGD: Optimizer("scratch_det.engine.optimizer:build_sgd", moments=1)}  # by a project's SOLVER.OPTIMIZER


def optimizer_of(cfg: CfgNode) -> Optimizer:
    """What a recipe that passed ``known_optimizer`` trains with."""
    return OPTIMIZERS[cfg.SOLVER.get("OPTIMIZER", SGD)]


def known_optimizer(cfg: CfgNode) -> Iterator[str]:
    """See ``known_choice``."""
    yield from known_choice(cfg, "SOLVER.OPTIMIZER", cfg.SOLVER.get("OPTIMIZER", SGD), OPTIMIZERS)


def positive_numbers(cfg: CfgNode) -> Iterator[str]:
    solver = cfg.SOLVER
    for name in ("MAX_ITER", "IMS_PER_BATCH", "CHECKPOINT_PERIOD"):
        if solver[name] < 1:
            yield f"SOLVER.{name} is {solver[name]}, expected 1 or more"
    if not 0 < solver.BASE_LR < math.inf:
        yield f"SOLVER.BASE_LR is {solver.BASE_LR}, expected above 0; the paper's is 0.02 at batch 16"
    for name in ("MOMENTUM", "WEIGHT_DECAY"):
        if not 0 <= solver[name] < 1:
            yield f"SOLVER.{name} is {solver[name]}, expected 0 or more and below 1"
    if solver.NESTEROV and not solver.MOMENTUM:
        yield "SOLVER.NESTEROV is True with SOLVER.MOMENTUM 0; set SOLVER.MOMENTUM 0.9 or SOLVER.NESTEROV False"
    if not 0 < solver.GAMMA <= 1:
        yield f"SOLVER.GAMMA is {solver.GAMMA}, expected above 0 and at most 1; the paper's is 0.1"


def cosine_ends(cfg: CfgNode) -> Iterator[str]:
    end, base = cfg.SOLVER.BASE_LR_END, cfg.SOLVER.BASE_LR
    if end and not is_cosine(cfg):
        yield f"SOLVER.BASE_LR_END is {end}, which only SOLVER.LR_SCHEDULER_NAME {COSINE} reads; set it to 0"
    elif base > 0 and not 0 <= end <= base:
        yield f"SOLVER.BASE_LR_END is {end}, expected from 0 to SOLVER.BASE_LR {base}"


def drops_happen(cfg: CfgNode) -> Iterator[str]:
    steps, max_iter = tuple(cfg.SOLVER.STEPS), cfg.SOLVER.MAX_ITER
    if is_cosine(cfg):
        if steps:
            yield f'SOLVER.STEPS is {steps}, but {COSINE} has no drops; set SOLVER.STEPS "()"'
        return
    if any(later <= earlier for earlier, later in zip((0, *steps), steps, strict=False)):
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


def warmup_ends(cfg: CfgNode) -> Iterator[str]:
    warmup, max_iter = cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.MAX_ITER
    if warmup < 0:
        yield f"SOLVER.WARMUP_ITERS is {warmup}, expected 0 or more"
    if warmup >= max_iter >= 1:
        yield (
            f"SOLVER.WARMUP_ITERS is {warmup}, as long as the run of SOLVER.MAX_ITER {max_iter}; "
            f"set SOLVER.WARMUP_ITERS {max_iter // 10} or train longer"
        )
    if not 0 <= cfg.SOLVER.WARMUP_FACTOR <= 1:
        yield f"SOLVER.WARMUP_FACTOR is {cfg.SOLVER.WARMUP_FACTOR}, expected a part of the learning rate from 0 to 1"


def clipping_is_known(cfg: CfgNode) -> Iterator[str]:
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if clip.ENABLED and clip.CLIP_TYPE not in ("value", "norm"):
        yield f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is '{clip.CLIP_TYPE}', expected 'value' or 'norm'"


def reference_world_size(cfg: CfgNode) -> Iterator[str]:
    reference, batch = cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.IMS_PER_BATCH
    if reference < 0 or (reference and batch % reference):
        yield (
            f"SOLVER.REFERENCE_WORLD_SIZE is {reference}, expected a number of processes that share "
            f"SOLVER.IMS_PER_BATCH {batch} evenly; set SOLVER.REFERENCE_WORLD_SIZE 0 to keep the batch in any number"
        )


def batch_divides(cfg: CfgNode, num_processes: int, accumulate: int) -> Iterator[str]:
    batch, parts = cfg.SOLVER.IMS_PER_BATCH, num_processes * accumulate
    if batch < 1 or batch % parts == 0:
        return
    processes = f"{num_processes} process{'es' if num_processes > 1 else ''}"
    if batch % num_processes:
        mend = f"--scale-to-batch {max(1, round(batch / parts)) * parts}"
    else:
        share = batch // num_processes
        mend = f"--accumulate {max(k for k in range(1, accumulate) if share % k == 0)}"
    yield (
        f"SOLVER.IMS_PER_BATCH is {batch} in total, which {processes}"
        f"{f' with --accumulate {accumulate}' if accumulate > 1 else ''} cannot share evenly; give {mend}"
    )


CHOICES = {
    "SOLVER.LR_SCHEDULER_NAME": ("WarmupMultiStepLR", COSINE),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
    "FLOAT32_PRECISION": ("", "highest", "high", "medium"),
    "INPUT.FORMAT": ("BGR", "RGB"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "INPUT.RANDOM_FLIP": ("none", "horizontal", "vertical"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
}
WAIVABLE = ("nothing_random_is_frozen", "bn_has_images")  # what trains, though badly; see --waive
NOT_HONOURED = ("VIS_PERIOD", "TEST.EXPECTED_RESULTS", "SOLVER.RESCALE_INTERVAL")
SMALLEST_VIEW = 32  # pixels: one cell of p5
DEVICES = ("cpu", "cuda", "mps", "xpu")  # torch's names; what a machine has is seen when the run starts


def check_config(cfg: CfgNode, num_processes: int = 1, accumulate: int = 1, waived: Collection[str] = ()) -> list[str]:
    """Notices for the log; raises one ConfigError with one line a problem when ``cfg`` cannot train as written.

    ``accumulate``: how many parts an iteration's images come in, one after another, in each of ``num_processes``.
    ``waived``: rules of WAIVABLE whose problems are notices, for who wants to see what comes of them.
    The batch is taken as it stands: ``settle_batch`` comes first.
    """
    if min(num_processes, accumulate) < 1:
        raise ValueError(f"num_processes {num_processes} and accumulate {accumulate} must be 1 or more")
    found = [(rule.__name__, problem) for rule in RULES for problem in rule(cfg)]
    found += [(rule.__name__, problem) for rule in PROCESS_RULES for problem in rule(cfg, num_processes, accumulate)]
    refuse(problem for rule, problem in found if rule not in waived)
    notices = [f"--waive {rule}: {problem}" for rule, problem in found]
    return [*notices, *sync_bn_notices(cfg, num_processes), *mirrored_views(cfg)]


def check_model(cfg: CfgNode) -> None:
    """Raise one ConfigError when the model cannot be built as written, whether or not it could be trained."""
    refuse(problem for rule in MODEL_RULES for problem in rule(cfg))


def known_choices(cfg: CfgNode) -> Iterator[str]:
    values = flatten(cfg)
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            expected = " or ".join(f"'{choice}'" for choice in choices)
            yield f"{key} is '{values[key]}', expected {expected}{did_you_mean(values[key], list(choices))}"


def nothing_is_ignored(cfg: CfgNode) -> Iterator[str]:
    """detectron2's trainer reads these keys, this one does not: a value that would change nothing is refused."""
    values, defaults = flatten(cfg), flatten(get_cfg())
    for key in NOT_HONOURED:
        if values[key] != defaults[key]:
            yield f"{key} is {values[key]!r}, which would change nothing here; leave it at {defaults[key]!r}"


def keypoints_can_be_flipped(cfg: CfgNode) -> Iterator[str]:
    """No keypoint changes places upside down, where detectron2 would still call a left eye left."""
    if cfg.MODEL.KEYPOINT_ON and cfg.INPUT.RANDOM_FLIP == "vertical":
        yield (
            "INPUT.RANDOM_FLIP is 'vertical' with MODEL.KEYPOINT_ON, expected horizontal or none: upside down, left "
            "and right keypoints would keep their names; set INPUT.RANDOM_FLIP horizontal"
        )


def has_training_data(cfg: CfgNode) -> Iterator[str]:
    if not cfg.DATASETS.TRAIN:
        yield "DATASETS.TRAIN is empty, expected at least one data set; set DATASETS.TRAIN \"('coco_2017_train',)\""


def known_device(cfg: CfgNode) -> Iterator[str]:
    name = cfg.MODEL.DEVICE
    kind, colon, number = name.partition(":")
    if kind not in DEVICES or (colon and not number.isdecimal()):
        mend = did_you_mean(kind, list(DEVICES))
        yield f"MODEL.DEVICE is '{name}', expected {', '.join(DEVICES)} or a numbered one such as cuda:0{mend}"


def output_dir_is_named(cfg: CfgNode) -> Iterator[str]:
    """An empty path means the current folder, which nobody wants filled with a run."""
    if not cfg.OUTPUT_DIR.strip():
        yield f"OUTPUT_DIR is {cfg.OUTPUT_DIR!r}, expected a folder; set OUTPUT_DIR output/NAME"


def workers(cfg: CfgNode) -> Iterator[str]:
    if cfg.DATALOADER.NUM_WORKERS < 0:
        yield (
            f"DATALOADER.NUM_WORKERS is {cfg.DATALOADER.NUM_WORKERS}, expected 0 or more; "
            "set DATALOADER.NUM_WORKERS 0 to read images in the training process"
        )


def resnet_depth(cfg: CfgNode) -> Iterator[str]:
    """ResNet-18 and 34 have no bottlenecks, so their res2 is as narrow as the stem (He et al. 2016, Table 1)."""
    resnets = cfg.MODEL.RESNETS
    if resnets.DEPTH not in (18, 34, 50, 101, 152):
        yield f"MODEL.RESNETS.DEPTH is {resnets.DEPTH}, expected 18, 34, 50, 101 or 152"
    elif resnets.DEPTH in (18, 34) and resnets.RES2_OUT_CHANNELS != 64:
        yield (
            f"MODEL.RESNETS.RES2_OUT_CHANNELS is {resnets.RES2_OUT_CHANNELS}, but a ResNet of DEPTH {resnets.DEPTH} "
            "has 64; set MODEL.RESNETS.RES2_OUT_CHANNELS 64"
        )


def roi_thresholds(cfg: CfgNode) -> Iterator[str]:
    thresholds = cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS
    if not thresholds or not all(0 < threshold < 1 for threshold in thresholds):
        yield f"MODEL.ROI_HEADS.IOU_THRESHOLDS is {thresholds}, expected IoUs between 0 and 1 such as [0.5]"


def cascade_stages(cfg: CfgNode) -> Iterator[str]:
    """Stages regress one box for all classes, and the first one samples at ROI_HEADS' own IoU."""
    if cfg.MODEL.ROI_HEADS.NAME != "CascadeROIHeads":
        return
    ious, weights = cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS, cfg.MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS
    if not cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
        yield (
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG is False, but the stages of CascadeROIHeads hand one box on, not "
            "one for each class; set it to True"
        )
    if len(ious) != len(weights) or not ious or any(len(four) != 4 for four in weights):
        yield (
            f"MODEL.ROI_BOX_CASCADE_HEAD has IOUS {ious} and BBOX_REG_WEIGHTS {weights}, expected one IoU and four "
            "weights a stage"
        )
    elif list(cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS) != [ious[0]]:
        yield (
            f"MODEL.ROI_HEADS.IOU_THRESHOLDS is {cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS}, but the cascade's first stage "
            f"matches at IoU {ious[0]}; set it to [{ious[0]}]"
        )


def test_images(cfg: CfgNode) -> Iterator[str]:
    """What an evaluation would stop at, perhaps after the whole training."""
    least = {"INPUT.MIN_SIZE_TEST": 0, "INPUT.MAX_SIZE_TEST": 1, "TEST.DETECTIONS_PER_IMAGE": 1}
    mends = {"TEST.DETECTIONS_PER_IMAGE": "; a large number keeps all"}  # as -1 does in detectron2
    values = flatten(cfg)
    for key, value in least.items():
        if values[key] < value:
            yield f"{key} is {values[key]}, expected {value} or more{mends.get(key, '')}"


def augmentation(cfg: CfgNode) -> Iterator[str]:
    """Test-time augmentation has views."""
    keys = cfg.TEST.AUG
    if not keys.ENABLED:
        return
    sides = tuple(keys.MIN_SIZES)
    whole = all(isinstance(side, int) for side in (*sides, keys.MAX_SIZE))
    if not sides or not whole or not SMALLEST_VIEW <= min(sides) <= max(sides) <= keys.MAX_SIZE:
        yield (
            f"TEST.AUG has MIN_SIZES {sides} and MAX_SIZE {keys.MAX_SIZE}, expected one or more sides in whole pixels, "
            f"{SMALLEST_VIEW} at least, and a longest one above them"
        )


def mirrored_views(cfg: CfgNode) -> Iterator[str]:
    if cfg.TEST.AUG.ENABLED and cfg.TEST.AUG.FLIP and cfg.INPUT.RANDOM_FLIP != "horizontal":
        yield (
            f"TEST.AUG.FLIP is True, but INPUT.RANDOM_FLIP is {cfg.INPUT.RANDOM_FLIP}: half of the views will be "
            "mirrored, which the model never sees in training; set TEST.AUG.FLIP False where that is another object"
        )


MODEL_RULES: tuple[Callable[[CfgNode], Iterator[str]], ...] = (
    known_norms,
    gn_channels_divide,
    backbone_keys,
    resnet_depth,
    roi_thresholds,
    cascade_stages,
)
RULES: tuple[Callable[[CfgNode], Iterator[str]], ...] = (
    nothing_random_is_frozen,
    *MODEL_RULES,
    test_images,
    augmentation,
    known_choices,
    nothing_is_ignored,
    known_augmentation,
    keypoints_can_be_flipped,
    has_training_data,
    workers,
    known_device,
    output_dir_is_named,
    known_optimizer,
    positive_numbers,
    drops_happen,
    cosine_ends,
    warmup_ends,
    reference_world_size,
    clipping_is_known,
)
PROCESS_RULES: tuple[Callable[[CfgNode, int, int], Iterator[str]], ...] = (
    batch_divides,
    bn_has_images,
)
