"""The values of detectron2's keys that the torchvision backend supports."""

from collections.abc import Iterator

from fvcore.common.config import CfgNode

from scratch_det.backends import ALLOWED_BY_LOOP, Allowed, check_allowed
from scratch_det.config import flatten, get_cfg
from scratch_det.config.choices import backbone_names, has_fpn

LEVELS = ["res2", "res3", "res4", "res5"]
PYRAMID = ["p2", "p3", "p4", "p5"]
POOLERS = ("ROIAlign", "ROIAlignV2")
RESNET = "build_resnet_fpn_backbone"

ALLOWED: Allowed = {
    **ALLOWED_BY_LOOP,
    "MODEL.BACKBONE.FREEZE_AT": (0, 1, 2, 3, 4, 5),
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": (0,),
    "MODEL.ANCHOR_GENERATOR.NAME": ("DefaultAnchorGenerator",),
    "MODEL.RPN.HEAD_NAME": ("StandardRPNHead",),
    "MODEL.RPN.BOUNDARY_THRESH": (-1,),
    "MODEL.RPN.IOU_LABELS": ([0, -1, 1],),
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": ("smooth_l1",),
    "MODEL.ROI_HEADS.NAME": ("StandardROIHeads", "CascadeROIHeads"),
    "MODEL.ROI_HEADS.IOU_LABELS": ([0, 1],),
    "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": (True,),
    "MODEL.ROI_BOX_HEAD.NAME": ("FastRCNNConvFCHead",),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": ("smooth_l1",),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": POOLERS,
    "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": (False,),
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": (False,),
    "MODEL.ROI_MASK_HEAD.NAME": ("MaskRCNNConvUpsampleHead",),
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": POOLERS,
    "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": (False,),
    "MODEL.ROI_KEYPOINT_HEAD.NAME": ("KRCNNConvDeconvUpsampleHead",),
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE": POOLERS,
}
WITH_FPN: Allowed = {
    "MODEL.FPN.FUSE_TYPE": ("sum",),
    "MODEL.RPN.IN_FEATURES": ([*PYRAMID, "p6"],),
    "MODEL.ROI_HEADS.IN_FEATURES": (PYRAMID,),
}
RESNETS: Allowed = {
    **WITH_FPN,
    "MODEL.FPN.IN_FEATURES": (LEVELS,),
    "MODEL.RESNETS.DEPTH": (18, 34, 50, 101, 152),
    "MODEL.RESNETS.OUT_FEATURES": (LEVELS,),
    "MODEL.RESNETS.STEM_OUT_CHANNELS": (64,),
    "MODEL.RESNETS.RES5_DILATION": (1,),
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": ([False] * 4,),
}
LENGTHS = {
    "MODEL.PIXEL_MEAN": 3,
    "MODEL.PIXEL_STD": 3,
    "MODEL.RPN.IOU_THRESHOLDS": 2,
    "MODEL.RPN.BBOX_REG_WEIGHTS": 4,
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": 1,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": 4,
}


def defaults() -> CfgNode:
    """This repository's subset of detectron2's keys, with detectron2's defaults."""
    return get_cfg()


def check(cfg: CfgNode) -> None:
    """Raise ConfigError, one line per key, when the config has values that this backend does not support."""
    allowed = {
        **ALLOWED,
        "MODEL.BACKBONE.NAME": (RESNET, *backbone_names()),
        **(RESNETS if cfg.MODEL.BACKBONE.NAME == RESNET else WITH_FPN if has_fpn(cfg) else {}),
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": (cfg.MODEL.ROI_HEADS.NAME == "CascadeROIHeads",),
    }
    check_allowed("torchvision", cfg, allowed, _problems(cfg))


def _problems(cfg: CfgNode) -> Iterator[str]:
    """Combinations of values that the backend does not support."""
    keys, resnets, rpn = flatten(cfg), cfg.MODEL.RESNETS, cfg.MODEL.RPN
    for key, length in LENGTHS.items():
        if len(keys[key]) != length:
            yield f"{key} is {keys[key]!r}; it takes {length} value{'s' * (length > 1)}"
    if cfg.MODEL.BACKBONE.NAME == RESNET:
        basic = resnets.DEPTH in (18, 34)
        if not basic and resnets.RES2_OUT_CHANNELS != 256:
            yield f"MODEL.RESNETS.RES2_OUT_CHANNELS is {resnets.RES2_OUT_CHANNELS}; allowed: 256 at this depth"
        if basic and (resnets.NUM_GROUPS, resnets.WIDTH_PER_GROUP) != (1, 64):
            yield "MODEL.RESNETS.NUM_GROUPS and WIDTH_PER_GROUP are fixed at 1 and 64 for ResNet-18 and -34"
    width = cfg.MODEL.FPN.OUT_CHANNELS if has_fpn(cfg) else -1  # without FPN no key says how wide the maps are
    if set(rpn.CONV_DIMS) - {-1, width}:
        yield f"MODEL.RPN.CONV_DIMS is {rpn.CONV_DIMS!r}; every hidden convolution has the maps' width: -1"
    for key in ("MODEL.ANCHOR_GENERATOR.SIZES", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"):
        lists, levels = keys[key], len(rpn.IN_FEATURES)
        if len(lists) not in (1, levels):
            yield f"{key} has {len(lists)} lists; expected one for all levels or one for each of the {levels}"
        if len({len(values) for values in lists}) > 1:
            yield f"{key} is {lists!r}; every level needs the same number of values"
