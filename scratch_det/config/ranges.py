"""The values that a key may have, whatever the other keys say: one table of numbers and lists, one of words."""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

from fvcore.common.config import CfgNode

from scratch_det.config.choices import PIXELS, PROJECT_KEYS, RECIPES
from scratch_det.config.load import flatten, get_cfg
from scratch_det.errors import did_you_mean

Test = Callable[[Any], object]
Row = tuple[str, Test, str]

LARGEST = 2**62  # sizes and seeds of torch are 64-bit numbers
CHANNELS, LAYERS, CELLS, CLASSES = 16_384, 100, 112, 30_000  # far more than any detector has
IMAGES, WORKERS = 65_536, 1024  # ... and any machine takes
SMALLEST_VIEW = 32  # pixels: one cell of p5


def within(low: float, high: float = LARGEST) -> Test:
    """From ``low`` to ``high``; NaN is nowhere."""
    return lambda n: low <= n <= high


def above(low: float, high: float = LARGEST) -> Test:
    """Above ``low`` and at most ``high``."""
    return lambda n: low < n <= high


def each(fits: Test, least: int = 1, most: int = LARGEST) -> Test:
    """A list of ``least`` to ``most`` elements that all fit."""
    return lambda items: least <= len(items) <= most and all(map(fits, items))


def whole(low: int) -> Test:
    """A number without a fraction from ``low`` on; yacs rejects fractions only outside of lists."""
    return lambda n: isinstance(n, int) and low <= n <= LARGEST


def rising(ious: Any) -> bool:
    """IoUs between 0 and 1, none below the one before."""
    return list(ious) == sorted(ious) and bool(each(lambda iou: 0 < iou < 1)(ious))


def not_negative(value: Any) -> bool:
    """What holds for keys without a row: no number in it is negative, infinite or NaN."""
    if isinstance(value, list | tuple):
        return all(map(not_negative, value))
    return not isinstance(value, int | float) or 0 <= value <= LARGEST


ROWS: tuple[Row, ...] = (  # pattern of keys, test, what is expected; the first row that matches counts
    ("SEED", within(-LARGEST), "a whole number"),
    # An empty name is the current folder, which nobody wants filled with a run.
    ("OUTPUT_DIR", str.strip, "a folder; set OUTPUT_DIR output/NAME"),
    # torch's names; what a machine has is seen when the run starts
    (r"MODEL\.DEVICE", re.compile(r"(cpu|cuda|mps|xpu)(:\d+)?").fullmatch, "cuda (cuda:0, mps, xpu) for a GPU, or cpu"),
    (r"MODEL_EMA\.DECAY", lambda part: 0 <= part < 1, "0 or more and below 1, such as 0.999"),
    (r"MODEL\.PIXEL_MEAN", each(within(-LARGEST), 3, 3), "three numbers, one a channel"),
    (r"MODEL\.PIXEL_STD", each(above(0), 3, 3), "three numbers above 0, one a channel"),
    (r".*\.FREEZE_AT", within(0, 5), "0, which freezes nothing, to 5"),
    (r"MODEL\.RESNETS\.DEPTH", lambda depth: depth in (18, 34, 50, 101, 152), "18, 34, 50, 101 or 152"),
    (r".*\.RES5_DILATION", within(1, 2), "1 or 2"),
    (r".*\.DEFORM_ON_PER_STAGE", lambda stages: len(stages) == 4, "True or False for each of four stages"),
    (r".*\.(\w*NUM_GROUPS|WIDTH_PER_GROUP|\w*OUT_CHANNELS|CONV_DIM|FC_DIM)", within(1, CHANNELS), f"1 to {CHANNELS}"),
    (r".*\.(NUM_CONV|NUM_FC)", within(0, LAYERS), f"0 to {LAYERS}"),
    (r".*\.POOLER_RESOLUTION", within(1, CELLS), f"1 to {CELLS} cells a side"),
    (r".*\.POOLER_SAMPLING_RATIO", within(0, CELLS), f"0, which adapts to the box, to {CELLS}"),
    (r".*RPN\.CONV_DIMS", each(lambda n: n in (-1, *range(1, CHANNELS + 1)), 0, LAYERS),
     f"for each convolution -1 or channels up to {CHANNELS}, such as [-1]"),
    (r".*\.CONV_DIMS", each(lambda n: n in range(1, CHANNELS + 1), 0, LAYERS), f"channels up to {CHANNELS}, of each"),
    (r".*ANCHOR_GENERATOR\.SIZES", each(each(above(0, 1e6))), "lists of sides in pixels such as [[32, 64]]"),
    (r".*\.ASPECT_RATIOS", each(each(within(1e-3, 1e3))), "lists such as [[0.5, 1.0, 2.0]]"),
    (r".*\.ANGLES", each(each(within(-360, 360))), "lists of degrees such as [[0]]"),
    (r".*GENERATOR\.OFFSET", lambda part: 0 <= part < 1, "a part of the stride, 0 or more and below 1"),
    (r".*\.BOUNDARY_THRESH", within(-1), "pixels, 0 or more, or -1 to keep all anchors"),
    (r".*\.IOU_THRESHOLDS", rising, "rising IoUs between 0 and 1 such as [0.5] or [0.3, 0.7]"),
    (r".*\.IOU_LABELS", each(lambda n: n in (-1, 0, 1)), "a list of 0, 1 and -1"),
    (r".*(BATCH_SIZE_PER_IMAGE|TOPK_\w+|MAX_ITER|CHECKPOINT_PERIOD|MAX_SIZE_T\w+)", within(1), "1 or more"),
    (r".*\.(NUM_CLASSES|NUM_KEYPOINTS)", within(1, CLASSES), f"1 to {CLASSES}"),
    (r".*\.POSITIVE_FRACTION", above(0, 1), "above 0 and at most 1"),
    (r".*\.(NMS_THRESH\w*|SCORE_THRESH_TEST|VOTE_THRESH|WARMUP_FACTOR)", within(0, 1), "from 0 to 1"),
    (r".*CASCADE_HEAD\.BBOX_REG_WEIGHTS", each(each(above(0), 4, 4)), "four numbers above 0 a stage"),
    (r".*\.BBOX_REG_WEIGHTS", each(above(0), 4, 4), "four numbers above 0"),
    (r".*\.IOUS", each(lambda iou: 0 < iou < 1), "an IoU between 0 and 1 a stage"),
    (r"INPUT\.MIN_SIZE_TRAIN", each(whole(1)), "one or more sides in pixels such as (800,)"),
    (r"DATASETS\.TRAIN", each(lambda name: isinstance(name, str)),
     "at least one data set; set DATASETS.TRAIN \"('coco_2017_train',)\""),
    (r"DATASETS\.CLASS_NAMES", each(lambda name: isinstance(name, str), 0), "names; leave it out: the data decides"),
    (r"DATASETS\.TEST", each(lambda name: isinstance(name, str), 0), "names of data sets such as ('coco_2017_val',)"),
    (r".*\.NUM_WORKERS", within(0, WORKERS), "0 or more; 0 reads images in the training process"),
    (r"SOLVER\.IMS_PER_BATCH", within(1, IMAGES), f"1 or more, at most {IMAGES}"),
    (r"SOLVER\.BASE_LR", above(0), "above 0; the paper's is 0.02 at batch 16"),
    (r"SOLVER\.STEPS", each(whole(-LARGEST), 0), "whole numbers of iterations"),
    (r"SOLVER\.(MOMENTUM|WEIGHT_DECAY\w*)", lambda n: n is None or 0 <= n < 1, "0 or more and below 1"),
    (r"SOLVER\.GAMMA", above(0, 1), "above 0 and at most 1; the paper's is 0.1"),
    (r"SOLVER\.CLIP_GRADIENTS\.(CLIP_VALUE|NORM_TYPE)", above(0, math.inf), "above 0"),
    (r".*\.DETECTIONS_PER_IMAGE", within(1), "1 or more; a large number keeps all"),  # as -1 does in detectron2
    (r".*\.KEYPOINT_OKS_SIGMAS", each(lambda n: isinstance(n, int | float) and n > 0, 0), "numbers above 0"),
    (r"TEST\.PATIENCE", within(0), "a number of evaluations, or 0, which ends no run early"),
    (r"TEST\.AUG\.MIN_SIZES", each(whole(SMALLEST_VIEW)), f"sides in whole pixels, {SMALLEST_VIEW} at least"),
    (r"TEST\.AUG\.MAX_SIZE", within(SMALLEST_VIEW), f"pixels of the longer side, {SMALLEST_VIEW} at least"),
)  # fmt: skip
ALLOWED = {
    "MODEL.ANCHOR_GENERATOR.ROUNDING": ("", "Detectron", "torchvision"),
    "MODEL.WEIGHTS_PIXELS": ("", *PIXELS, RECIPES),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
    "FLOAT32_PRECISION": ("", "highest", "high", "medium"),
    "INPUT.FORMAT": ("BGR", "RGB"),
    "INPUT.MASK_FORMAT": ("polygon", "bitmask"),
    "INPUT.RANDOM_FLIP": ("none", "horizontal", "vertical"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
}


@cache
def row_of(key: str) -> Row | None:
    """The row of ROWS for a key; without one a project's key may be anything, any other is not negative."""
    default = None if key in PROJECT_KEYS else (key, not_negative, "0 or more")
    return next((row for row in ROWS if re.fullmatch(row[0], key)), default)


def known_values(cfg: CfgNode, section: str = "") -> Iterator[str]:
    """The values of the keys that begin with ``section`` fit their rows, and are one of their words in ALLOWED."""
    values = flatten(cfg)
    for key in flatten(get_cfg()):
        if key.startswith(section) and (row := row_of(key)) and not row[1](value := values[key]):
            limit = ", which is too large" if isinstance(value, int | float) and value > LARGEST else ""
            yield f"{key} is {value!r}{limit}, expected {row[2]}"
    for key, words in ALLOWED.items():
        if key.startswith(section):
            yield from is_one_of(key, values[key], words)


def is_one_of(key: str, word: str, words: Iterable[str]) -> Iterator[str]:
    """A problem when the value ``word`` of ``key`` is none of ``words``."""
    if word not in (words := list(words)):
        yield f"{key} is '{word}', expected {' or '.join(map(repr, words))}{did_you_mean(word, words)}"
