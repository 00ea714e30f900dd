"""One image with its objects drawn over it, and labels that stay legible where objects crowd.

One picture of truth beside prediction, for looking at what a detector has learnt.

A sample is ``{"image", "truth", "prediction"}`` and optionally ``"title"``. The image is uint8 [H, W, 3] RGB. Truth and
prediction are dicts of ``boxes`` float [N, 4] (x0, y0, x1, y1 in px), ``labels`` int [N] (0-based), ``masks`` (N COCO
RLEs, bool [N, H, W], or None), optionally ``keypoints`` [N, K, 3] (x, y, v); the prediction has ``scores`` [N] as well.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as mask_api
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from scratch_det.errors import DataError
from scratch_det.visualization.curves import save_figure

Rect = tuple[float, float, float, float]  # x0, y0, x1, y1 in px of the tile, y downwards


@dataclass(frozen=True)
class Thing:
    """One object to draw: box in px of the tile, mask bool [h, w] of the tile or None, keypoints [K, 3] or None."""

    box: Rect
    text: str
    color: str
    mask: np.ndarray | None
    keypoints: np.ndarray | None
    dashed: bool


def draw_tile(axes: Axes, image: np.ndarray, size: tuple[int, int], things: Sequence[Thing], note: str) -> None:
    """Draw the image, masks, boxes and keypoints (large things first), then labels, then the note.

    ``size`` is the (width, height) of the axes in px.
    """
    width, height = size
    axes.imshow(image, extent=(0, width, height, 0), interpolation="bilinear", aspect="auto")
    by_size = sorted(things, key=lambda thing: -area(thing.box))
    axes.imshow(_overlay(by_size, width, height), extent=(0, width, height, 0), interpolation="nearest", aspect="auto")
    for thing in by_size:
        x0, y0, x1, y1 = thing.box
        style = {"lw": 1.2, "ls": (0, (4, 3))} if thing.dashed else {"lw": 1.8}
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=thing.color, **style))
        if thing.keypoints is not None:
            x, y, visible = thing.keypoints.T
            axes.scatter(
                x[visible > 0], y[visible > 0], s=14, c=thing.color, edgecolors="white", linewidths=0.7, zorder=3
            )
    _draw_labels(axes, things, width, height)
    if note:
        box = {"facecolor": "black", "alpha": 0.65, "edgecolor": "none", "pad": 3}
        axes.text(width / 2, height - 8, note, color="white", fontsize=8, ha="center", va="bottom", bbox=box, zorder=6)
    axes.set(xlim=(0, width), ylim=(height, 0))


def _overlay(things: Sequence[Thing], width: int, height: int) -> np.ndarray:
    """Float RGBA [height, width, 4]: every mask in its class's colour, translucent, with an opaque rim."""
    overlay = np.zeros((height, width, 4))
    for thing in things:
        if thing.mask is not None:
            overlay[thing.mask] = (*to_rgb(thing.color), 0.15 if thing.dashed else 0.4)
            overlay[_rim(thing.mask)] = (*to_rgb(thing.color), 0.5 if thing.dashed else 0.9)
    return overlay


def _rim(mask: np.ndarray) -> np.ndarray:
    """The px of a mask that have a neighbour outside it."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def _draw_labels(axes: Axes, things: Sequence[Thing], width: int, height: int) -> None:
    """Name and score on the class's colour, at the corner of the box where least is covered.

    A label that could only stand on others is left out: the colour of its box still names the class.
    """
    taken: list[Rect] = []
    boxes = [thing.box for thing in things]
    for thing in things:
        style = {"facecolor": thing.color, "edgecolor": "none", "pad": 1.2}
        text = axes.text(0, 0, thing.text, fontsize=8, color=_ink(thing.color), bbox=style, zorder=5, va="top")
        extent = text.get_window_extent(axes.figure.canvas.get_renderer())  # type: ignore[attr-defined]
        places = _places(thing.box, extent.width + 5, extent.height + 5, (width, height))
        best = min(places, key=lambda place: 3 * _covered(place, taken) + _hidden(place, boxes))
        if _covered(best, taken) > 0.15:
            text.remove()
            continue
        taken.append(best)
        text.set_position((best[0] + 2.5, best[1] + 2.5))


def _places(box: Rect, w: float, h: float, tile: tuple[int, int]) -> list[Rect]:
    """Where a label of w x h px may stand within the tile, the usual first: above the box, below, inside, beside."""
    x0, y0, x1, y1 = box
    spots = [(x, y) for y in (y0 - h, y1, y0, y1 - h) for x in (x0, x1 - w)]
    spots += [(x, (y0 + y1 - h) / 2) for x in (x1, x0 - w)]
    inside = [(min(max(x, 0), max(0, tile[0] - w)), min(max(y, 0), max(0, tile[1] - h))) for x, y in spots]
    return [(x, y, x + w, y + h) for x, y in inside]


def _covered(place: Rect, labels: Sequence[Rect]) -> float:
    """How much of a label lies on other labels, as a share of its own area."""
    return sum(_overlap(place, other) for other in labels) / area(place)


def _hidden(place: Rect, boxes: Sequence[Rect]) -> float:
    """The sum over all objects of the share of their box that the label would hide: small objects weigh most."""
    return sum(_overlap(place, box) / max(area(box), 1.0) for box in boxes)


def _overlap(a: Rect, b: Rect) -> float:
    """The common area of two rectangles, px."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def area(box: Rect) -> float:
    """Of a rectangle, px."""
    return (box[2] - box[0]) * (box[3] - box[1])


def _ink(color: str) -> str:
    """Black on light colours, white on dark."""
    red, green, blue = to_rgb(color)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


SIDES = ("truth", "prediction")
DPI = 100
TILE = 400  # px of the longer side of every image in the picture
MARGIN, PAIR_GAP, COLUMN_GAP, HEADER, TITLE, FOOTER = 14, 6, 26, 30, 20, 30  # px
MOST_OBJECTS = 60  # per tile, best scores first
THRESHOLD = 0.5  # of the score, for predictions to be shown
FALLBACK = 3  # boxes shown, dashed, where none reaches it
# Colours that differ from each other and from most photographs; classes take them in turn.
PALETTE = (
    "#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#42d4f4",
    "#f032e6", "#bfef45", "#911eb4", "#fabed4", "#469990", "#dcbeff",
    "#9a6324", "#aaffc3", "#808000", "#ffd8b1",
)  # fmt: skip


def draw_predictions(
    samples: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
    out_png: str | Path,
    columns: int = 2,
) -> Path:
    """Draw truth (left) and prediction (right) of every sample, ``columns`` pairs a row; return the path of the PNG.

    Where no score reaches THRESHOLD the best few are dashed, and the tile says so. Raises DataError for no samples.
    """
    if not samples:
        raise DataError("no samples to draw: expected at least one image with its truth and prediction")
    columns = min(columns, len(samples))
    colors = _class_colors(samples, len(classes))
    sizes = [_tile_size(sample["image"]) for sample in samples]
    corners, (width, height) = _place_tiles(sizes, columns)
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    for sample, size, pair in zip(samples, sizes, corners, strict=True):
        for side, corner in zip(SIDES, pair, strict=True):
            axes = _add_axes(figure, corner, size)
            draw_tile(axes, sample["image"], size, *_things(sample, side, classes, colors, size))
        title_at = (pair[0][0], pair[0][1] - 5)
        _write(figure, title_at, str(sample.get("title", "")), ha="left", va="bottom", color="#666666", fontsize=8)
    _write_frame(figure, corners, sizes, columns)
    return save_figure(figure, out_png)


def _class_colors(samples: Sequence[Mapping[str, Any]], count: int) -> dict[int, str]:
    """A colour per label: by its number where the palette has one for each class, else by its frequency here."""
    if count <= len(PALETTE):
        return dict(enumerate(PALETTE))
    seen = Counter(int(label) for sample in samples for side in SIDES for label in np.ravel(sample[side]["labels"]))
    return {label: PALETTE[rank % len(PALETTE)] for rank, (label, _) in enumerate(seen.most_common())}


def _tile_size(image: np.ndarray) -> tuple[int, int]:
    """(width, height) in px of the picture: the longer side is TILE."""
    height, width = image.shape[:2]
    scale = TILE / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _place_tiles(sizes: Sequence[tuple[int, int]], columns: int) -> tuple[list[tuple], tuple[int, int]]:
    """The top-left corners of each (truth, prediction) pair, and the picture's (width, height), all in px.

    A column is as wide as its widest image and a row as high as its highest; the others stand in the middle.
    """
    widths = [max(w for w, _ in sizes[column::columns]) for column in range(columns)]
    starts = range(0, len(sizes), columns)
    heights = [max(h for _, h in sizes[start : start + columns]) for start in starts]
    lefts = [MARGIN + sum(2 * w + PAIR_GAP + COLUMN_GAP for w in widths[:column]) for column in range(columns)]
    tops = [HEADER + TITLE + sum(h + TITLE for h in heights[:row]) for row in range(len(heights))]
    corners = []
    for number, (width, height) in enumerate(sizes):
        row, column = divmod(number, columns)
        x = lefts[column] + (widths[column] - width) // 2
        y = tops[row] + (heights[row] - height) // 2
        corners.append(((x, y), (x + widths[column] + PAIR_GAP, y)))
    return corners, (lefts[-1] + 2 * widths[-1] + PAIR_GAP + MARGIN, tops[-1] + heights[-1] + FOOTER)


def _add_axes(figure: Figure, corner: tuple[int, int], size: tuple[int, int]) -> Axes:
    """Axes that cover exactly these px of the picture and whose data coordinates are px of the tile, y downwards."""
    total_width, total_height = figure.get_size_inches() * DPI
    (x, y), (width, height) = corner, size
    box = (x / total_width, 1 - (y + height) / total_height, width / total_width, height / total_height)
    axes = figure.add_axes(box)
    axes.set_axis_off()
    return axes


def _things(
    sample: Mapping[str, Any],
    side: str,
    classes: Sequence[str],
    colors: Mapping[int, str],
    size: tuple[int, int],
) -> tuple[list[Thing], str]:
    """What to draw on one side, most important first, and a note for the tile (empty when all is as expected)."""
    items = sample[side]
    chosen, dashed = _choose(items)
    scale = size[0] / sample["image"].shape[1]
    things = []
    for i in chosen[:MOST_OBJECTS]:
        label = int(items["labels"][i])
        name = classes[label] if 0 <= label < len(classes) else f"class {label}"
        text = f"{name}: {_shown(items['scores'][i])}" if "scores" in items else name
        box = tuple(float(value) * scale for value in items["boxes"][i])
        mask, points = _mask(items.get("masks"), i, size), _keypoints(items.get("keypoints"), i, scale)
        things.append(Thing(box, text, colors.get(label, PALETTE[-1]), mask, points, dashed))
    return things, _note(side, len(things), dashed)


def _choose(items: Mapping[str, Any]) -> tuple[np.ndarray, bool]:
    """The indices to draw and whether they are a fallback: large objects of the truth first; of a prediction all that
    reach THRESHOLD by falling score, or if none does the best few."""
    if "scores" not in items:
        areas = [area(box) for box in items["boxes"]]
        return np.argsort(-np.array(areas), kind="stable"), False
    scores = np.asarray(items["scores"], float).reshape(-1)
    order = np.argsort(-scores, kind="stable")
    above = order[scores[order] >= THRESHOLD]
    return (above, False) if len(above) else (order[:FALLBACK], True)


def _shown(score: float) -> Decimal:
    """Two decimals, rounded down: what does not reach THRESHOLD must not look as if it did."""
    return Decimal(str(score)).quantize(Decimal("0.01"), ROUND_FLOOR)


def _note(side: str, count: int, dashed: bool) -> str:
    if not count:
        return "no objects" if side == "truth" else "no predictions"
    return f"no score reaches {THRESHOLD:g}; dashed: the best {count}" if dashed else ""


def _mask(masks: Any, index: int, size: tuple[int, int]) -> np.ndarray | None:
    """Mask ``index``, RLE or bool [H, W], as bool [h, w] in px of the tile."""
    if masks is None:
        return None
    mask = mask_api.decode(masks[index]) if isinstance(masks[index], Mapping) else np.asarray(masks[index])
    width, height = size
    rows = (np.arange(height) + 0.5) * mask.shape[0] / height
    columns = (np.arange(width) + 0.5) * mask.shape[1] / width
    return mask[np.ix_(rows.astype(int), columns.astype(int))].astype(bool)


def _keypoints(keypoints: Any, index: int, scale: float) -> np.ndarray | None:
    return None if keypoints is None else np.asarray(keypoints, float)[index] * (scale, scale, 1)


def _write(figure: Figure, at: tuple[float, float], words: str, **style: Any) -> None:
    """Text at (x, y) px of the picture, y downwards."""
    width, height = figure.get_size_inches() * DPI
    figure.text(at[0] / width, 1 - at[1] / height, words, **style)


def _write_frame(figure: Figure, corners: Sequence[tuple], sizes: Sequence[tuple[int, int]], columns: int) -> None:
    """The header over each column and the footer that states the threshold."""
    for column in range(columns):
        for side, words in enumerate(SIDES):
            middle = corners[column][side][0] + sizes[column][0] / 2
            _write(figure, (middle, HEADER / 2 + 4), words, ha="center", va="center", fontsize=12, fontweight="bold")
    height = figure.get_size_inches()[1] * DPI
    words = f"predictions with score \u2265 {THRESHOLD:g}; truth and prediction share a colour per class"
    _write(figure, (MARGIN, height - FOOTER / 2), words, ha="left", va="center", fontsize=9, color="#444444")
