"""The grid as a picture: its longest axis from left to right, every combination of the others a row."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from scratch_det.evaluation.metrics import VERMILION
from scratch_det.visualization.curves import save_figure

if TYPE_CHECKING:
    from scratch_det.search.board import Record


def draw_grid(records: Sequence["Record"], metric: str, out_png: str | Path) -> Path:
    """Draw ``metric`` of every point, in the grid's order, the best one framed; returns the path of the PNG."""
    across, columns, rows = layout(records)
    values, texts, best = np.full((len(rows), len(columns)), np.nan), {}, None
    for record in records:
        place = rows.index(_row(record, across)), columns.index(record.point.labels[across])
        if record.value is not None:
            best = place if best is None or record.value > values[best] else best
            values[place] = record.value
        texts[place] = str(record)

    figure = Figure(figsize=(3 + 1.2 * len(columns), 1.8 + 0.55 * len(rows)), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.set_title(metric, loc="left", fontsize=11, fontweight="bold")
    axes.set_facecolor("#dddddd")  # shows where there is no value
    axes.imshow(np.ma.masked_invalid(values), cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(across)
    for (row, column), value in np.ndenumerate(values):
        dark = np.isfinite(value) and value < np.nanmin(values) + 0.6 * np.ptp(values[np.isfinite(values)])
        axes.text(column, row, texts[row, column], ha="center", va="center", color="white" if dark else "black")
        if (row, column) == best:
            frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, lw=3, edgecolor=VERMILION, clip_on=False)
            axes.add_patch(frame)
    return save_figure(figure, out_png)


def layout(records: Sequence["Record"]) -> tuple[str, list[str], list[str]]:
    """The axis that goes across, its labels, and the labels of the rows."""
    choices = {axis: list(dict.fromkeys(r.point.labels[axis] for r in records)) for axis in records[0].point.labels}
    across = max(choices, key=lambda axis: len(choices[axis]))
    return across, choices[across], list(dict.fromkeys(_row(record, across) for record in records))


def _row(record: "Record", across: str) -> str:
    return ", ".join(f"{axis} {label}" for axis, label in record.point.labels.items() if axis != across)
