"""What scratch-det check and scratch-det train say of checkpoints of other projects."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import load_command
from layouts import KEYS, LAYOUTS, image, network, write
from PIL import Image
from run_folder import NO_TEST

from scratch_det.config.choices import PIXELS

IMAGENET = ("INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", list(PIXELS["imagenet"][1]), "MODEL.PIXEL_STD",
            list(PIXELS["imagenet"][2]))  # fmt: skip


@pytest.fixture
def recipe(toy_recipe: Path, datasets_root: Path) -> Path:
    """``toy_recipe``, whose images have the contrast of photographs."""
    shown = Image.fromarray(image().permute(1, 2, 0).numpy())
    for file in datasets_root.glob("*/images/*.jpg"):
        shown.resize(Image.open(file).size).save(file, quality=95)
    return toy_recipe


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["check.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            load_command("check").main()
        return int(str(ended.value.code)), capsys.readouterr().out

    return run


def arguments(recipe: Path, weights: Path, pixels: str, *words: object) -> list[object]:
    """Of both commands; the recipe has the mean of ``pixels``."""
    order, mean, _ = PIXELS[pixels]
    keys = KEYS | {"MODEL.RESNETS.NORM": "FrozenBN", "MODEL.PIXEL_MEAN": list(mean if order == "BGR" else mean[::-1])}
    settings = [word for pair in keys.items() for word in pair]
    return ["--config-file", recipe, *settings, "MODEL.WEIGHTS", weights, "SOLVER.MAX_ITER", 1, *NO_TEST, *words]


@pytest.mark.parametrize(
    ("name", "keys", "problem", "said"),
    [
        ("MoCo, converted", (), "", "left out stem (1); channels RGB to BGR"),
        ("solo-learn", (), "error", "holds 2 networks: state_dict.backbone, state_dict.momentum_backbone; name one: "),
        ("VISSL, converted", (), "error", "set MODEL.WEIGHTS_PIXELS imagenet (RGB) or 0-1 (RGB) or inception (RGB)"),
        ("VISSL, converted", IMAGENET, "notice", "does not say which pixels it was trained on: state them"),
        ("SimCLR, converted from TensorFlow", (), "notice", "if they were not RGB, PIXEL_MEAN 123.675"),
        ("MoCo, converted", ("MODEL.PIXEL_MEAN", [0.0, 0.0, 0.0]), "notice", "trained with MODEL.PIXEL_MEAN [103.53, "),
        ("OBoW, converted", (), "error", "so its pixels were not BGR, PIXEL_MEAN 102.98"),
        ("mmdetection, caffe", (), "error", "MODEL.RESNETS.STRIDE_IN_1X1 is False; set it to True"),
    ],
)  # fmt: skip
def test_both_commands_say(
    name: str, keys: tuple, problem: str, said: str, recipe: Path, tmp_path: Path, check: Callable,
    train_net: Callable, capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    layout, file = LAYOUTS[name], tmp_path / f"weights{LAYOUTS[name].suffix}"
    write(file, layout.make(network(layout.pixels, layout.caffe).state_dict()))
    words = arguments(recipe, file, layout.pixels, *keys)
    code, text = check(*words)
    assert code == 2 * (problem == "error")
    assert f"{problem}: " in text if problem else "notice: weights" not in text
    assert said in " ".join(text.split())
    if problem == "error":
        with pytest.raises(SystemExit):
            train_net(*words)
        assert said in " ".join(capsys.readouterr().err.split())
    else:
        train_net(*words)
        assert said in (tmp_path / "run/log.txt").read_text()


def test_of_another_depth_the_keys_are_named(recipe: Path, tmp_path: Path, check: Callable) -> None:
    write(tmp_path / "a.pth", network().state_dict())
    words = arguments(recipe, tmp_path / "a.pth", "imagenet", "MODEL.RESNETS.DEPTH", 18,
                      "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.WIDTH_PER_GROUP", 64)  # fmt: skip
    assert "3, 4, 6, 3 of 3 convolutions (MODEL.RESNETS.DEPTH 50, RES2_OUT_CHANNELS 256)" in check(*words)[1]


def test_the_command_that_makes_missing_weights(recipe: Path, tmp_path: Path, check: Callable) -> None:
    for folder, is_ours in (("pretrain_digits_R_18_gn", True), ("imagenet_X_152_8x32d_gn", True), ("other", False)):
        _, text = check(*arguments(recipe, tmp_path / folder / "backbone.pth", "imagenet"))
        command = "make it: scratch-det pretrain --config-file configs/Pretraining/"
        assert (f"{command}{folder.removeprefix('pretrain_')}.yaml\n" in text) == is_ours


def test_bn_of_several_parts_is_one_error(recipe: Path, tmp_path: Path, check: Callable) -> None:
    write(tmp_path / "a.pth", network().state_dict())
    parts = ["MODEL.RESNETS.NORM", "MODEL.FPN.NORM", "MODEL.ROI_BOX_HEAD.NORM", "MODEL.ROI_MASK_HEAD.NORM"]
    keys = [word for part in parts for word in (part, "BN")]
    _, text = check(*arguments(recipe, tmp_path / "a.pth", "imagenet", *keys))
    assert text.count("error: ") == 1
    assert f"{' and '.join(parts)} are BN with 2 images per process" in text
