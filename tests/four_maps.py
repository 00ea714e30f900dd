"""A small backbone, for tests that add one to BACKBONES."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn


class FourMaps(nn.Module):
    """Maps res2 ... res5 of strides 4 to 32: four convolutions in a row, each with ``norm`` and ReLU where it is given.

    A subclass takes the config and says how many ``channels`` each map has.
    """

    def __init__(self, channels: Sequence[int], norm: Callable[[int], nn.Module] | None = None):
        super().__init__()
        self.strides = {f"res{k}": 2**k for k in (2, 3, 4, 5)}
        self.channels = dict(zip(self.strides, channels, strict=True))
        for name, before in zip(self.channels, (3, *channels), strict=False):
            width = self.channels[name]
            convolution = nn.Conv2d(before, width, 3, 4 if name == "res2" else 2, 1)
            self.add_module(name, nn.Sequential(convolution, *([norm(width), nn.ReLU()] if norm else [])))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = {}
        for name in self.strides:
            x = maps[name] = self.get_submodule(name)(x)
        return maps
