"""The pixels that a network expects: their channels' order and what is subtracted and divided."""

from typing import Any, NamedTuple

import torch
from fvcore.common.config import CfgNode
from torch import Tensor


class Pixels(NamedTuple):
    """Input is (grey value 0 to 255 - mean) / std, per channel in the order of ``format``, "BGR" or "RGB"."""

    format: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, cfg: CfgNode) -> "Pixels":
        """Those of a recipe."""
        return cls(cfg.INPUT.FORMAT, tuple(cfg.MODEL.PIXEL_MEAN), tuple(cfg.MODEL.PIXEL_STD))

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Pixels":
        """From ``as_dict``."""
        return cls(content["format"], tuple(content["mean"]), tuple(content["std"]))

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint: plain text and numbers."""
        return {"format": self.format, "mean": list(self.mean), "std": list(self.std)}

    def reordered(self, order: str) -> "Pixels":
        """The same with the channels in the order of ``order``."""
        return self if order == self.format else Pixels(order, self.mean[::-1], self.std[::-1])


IMAGENET = Pixels("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))  # torchvision's and timm's, times 255
DETECTRON = Pixels("BGR", (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0))  # detectron/core/config.py, PIXEL_MEANS


def adapt_first_layer(weight: Tensor, trained_with: Pixels, used_with: Pixels) -> tuple[Tensor, str]:
    """The first convolution [C, 3, h, w] for pixels as in ``used_with``, and what was done, in words.

    Order and division are taken into the weights, exactly. Another mean is not: where the image ends, zeros are padded.
    """
    done = []
    if trained_with.format != used_with.format:
        weight = weight.flip(1)
        done.append(f"channels {trained_with.format} to {used_with.format}")
    there = trained_with.reordered(used_with.format)
    if there.std != used_with.std:
        ratio = (torch.tensor(used_with.std) / torch.tensor(there.std)).view(1, -1, 1, 1)
        weight = weight.float() * ratio
        done.append(f"divided by PIXEL_STD {_text(used_with.std)} instead of {_text(there.std)}")
    apart = max(abs(one - other) for one, other in zip(there.mean, used_with.mean, strict=True))
    if apart:
        done.append(f"PIXEL_MEAN stays the recipe's, up to {apart:.2g} of 255 from the weights' own")
    return weight, "; ".join(done)


def _text(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)
