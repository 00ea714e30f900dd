"""The figures of a diagnosis, as SVG: precision and recall, AP by IoU, confusions, calibration."""

from collections.abc import Mapping, Sequence
from typing import Any

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
Line = tuple[str, str, str, Any, Any]  # label, colour, style, x and y


def precision_and_recall(models: Models, colors: Colors) -> str:
    """The mean precision of the classes at each recall, at IoU 0.5 (solid) and 0.75 (dashed)."""
    curves = []
    for name, found in models.items():
        for iou, line in ((0.5, "-"), (0.75, "--")):
            values = np.nanmean(found.precision[at_iou(iou)][0], axis=1)
            curves.append((f"{name}, IoU {iou:g}", colors[name], line, np.linspace(0, 1, len(values)), values))
    return _lines(curves, xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1))


def ap_by_iou(models: Models, colors: Colors) -> str:
    """Mean AP at each IoU: where boxes are exact, the curve falls late."""
    curves = [(name, colors[name], "o-", IOU_THRESHOLDS, found.at_thresholds()) for name, found in models.items()]
    return _lines(curves, xlabel="IoU with the object from which a detection is right", ylabel="AP (%)", ylim=(0, None))


def calibration(models: Models, colors: Colors) -> str:
    """Of detections with about a score, the share that is right; on the diagonal a score is a probability."""
    curves: list[Line] = [("", GREY, "-", [0, 1], [0, 1])]
    for name, found in models.items():
        shown = found.calibration[found.calibration[:, 3] > 0]
        curves.append((name, colors[name], "o-", shown[:, 1], shown[:, 2]))
    return _lines(curves, xlabel="score", ylabel="share of right detections", xlim=(0, 1), ylim=(0, 1))


@rc_context(STYLE)
def _lines(curves: Sequence[Line], **labels: Any) -> str:
    figure = Figure(figsize=SIZE)
    axes = figure.add_subplot()
    axes.grid(True)
    for name, color, style, x, y in curves:
        axes.plot(x, y, style, color=color, label=name, linewidth=None if name else 1)
    axes.set(**labels)  # after the lines: ylim (0, None) keeps the upper limit that they set
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
