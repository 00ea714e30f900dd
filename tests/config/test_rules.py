"""Rules: one mistake is one line that names the key and the fix; good recipes pass."""

import pytest
from conftest import ROOT
from fvcore.common.config import CfgNode

from scratch_det.config.load import get_cfg, load_config, set_key
from scratch_det.config.rules import check_config
from scratch_det.errors import ConfigError

CONFIGS = ROOT / "configs"


@pytest.fixture
def scratch_cfg() -> CfgNode:
    return load_config(CONFIGS / "COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_3x_gn.yaml").cfg


class TestRules:
    @pytest.mark.parametrize(
        ("key", "value", "expected"),
        [
            ("MODEL.BACKBONE.FREEZE_AT", 2, "set MODEL.BACKBONE.FREEZE_AT 0"),
            ("MODEL.RESNETS.NORM", "FrozenBN", "set MODEL.RESNETS.NORM GN"),
            ("MODEL.FPN.NORM", "FrozenBN", "set MODEL.FPN.NORM GN"),
            ("MODEL.ROI_BOX_HEAD.NORM", "FrozenBN", "set MODEL.ROI_BOX_HEAD.NORM GN"),
            ("MODEL.ROI_MASK_HEAD.NORM", "FrozenBN", "set MODEL.ROI_MASK_HEAD.NORM GN"),
            ("MODEL.FPN.NORM", "SynchBN", "did you mean 'SyncBN'"),
            ("MODEL.FPN.OUT_CHANNELS", 80, "MODEL.FPN.OUT_CHANNELS makes 80 channels"),
            ("MODEL.ROI_BOX_HEAD.CONV_DIM", 48, "multiple of 32 such as 64"),
            ("MODEL.ROI_MASK_HEAD.CONV_DIM", 8, "multiple of 32 such as 32"),
            ("MODEL.RESNETS.WIDTH_PER_GROUP", 4, "NUM_GROUPS x WIDTH_PER_GROUP makes 4 channels"),
            ("MODEL.RESNETS.NORM", "BN", "MODEL.RESNETS.NORM is BN with 2 images per process"),
            ("MODEL.RESNETS.DEPTH", 51, "MODEL.RESNETS.DEPTH is 51"),
            ("MODEL.RESNETS.DEPTH", 18, "set MODEL.RESNETS.RES2_OUT_CHANNELS 64"),
            ("MODEL.ROI_HEADS.IOU_THRESHOLDS", [1.5], "MODEL.ROI_HEADS.IOU_THRESHOLDS is [1.5]"),
            ("SOLVER.STEPS", (250_000, 210_000), 'set SOLVER.STEPS "(210000, 250000)"'),
            ("SOLVER.STEPS", (210_000, 270_000), 'drop them (set SOLVER.STEPS "(210000,)")'),
            ("SOLVER.MAX_ITER", 200_000, 'drop them (set SOLVER.STEPS "()")'),
            ("SOLVER.WARMUP_ITERS", 270_000, "set SOLVER.WARMUP_ITERS 27000"),
            ("SOLVER.WARMUP_FACTOR", 3.0, "SOLVER.WARMUP_FACTOR is 3.0"),
            ("SOLVER.MAX_ITER", 0, "SOLVER.MAX_ITER is 0"),
            ("SOLVER.IMS_PER_BATCH", 0, "SOLVER.IMS_PER_BATCH is 0"),
            ("SOLVER.IMS_PER_BATCH", 12, "which 8 processes cannot share evenly; give --scale-to-batch 16"),
            ("SOLVER.REFERENCE_WORLD_SIZE", -1, "SOLVER.REFERENCE_WORLD_SIZE is -1"),
            (
                "SOLVER.REFERENCE_WORLD_SIZE",
                5,
                "share SOLVER.IMS_PER_BATCH 16 evenly; set SOLVER.REFERENCE_WORLD_SIZE 0",
            ),
            ("SOLVER.BASE_LR", 0.0, "SOLVER.BASE_LR is 0.0"),
            ("SOLVER.GAMMA", -0.1, "SOLVER.GAMMA is -0.1"),
            ("SOLVER.CHECKPOINT_PERIOD", 0, "SOLVER.CHECKPOINT_PERIOD is 0"),
            ("SOLVER.LR_SCHEDULER_NAME", "CosineLR", "did you mean 'WarmupCosineLR'"),
            ("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", 'has no drops; set SOLVER.STEPS "()"'),
            ("SOLVER.BASE_LR_END", 0.001, "which SOLVER.LR_SCHEDULER_NAME WarmupMultiStepLR ignores; leave it at 0.0"),
            ("SOLVER.RESCALE_INTERVAL", True, "which this trainer ignores; leave it at False"),
            ("SOLVER.WARMUP_METHOD", "linnear", "did you mean 'linear'"),
            ("INPUT.FORMAT", "GRB", "expected 'BGR' or 'RGB'"),
            ("INPUT.RANDOM_FLIP", "horizontaly", "did you mean 'horizontal'"),
            ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "needs its two ends"),
            ("INPUT.MIN_SIZE_TRAIN", (), "INPUT.MIN_SIZE_TRAIN is ()"),
            ("INPUT.MAX_SIZE_TRAIN", 0, "INPUT.MAX_SIZE_TRAIN is 0"),
            ("INPUT.MIN_SIZE_TEST", -800, "INPUT.MIN_SIZE_TEST is -800, expected 0 or more"),
            ("INPUT.MAX_SIZE_TEST", 0, "INPUT.MAX_SIZE_TEST is 0, expected 1 or more"),
            ("TEST.DETECTIONS_PER_IMAGE", -1, "TEST.DETECTIONS_PER_IMAGE is -1, expected 1 or more"),
            ("DATASETS.TRAIN", (), "DATASETS.TRAIN is (), expected at least one data set"),
        ],
    )
    def test_one_mistake_one_line(self, scratch_cfg: CfgNode, key: str, value: object, expected: str) -> None:
        set_key(scratch_cfg, key, value)
        with pytest.raises(ConfigError) as error:
            check_config(scratch_cfg, num_processes=8)
        assert expected in str(error.value)
        assert len(str(error.value).splitlines()) == 1

    def test_every_problem_is_listed(self, scratch_cfg: CfgNode) -> None:
        scratch_cfg.MODEL.BACKBONE.FREEZE_AT = 2
        scratch_cfg.SOLVER.BASE_LR = -1.0
        scratch_cfg.DATASETS.TRAIN = ()
        with pytest.raises(ConfigError) as error:
            check_config(scratch_cfg)
        assert len(str(error.value).splitlines()) == 3

    def test_detectron2s_defaults_cannot_train_from_scratch(self) -> None:
        with pytest.raises(ConfigError, match=r"FREEZE_AT is 2(.|\n)*RESNETS\.NORM is FrozenBN"):
            check_config(get_cfg())

    def test_fine_tuning_may_freeze(self) -> None:
        cfg = load_config(CONFIGS / "COCO-InstanceSegmentation/pretrained_mask_rcnn_R_50_FPN_2x_gn.yaml").cfg
        cfg.MODEL.RESNETS.NORM = "FrozenBN"
        assert check_config(cfg, num_processes=8) == []

    def test_plain_bn_with_enough_images(self, scratch_cfg: CfgNode) -> None:
        scratch_cfg.MODEL.RESNETS.NORM = "BN"
        assert check_config(scratch_cfg, num_processes=2) == []

    def test_a_backbone_without_resnet_does_not_read_its_norm(self, scratch_cfg: CfgNode) -> None:
        scratch_cfg.MODEL.BACKBONE.NAME = "build_vgg_backbone"
        scratch_cfg.MODEL.RESNETS.NORM = "FrozenBN"
        assert check_config(scratch_cfg) == []

    def test_sync_bn_says_what_it_becomes(self, scratch_cfg: CfgNode) -> None:
        scratch_cfg.MODEL.RESNETS.NORM = "SyncBN"
        assert check_config(scratch_cfg, num_processes=8) == []
        (notice,) = check_config(scratch_cfg, num_processes=1)
        assert notice.startswith("MODEL.RESNETS.NORM: SyncBN in a single process is plain BN")

    @pytest.mark.parametrize(("norm", "seen", "whole"), [("SyncBN", 8, 16), ("BN", 4, 8)])
    @pytest.mark.parametrize("part", ["RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"])
    def test_accumulation_needs_norms_without_a_batch(
        self, scratch_cfg: CfgNode, part: str, norm: str, seen: int, whole: int
    ) -> None:
        assert check_config(scratch_cfg, num_processes=2, accumulate=2) == []
        scratch_cfg.MODEL[part].NORM = norm
        with pytest.raises(ConfigError) as error:
            check_config(scratch_cfg, num_processes=2, accumulate=2)
        assert str(error.value) == (
            f"MODEL.{part}.NORM is {norm} with --accumulate 2: it would normalise with the statistics of {seen} "
            f"images, not of {whole}, which is another training; set MODEL.{part}.NORM GN, which normalises each image "
            "separately, or leave out --accumulate"
        )

    def test_fixed_statistics_may_accumulate(self) -> None:
        cfg = load_config(CONFIGS / "COCO-InstanceSegmentation/pretrained_mask_rcnn_R_50_FPN_2x_gn.yaml").cfg
        cfg.MODEL.RESNETS.NORM = "FrozenBN"
        assert check_config(cfg, accumulate=8) == []

    @pytest.mark.parametrize(
        ("num_processes", "accumulate", "expected"),
        [
            (1, 3, "which 1 process with --accumulate 3 cannot share evenly; give --accumulate 2"),
            (1, 10**12, f"which 1 process with --accumulate {10**12} cannot share evenly; give --accumulate 16"),
            (2, 32, "which 2 processes with --accumulate 32 cannot share evenly; give --accumulate 8"),
            (3, 2, "which 3 processes with --accumulate 2 cannot share evenly; give --scale-to-batch 18"),
            (64, 1, "which 64 processes cannot share evenly; give --scale-to-batch 64"),
        ],
    )
    def test_shares_are_even(self, scratch_cfg: CfgNode, num_processes: int, accumulate: int, expected: str) -> None:
        with pytest.raises(ConfigError) as error:
            check_config(scratch_cfg, num_processes, accumulate)
        assert str(error.value) == f"SOLVER.IMS_PER_BATCH is 16 in total, {expected}"

    def test_a_batch_beyond_its_range(self, scratch_cfg: CfgNode) -> None:
        """No share of it is looked for: that would take for ever."""
        scratch_cfg.SOLVER.IMS_PER_BATCH = 10**12 + 1
        with pytest.raises(ConfigError, match=r"^SOLVER.IMS_PER_BATCH is 1000000000001, expected 1 or more, at most"):
            check_config(scratch_cfg, accumulate=10**12)

    def test_clipping_type(self, scratch_cfg: CfgNode) -> None:
        scratch_cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "global"
        assert check_config(scratch_cfg) == []
        scratch_cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
        with pytest.raises(ConfigError, match="CLIP_TYPE is 'global', expected 'value' or 'norm'"):
            check_config(scratch_cfg)
