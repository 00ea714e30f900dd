"""Anchors, which both backends lay alike: exact as detectron2's, or rounded as the library that trained a detector."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

SHAPES: dict[str, Callable[[float, float, int], tuple[float, float]]] = {
    # by ANCHOR_GENERATOR.ROUNDING: width and height in pixels from the side of a square one, height / width, stride
    "": lambda side, ratio, _: (side / ratio**0.5, side * ratio**0.5),
    "torchvision": lambda side, ratio, _: (2 * round(side / ratio**0.5 / 2), 2 * round(side * ratio**0.5 / 2)),
    # an anchor of the stride's size has whole pixels; larger ones are multiples of it
    "Detectron": lambda side, ratio, stride: (
        (width := round(stride / ratio**0.5)) * side / stride, round(width * ratio) * side / stride
    ),
}  # fmt: skip


class Anchors(nn.Module):
    """Anchors as ANCHOR_GENERATOR describes them, sizes before ratios.

    Args:
        sizes: side of a square anchor in pixels; a list per level, or one for all.
        aspect_ratios: height / width; a list per level, or one for all.
        strides: pixels between two anchors, per level. torchvision's own are derived from the sizes of image and map:
            p6's is below 64 where the image is no multiple of it.
        offset: position of an anchor's centre in its cell, 0 = top left corner, as a fraction of the stride.
        rounding: one of SHAPES.
    """

    def __init__(
        self, sizes: list[list[float]], aspect_ratios: list[list[float]], strides: Sequence[int], offset: float,
        rounding: str = "",
    ):  # fmt: skip
        super().__init__()
        self.strides, self.offset, self.by_size = strides, offset, rounding == "torchvision"
        for level, stride in enumerate(strides):
            own_sizes, own_ratios = (lists[level if len(lists) > 1 else 0] for lists in (sizes, aspect_ratios))
            sides = torch.tensor([SHAPES[rounding](size, ratio, stride) for size in own_sizes for ratio in own_ratios])
            self.register_buffer(f"cell{level}", torch.cat([-sides, sides], dim=1) / 2, persistent=False)
        self.per_location = len(sides)

    def levels(self, maps: list[Tensor]) -> list[Tensor]:
        """Anchors [H * W * A, 4] (x1 y1 x2 y2, pixels) of each map [N, C, H, W], the same for all images."""
        found, image = [], [side * self.strides[0] for side in maps[0].shape[-2:]]
        for level, (one, stride) in enumerate(zip(maps, self.strides, strict=True)):
            cell, grid = getattr(self, f"cell{level}"), one.shape[-2:]
            steps = [side // n if self.by_size else stride for side, n in zip(image, grid, strict=True)]
            rows, columns = (
                (torch.arange(n, device=cell.device) + self.offset) * step for n, step in zip(grid, steps, strict=True)
            )
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            centres = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
            found.append((centres + cell).reshape(-1, 4))
        return found
