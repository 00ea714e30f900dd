"""The figures of a diagnosis, as SVG: precision and recall, AP by IoU, confusions, calibration."""

import base64
import io
from collections.abc import Mapping
from itertools import cycle

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from scratch_det.diagnosis.numbers import Diagnosis
from scratch_det.errors import shortened
from scratch_det.evaluation.average_precision import IOU_THRESHOLDS, at_iou
from scratch_det.evaluation.metrics import COLORS
from scratch_det.visualization.curves import NO_METADATA, STYLE

SIZE = (5.2, 3.6)  # inches
MOST_CLASSES = 25  # in the matrix of confusions: those with the most objects
Models = Mapping[str, Diagnosis]  # by what they are called


def as_svg(figure: Figure) -> str:
    """As a data URI."""
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata=NO_METADATA[".svg"])
    return f"data:image/svg+xml;base64,{base64.b64encode(content.getvalue()).decode()}"


@rc_context(STYLE)
def precision_and_recall(models: Models) -> str:
    """The mean precision of the classes at each recall, at IoU 0.5 (solid) and 0.75 (dashed)."""
    figure = Figure(figsize=SIZE)
    axes = figure.add_subplot(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1))
    axes.grid(True)
    for (name, found), color in zip(models.items(), cycle(COLORS), strict=False):
        for iou, line in ((0.5, "-"), (0.75, "--")):
            values = np.nanmean(found.precision[at_iou(iou)][0], axis=1)
            axes.plot(np.linspace(0, 1, len(values)), values, line, color=color, label=f"{name}, IoU {iou:g}")
    axes.legend()
    return as_svg(figure)


@rc_context(STYLE)
def ap_by_iou(models: Models) -> str:
    """Mean AP at each IoU: where boxes are exact, the curve falls late."""
    figure = Figure(figsize=SIZE)
    axes = figure.add_subplot(xlabel="IoU with the object from which a detection is right", ylabel="AP (%)")
    axes.grid(True)
    for (name, found), color in zip(models.items(), cycle(COLORS), strict=False):
        axes.plot(IOU_THRESHOLDS, found.at_thresholds(), "o-", color=color, label=name)
    axes.set_ylim(bottom=0)
    axes.legend()
    return as_svg(figure)


@rc_context(STYLE)
def calibration(models: Models) -> str:
    """Of detections with about a score, the share that is right; on the diagonal a score is a probability."""
    figure = Figure(figsize=SIZE)
    axes = figure.add_subplot(xlabel="score", ylabel="share of right detections", xlim=(0, 1), ylim=(0, 1))
    axes.grid(True)
    axes.plot([0, 1], [0, 1], color="#888888", linewidth=1)
    for (name, found), color in zip(models.items(), cycle(COLORS), strict=False):
        shown = found.calibration[found.calibration[:, 3] > 0]
        axes.plot(shown[:, 1], shown[:, 2], "o-", color=color, label=name)
    axes.legend()
    return as_svg(figure)


@rc_context(STYLE)
def confusions(found: Diagnosis) -> str:
    """True classes (rows) by predicted ones; the last column is missed, the last row background."""
    chosen = np.sort(np.argsort(-found.counts, kind="stable")[:MOST_CLASSES])
    places, names = [*chosen, len(found.classes)], [shortened(found.classes[k], 20) for k in chosen]
    table = found.confusion[np.ix_(places, places)].astype(float)
    shares = table / np.maximum(found.confusion[places].sum(1, keepdims=True), 1)
    side = 2.2 + 0.32 * len(places)
    figure = Figure(figsize=(side, side))
    axes = figure.add_subplot(xlabel="predicted", ylabel="true")
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(places)), [*names, "missed"], rotation=90)
    axes.set_yticks(range(len(places)), [*names, "background"])
    for (row, column), count in np.ndenumerate(table):
        if count:
            ink = "white" if shares[row, column] > 0.5 else "#333333"
            axes.text(column, row, f"{count:.0f}", ha="center", va="center", fontsize=7, color=ink)
    return as_svg(figure)
