"""The pixels that weights were trained on, and whether a backbone sees the same ones again."""

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.func import functional_call

from scratch_det.config.choices import PIXELS, RECIPES
from scratch_det.errors import UserError

# With the right pixels 0.3 to 0.7 of the variance that a backbone's first batch norm has seen in training is seen on
# one image (torchvision's, MSRA's and SSL's ResNet-50); with 0 to 255 in the place of 0 to 1, or the other way round,
# above 1,000 or below 0.001. Neither the order of the channels nor the mean shows in it.
MOST_APART = 30
TYPICAL = 0.1, 3  # beyond, a word: 0 to 1 for ImageNet's is 20 times as much, or a 20th
LEAST_DEVIATION = 20  # of grey values; photographs have 40 to 80, a dark image would show too little variance
FAR = 10  # grey values from one mean to another: no weights make up for it; ImageNet's and MSRA's differ by 1
MOST_PIXELS = 400  # from the middle of an image to each side
Positive = Annotated[float, msgspec.Meta(gt=0)]


class Pixels(NamedTuple):
    """Input is (grey value 0 to 255 - mean) / std, per channel in the order of ``format``, "BGR" or "RGB"."""

    format: Literal["BGR", "RGB"]
    mean: tuple[float, float, float]
    std: tuple[Positive, Positive, Positive]

    @classmethod
    def of(cls, cfg: CfgNode) -> "Pixels":
        """The pixel statistics of a recipe."""
        return cls(cfg.INPUT.FORMAT, tuple(cfg.MODEL.PIXEL_MEAN), tuple(cfg.MODEL.PIXEL_STD))

    def __str__(self) -> str:
        mean, std = (" ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"{self.format}, PIXEL_MEAN {mean}, PIXEL_STD {std}"

    @classmethod
    def read(cls, recorded: Any, path: Path) -> "Pixels":
        """Those that ``as_dict`` gave. Raises UserError, which names the file, for others."""
        try:
            return msgspec.convert([recorded[name] for name in cls._fields], cls)
        except (msgspec.ValidationError, LookupError, TypeError):
            raise UserError(
                f"weights file {path} has pixels {recorded!r:.100}, expected format RGB or BGR, mean and std, three "
                "numbers each, std above 0; get another file"
            ) from None

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint: plain text and numbers."""
        return {"format": self.format, "mean": list(self.mean), "std": list(self.std)}

    def reordered(self, order: str) -> "Pixels":
        """The same with the channels in the order of ``order``."""
        return self if order == self.format else Pixels(order, self.mean[::-1], self.std[::-1])

    def apart(self, other: "Pixels") -> float:
        """The largest difference of the means, in grey values; both have the channels in one order."""
        return max(abs(one - another) for one, another in zip(self.mean, other.mean, strict=True))


IMAGENET, DETECTRON = Pixels(*PIXELS["imagenet"]), Pixels(*PIXELS["caffe"])


def stated_pixels(cfg: CfgNode) -> Pixels | None:
    """What MODEL.WEIGHTS_PIXELS says; None where it is empty."""
    name = cfg.MODEL.get("WEIGHTS_PIXELS", "")
    return (Pixels.of(cfg) if name == RECIPES else Pixels(*PIXELS[name])) if name else None


def adapt_first_layer(weight: Tensor, trained_with: Pixels, used_with: Pixels) -> tuple[Tensor, str]:
    """The first convolution [C, 3, h, w] for pixels as in ``used_with``, and what was done, in words.

    The weights can make up for another order or division exactly. For another mean they cannot: the border is padded
    with zeros.
    """
    done = []
    if trained_with.format != used_with.format:
        weight = weight.flip(1)
        done.append(f"channels {trained_with.format} to {used_with.format}")
    there = trained_with.reordered(used_with.format)
    if there.std != used_with.std:
        ratio = (torch.tensor(used_with.std) / torch.tensor(there.std)).view(1, -1, 1, 1)
        weight = weight.float() * ratio
        now, then = (" ".join(f"{value:g}" for value in pixels.std) for pixels in (used_with, there))
        done.append(f"divided by PIXEL_STD {now} instead of {then}")
    if apart := there.apart(used_with):
        done.append(f"PIXEL_MEAN stays the recipe's, up to {apart:.1f} of 255 from the weights' own")
    return weight, "; ".join(done)


class _FirstNorm(Exception):
    """Ends a forward pass at the first batch norm; the arguments are the norm and its input."""


def _stop_at_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if getattr(module, "running_var", None) is not None:
        raise _FirstNorm(module, inputs[0])


@torch.no_grad()
def variance_ratio(
    bottom_up: nn.Module, image: Tensor, used: Pixels, weights: dict[str, Tensor] | None = None
) -> float | None:
    """The variance that the first batch norm sees on an image, divided by its running variance; median of the channels.

    image: [3, H, W], grey values in the order of ``used``; only its middle counts. weights: by name, in the place of
    the network's own. None for a network without batch norm or with one that has no statistics of its own, and for an
    image of little contrast.
    """
    middle = (slice(max(0, side // 2 - MOST_PIXELS), side // 2 + MOST_PIXELS) for side in image.shape[1:])
    own, shown = next(bottom_up.parameters()), image[:, *middle].cpu().float()
    if shown.std() < LEAST_DEVIATION:
        return None
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (used.mean, used.std))
    changed = {name: value.to(own) for name, value in (weights or {}).items()}
    try:
        with nn.modules.module.register_module_forward_pre_hook(_stop_at_norm):
            functional_call(bottom_up, changed, (((shown - mean) / std)[None].to(own),))
    except _FirstNorm as found:
        norm, seen = found.args
        if (var := norm.running_var.float()).max() > var.min():
            return (seen.float().var((0, 2, 3)) / var).nanmedian().item()  # a channel may have died
    return None


def check_pixels(
    bottom_up: nn.Module, first: str, raw: Tensor, image: Tensor, assumed: Pixels, used: Pixels, path: Path
) -> str:
    """Raise UserError when the first batch norm of a filled network shows that ``assumed`` are not its pixels.

    first: the name of the network's first weight, which is adapted from ``raw`` of the file. image: see
    ``variance_ratio``. Returns a message on pixels that are not likely, "" for others. Both name what would fit.
    """
    ratio = variance_ratio(bottom_up, image, used)
    if ratio is None or TYPICAL[0] < ratio < TYPICAL[1]:
        return ""
    is_wrong = not 1 / MOST_APART < ratio < MOST_APART
    least, most = (1 / MOST_APART, MOST_APART) if is_wrong else TYPICAL
    weights = {name: {first: adapt_first_layer(raw, Pixels(*values), used)[0]} for name, values in PIXELS.items()}
    ratios = {name: variance_ratio(bottom_up, image, used, one) or 0 for name, one in weights.items()}
    named = " or ".join(f"{name} ({PIXELS[name][0]})" for name, other in ratios.items() if least < other < most)
    own = "none that is known fits: set INPUT.FORMAT, MODEL.PIXEL_MEAN and MODEL.PIXEL_STD to its own, and MODEL."
    fix = f"set MODEL.WEIGHTS_PIXELS {named}, whose variance fits" if named else f"{own}WEIGHTS_PIXELS {RECIPES}"
    seen = f"weights file {path}: on a training image the first batch norm sees {ratio:.2g} times its running variance"
    if is_wrong:
        raise UserError(f"{seen}, so its pixels were not {assumed}; {fix}")
    return f"{seen}, with the right pixels 0.3 to 0.7 times; if they were not {assumed}, {fix}"
