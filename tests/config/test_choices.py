"""The lists of choices: one more schedule, optimizer, augmentation, backbone and writer, each by one line."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, restored_registries
from four_maps import FourMaps
from fvcore.common.config import CfgNode
from torch import nn

from scratch_det.command_line import load_project
from scratch_det.config.choices import (
    AUGMENTATIONS,
    BACKBONES,
    LR_SCHEDULES,
    OPTIMIZERS,
    PROJECT_KEYS,
    WRITERS,
    Choice,
    model_name,
)
from scratch_det.config.load import load_config
from scratch_det.config.rules import check_config
from scratch_det.config.schedule import is_multi_step, learning_rate, learning_rate_line
from scratch_det.data.transforms import Sample, augment
from scratch_det.engine.state import parameter_groups
from scratch_det.engine.writers import Writer
from scratch_det.errors import ConfigError

SEEN: list[str] = []  # names of the added functions that ran


def falling(solver: CfgNode, iteration: int) -> float:
    """A straight line down to 0."""
    SEEN.append("schedule")
    return solver.BASE_LR * (1 - iteration / solver.MAX_ITER)


def falls(cfg: CfgNode) -> Iterator[str]:
    if cfg.SOLVER.STEPS:
        yield 'SOLVER.STEPS is set, but Falling has no drops; set SOLVER.STEPS "()"'


def build_rmsprop(cfg: CfgNode, model: nn.Module) -> torch.optim.RMSprop:
    SEEN.append("optimizer")
    return torch.optim.RMSprop(parameter_groups(cfg, model), lr=cfg.SOLVER.BASE_LR, alpha=cfg.SOLVER.ALPHA)


def darker(sample: Sample, cfg: CfgNode, rng: np.random.Generator) -> Sample:
    SEEN.append("augmentation")
    return augment(sample, cfg, rng)


class Thin(FourMaps):
    def __init__(self, cfg: CfgNode):
        SEEN.append("backbone")
        super().__init__([cfg.MODEL.THIN.WIDTH] * 4)


class Noted(Writer):
    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        SEEN.append("writer")


@pytest.fixture(autouse=True)
def one_more_of_each() -> Iterator[None]:
    SEEN.clear()
    keys = {"SOLVER.OPTIMIZER": "SGD", "SOLVER.ALPHA": 0.9, "INPUT.AUGMENTATION": "resize", "MODEL.THIN.WIDTH": 8}
    with restored_registries():
        PROJECT_KEYS.update(keys)
        LR_SCHEDULES["Falling"] = Choice(f"{__name__}:falling", rule=falls)
        OPTIMIZERS["RMSprop"] = Choice(f"{__name__}:build_rmsprop", ("SOLVER.ALPHA",), moments=1)
        AUGMENTATIONS["darker"] = Choice(f"{__name__}:darker", AUGMENTATIONS["resize"].keys)
        WRITERS["noted"] = Choice(f"{__name__}:Noted")
        BACKBONES["thin"] = Choice(f"{__name__}:Thin", ("MODEL.THIN.WIDTH",))
        yield


CHOSEN = ("SOLVER.LR_SCHEDULER_NAME", "Falling", "SOLVER.STEPS", "()", "SOLVER.OPTIMIZER", "RMSprop", "SOLVER.BASE_LR",
          "0.001", "INPUT.AUGMENTATION", "darker", "MODEL.BACKBONE.NAME", "build_thin_fpn_backbone",
          "WRITERS", "['noted']")  # fmt: skip


def test_a_detector_is_trained_with_all_of_them(train: Callable[..., Path]) -> None:
    folder = train(*CHOSEN, "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2)
    assert {"schedule", "optimizer", "augmentation", "backbone", "writer"} == set(SEEN)
    assert json.loads((folder / "result.json").read_text())["iteration"] == 4
    state = torch.load(folder / "checkpoints/model_0000001.pth", weights_only=False)
    assert any(name.endswith("res5.0.weight") for name in state["model"])


@pytest.fixture
def cfg() -> CfgNode:
    return load_config(ROOT / "configs/Digits/quickstart.yaml", CHOSEN).cfg


def test_the_schedule_is_used_and_shown(cfg: CfgNode) -> None:
    assert not is_multi_step(cfg)
    assert learning_rate(cfg, 160) == pytest.approx(0.001 * 0.75)
    assert learning_rate_line(cfg) == "learning rate 0.001 -> 0.001 over 100 it, by Falling to 0, end 640"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("SOLVER.STEPS", "(9,)"), "Falling has no drops"),
        (("SOLVER.OPTIMIZER", "SGD", "SOLVER.ALPHA", "0.5"), r"ALPHA is 0\.5, which SOLVER\.OPTIMIZER SGD ignores"),
        (("SOLVER.OPTIMIZER", "RMSProp"), "expected 'SGD' or 'RMSprop'; did you mean 'RMSprop'"),
        (("INPUT.AUGMENTATION", "dark"), "expected 'resize' or 'darker'; did you mean 'darker'"),
        (
            ("MODEL.BACKBONE.NAME", "build_vgg16_fpn_backbone", "MODEL.THIN.WIDTH", "9"),
            r"WIDTH is 9, which MODEL\.BACKBONE\.NAME build_vgg16_fpn_backbone ignores; leave it at 8",
        ),
    ],
)
def test_what_does_not_fit_is_rejected(keys: tuple[str, ...], message: str) -> None:
    check_config(load_config(ROOT / "configs/Digits/quickstart.yaml", CHOSEN).cfg)
    with pytest.raises(ConfigError, match=message):
        check_config(load_config(ROOT / "configs/Digits/quickstart.yaml", [*CHOSEN, *keys]).cfg)


def test_models_are_named_by_their_keys(cfg: CfgNode) -> None:
    assert model_name(cfg) == "mask_rcnn_THIN_FPN_fc256"
    names = {
        "COCO-InstanceSegmentation/pretrained_cascade_mask_rcnn_X_152_8x32d_FPN_6x_gn_train_aug": (
            "mask_rcnn_X_152_8x32d_FPN_gn + cascade"
        ),
        "COCO-Detection/scratch_faster_rcnn_VGG16_11x_train_aug": "faster_rcnn_VGG16_fc4096",
        "COCO-Keypoints/scratch_keypoint_rcnn_R_50_FPN_2x_gn": "keypoint_rcnn_R_50_FPN_gn",
        "Digits/scratch_mask_rcnn_R_18_FPN_3x_none": "mask_rcnn_R_18_FPN_none_fc256",
    }
    for recipe, name in names.items():
        assert model_name(load_config(ROOT / f"configs/{recipe}.yaml").cfg) == name


def test_a_project_is_taken_back() -> None:
    """What ``restored_registries`` is for: no test leaves keys or choices of a project to the next one."""
    recipe = ROOT / "projects/lsj/configs/digits_mask_rcnn_R_18_FPN_2ep_lsj.yaml"
    with restored_registries():
        load_project(ROOT / "projects/lsj")
        check_config(load_config(recipe).cfg)
        assert "LSJ" in AUGMENTATIONS
    assert "LSJ" not in AUGMENTATIONS
    with pytest.raises(ConfigError, match=r"key INPUT\.LSJ\.SIZE is one of a project: give --project projects/lsj"):
        load_config(recipe)
