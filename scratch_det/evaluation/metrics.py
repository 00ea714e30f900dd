"""The one list of metrics: tables, curves, boards, reports and the choice of model_best.pth derive from ``METRICS``.

The name of a metric is ``task/score``, as in metrics.json; the first one of a task is its main metric. To add an AP,
add a line; to add another kind of number, also compute it in the function that returns the task's scores.
Imports neither torch nor matplotlib.
"""

from dataclasses import dataclass, replace

from fvcore.common.config import CfgNode

# Okabe and Ito's colours, which colour-blind readers tell apart, with brown instead of their yellow: it is darker.
BLUE, VERMILION, GREEN, PURPLE, SKY, BROWN, BLACK = COLORS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#8B6914", "black",
)  # fmt: skip
TTA = "_TTA"  # ends the names of tasks that are evaluated with test-time augmentation


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
    "bbox/AP": Metric("box AP", BLUE, "o"),
    "bbox/AP50": Metric("box AP50", iou=0.5),
    "bbox/AP75": Metric("box AP75", iou=0.75),
    "bbox/APs": Metric("box APs", area="small"),
    "bbox/APm": Metric("box APm", area="medium"),
    "bbox/APl": Metric("box APl", area="large"),
    "segm/AP": Metric("mask AP", VERMILION, "s"),
    "segm/AP50": Metric("mask AP50", iou=0.5),
    "segm/AP75": Metric("mask AP75", iou=0.75),
    "segm/APs": Metric("mask APs", area="small"),
    "segm/APm": Metric("mask APm", area="medium"),
    "segm/APl": Metric("mask APl", area="large"),
    "keypoints/AP": Metric("keypoint AP", GREEN, "D"),
    "keypoints/AP50": Metric("keypoint AP50", iou=0.5),
    "keypoints/AP75": Metric("keypoint AP75", iou=0.75),
    "keypoints/APm": Metric("keypoint APm", area="medium"),  # COCO annotates no keypoints of small people
    "keypoints/APl": Metric("keypoint APl", area="large"),
    "classification/top1": Metric("top-1", BLUE, "o"),
    "classification/top5": Metric("top-5", VERMILION, "s"),
}


def all_metrics() -> dict[str, Metric]:
    """METRICS, followed by those of detection with test-time augmentation, such as "bbox_TTA/AP"."""
    augmented = {
        name.replace("/", f"{TTA}/"): replace(metric, label=f"{metric.label}, test aug", marker="*")
        for name, metric in METRICS.items()
        if not name.startswith("classification/")
    }
    return METRICS | augmented


def metrics_of(task: str) -> dict[str, Metric]:
    """The metrics of a task by score: {"AP": ..., "AP50": ...} of "bbox"."""
    return {name.partition("/")[2]: metric for name, metric in METRICS.items() if name.startswith(f"{task}/")}


def main_metrics() -> dict[str, Metric]:
    """The first metric of each task, those with test-time augmentation included."""
    first: dict[str, str] = {}
    for name in (metrics := all_metrics()):
        first.setdefault(name.partition("/")[0], name)
    return {name: metrics[name] for name in first.values()}


def main_score(task: str) -> tuple[str, str]:
    """Task and score of its main metric, which model_best.pth is chosen by."""
    return task, next(iter(metrics_of(task)))


def detection_tasks(cfg: CfgNode) -> list[str]:
    """The tasks that the model of ``cfg`` is evaluated on."""
    heads = {"bbox": True, "segm": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINT_ON}
    return [task for task, is_on in heads.items() if is_on]
