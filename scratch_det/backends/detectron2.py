"""The detectron2 backend: the functions of ``scratch_det.backends.Backend`` around detectron2's ``build_model``.

The networks of BACKBONES are registered as detectron2's backbones, by the same names.
"""

import logging
import warnings
from collections.abc import Iterable
from copy import copy
from functools import partial
from typing import Any

import torch
from detectron2 import _C  # noqa: F401 - without its compiled part detectron2 fails later, and less clearly
from detectron2.config import get_cfg
from detectron2.layers import ROIAlign, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, build_model, detector_postprocess
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.structures import Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from scratch_det.backends import Batch
from scratch_det.config.choices import backbone_names, has_fpn
from scratch_det.config.load import flatten, set_key, with_project_keys
from scratch_det.data.detectron2_catalog import register_data_sets
from scratch_det.errors import ConfigError, did_you_mean
from scratch_det.modeling.anchors import Anchors
from scratch_det.modeling.backbones import build_bottom_up
from scratch_det.modeling.norm import SyncBatchNorm
from scratch_det.modeling.roi_align import roi_align


class BareBackbone(Backbone):
    """A bottom-up network without a pyramid; its weights have the same names as with one."""

    def __init__(self, cfg: CfgNode, input_shape: ShapeSpec):
        super().__init__()
        self.bottom_up = build_bottom_up(cfg)
        self._out_features = list(self.bottom_up.strides)  # these three are what ``output_shape`` tells
        self._out_feature_channels, self._out_feature_strides = self.bottom_up.channels, self.bottom_up.strides

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images [N, 3, H, W] -> maps by name."""
        return self.bottom_up(images)


def build_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """The config's network of BACKBONES, under detectron2's FPN where its name says so."""
    bare = BareBackbone(cfg, input_shape)
    if not has_fpn(cfg):
        return bare
    keys = cfg.MODEL.FPN
    pyramid = FPN(bare, keys.IN_FEATURES, keys.OUT_CHANNELS, keys.NORM, LastLevelMaxPool(), keys.FUSE_TYPE)
    pyramid.bottom_up = bare.bottom_up  # without the wrapper, so that names are like those of detectron2's ResNets
    return pyramid


class FloatROIAlign(ROIAlign):
    """detectron2's layer, in float32 under autocast: bfloat16 would move the boxes' corners by 0.7 px on average.

    On the CPU it has the faster gradient of ``scratch_det.modeling.roi_align``.
    """

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Maps [N, C, H, W] in ``rois`` [K, 5] -> [K, C, S, S] of the maps' type; float32 in between."""
        size, scale = self.output_size[0], self.spatial_scale
        pooled = roi_align(input.float(), rois, size, scale, self.sampling_ratio, self.aligned)
        return pooled.to(input.dtype)


class LevelAnchors(Anchors):
    """As detectron2's RPN asks for them, level by level."""

    box_dim = 4

    def forward(self, maps: list[Tensor]) -> list[Boxes]:
        return [Boxes(level) for level in self.levels(maps)]


def register_backbones() -> None:
    """Register the networks of BACKBONES for ``build_model``, once."""
    for name in backbone_names():
        if name not in BACKBONE_REGISTRY:
            BACKBONE_REGISTRY._do_register(name, build_backbone)


def register(names: Iterable[str] | None = None) -> None:
    """Make this repository's backbones and data sets known to detectron2's own tools.

    names: of the data sets, see ``scratch_det.data.detectron2_catalog``; None for all that are on disk.
    """
    register_backbones()
    register_data_sets(names)


def build(cfg: CfgNode) -> nn.Module:
    """See ``Backend``. SyncBN is this repository's, which works on the CPU and on a rank without proposals too.

    RoIAlign's gradient on the CPU is this repository's as well.
    """
    # Current versions of torch warn about detectron2's code; the user can do nothing about it.
    warnings.filterwarnings("ignore", "torch.meshgrid", UserWarning)
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    register_backbones()
    known, name = [key for key, _ in BACKBONE_REGISTRY], cfg.MODEL.BACKBONE.NAME
    if name not in known:
        raise ConfigError(f"MODEL.BACKBONE.NAME is {name}, which detectron2 does not have{did_you_mean(name, known)}")
    stock = stock_cfg(cfg, device=str(torch.get_default_device()))
    stock.VIS_PERIOD = 0  # the loop draws
    model = build_model(stock)
    for name, old in list(model.named_modules()):
        if isinstance(old, nn.SyncBatchNorm):
            own = SyncBatchNorm(old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats)
            own.load_state_dict(old.state_dict())
            model.set_submodule(name, own)
        elif isinstance(old, ROIAlign):
            model.set_submodule(
                name, FloatROIAlign(old.output_size, old.spatial_scale, old.sampling_ratio, old.aligned)
            )
    rpn, keys = model.proposal_generator, cfg.MODEL.ANCHOR_GENERATOR
    if keys.ROUNDING:
        strides = rpn.anchor_generator.strides
        rpn.anchor_generator = LevelAnchors(keys.SIZES, keys.ASPECT_RATIOS, strides, keys.OFFSET, keys.ROUNDING)
    rpn.predict_proposals, heads = partial(_predict_proposals, rpn), model.roi_heads
    if hasattr(heads, "_create_proposals_from_boxes"):  # a cascade's
        heads._create_proposals_from_boxes = partial(_finite_proposals, heads)
    return model


def stock_cfg(cfg: CfgNode, device: str) -> CfgNode:
    """detectron2's own config, and the keys of projects, with the values of ``cfg``."""
    stock = with_project_keys(get_cfg())
    for key, value in flatten(cfg).items():
        set_key(stock, key, value)
    stock.MODEL.DEVICE = device
    return stock


def losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """See ``Backend``."""
    with EventStorage():  # detectron2 writes its own statistics there
        return model.train()([_with_truth(sample) for sample in batch])


@torch.no_grad()
def _predict_proposals(
    rpn: nn.Module, anchors: list[Boxes], logits: list[Tensor], deltas: list[Tensor], sizes: list[tuple[int, int]]
) -> list[Instances]:
    """detectron2's proposals, but those that overflowed are left out, where detectron2 raises in training.

    This rank goes on to the end of the iteration, where the others wait for its gradients and, with SyncBN, for its
    statistics. Where anchors overflow that the RPN's losses sample, these are not finite, and the loop stops all.
    """
    topk = rpn.pre_nms_topk[rpn.training], rpn.post_nms_topk[rpn.training]
    boxes = rpn._decode_proposals(anchors, deltas)
    return find_top_rpn_proposals(
        boxes, logits, sizes, rpn.nms_thresh, *topk, min_box_size=rpn.min_box_size, training=False
    )


def _finite_proposals(heads: nn.Module, boxes: list[Tensor], sizes: list[tuple[int, int]]) -> list[Instances]:
    """The boxes of a cascade's next stage; detectron2 fails where one is NaN, before the loop can tell all ranks."""
    return type(heads)._create_proposals_from_boxes(heads, [one.nan_to_num() for one in boxes], sizes)


@torch.no_grad()
def predict(model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
    """See ``Backend``."""
    found = model.eval().inference(batch, do_postprocess=False)
    return [_to_original(sample, one.to("cpu")) for sample, one in zip(batch, found, strict=True)]


@torch.no_grad()
def detect(model: nn.Module, batch: Batch, candidates: bool = False) -> list[dict[str, Tensor]]:
    """See ``Backend``."""
    box_model, box_heads = copy(model.eval()), copy(model.roi_heads)  # which share all layers with the model
    box_heads.mask_on = box_heads.keypoint_on = False
    if candidates:
        several = box_heads.box_predictor if isinstance(box_heads.box_predictor, nn.ModuleList) else None
        predictor = copy(several[-1] if several else box_heads.box_predictor)
        predictor.test_nms_thresh, predictor.test_topk_per_image = 1.0, -1  # no IoU is above 1; no limit
        predictor = nn.ModuleList([*several[:-1], predictor]) if several else predictor
        box_heads._modules = {**box_heads._modules, "box_predictor": predictor}
    box_model._modules = {**model._modules, "roi_heads": box_heads}
    return [_as_dict(one.to("cpu")) for one in box_model.inference(batch, do_postprocess=False)]


@torch.no_grad()
def shapes(model: nn.Module, batch: Batch, found: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """See ``Backend``."""
    heads, shapes = model.eval().roi_heads, {}
    sizes = [tuple(sample["image"].shape[-2:]) for sample in batch]
    given = [
        Instances(size, pred_boxes=Boxes(one["boxes"]), pred_classes=one["labels"]).to(model.device)
        for size, one in zip(sizes, found, strict=True)
    ]
    if getattr(heads, "keypoint_on", False):
        maps = model.backbone(model.preprocess_image(batch).tensor)
        features = [maps[name] for name in heads.keypoint_in_features]
        pooled = heads.keypoint_pooler(features, [one.pred_boxes for one in given])
        shapes["heat_maps"] = heads.keypoint_head.layers(pooled).split([len(one) for one in given])
    if heads.mask_on:
        shapes["masks"] = [one.pred_masks[:, 0] for one in model.inference(batch, given, do_postprocess=False)]
    return [{name: values[image].cpu() for name, values in shapes.items()} for image in range(len(found))]


def _with_truth(sample: dict[str, Any]) -> dict[str, Any]:
    """A training sample as detectron2's DatasetMapper makes it."""
    truth = Instances(tuple(sample["image"].shape[-2:]))
    truth.gt_boxes, truth.gt_classes = Boxes(sample["boxes"]), sample["labels"]
    if "masks" in sample:
        truth.gt_masks = sample["masks"]
    if "keypoints" in sample:
        truth.gt_keypoints = Keypoints(sample["keypoints"])
    return {"image": sample["image"], "instances": truth}


def _as_dict(found: Instances) -> dict[str, Any]:
    result = {"boxes": found.pred_boxes.tensor, "scores": found.scores, "labels": found.pred_classes}
    if found.has("cells"):
        result["masks"] = found.cells
    if found.has("pred_keypoints"):
        result["keypoints"] = found.pred_keypoints
    return result


def _to_original(sample: dict[str, Any], found: Instances) -> dict[str, Any]:
    """Scale detections to the original image as detectron2 does."""
    if found.has("pred_masks"):
        found.cells = found.pred_masks[:, 0]  # by this name detectron2 does not paste them
        found.remove("pred_masks")
    return _as_dict(detector_postprocess(found, sample["height"], sample["width"]))
