"""The masks of one image's objects as their outlines' edges: they move with the image, and are drawn inside boxes only.

A mask is one or several parts. A point is inside a part when an odd number of its edges lie to the left, and inside the
mask when it is inside any part; pycocotools fills polygons and joins an object's polygons by the same rules.
A part is a polygon, or all of an RLE: then the edges are the borders between a pixel and its neighbour in the row, so
nothing is lost, and holes and pieces need no treatment of their own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scratch_det.data.rle import run_lengths

MOST_PAIRS = 2**20  # of a box and an edge at a time: about 150 MB


@dataclass(frozen=True, eq=False)
class Masks:
    """Masks of N objects, of which some may be the same: what detectron2's mask heads need of such a class.

    Attributes:
        edges: float32 [E, 4], x0 y0 x1 y1 in pixels, the first pixel's centre being 0.5, 0.5. Horizontal ones are left
            out, since no point lies to the right of one.
        edge_starts: int64 [P + 1], where the edges of each part begin, and E.
        part_starts: int64 [G + 1], where the parts of each of G masks begin, and P.
        chosen: int64 [N], the mask of each object.
    """

    edges: Tensor
    edge_starts: Tensor
    part_starts: Tensor
    chosen: Tensor

    @staticmethod
    def read(segmentations: Sequence[Any]) -> "Masks":
        """The masks of COCO's ``segmentation`` of each object: a list of polygons, or an RLE of either kind."""
        masks = [
            [_polygon_edges(polygon) for polygon in mask] if isinstance(mask, list) else [_rle_edges(mask)]
            for mask in segmentations
        ]
        parts = [part for mask in masks for part in mask]
        edges = np.concatenate([np.empty((0, 4), np.float32), *parts])
        is_crossed = edges[:, 1] != edges[:, 3]
        starts = np.concatenate([[0], np.cumsum(is_crossed)])[np.cumsum([0, *map(len, parts)])]
        part_starts = np.cumsum([0, *map(len, masks)])
        return _from_arrays(edges[is_crossed], starts, part_starts, np.arange(len(masks)))

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: Any) -> "Masks":
        """Those of the objects that a tensor of bool or of indices, or a slice, selects."""
        return replace(self, chosen=self.chosen[index])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as arrays: a worker passes on each tensor as an open file, and a process may have 1,024 of those."""
        return _from_arrays, tuple(getattr(self, field.name).cpu().numpy() for field in fields(self))

    def to(self, *arguments: Any, **keywords: Any) -> "Masks":
        """On another device; arguments as those of ``Tensor.to``."""
        return self._each(lambda tensor: tensor.to(*arguments, **keywords))

    def pin_memory(self) -> "Masks":
        """In memory from which a GPU copies; a DataLoader calls this."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Masks":
        return Masks(*(change(getattr(self, field.name)) for field in fields(self)))

    def moved(self, scale: tuple[float, float] = (1.0, 1.0), offset: tuple[float, float] = (0.0, 0.0)) -> "Masks":
        """Every point times ``scale`` plus ``offset`` (each x, y): resized, shifted, or mirrored by a scale of -1."""
        return replace(self, edges=self.edges * torch.tensor(scale * 2) + torch.tensor(offset * 2))

    def crop_and_resize(self, boxes: Tensor, resolution: int) -> Tensor:
        """Each mask inside its box: bool [N, resolution, resolution], True where a cell's centre is inside the mask.

        boxes: float [N, 4], x1 y1 x2 y2 in pixels, with an area; one for each mask.
        """
        starts, counts = self.part_starts[self.chosen], self.part_starts.diff()[self.chosen]
        box, part = spread(starts, counts)
        counts = self.edge_starts.diff()[part]
        pairs = int(counts.sum())
        if len(boxes) > 1 and pairs > MOST_PAIRS:
            halves = slice(None, len(boxes) // 2), slice(len(boxes) // 2, None)
            return torch.cat([self[half].crop_and_resize(boxes[half], resolution) for half in halves])
        owner, edge = spread(self.edge_starts[part], counts, pairs)
        corner, cell = boxes[:, :2].repeat(1, 2), (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2) / resolution
        of_box = box[owner]
        edges = (self.edges[edge] - corner[of_box]) / cell[of_box]  # in cells, from the box's corner
        # An edge crosses a row whose centre is level with its upper end or below, and above its lower end: of two
        # edges that meet in a corner, one. So every row has an even number of crossings.
        first, last = ((edges[:, 1::2] - 0.5).ceil().clamp(0, resolution).to(torch.int64)).aminmax(dim=1)
        pair, row = spread(first, last - first)
        x0, y0, x1, y1 = edges[pair].unbind(1)
        x = x0 + (row + 0.5 - y0) * ((x1 - x0) / (y1 - y0))
        column = (x - 0.5).ceil().clamp(0, resolution).to(torch.int64)  # the first whose centre lies to the right
        place = (owner[pair] * resolution + row) * (resolution + 1) + column  # the last column is outside of the box
        one = torch.ones_like(place, dtype=torch.uint8)  # more than 255 crossings are odd or even all the same
        crossings = one.new_zeros((len(part), resolution, resolution + 1))
        crossings.view(-1).scatter_add_(0, place, one)
        inside = (crossings[..., :-1].cumsum(2, dtype=torch.uint8) & 1).to(boxes.dtype)
        return inside.new_zeros(len(boxes), *inside.shape[1:]).index_add_(0, box, inside) > 0


def spread(starts: Tensor, counts: Tensor, total: int | None = None) -> tuple[Tensor, Tensor]:
    """For ranges of ``counts`` [N] numbers from ``starts`` [N] on: the range that each number is of, and the number.

    total: the sum of ``counts``, where it is known: then a GPU need not tell it.
    """
    owner = torch.repeat_interleave(counts, output_size=total)
    return owner, torch.arange(len(owner), device=owner.device) + (starts - counts.cumsum(0) + counts)[owner]


def _from_arrays(*arrays: np.ndarray) -> Masks:
    return Masks(*map(torch.from_numpy, arrays))


def _polygon_edges(polygon: Any) -> np.ndarray:
    """Float32 [n, 4] of the x, y of n corners in turn."""
    corners = np.asarray(polygon, dtype=np.float32).reshape(-1, 2)
    return np.concatenate([corners, np.concatenate([corners[1:], corners[:1]])], axis=1)


def _rle_edges(rle: dict[str, Any]) -> np.ndarray:
    """Float32 [n, 4]: the vertical borders between the pixels of a COCO RLE and those outside."""
    height, counts = rle["size"][0], rle["counts"]
    ends = np.cumsum(counts if isinstance(counts, list) else run_lengths([counts])[0])
    runs = ends[: len(ends) // 2 * 2].reshape(-1, 2)  # of pixels inside, down the columns
    start, end = runs[runs[:, 0] < runs[:, 1]].T
    first = start // height
    lengths = (end - 1) // height - first + 1  # in columns
    run = np.repeat(np.arange(len(first)), lengths)
    column = np.arange(len(run)) + (first - lengths.cumsum() + lengths)[run]
    top, bottom = np.maximum(start[run] - column * height, 0), np.minimum(end[run] - column * height, height)
    # Each column's runs have a left and a right border; where two neighbours' coincide there is none. Sorted along a
    # border, an odd number of runs lies between every second end and the next.
    left, right = column * (height + 1), (column + 1) * (height + 1)
    borders = np.sort(np.concatenate([left + top, left + bottom, right + top, right + bottom])).reshape(-1, 2)
    borders = borders[borders[:, 0] < borders[:, 1]]
    return np.stack(np.divmod(borders, height + 1), axis=2).reshape(-1, 4).astype(np.float32)
