"""One picture of truth beside prediction, for looking at what a detector has learnt.

A sample is ``{"image", "truth", "prediction"}`` and optionally ``"title"``. The image is uint8 [H, W, 3] RGB. Truth and
prediction are dicts of ``boxes`` float [N, 4] (x0, y0, x1, y1 in px), ``labels`` int [N] (0-based), ``masks`` (N COCO
RLEs, bool [N, H, W], or None), optionally ``keypoints`` [N, K, 3] (x, y, v); the prediction has ``scores`` [N] as well.
``names`` and ``colors`` of N objects stand for what else follows from class and score.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import ROUND_FLOOR, Decimal
from pathlib import Path
from typing import Any

import numpy as np
from hotcoco import mask as mask_api
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from scratch_det.errors import DataError
from scratch_det.visualization.curves import NO_MATH, save_figure

SIDES = ("truth", "prediction")
DPI = 100
COLUMNS = 2  # pairs of tiles in a row
TILE = 400  # px of the longer side of every image in the picture
GAP, TITLE, FOOTER = 14, 22, 30  # px between tiles, above each tile, and below all
MOST_OBJECTS = 60  # per tile, best scores first
THRESHOLD = 0.5  # of the score, for predictions to be shown
FALLBACK = 3  # boxes shown, with thin lines, where no score reaches it
# Colours that differ from each other and from most photographs; classes take them in turn.
PALETTE = (
    "#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#42d4f4",
    "#f032e6", "#bfef45", "#911eb4", "#fabed4", "#469990", "#dcbeff",
    "#9a6324", "#aaffc3", "#808000", "#ffd8b1",
)  # fmt: skip


@rc_context(NO_MATH)
def draw_predictions(
    samples: Sequence[Mapping[str, Any]], classes: Sequence[str], out_png: str | Path, when: str = ""
) -> Path:
    """Draw truth (left) and prediction (right) of every sample, COLUMNS pairs a row; return the path of the PNG.

    when: words before those below the tiles.
    Where no score reaches THRESHOLD, the best few have thin lines and a note. Raises DataError for no samples.
    """
    if not samples:
        raise DataError("no samples to draw: expected at least one image with its truth and prediction")
    columns = min(COLUMNS, len(samples))
    sizes = [tile_size(sample["image"]) for sample in samples]
    widths = [max(width for _, width in sizes[column::columns]) for column in range(columns) for _ in SIDES]
    heights = [max(height for height, _ in sizes[start : start + columns]) for start in range(0, len(sizes), columns)]
    width = sum(widths) + GAP * (len(widths) + 1)
    height = sum(heights) + TITLE * len(heights) + FOOTER
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    colors = class_colors(samples, len(classes))
    for number, sample in enumerate(samples):
        row, column = divmod(number, columns)
        for place, side in enumerate(SIDES, start=2 * column):
            below = heights[row + 1 :]
            left, bottom = GAP * (place + 1) + sum(widths[:place]), FOOTER + TITLE * len(below) + sum(below)
            axes = figure.add_axes((left / width, bottom / height, widths[place] / width, heights[row] / height))
            axes.set_axis_off()
            draw_tile(axes, sample["image"], sample[side], classes, colors, sizes[number])
            title = f"{side}: {sample['title']}" if side == "truth" and sample.get("title") else side
            axes.set_title(title, loc="left", fontsize=9, color="#444444", pad=4)
    words = f"{when}predictions with score \u2265 {THRESHOLD:g}; truth and prediction share a colour per class"
    figure.text(GAP / width, FOOTER / 2 / height, words, va="center", fontsize=9, color="#444444")
    return save_figure(figure, out_png)


@rc_context(NO_MATH)
def draw_objects(
    image: np.ndarray,
    items: Mapping[str, Any],
    classes: Sequence[str],
    threshold: float = THRESHOLD,
    longer_side: int = 0,
) -> Image.Image:
    """Draw one image with its objects; without ``longer_side`` in its own size, but at least TILE px long."""
    height, width = size = tile_size(image, longer_side or max(TILE, *image.shape[:2]))
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    draw_tile(axes, image, items, classes, class_colors([{"prediction": items}], len(classes)), size, threshold)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def class_colors(samples: Sequence[Mapping[str, Any]], count: int) -> dict[int, str]:
    """A colour per label: by its number where the palette has one for each class, else by its frequency here."""
    if count <= len(PALETTE):
        return dict(enumerate(PALETTE))
    sides = (sample[side] for sample in samples for side in SIDES if side in sample)
    seen = Counter(int(label) for side in sides for label in np.ravel(side["labels"]))
    return {label: PALETTE[rank % len(PALETTE)] for rank, (label, _) in enumerate(seen.most_common())}


def tile_size(image: np.ndarray, longer_side: int = TILE) -> tuple[int, int]:
    """Height and width in px of the picture."""
    scale = longer_side / max(image.shape[:2])
    return max(1, round(image.shape[0] * scale)), max(1, round(image.shape[1] * scale))


def draw_tile(
    axes: Axes,
    image: np.ndarray,
    items: Mapping[str, Any],
    classes: Sequence[str],
    colors: Mapping[int, str],
    size: tuple[int, int],
    threshold: float = THRESHOLD,
) -> None:
    """Draw an image and its objects, large ones first, then labels, then a note where something is missing.

    size: height and width of the axes, px.
    """
    import torch  # here, as errors of the user come before
    from torchvision.ops import box_area
    from torchvision.transforms.v2 import functional as F
    from torchvision.utils import draw_bounding_boxes, draw_keypoints, draw_segmentation_masks

    chosen, is_fallback = choose(items, threshold)
    scale = size[1] / image.shape[1]
    boxes = torch.as_tensor(np.asarray(items["boxes"], float).reshape(-1, 4))[chosen] * scale
    labels = [int(items["labels"][i]) for i in chosen]
    own_colors = [colors.get(label, PALETTE[-1]) for label in labels]
    if "colors" in items:
        own_colors = [items["colors"][i] for i in chosen]
    tile = F.resize(torch.tensor(image).permute(2, 0, 1), list(size))
    by_size = box_area(boxes).argsort(descending=True, stable=True).tolist()
    for k in by_size:
        if items.get("masks") is not None:
            mask = items["masks"][chosen[k]]
            mask = torch.as_tensor(mask_api.decode(mask) if isinstance(mask, dict) else mask).bool()
            mask = F.resize(mask[None], list(size), interpolation=F.InterpolationMode.NEAREST_EXACT)
            tile = draw_segmentation_masks(tile, mask, 0.15 if is_fallback else 0.45, own_colors[k])
    for k in by_size:
        tile = draw_bounding_boxes(tile, boxes[k : k + 1], colors=own_colors[k], width=1 if is_fallback else 3)
        if items.get("keypoints") is not None:
            points = torch.as_tensor(items["keypoints"][chosen[k]])[None]
            for color, radius in (("white", 4), (own_colors[k], 3)):
                tile = draw_keypoints(tile, points[..., :2] * scale, None, color, radius, visibility=points[..., 2] > 0)
    axes.imshow(tile.permute(1, 2, 0).numpy(), extent=(0, size[1], size[0], 0))
    names = [classes[label] if 0 <= label < len(classes) else f"class {label}" for label in labels]
    if "names" in items:
        names = [items["names"][i] for i in chosen]
    elif "scores" in items:
        # rounded down: a score below THRESHOLD must not look as if it reached it
        scores = [Decimal(str(items["scores"][i])).quantize(Decimal("0.01"), ROUND_FLOOR) for i in chosen]
        names = [f"{name}: {score}" for name, score in zip(names, scores, strict=True)]
    _draw_labels(axes, boxes.numpy(), names, own_colors, size)
    note = f"no score reaches {threshold:g}; thin lines: the best {len(chosen)}" if is_fallback else ""
    if not len(chosen):
        note = "no predictions" if "scores" in items else "no objects"
    if note:
        box = {"facecolor": "black", "alpha": 0.65, "edgecolor": "none", "pad": 3}
        at = size[1] / 2, size[0] - 8
        axes.text(*at, note, color="white", fontsize=8, ha="center", va="bottom", bbox=box, zorder=6)


def choose(items: Mapping[str, Any], threshold: float = THRESHOLD) -> tuple[np.ndarray, bool]:
    """Indices of the objects to draw, at most MOST_OBJECTS, and whether they are a fallback.

    Truth: the largest. Prediction: scores of ``threshold`` or more, descending, or the best few if there are none.
    """
    if "scores" not in items:
        boxes = np.reshape(items["boxes"], (-1, 4))
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        return np.argsort(-areas, kind="stable")[:MOST_OBJECTS], False
    scores = np.asarray(items["scores"], float).reshape(-1)
    order = np.argsort(-scores, kind="stable")
    above = order[scores[order] >= threshold][:MOST_OBJECTS]
    return (above, False) if len(above) or not len(order) else (order[:FALLBACK], True)


def _draw_labels(
    axes: Axes, boxes: np.ndarray, names: Sequence[str], colors: Sequence[str], size: tuple[int, int]
) -> None:
    """Name and score on the class's colour, at the corner of the box where they cover least of labels and boxes.

    A label that would cover others everywhere is left out: the colour of its box still names the class.
    """
    taken, areas = np.zeros((0, 4)), np.maximum(_overlap(boxes, boxes).diagonal(), 1.0)
    for (x0, y0, x1, y1), name, color in zip(boxes, names, colors, strict=True):
        ink = "black" if np.dot(to_rgb(color), (0.299, 0.587, 0.114)) > 0.5 else "white"  # by the colour's luminance
        style = {"facecolor": color, "edgecolor": "none", "pad": 1.2}
        text = axes.text(0, 0, name, fontsize=8, color=ink, bbox=style, zorder=5, va="top")
        extent = text.get_window_extent(axes.figure.canvas.get_renderer())  # type: ignore[attr-defined]
        w, h = extent.width + 5, extent.height + 5
        corners = [(x, y) for y in (y0 - h, y1, y0, y1 - h) for x in (x0, x1 - w)]  # above the box, below, inside
        corners = np.clip(corners, 0, np.maximum(0, (size[1] - w, size[0] - h)))
        places = np.hstack([corners, np.add(corners, (w, h))])
        covered = _overlap(places, taken).sum(1) / (w * h)
        hidden = (_overlap(places, boxes) / areas).sum(1)  # by shares of boxes: small objects weigh most
        best = np.argmin(3 * covered + hidden)
        if covered[best] > 0.15:
            text.remove()
            continue
        taken = np.vstack([taken, places[best]])
        text.set_position(corners[best] + 2.5)


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The common areas [N, M], px^2, of boxes [N, 4] and [M, 4]."""
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    return sides.clip(min=0).prod(axis=2)
