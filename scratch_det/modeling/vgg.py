"""VGG-16 below a detector's heads or FPN (Simonyan & Zisserman 2015, configuration D), without any normalisation."""

from itertools import pairwise

from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers


class VGG16(nn.Module):
    """The 13 convolutions up to conv5_3 and its ReLU, with torchvision's names of weights; nothing after them.

    Attributes:
        channels, strides: of every map that ``forward`` gives, by its name.
        stages: the names of the layers of conv1 ... conv5.
    """

    def __init__(self, cfg: CfgNode):
        super().__init__()
        self.channels, self.strides = {"conv5": 512}, {"conv5": 16}
        self.features = make_layers(cfgs["D"])[:-1]  # the last pooling would halve conv5 once more
        ends = [i for i, layer in enumerate(self.features) if isinstance(layer, nn.MaxPool2d)]
        bounds = pairwise([0, *ends, len(self.features)])
        self.stages = [[f"features.{i}" for i in range(low, high)] for low, high in bounds]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images [N, 3, H, W] -> ``conv5`` [N, 512, H / 16, W / 16], rounded down."""
        return {"conv5": self.features(images)}
