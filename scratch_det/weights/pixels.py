"""The pixels that weights were trained on, and whether a backbone sees the same ones again."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from scratch_det.config.choices import PIXELS, RECIPES
from scratch_det.errors import UserError, quoted

# With the right pixels 0.3 to 0.7 of the variance that a backbone's first batch norm has seen in training is seen on
# one image (torchvision's, MSRA's and SSL's ResNet-50); with 0 to 255 in the place of 0 to 1, or the other way round,
# above 1,000 or below 0.001. Neither the order of the channels nor the mean shows in it.
MOST_APART = 30
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
    apart = max(abs(one - other) for one, other in zip(there.mean, used_with.mean, strict=True))
    if apart:
        done.append(f"PIXEL_MEAN stays the recipe's, up to {apart:.2g} of 255 from the weights' own")
    return weight, "; ".join(done)


@torch.no_grad()
def variance_ratio(bottom_up: nn.Module, image: Tensor, used: Pixels) -> float | None:
    """The variance that the first batch norm sees on an image, divided by its running variance; median of the channels.

    image: [3, H, W], grey values in the order of ``used``. None for a network without batch norm, or with one that has
    no statistics of its own.
    """
    parameter = next(bottom_up.parameters())
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (used.mean, used.std))
    with _first_input(bottom_up) as seen, suppress(_Seen):
        bottom_up(((image.cpu().float() - mean) / std)[None].to(parameter))
    if not seen or (var := seen[0].running_var.float()).max() == var.min():
        return None
    return (seen[1].float().var((0, 2, 3)) / var).median().item()


class _Seen(Exception):
    """Ends a forward pass."""


@contextmanager
def _first_input(network: nn.Module) -> Iterator[list[Any]]:
    """The first batch norm that a forward pass comes to, and its input, at which the pass ends."""
    seen: list[Any] = []

    def look(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        seen.extend((norm, inputs[0]))
        raise _Seen

    norms = [module for module in network.modules() if getattr(module, "running_var", None) is not None]
    hooks = [norm.register_forward_pre_hook(look) for norm in norms]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def check_pixels(
    bottom_up: nn.Module, first: nn.Parameter, raw: Tensor, image: Tensor, assumed: Pixels, used: Pixels, source: str
) -> None:
    """Raise UserError when the first batch norm of a filled network shows that ``assumed`` are not its pixels.

    first: the network's first weight, adapted from ``raw`` of the file. image: see ``variance_ratio``. The message
    names the statements that would fit.
    """
    ratio = variance_ratio(bottom_up, image, used)
    if ratio is None or 1 / MOST_APART < ratio < MOST_APART:
        return
    fitting, adapted = [], first.detach().clone()
    for name, values in PIXELS.items():
        with torch.no_grad():
            first.copy_(adapt_first_layer(raw, Pixels(*values), used)[0])
        if 1 / MOST_APART < (variance_ratio(bottom_up, image, used) or 0) < MOST_APART:
            fitting.append(name)
    with torch.no_grad():
        first.copy_(adapted)
    fix = (
        f"set MODEL.WEIGHTS_PIXELS {' or '.join(fitting)}, whose variance fits"
        if fitting
        else "none that is known fits: set INPUT.FORMAT, MODEL.PIXEL_MEAN and MODEL.PIXEL_STD to its own, and "
        f"MODEL.WEIGHTS_PIXELS {RECIPES}"
    )
    raise UserError(
        f"MODEL.WEIGHTS {quoted(source)}: on a training image the backbone's first layer gives {ratio:.2g} times the "
        f"variance that its batch norm had in training, so its pixels were not {assumed}; {fix}"
    )
