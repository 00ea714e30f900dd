"""One image with its objects drawn over it, and labels that stay legible where objects crowd."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

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
