"""The torchvision backend: Faster, Mask and Keypoint R-CNN from the parts of ``torchvision.models.detection``."""

import sys
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_area, clip_boxes_to_image
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from scratch_det.backends import Batch
from scratch_det.backends.torchvision_heads import RPN, RoIHeads
from scratch_det.config.choices import has_fpn
from scratch_det.data.transforms import PER_OBJECT
from scratch_det.modeling.backbones import build_bottom_up
from scratch_det.modeling.init import Fill, he_fill, initialize, normal_fill, xavier_fill
from scratch_det.modeling.norm import norm_layer
from scratch_det.modeling.ops import decode_keypoints

FILLS: dict[str, Fill] = {  # initial weights by the prefix of the name, in a cascade without the stage's number
    "backbone.body": he_fill,
    "backbone.fpn": xavier_fill,
    "rpn.head": normal_fill(0.01),
    "roi_heads.box_head": lambda weight: (he_fill if weight.dim() == 4 else xavier_fill)(weight),  # convolution or not
    "roi_heads.box_predictor.cls_score": normal_fill(0.01),
    "roi_heads.box_predictor.bbox_pred": normal_fill(0.001),
    "roi_heads.mask_head": he_fill,
    "roi_heads.mask_predictor.conv5_mask": he_fill,
    "roi_heads.mask_predictor.mask_fcn_logits": normal_fill(0.001),
    "roi_heads.keypoint_head": he_fill,
    "roi_heads.keypoint_predictor": he_fill,
}
PYRAMID_STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "pool": 64}  # detectron2 calls the last one p6


class Backbone(nn.Module):
    """The bottom-up network ``body`` and, with ``build_..._fpn_backbone``, a feature pyramid ``fpn`` on its maps.

    Attributes:
        strides: pixels between two places of each map, by the map's name.
        out_channels: of every map.
        size_divisibility: the sides of the padded images have to be multiples of it.
    """

    def __init__(self, cfg: CfgNode):
        super().__init__()
        self.body, keys = build_bottom_up(cfg), cfg.MODEL.FPN
        if has_fpn(cfg):
            self.levels = dict(zip(keys.IN_FEATURES, PYRAMID_STRIDES, strict=False))  # the last one is pooled
            channels = [self.body.channels[name] for name in self.levels]
            self.fpn = FeaturePyramidNetwork(channels, keys.OUT_CHANNELS, LastLevelMaxPool(), norm_layer(keys.NORM))
            self.strides, self.out_channels = PYRAMID_STRIDES, keys.OUT_CHANNELS
            self.size_divisibility = 32  # the stride of p5: every level of the pyramid halves exactly
        else:
            self.fpn, self.strides, self.size_divisibility = None, self.body.strides, 1
            (self.out_channels,) = set(self.body.channels.values())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images [N, 3, H, W] -> maps by name."""
        maps = self.body(images)
        return self.fpn({level: maps[name] for name, level in self.levels.items()}) if self.fpn else maps


class GeneralizedRCNN(nn.Module):
    """Backbone, proposals, heads. Pixels become (value - PIXEL_MEAN) / PIXEL_STD, per channel in INPUT.FORMAT order."""

    def __init__(self, cfg: CfgNode):
        super().__init__()
        self.backbone = Backbone(cfg)
        channels, strides = self.backbone.out_channels, self.backbone.strides
        self.rpn = RPN(cfg, channels, list(strides.values()))
        pooled = {name: strides[name] for name in cfg.MODEL.ROI_HEADS.IN_FEATURES}
        self.roi_heads = RoIHeads(cfg, channels, pooled)
        for name, values in (("pixel_mean", cfg.MODEL.PIXEL_MEAN), ("pixel_std", cfg.MODEL.PIXEL_STD)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The losses."""
        images, features = self.extract_features(batch)
        device = images.tensors.device
        targets = [
            {key: sample[key].to(device, non_blocking=device.type == "cuda") for key in PER_OBJECT if key in sample}
            | {"size": size}
            for sample, size in zip(batch, images.image_sizes, strict=True)
        ]
        proposals, of_rpn = self.rpn(images, features, targets)
        losses = self.roi_heads.losses(features, proposals, targets, images.image_sizes)
        return {**losses, "loss_rpn_cls": of_rpn["loss_objectness"], "loss_rpn_loc": of_rpn["loss_rpn_box_reg"]}

    def extract_features(self, batch: Batch) -> tuple[ImageList, dict[str, Tensor]]:
        """The images, normalised and padded, and the backbone's maps of them.

        They are padded with zeros, right and below, to one size that the backbone's strides divide.
        """
        device = self.pixel_mean.device  # the loader pins memory for CUDA alone
        images = [sample["image"].to(device, non_blocking=device.type == "cuda") for sample in batch]
        images = [(image - self.pixel_mean) / self.pixel_std for image in images]
        sizes = [tuple(image.shape[-2:]) for image in images]
        multiple = self.backbone.size_divisibility
        height, width = ((max(side) + multiple - 1) // multiple * multiple for side in zip(*sizes, strict=True))
        padded = torch.stack([F.pad(one, (0, width - one.shape[2], 0, height - one.shape[1])) for one in images])
        return ImageList(padded, sizes), self.backbone(padded)

    def detect(self, batch: Batch) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Boxes, scores and labels as ``RoIHeads.detect`` gives them, and the backbone's maps."""
        images, features = self.extract_features(batch)
        proposals, _ = self.rpn(images, features)
        return self.roi_heads.detect(features, proposals, images.image_sizes), features


def build(cfg: CfgNode) -> nn.Module:
    """See ``Backend``."""
    model = GeneralizedRCNN(cfg)
    stages = [f"roi_heads.stages.{k}." for k in range(len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS))]
    fills = {name.replace("roi_heads.", at): fill for at in ("roi_heads.", *stages) for name, fill in FILLS.items()}
    leave = "backbone.body" if getattr(model.backbone.body, "initialized", False) else None
    initialize(model, fills, leave)
    return model


def losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """See ``Backend``."""
    return model.train()(batch)


@torch.no_grad()
def predict(model: GeneralizedRCNN, batch: Batch) -> list[dict[str, Any]]:
    """See ``Backend``."""
    found, features = model.eval().detect(batch)
    shapes = model.roi_heads.shapes(features, found)
    return [_to_original(sample, one | its) for sample, one, its in zip(batch, found, shapes, strict=True)]


@torch.no_grad()
def detect(model: GeneralizedRCNN, batch: Batch, candidates: bool = False) -> list[dict[str, Tensor]]:
    """See ``Backend``."""
    if candidates:
        model, heads = copy(model), copy(model.roi_heads)  # which share all layers with the model
        heads.nms_thresh, heads.detections_per_img = 1.0, sys.maxsize  # no IoU is above 1
        model._modules = {**model._modules, "roi_heads": heads}
    found, _ = model.eval().detect(batch)
    return [{name: value.cpu() for name, value in one.items()} for one in found]


@torch.no_grad()
def shapes(model: GeneralizedRCNN, batch: Batch, found: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """See ``Backend``."""
    images, features = model.eval().extract_features(batch)
    found = [{name: one[name].to(images.tensors.device) for name in ("boxes", "labels")} for one in found]
    return [{name: value.cpu() for name, value in one.items()} for one in model.roi_heads.shapes(features, found)]


def _to_original(sample: dict[str, Any], found: dict[str, Tensor]) -> dict[str, Any]:
    """Scale detections to the original image, drop boxes without area, find keypoints; on the CPU."""
    height, width = sample["height"], sample["width"]
    scale_y, scale_x = height / sample["image"].shape[-2], width / sample["image"].shape[-1]
    boxes = found["boxes"].cpu() * torch.tensor([scale_x, scale_y, scale_x, scale_y])
    boxes = clip_boxes_to_image(boxes, (height, width))
    kept = box_area(boxes) > 0
    boxes = boxes[kept]
    result = {"boxes": boxes, "scores": found["scores"].cpu()[kept], "labels": found["labels"].cpu()[kept]}
    if "masks" in found:
        result["masks"] = found["masks"].cpu()[kept]
    if "heat_maps" in found:
        points = decode_keypoints(found["heat_maps"], found["boxes"])
        result["keypoints"] = points.cpu()[kept] * torch.tensor([scale_x, scale_y, 1])
    return result
