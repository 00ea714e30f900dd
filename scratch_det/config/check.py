"""Cross-field rules: what cannot train as written is refused before iteration 1, with the change that mends it.

A rule is a generator of problems, one line each: what was found, what is expected, the key, the mend.
"""

from collections.abc import Callable, Collection, Iterator

from fvcore.common.config import CfgNode

from scratch_det.config import norm_rules, solver_rules
from scratch_det.config.augmentation import known_augmentation
from scratch_det.config.bodies import body_keys
from scratch_det.config.curve import COSINE
from scratch_det.config.defaults import get_cfg
from scratch_det.config.keys import flatten
from scratch_det.errors import did_you_mean, refuse

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
    return [*notices, *norm_rules.sync_bn_notices(cfg, num_processes), *mirrored_views(cfg)]


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
    norm_rules.known_norms,
    norm_rules.gn_channels_divide,
    body_keys,
    resnet_depth,
    roi_thresholds,
    cascade_stages,
)
RULES: tuple[Callable[[CfgNode], Iterator[str]], ...] = (
    norm_rules.nothing_random_is_frozen,
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
    solver_rules.known_optimizer,
    solver_rules.positive_numbers,
    solver_rules.drops_happen,
    solver_rules.cosine_ends,
    solver_rules.warmup_ends,
    solver_rules.reference_world_size,
    solver_rules.clipping_is_known,
)
PROCESS_RULES: tuple[Callable[[CfgNode, int, int], Iterator[str]], ...] = (
    solver_rules.batch_divides,
    norm_rules.bn_has_images,
)
