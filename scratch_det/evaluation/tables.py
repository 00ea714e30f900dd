"""AP numbers as Markdown tables and as strict JSON."""

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from scratch_det.evaluation.coco import Metrics

COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
PAIRS_PER_ROW = 3  # of class and AP


def format_table(metrics: Metrics) -> str:
    """A Markdown table: one row per task, the six numbers in percent with one decimal, '-' for nan or absent."""
    rows = [[task, *(_cell(values.get(name, math.nan)) for name in COLUMNS)] for task, values in metrics.items()]
    return _markdown(["task", *COLUMNS], rows)


def format_per_class(metrics: Metrics) -> str:
    """A Markdown table of AP per class (one column per task), PAIRS_PER_ROW classes side by side, read downwards.

    An empty string for a single class, where the per-class AP is the AP.
    """
    names = [key for key in next(iter(metrics.values()), {}) if key.startswith("AP-")]
    if not names:
        return ""
    cells = [[name[3:], *(_cell(v.get(name, math.nan)) for v in metrics.values())] for name in names]
    pairs = min(PAIRS_PER_ROW, len(cells))
    height = math.ceil(len(cells) / pairs)
    cells += [[""] * (1 + len(metrics))] * (pairs * height - len(cells))
    rows = [list(chain.from_iterable(cells[start::height])) for start in range(height)]
    return _markdown(["class", *metrics] * pairs, rows)


def to_json_numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The same nested mapping with None for nan and infinities, which ``json.dump(..., allow_nan=False)`` accepts."""
    return {name: to_json_numbers(v) if isinstance(v, Mapping) else _finite(v) for name, v in metrics.items()}


def _finite(value: Any) -> Any:
    """None for a float that JSON has no word for, a plain float for numpy's, everything else as it is."""
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value


def _cell(value: float | None) -> str:
    """One decimal, or '-' for nan and for None, its form in JSON."""
    return "-" if value is None or math.isnan(value) else f"{value:.1f}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in plain text too; numbers to the right, words to the left."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    words = [title in ("task", "class") for title in header]
    rule = [":".ljust(w, "-") if word else ":".rjust(w, "-") for w, word in zip(widths, words, strict=True)]
    lines = [
        [cell.ljust(w) if word else cell.rjust(w) for cell, w, word in zip(cells, widths, words, strict=True)]
        for cells in [header, rule, *rows]
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
