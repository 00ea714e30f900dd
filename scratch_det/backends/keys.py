"""The values of a config's keys that each backend supports. Free of torch, so that a bad config is rejected at once."""

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from scratch_det.config.choices import SAMPLERS, backbone_names, has_fpn
from scratch_det.config.load import flatten, get_cfg
from scratch_det.errors import ConfigError, did_you_mean

LEVELS = ["res2", "res3", "res4", "res5"]
PYRAMID = ["p2", "p3", "p4", "p5"]
POOLERS = ("ROIAlign", "ROIAlignV2", "ROIPool")
RESNET = "build_resnet_fpn_backbone"

# Keys that have to stay at detectron2's default with any backend, because this repository's data, loop and evaluation
# support nothing else. Other architectures need other annotations, or have state that no checkpoint holds (RetinaNet's
# running loss_normalizer); USE_FED_LOSS needs LVIS's class frequencies.
FIXED_BY_LOOP = (
    "MODEL.META_ARCHITECTURE", "MODEL.PROPOSAL_GENERATOR.NAME", "MODEL.ROI_BOX_HEAD.USE_FED_LOSS",
    "MODEL.LOAD_PROPOSALS", "INPUT.CROP.ENABLED", "TEST.PRECISE_BN.ENABLED",
)  # fmt: skip
# Keys that have to stay at detectron2's default with the torchvision backend.
FIXED_BY_TORCHVISION = (
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE", "MODEL.ANCHOR_GENERATOR.NAME", "MODEL.RPN.HEAD_NAME",
    "MODEL.RPN.IOU_LABELS", "MODEL.RPN.BBOX_REG_LOSS_TYPE", "MODEL.ROI_HEADS.IOU_LABELS",
    "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE",
    "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", "MODEL.ROI_MASK_HEAD.NAME",
    "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", "MODEL.ROI_KEYPOINT_HEAD.NAME",
)  # fmt: skip
FIXED_OF_RESNETS = (  # with the torchvision backend and a ResNet
    "MODEL.RESNETS.STEM_OUT_CHANNELS", "MODEL.RESNETS.RES5_DILATION", "MODEL.RESNETS.DEFORM_ON_PER_STAGE",
)  # fmt: skip


@cache
def detectron2_defaults() -> CfgNode:
    """detectron2's own keys, read from its file without importing detectron2, which would import torch.

    The file's only import is ``.config``, for the CfgNode; as a module of fvcore.common it gets fvcore's.
    """
    package: Any = find_spec("detectron2")
    file = Path(package.origin).parent / "config" / "defaults.py"
    spec: Any = spec_from_file_location("fvcore.common.detectron2_defaults", file)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module._C


def allowed_values(backend: str, cfg: CfgNode) -> dict[str, tuple[Any, ...]]:
    """The values that a config like ``cfg`` may have with ``backend``; a key that is not listed may have any value."""
    defaults = flatten(get_cfg())
    allowed: dict[str, tuple[Any, ...]] = {key: (defaults[key],) for key in FIXED_BY_LOOP}
    allowed["DATALOADER.SAMPLER_TRAIN"] = SAMPLERS
    if backend == "torchvision":
        allowed |= {key: (defaults[key],) for key in FIXED_BY_TORCHVISION}
        allowed |= {f"MODEL.ROI_{head}_HEAD.POOLER_TYPE": POOLERS for head in ("BOX", "MASK", "KEYPOINT")}
        allowed |= {
            "MODEL.BACKBONE.NAME": (RESNET, *backbone_names()),
            "MODEL.ROI_HEADS.NAME": ("StandardROIHeads", "CascadeROIHeads"),
            "MODEL.ROI_BOX_HEAD.NAME": ("FastRCNNConvFCHead",),
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": (cfg.MODEL.ROI_HEADS.NAME == "CascadeROIHeads",),
        }
        if has_fpn(cfg):
            allowed |= {"MODEL.FPN.FUSE_TYPE": ("sum",), "MODEL.RPN.IN_FEATURES": ([*PYRAMID, "p6"],)}
            allowed["MODEL.ROI_HEADS.IN_FEATURES"] = (PYRAMID,)
        if cfg.MODEL.BACKBONE.NAME == RESNET:
            allowed |= {key: (defaults[key],) for key in FIXED_OF_RESNETS}
            allowed |= {"MODEL.FPN.IN_FEATURES": (LEVELS,), "MODEL.RESNETS.OUT_FEATURES": (LEVELS,)}
    heads = {"MODEL.ROI_MASK_HEAD": cfg.MODEL.MASK_ON, "MODEL.ROI_KEYPOINT_HEAD": cfg.MODEL.KEYPOINT_ON}
    unused = tuple(head for head, is_on in heads.items() if not is_on)
    return {key: values for key, values in allowed.items() if not key.startswith(unused)}


def check_keys(backend: str, cfg: CfgNode) -> None:
    """Raise ConfigError, one line per problem, when the config has values that ``backend`` does not support."""
    keys, lines = flatten(cfg), []
    for key, values in allowed_values(backend, cfg).items():
        if keys[key] not in values:
            fix = did_you_mean(str(keys[key]), [str(value) for value in values])
            fix += "; --project FOLDER adds a project's backbones" if key == "MODEL.BACKBONE.NAME" else ""
            fix += "; a recipe with crops is for scratch-det pretrain" if key == "INPUT.CROP.ENABLED" else ""
            lines.append(f"{key} is {keys[key]!r}; allowed: {' or '.join(map(repr, values))}{fix}")
    if backend == "torchvision":
        lines += _torchvision_problems(cfg)
    elif cfg.MODEL.KEYPOINT_ON and cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeads":
        lines.append("MODEL.ROI_HEADS.NAME is 'Res5ROIHeads', which has no keypoint head; use StandardROIHeads and FPN")
    if lines:
        raise ConfigError(f"the {backend} backend does not support this recipe:\n  " + "\n  ".join(lines))


def _torchvision_problems(cfg: CfgNode) -> Iterator[str]:
    """Combinations of values that the torchvision backend does not support."""
    resnets, rpn = cfg.MODEL.RESNETS, cfg.MODEL.RPN
    if cfg.MODEL.BACKBONE.NAME == RESNET:
        basic = resnets.DEPTH in (18, 34)
        if not basic and resnets.RES2_OUT_CHANNELS != 256:
            yield f"MODEL.RESNETS.RES2_OUT_CHANNELS is {resnets.RES2_OUT_CHANNELS}; allowed: 256 at this depth"
        if basic and (resnets.NUM_GROUPS, resnets.WIDTH_PER_GROUP) != (1, 64):
            yield "MODEL.RESNETS.NUM_GROUPS and WIDTH_PER_GROUP are fixed at 1 and 64 for ResNet-18 and -34"
    width = cfg.MODEL.FPN.OUT_CHANNELS if has_fpn(cfg) else -1  # without FPN no key says how wide the maps are
    if set(rpn.CONV_DIMS) - {-1, width}:
        yield f"MODEL.RPN.CONV_DIMS is {rpn.CONV_DIMS!r}; every hidden convolution has the maps' width: -1"
