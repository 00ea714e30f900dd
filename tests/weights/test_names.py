"""Names of weights in three libraries, there and back."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import nn
from torchvision.models.detection import keypointrcnn_resnet50_fpn, maskrcnn_resnet50_fpn

from scratch_det.backends import torchvision as backend
from scratch_det.config.load import load_config
from scratch_det.weights.names import from_caffe2, from_stock, renamed

R50 = ROOT / "configs/COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_3x_gn.yaml"
PAIRS = [  # torchvision, detectron2
    ("backbone.body.bn1.running_mean", "backbone.bottom_up.stem.conv1.norm.running_mean"),
    ("backbone.body.layer3.22.conv2.weight", "backbone.bottom_up.res4.22.conv2.weight"),
    ("backbone.body.layer1.0.downsample.1.bias", "backbone.bottom_up.res2.0.shortcut.norm.bias"),
    ("backbone.fpn.inner_blocks.3.0.weight", "backbone.fpn_lateral5.weight"),
    ("backbone.fpn.layer_blocks.0.1.weight", "backbone.fpn_output2.norm.weight"),
    ("rpn.head.conv.0.0.bias", "proposal_generator.rpn_head.conv.bias"),
    ("roi_heads.box_head.3.0.weight", "roi_heads.box_head.conv4.weight"),
    ("roi_heads.box_head.5.weight", "roi_heads.box_head.fc1.weight"),
    ("roi_heads.box_head.7.bias", "roi_heads.box_head.fc2.bias"),
    ("roi_heads.mask_head.1.1.weight", "roi_heads.mask_head.mask_fcn2.norm.weight"),
    ("roi_heads.mask_predictor.conv5_mask.weight", "roi_heads.mask_head.deconv.weight"),
    ("roi_heads.keypoint_head.14.weight", "roi_heads.keypoint_head.conv_fcn8.weight"),
    ("roi_heads.keypoint_predictor.kps_score_lowres.bias", "roi_heads.keypoint_head.score_lowres.bias"),
]
CAFFE2 = [
    ("conv1_w", "stem.conv1.weight"),
    ("conv1_gn_s", "stem.conv1.norm.weight"),
    ("res_conv1_bn_b", "stem.conv1.norm.bias"),
    ("res2_0_branch1_w", "res2.0.shortcut.weight"),
    ("res2_0_branch1_gn_b", "res2.0.shortcut.norm.bias"),
    ("res4_22_branch2c_w", "res4.22.conv3.weight"),
    ("res5_2_branch2a_bn_s", "res5.2.conv1.norm.weight"),
    ("res3_1_branch2b_bn_riv", "res3.1.conv2.norm.running_var"),
    ("fpn_inner_res5_2_sum_gn_s", "backbone.fpn_lateral5.norm.weight"),
    ("fpn_inner_res3_3_sum_lateral_w", "backbone.fpn_lateral3.weight"),
    ("fpn_res2_2_sum_b", "backbone.fpn_output2.bias"),
    ("conv_rpn_fpn2_w", "proposal_generator.rpn_head.conv.weight"),
    ("rpn_cls_logits_fpn2_b", "proposal_generator.rpn_head.objectness_logits.bias"),
    ("rpn_bbox_pred_fpn2_w", "proposal_generator.rpn_head.anchor_deltas.weight"),
    ("head_conv4_gn_b", "roi_heads.box_head.conv4.norm.bias"),
    ("fc6_w", "roi_heads.box_head.fc1.weight"),
    ("fc7_b", "roi_heads.box_head.fc2.bias"),
    ("cls_score_w", "roi_heads.box_predictor.cls_score.weight"),
    ("bbox_pred_b", "roi_heads.box_predictor.bbox_pred.bias"),
    ("_[mask]_fcn1_w", "roi_heads.mask_head.mask_fcn1.weight"),
    ("_mask_fcn2_gn_s", "roi_heads.mask_head.mask_fcn2.norm.weight"),
    ("conv5_mask_b", "roi_heads.mask_head.deconv.bias"),
    ("mask_fcn_logits_w", "roi_heads.mask_head.predictor.weight"),
    ("conv_fcn8_w", "roi_heads.keypoint_head.conv_fcn8.weight"),
    ("kps_score_lowres_b", "roi_heads.keypoint_head.score_lowres.bias"),
    ("pred_w", None),
    ("conv1_w_momentum", None),
]


def model_of(*overrides: Any, recipe: Path = R50) -> nn.Module:
    with torch.device("meta"):
        return backend.build(load_config(recipe, list(overrides)).cfg)


class TestNames:
    @pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=[theirs for _, theirs in PAIRS])
    def test_both_ways(self, ours: str, theirs: str) -> None:
        names = [name for name, _ in PAIRS] + [f"roi_heads.box_head.{i}.0.weight" for i in range(4)]
        assert renamed(names, "torchvision", "detectron2")[ours] == theirs
        names = [name for _, name in PAIRS] + [f"roi_heads.box_head.conv{i}.weight" for i in range(1, 5)]
        assert renamed(names, "detectron2", "torchvision")[theirs] == ours

    def test_hidden_convolutions_of_an_rpn(self) -> None:
        ours = [f"rpn.head.conv.{n}.0.weight" for n in range(2)]
        theirs = [f"proposal_generator.rpn_head.conv.conv{n}.weight" for n in range(2)]
        assert renamed(ours, "torchvision", "detectron2") == dict(zip(ours, theirs, strict=True))
        assert renamed(theirs, "detectron2", "torchvision") == dict(zip(theirs, ours, strict=True))

    @pytest.mark.parametrize("fcs", [1, 2])
    @pytest.mark.parametrize("convs", [0, 4])
    @pytest.mark.parametrize("norm", ["GN", "BN"])
    def test_a_model_there_and_back(self, norm: str, convs: int, fcs: int) -> None:
        model = model_of("MODEL.RESNETS.NORM", norm, "MODEL.ROI_BOX_HEAD.NUM_CONV", convs,
                         "MODEL.ROI_BOX_HEAD.NUM_FC", fcs, "MODEL.RPN.CONV_DIMS", [-1] * fcs)  # fmt: skip
        there = renamed(model.state_dict(), "torchvision", "detectron2")
        assert None not in there.values()
        assert len(set(there.values())) == len(there)
        back = renamed(map(str, there.values()), "detectron2", "torchvision")
        assert [back[str(name)] for name in there.values()] == list(there)

    @pytest.mark.parametrize("builder", [maskrcnn_resnet50_fpn, keypointrcnn_resnet50_fpn])
    def test_torchvisions_own_models(self, builder: Callable) -> None:
        with torch.device("meta"):
            names = builder(weights=None, weights_backbone=None).state_dict()
        there = renamed(map(from_stock, names), "torchvision", "detectron2")
        assert None not in there.values()
        assert there[from_stock("roi_heads.box_head.fc7.weight")] == "roi_heads.box_head.fc2.weight"

    @pytest.mark.detectron2
    @pytest.mark.parametrize("keypoints", [False, True])
    def test_detectron2s_models(self, keypoints: bool) -> None:
        from detectron2.config import get_cfg
        from detectron2.modeling import build_model

        cfg = get_cfg()
        cfg.merge_from_file(str(R50))
        cfg.merge_from_list(["MODEL.DEVICE", "meta", "MODEL.KEYPOINT_ON", keypoints, "MODEL.ROI_BOX_HEAD.NUM_CONV", 0,
                             "MODEL.ROI_BOX_HEAD.NUM_FC", 2, "MODEL.FPN.NORM", "",
                             "MODEL.RPN.CONV_DIMS", [-1, -1] if keypoints else [-1]])  # fmt: skip
        with torch.device("meta"):
            names = build_model(cfg).state_dict()
        assert any("keypoint" in name for name in names) == keypoints
        there = renamed(names, "detectron2", "torchvision")
        assert None not in there.values()
        back = renamed(map(str, there.values()), "torchvision", "detectron2")
        assert [back[str(name)] for name in there.values()] == list(there)

    @pytest.mark.parametrize(("blob", "name"), CAFFE2, ids=[blob for blob, _ in CAFFE2])
    def test_detectrons(self, blob: str, name: str | None) -> None:
        assert from_caffe2(blob) == name

    @pytest.mark.detectron2
    def test_detectrons_as_detectron2_reads_them(self) -> None:
        from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names

        blobs = [blob for blob, name in CAFFE2 if name]
        theirs = convert_c2_detectron_names({blob: torch.zeros(8, 1) for blob in blobs})[1]
        ours = {from_caffe2(blob): blob for blob in blobs}
        assert {re.sub(r"^(backbone|roi_heads(\.box_predictor)?)\.", "", str(name)): b for name, b in ours.items()} == {
            re.sub(r"^roi_heads\.", "", name): blob for name, blob in theirs.items()}  # fmt: skip
