"""The figures of a diagnosis, as SVG: precision and recall, AP by IoU, confusions, calibration."""

from collections.abc import Mapping

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from scratch_det.diagnosis.numbers import Diagnosis
from scratch_det.errors import shortened
from scratch_det.evaluation.average_precision import IOU_THRESHOLDS, at_iou
from scratch_det.evaluation.metrics import GREY, INK
from scratch_det.visualization.curves import STYLE, as_svg

SIZE = (5.2, 3.6)  # inches
MOST_CLASSES = 25  # in the matrix of confusions: those with the most objects
Models = Mapping[str, Diagnosis]  # by what they are called
Colors = Mapping[str, str]  # of each of them


@rc_context(STYLE)
def precision_and_recall(models: Models, colors: Colors) -> str:
    """The mean precision of the classes at each recall, at IoU 0.5 (solid) and 0.75 (dashed)."""
    figure = Figure(figsize=SIZE)
    axes = figure.add_subplot(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1))
    axes.grid(True)
    for name, found in models.items():
        for iou, line in ((0.5, "-"), (0.75, "--")):
            values = np.nanmean(found.precision[at_iou(iou)][0], axis=1)
            axes.plot(np.linspace(0, 1, len(values)), values, line, color=colors[name], label=f"{name}, IoU {iou:g}")
    axes.legend()
    return as_svg(figure)


@rc_context(STYLE)
def ap_by_iou(models: Models, colors: Colors) -> str:
    """Mean AP at each IoU: where boxes are exact, the curve falls late."""
    figure = Figure(figsize=SIZE)
    axes = figure.add_subplot(xlabel="IoU with the object from which a detection is right", ylabel="AP (%)")
    axes.grid(True)
    for name, found in models.items():
        axes.plot(IOU_THRESHOLDS, found.at_thresholds(), "o-", color=colors[name], label=name)
    axes.set_ylim(bottom=0)
    axes.legend()
    return as_svg(figure)


@rc_context(STYLE)
def calibration(models: Models, colors: Colors) -> str:
    """Of detections with about a score, the share that is right; on the diagonal a score is a probability."""
    figure = Figure(figsize=SIZE)
    axes = figure.add_subplot(xlabel="score", ylabel="share of right detections", xlim=(0, 1), ylim=(0, 1))
    axes.grid(True)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1)
    for name, found in models.items():
        shown = found.calibration[found.calibration[:, 3] > 0]
        axes.plot(shown[:, 1], shown[:, 2], "o-", color=colors[name], label=name)
    axes.legend()
    return as_svg(figure)


@rc_context(STYLE)
def confusions(found: Diagnosis, color: str) -> str:
    """True classes (rows) by predicted ones; the last column is missed, the last row background."""
    chosen = np.sort(np.argsort(-found.counts, kind="stable")[:MOST_CLASSES])
    places, names = [*chosen, len(found.classes)], [shortened(found.classes[k], 20) for k in chosen]
    table = found.confusion[np.ix_(places, places)].astype(float)
    shares = table / np.maximum(found.confusion[places].sum(1, keepdims=True), 1)
    side = 2.2 + 0.32 * len(places)
    figure = Figure(figsize=(side, side))
    axes = figure.add_subplot(xlabel="predicted", ylabel="true")
    axes.imshow(np.ones_like(shares), cmap=ListedColormap([color]), alpha=shares)
    axes.set_xticks(range(len(places)), [*names, "missed"], rotation=90)
    axes.set_yticks(range(len(places)), [*names, "background"])
    for (row, column), count in np.ndenumerate(table):
        if count:
            ink = "white" if shares[row, column] > 0.6 else INK
            axes.text(column, row, f"{count:.0f}", ha="center", va="center", fontsize=7, color=ink)
    return as_svg(figure)
