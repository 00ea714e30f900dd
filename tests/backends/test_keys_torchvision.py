"""What the torchvision backend rejects, by key, and what it accepts."""

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from conftest import ROOT
from fvcore.common.config import CfgNode
from samples import sample
from torch import nn

from scratch_det.backends import torchvision as backend
from scratch_det.backends.keys import allowed_values, check_keys
from scratch_det.config.load import load_config, set_key
from scratch_det.errors import ConfigError

CONFIGS = ROOT / "configs"
SMALL = CONFIGS / "Digits/quickstart.yaml"

Config = Callable[..., CfgNode]
check = partial(check_keys, "torchvision")


def built(cfg: CfgNode, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return backend.build(cfg)


WRONG = {  # a value of the right type that this backend does not have
    "MODEL.META_ARCHITECTURE": "RetinaNet",
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL.FPN.FUSE_TYPE": "avg",
    "MODEL.RESNETS.OUT_FEATURES": ["res4"],
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 32,
    "MODEL.RESNETS.RES5_DILATION": 2,
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, True, True, True],
    "MODEL.PROPOSAL_GENERATOR.NAME": "RRPN",
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": 4,
    "MODEL.ANCHOR_GENERATOR.NAME": "RotatedAnchorGenerator",
    "MODEL.RPN.HEAD_NAME": "OtherHead",
    "MODEL.RPN.IN_FEATURES": ["p3", "p4", "p5"],
    "MODEL.RPN.IOU_LABELS": [0, 1],
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": "giou",
    "MODEL.ROI_HEADS.NAME": "Res5ROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3"],
    "MODEL.ROI_HEADS.IOU_LABELS": [0, -1, 1],
    "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": False,
    "MODEL.ROI_BOX_HEAD.NAME": "",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": "diou",
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignRotated",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
    "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": True,
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": True,
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": True,
    "MODEL.ROI_MASK_HEAD.NAME": "PointRendMaskHead",
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": "ROIAlignRotated",
    "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": True,
    "MODEL.ROI_KEYPOINT_HEAD.NAME": "KRCNNHead",
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE": "ROIAlignRotated",
    "MODEL.LOAD_PROPOSALS": True,
    "INPUT.CROP.ENABLED": True,
    "DATALOADER.SAMPLER_TRAIN": "RandomSubsetTrainingSampler",
    "TEST.PRECISE_BN.ENABLED": True,
}


class TestRejections:
    def test_every_restricted_key_has_a_wrong_value_here(self, config: Config) -> None:
        assert set(WRONG) == set(allowed_values("torchvision", config("MODEL.KEYPOINT_ON", "True")))

    @pytest.mark.parametrize("key", WRONG)
    def test_a_value_it_does_not_have_is_rejected_by_name(self, key: str, config: Config) -> None:
        cfg = config("MODEL.KEYPOINT_ON", "True")
        set_key(cfg, key, WRONG[key])
        with pytest.raises(ConfigError, match=f"{re.escape(key)} is {re.escape(repr(WRONG[key]))}") as rejection:
            check(cfg)
        assert {line.split()[0] for line in str(rejection.value).splitlines()[1:] if " is " in line} <= {
            key,
            "MODEL.RESNETS.RES2_OUT_CHANNELS",  # follows from the depth
        }

    def test_all_problems_at_once(self, config: Config) -> None:
        with pytest.raises(ConfigError) as rejection:
            check(config("INPUT.CROP.ENABLED", "True", "MODEL.LOAD_PROPOSALS", "True"))
        assert all(key in str(rejection.value) for key in ("INPUT.CROP.ENABLED", "MODEL.LOAD_PROPOSALS"))

    @pytest.mark.parametrize(
        ("overrides", "named"),
        [
            (("MODEL.RESNETS.DEPTH", "50"), "MODEL.RESNETS.RES2_OUT_CHANNELS is 64"),
            (("MODEL.RESNETS.NUM_GROUPS", "32"), "MODEL.RESNETS.NUM_GROUPS"),
            (("MODEL.RPN.CONV_DIMS", "[-1, 64]"), "MODEL.RPN.CONV_DIMS is [-1, 64]"),
        ],
    )
    def test_what_does_not_go_together(self, overrides: tuple[str, str], named: str, config: Config) -> None:
        with pytest.raises(ConfigError, match=re.escape(named)):
            check(config(*overrides))

    def test_every_recipe_is_accepted(self) -> None:
        paths = [path for path in CONFIGS.glob("*/*.yaml") if path.parent.name not in ("_base_", "Pretraining")]
        assert paths
        for path in sorted(paths):
            try:
                check(load_config(path).cfg)
            except ConfigError as error:
                pytest.fail(f"{path}: {error}")

    @pytest.mark.parametrize(
        "overrides",
        [
            ("MODEL.MASK_ON", "False", "MODEL.ROI_MASK_HEAD.NAME", "PointRendMaskHead"),  # not built, so not asked
            ("MODEL.ANCHOR_GENERATOR.SIZES", "[[8, 16]]"),  # one list for all levels
            ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlign"),
            ("MODEL.RPN.CONV_DIMS", "[]"),
            ("MODEL.RPN.CONV_DIMS", "[-1, 32]"),
        ],
    )
    def test_what_is_accepted_also_trains(self, overrides: tuple[str, ...], config: Config) -> None:
        cfg = config(*overrides)
        check(cfg)
        assert all(loss.isfinite() for loss in backend.losses(built(cfg), [sample()]).values())
