"""The one list of metrics, METRICS, and tables of their values.

Log tables, curves, reports and the choice of model_best.pth all read it. The name of a metric is ``task/score``, as in
metrics.json; the first one of a task is its main metric. To add an AP, add a line; to add another kind of number, also
compute it in the function that returns the task's scores. Imports neither torch nor matplotlib.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain, cycle
from typing import Any

from fvcore.common.config import CfgNode

from scratch_det.tables import markdown

Metrics = dict[str, dict[str, float]]  # task -> score -> value

# Okabe and Ito's colours, which colour-blind readers tell apart, with brown instead of their yellow, and some more. All
# can be seen on white and on nearly black; INK, of text and of what stands out, is light on a dark page.
BLUE, VERMILION, GREEN, PURPLE, SKY, BROWN = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8B6914"
INK, OLIVE, WINE, GREY = "#222222", "#999933", "#AA4466", "#808080"
SCRATCH, PRETRAINED = "scratch", "pretrained"
# Label, colour and marker in every figure and page; nothing else has these two colours.
INITS = {SCRATCH: ("random initialisation", VERMILION, "o"), PRETRAINED: ("pre-trained", BLUE, "s")}
COLORS = GREEN, PURPLE, SKY, BROWN, INK, OLIVE, WINE, GREY
TTA = "_TTA"  # ends the names of tasks that are evaluated with test-time augmentation
EMA = "_EMA"  # ... with the moving average of the weights
VARIANTS = {TTA: (", test aug", "*"), EMA: (", EMA", "^"), EMA + TTA: (", EMA, test aug", "P")}  # label, marker
CLASSES_PER_ROW = 3  # in the table of AP per class


@dataclass(frozen=True)
class Metric:
    """A number that an evaluation returns.

    Attributes:
        label: for axes, legends and table headers.
        color, marker: of its curve in curves.png; without a color it has no curve.
        iou: the IoU threshold of an AP; None: the mean over 0.50, 0.55, ..., 0.95.
        area: the objects that an AP is of: "all", or COCO's "small" (below 32^2 px), "medium", "large" (above 96^2 px).
        percent: whether it lies between 0 and 100.
    """

    label: str
    color: str = ""
    marker: str = "o"
    iou: float | None = None
    area: str = "all"
    percent: bool = True

    @property
    def axis(self) -> str:
        """The label with its unit."""
        return f"{self.label} (%)" if self.percent else self.label


METRICS = {
    "bbox/AP": Metric("box AP", GREEN, "o"),
    "bbox/AP50": Metric("box AP50", iou=0.5),
    "bbox/AP75": Metric("box AP75", iou=0.75),
    "bbox/APs": Metric("box APs", area="small"),
    "bbox/APm": Metric("box APm", area="medium"),
    "bbox/APl": Metric("box APl", area="large"),
    "segm/AP": Metric("mask AP", PURPLE, "s"),
    "segm/AP50": Metric("mask AP50", iou=0.5),
    "segm/AP75": Metric("mask AP75", iou=0.75),
    "segm/APs": Metric("mask APs", area="small"),
    "segm/APm": Metric("mask APm", area="medium"),
    "segm/APl": Metric("mask APl", area="large"),
    "keypoints/AP": Metric("keypoint AP", BROWN, "D"),
    "keypoints/AP50": Metric("keypoint AP50", iou=0.5),
    "keypoints/AP75": Metric("keypoint AP75", iou=0.75),
    "keypoints/APm": Metric("keypoint APm", area="medium"),  # COCO annotates no keypoints of small people
    "keypoints/APl": Metric("keypoint APl", area="large"),
    "classification/top1": Metric("top-1", GREEN, "o"),
    "classification/top5": Metric("top-5", PURPLE, "s"),
}
LOSSES = {  # by key of metrics.json: label, colour, line width in curves.png
    "total_loss": ("total", INK, 2.2),
    "loss_cls": ("class", WINE, 1.2),
    "loss_box_reg": ("box", GREEN, 1.2),
    "loss_mask": ("mask", PURPLE, 1.2),
    "loss_keypoint": ("keypoints", BROWN, 1.2),
    "loss_rpn_cls": ("proposal objectness", OLIVE, 1.2),
    "loss_rpn_loc": ("proposal box", SKY, 1.2),
}


def colors_of(inits: Mapping[str, str]) -> dict[str, str]:
    """The colour of each line by its label, from their initialisations: its own where no other line has the same."""
    counts, others = Counter(inits.values()), cycle(COLORS)
    return {label: INITS[init][1] if init in INITS and counts[init] == 1 else next(others)
            for label, init in inits.items()}  # fmt: skip


def all_metrics() -> dict[str, Metric]:
    """METRICS, followed by their variants, such as "bbox_TTA/AP"."""
    return METRICS | {
        name.replace("/", f"{end}/"): replace(metric, label=metric.label + words, marker=marker)
        for end, (words, marker) in VARIANTS.items()
        for name, metric in METRICS.items()
    }


def metrics_of(task: str) -> dict[str, Metric]:
    """The metrics of a task by score: {"AP": ..., "AP50": ...} of "bbox"."""
    return {name.partition("/")[2]: metric for name, metric in METRICS.items() if name.startswith(f"{task}/")}


def main_metrics() -> dict[str, Metric]:
    """The first metric of each task, variants included."""
    first: dict[str, tuple[str, Metric]] = {}
    for name, metric in all_metrics().items():
        first.setdefault(name.partition("/")[0], (name, metric))
    return dict(first.values())


def main_score(task: str) -> tuple[str, str]:
    """Task and score of its main metric, which model_best.pth is chosen by."""
    return task, next(iter(metrics_of(task)))


def detection_tasks(cfg: CfgNode) -> list[str]:
    """The tasks that the model of ``cfg`` is evaluated on."""
    heads = {"bbox": True, "segm": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINT_ON}
    return [task for task, is_on in heads.items() if is_on]


def suffixes(cfg: CfgNode) -> list[str]:
    """What ends the names of the tasks of a complete run's evaluation: "", then the variants that it has."""
    ends = [end for end, is_on in (("", True), (EMA, cfg.MODEL_EMA.ENABLED)) if is_on]
    return [end + augmented for augmented in ("", TTA)[: 1 + cfg.TEST.AUG.ENABLED] for end in ends]


def format_table(metrics: Metrics) -> str:
    """A Markdown table: one row per task, its METRICS in percent with one decimal, '-' for nan or absent."""
    names = (name.partition("/") for name in METRICS)
    columns = list(dict.fromkeys(score for task, _, score in names if task != "classification"))
    rows = [[task, *(_cell(values.get(name)) for name in columns)] for task, values in metrics.items()]
    return markdown(["task", *columns], rows, align=["left"] + ["right"] * len(columns))


def format_per_class(metrics: Metrics) -> str:
    """A Markdown table of AP per class (one column per task), CLASSES_PER_ROW side by side, read downwards.

    An empty string for a single class, where the per-class AP is the AP.
    """
    names = [key for key in next(iter(metrics.values()), {}) if key.startswith("AP-")]
    if not names:
        return ""
    cells = [[name[3:], *(_cell(values.get(name)) for values in metrics.values())] for name in names]
    side_by_side = min(CLASSES_PER_ROW, len(cells))
    height = math.ceil(len(cells) / side_by_side)
    cells += [[""] * (1 + len(metrics))] * (side_by_side * height - len(cells))
    rows = [list(chain.from_iterable(cells[start::height])) for start in range(height)]
    align = (["left"] + ["right"] * len(metrics)) * side_by_side
    return markdown(["class", *metrics] * side_by_side, rows, align)


def _cell(value: float | None) -> str:
    """One decimal, or '-' for nan and for None, its form in JSON."""
    return "-" if value is None or math.isnan(value) else f"{value:.1f}"


def to_json_numbers(metrics: Any) -> Any:
    """The same nested mapping with None for nan and infinities, which ``json.dump(..., allow_nan=False)`` accepts."""
    if isinstance(metrics, Mapping):
        return {name: to_json_numbers(value) for name, value in metrics.items()}
    return None if isinstance(metrics, float) and not math.isfinite(metrics) else metrics
