"""Which values of detectron2's keys this backend can honour."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

from fvcore.common.config import CfgNode

from scratch_det.backends import LOOP, Honoured, not_honoured, refuse
from scratch_det.config import flatten, get_cfg
from scratch_det.config.choices import backbone_names, has_fpn

LEVELS = ["res2", "res3", "res4", "res5"]
PYRAMID = ["p2", "p3", "p4", "p5"]

HONOURED: Honoured = {
    **LOOP,
    "MODEL.META_ARCHITECTURE": ("GeneralizedRCNN",),
    "MODEL.BACKBONE.FREEZE_AT": (0, 1, 2, 3, 4, 5),
    "MODEL.PROPOSAL_GENERATOR.NAME": ("RPN",),
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
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": ("ROIAlign", "ROIAlignV2"),
    "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": (False,),
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": (False,),
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": (False,),
    "MODEL.ROI_MASK_HEAD.NAME": ("MaskRCNNConvUpsampleHead",),
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": ("ROIAlign", "ROIAlignV2"),
    "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": (False,),
    "MODEL.ROI_KEYPOINT_HEAD.NAME": ("KRCNNConvDeconvUpsampleHead",),
    "MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE": ("ROIAlign", "ROIAlignV2"),
}
PYRAMIDS: Honoured = {
    "MODEL.FPN.FUSE_TYPE": ("sum",),
    "MODEL.RPN.IN_FEATURES": ([*PYRAMID, "p6"],),
    "MODEL.ROI_HEADS.IN_FEATURES": (PYRAMID,),
}
RESNETS: Honoured = {  # with FPN
    **PYRAMIDS,
    "MODEL.FPN.IN_FEATURES": (LEVELS,),
    "MODEL.RESNETS.DEPTH": (18, 34, 50, 101, 152),
    "MODEL.RESNETS.OUT_FEATURES": (LEVELS,),
    "MODEL.RESNETS.STEM_OUT_CHANNELS": (64,),
    "MODEL.RESNETS.RES5_DILATION": (1,),
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": ([False] * 4,),
}
RESNET = "build_resnet_fpn_backbone"
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
    """Raise ConfigError, one line per key, where the recipe asks for what this backend does not have."""
    keys, is_resnet = flatten(cfg), cfg.MODEL.BACKBONE.NAME == RESNET
    pyramids = PYRAMIDS if has_fpn(cfg) else {}
    honoured = {
        **HONOURED,
        "MODEL.BACKBONE.NAME": (RESNET, *backbone_names()),
        **(RESNETS if is_resnet else pyramids),
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": (cfg.MODEL.ROI_HEADS.NAME == "CascadeROIHeads",),
    }
    widths = _widths(keys) if is_resnet else ()
    refuse("torchvision", chain(not_honoured(cfg, honoured), _lengths(keys), widths, _rpn(cfg), _anchors(keys)))


def _lengths(keys: dict[str, Any]) -> Iterator[str]:
    for key, length in LENGTHS.items():
        if len(keys[key]) != length:
            yield f"{key} is {keys[key]!r}; it takes {length} value{'s' * (length > 1)}"


def _widths(keys: dict[str, Any]) -> Iterator[str]:
    basic = keys["MODEL.RESNETS.DEPTH"] in (18, 34)
    res2, groups = keys["MODEL.RESNETS.RES2_OUT_CHANNELS"], keys["MODEL.RESNETS.NUM_GROUPS"]
    if not basic and res2 != 256:
        yield f"MODEL.RESNETS.RES2_OUT_CHANNELS is {res2}; it has 256 at this depth"
    if basic and (groups, keys["MODEL.RESNETS.WIDTH_PER_GROUP"]) != (1, 64):
        yield "MODEL.RESNETS.NUM_GROUPS and WIDTH_PER_GROUP are fixed at 1 and 64 for ResNet-18 and -34"


def _rpn(cfg: CfgNode) -> Iterator[str]:
    """Hidden convolutions, any number of them; without FPN no key says how wide the maps are."""
    dims, width = cfg.MODEL.RPN.CONV_DIMS, cfg.MODEL.FPN.OUT_CHANNELS if has_fpn(cfg) else -1
    if set(dims) - {-1, width}:
        yield f"MODEL.RPN.CONV_DIMS is {dims!r}; every hidden convolution has the maps' width: -1"


def _anchors(keys: dict[str, Any]) -> Iterator[str]:
    for key in ("MODEL.ANCHOR_GENERATOR.SIZES", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"):
        lists, levels = keys[key], len(keys["MODEL.RPN.IN_FEATURES"])
        if len(lists) not in (1, levels):
            yield f"{key} has {len(lists)} lists; expected one for all levels or one for each of the {levels}"
        if len({len(values) for values in lists}) > 1:
            yield f"{key} is {lists!r}; every level needs the same number of values"
