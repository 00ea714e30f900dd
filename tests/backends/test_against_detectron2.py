"""Proof that both backends are the same model: losses, gradients and detections with the same weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from pycocotools import mask as mask_api
from samples import sample
from torch import nn

from scratch_det import backends
from scratch_det.backends import torchvision as torchvision_backend
from scratch_det.config.load import load_config
from scratch_det.conversion import agreement
from scratch_det.data.dataset import load_sample
from scratch_det.data.transforms import output_size, resize
from scratch_det.evaluation.inference import pasted
from scratch_det.weights.convert import convert
from scratch_det.weights.origin import Weights

SMALL = ROOT / "configs/Digits/quickstart.yaml"
R50 = ROOT / "configs/COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_3x_gn.yaml"


@pytest.mark.detectron2
class TestAgainstDetectron2:
    """The same recipe with the same weights gives the same numbers in both libraries."""

    SAMPLE_ALL = (  # every anchor and proposal is sampled, so that chance has no part in the losses
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "16384",
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "512",
        "MODEL.ROI_HEADS.POSITIVE_FRACTION", "0.5",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0",
    )  # fmt: skip

    @pytest.fixture(params=["R18 GN, ROIAlignV2, L1", "R50 BN, ROIAlign, smooth L1", "R18 GN, cascade", "VGG-16"])
    def pair(self, request: pytest.FixtureRequest, small_model: list[str]) -> tuple[nn.Module, nn.Module]:
        """Our model and detectron2's with the same weights, drawn wider than the start so that outputs differ."""
        from detectron2.config import get_cfg as stock_cfg
        from detectron2.modeling import build_model

        from scratch_det.backends.detectron2 import register_backbones

        recipe, overrides = SMALL, [*small_model, *self.SAMPLE_ALL, "MODEL.ROI_HEADS.NUM_CLASSES", "10"]
        if request.param == "VGG-16":
            recipe = ROOT / "configs/Digits/vgg16.yaml"
            overrides += ["MODEL.ANCHOR_GENERATOR.SIZES", "[[8, 16, 32]]", "MODEL.ROI_BOX_HEAD.NUM_CONV", "0"]
            overrides += ["MODEL.ROI_BOX_HEAD.NUM_FC", "2"]
        if request.param.endswith("cascade"):
            overrides += ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"]
        if request.param.startswith("R50"):
            overrides += ["MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.RES2_OUT_CHANNELS", "256"]
            overrides += ["MODEL.RESNETS.STRIDE_IN_1X1", "True", "MODEL.ROI_BOX_HEAD.NORM", ""]
            overrides += ["MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "", "MODEL.ROI_MASK_HEAD.NORM", ""]
            overrides += ["MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlign", "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", "1.0"]
            overrides += ["MODEL.RPN.SMOOTH_L1_BETA", "0.1111", "MODEL.ROI_MASK_HEAD.NUM_CONV", "2"]
            overrides += ["MODEL.RPN.CONV_DIMS", "[-1, -1]"]
        torch.manual_seed(0)
        ours = torchvision_backend.build(load_config(recipe, overrides).cfg)
        for layer in ours.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 1.0  # take over the statistics of the next batch: without, evaluation overflows
        ours.train().extract_features([sample(), sample(seed=1)])
        cfg = stock_cfg()
        cfg.merge_from_file(str(recipe))
        cfg.merge_from_list(overrides)
        register_backbones()
        theirs = build_model(cfg)
        with torch.no_grad():
            for name, layer in ours.named_modules():
                if name.endswith(("cls_score", "mask_fcn_logits")):
                    layer.weight.normal_(std=0.03)
                elif name.endswith("bbox_pred"):  # which of them leave the image depends on the CPU if they go far
                    layer.weight.normal_(std=0.01)
        theirs.load_state_dict(_to_detectron2(ours))
        return ours, theirs

    @staticmethod
    def batch() -> list[dict[str, Any]]:
        from detectron2.structures import Boxes, Instances

        batch = [sample(64, 96, objects=3, scale=1.5), sample(80, 64, seed=1)]
        for one in batch:
            truth = Instances(one["image"].shape[-2:])
            truth.gt_boxes, truth.gt_classes = Boxes(one["boxes"]), one["labels"]
            truth.gt_masks = one["masks"]
            one["instances"] = truth
        return batch

    def test_backbone_and_rpn(self, pair: tuple[nn.Module, nn.Module]) -> None:
        ours, theirs = (model.eval() for model in pair)
        batch = self.batch()
        with torch.no_grad():
            images, their_images = ours.extract_features(batch)[0].tensors, theirs.preprocess_image(batch).tensor
            torch.testing.assert_close(images, their_images)
            maps, their_maps = ours.backbone(images), theirs.backbone(images)
            logits, deltas = ours.rpn.head(list(maps.values()))
            their_logits, their_deltas = theirs.proposal_generator.rpn_head(list(their_maps.values()))
        assert len(maps) == len(their_maps)
        for found, expected in [
            *zip(maps.values(), their_maps.values(), strict=True),
            *zip(logits, their_logits, strict=True),
            *zip(deltas, their_deltas, strict=True),
        ]:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def test_heads(self, pair: tuple[nn.Module, nn.Module]) -> None:
        channels = pair[0].backbone.out_channels
        ours, theirs = (model.eval().roi_heads for model in pair)
        torch.manual_seed(0)
        pooled, mask_pooled = torch.randn(5, channels, 7, 7), torch.randn(5, channels, 14, 14)
        cascade = hasattr(ours, "stages")
        own = [stage.box_head for stage in ours.stages] if cascade else [ours.box_head]
        predictors = [stage.box_predictor for stage in ours.stages] if cascade else [ours.box_predictor]
        other = (
            list(zip(theirs.box_head, theirs.box_predictor, strict=True))
            if cascade
            else [(theirs.box_head, theirs.box_predictor)]
        )
        with torch.no_grad():
            for head, predictor, (their_head, their_predictor) in zip(own, predictors, other, strict=True):
                logits, deltas = predictor(head(pooled))
                their_logits, their_deltas = their_predictor(their_head(pooled))
                torch.testing.assert_close(logits.roll(-1, 1), their_logits, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(deltas if cascade else deltas[:, 4:], their_deltas, rtol=1e-4, atol=1e-4)
            if ours.has_mask():
                masks, expected = ours.mask_predictor(ours.mask_head(mask_pooled)), theirs.mask_head.layers(mask_pooled)
                torch.testing.assert_close(masks[:, 1:], expected, rtol=1e-4, atol=1e-4)

    def test_losses_and_gradients(self, pair: tuple[nn.Module, nn.Module]) -> None:
        from detectron2.utils.events import EventStorage

        ours, theirs = pair
        batch = self.batch()
        losses = torchvision_backend.losses(ours, batch)
        with EventStorage():
            expected = theirs.train()(batch)
        assert {n: loss.item() for n, loss in losses.items()} == pytest.approx(
            {n: loss.item() for n, loss in expected.items()}, rel=1e-4
        )
        sum(losses.values()).backward()
        sum(expected.values()).backward()
        body, their_body = (next(iter(own.parameters())) for own in (ours.backbone.body, theirs.backbone.bottom_up))
        assert F.cosine_similarity(body.grad.flatten(), their_body.grad.flatten(), dim=0) > 0.9999
        assert body.grad.norm().item() == pytest.approx(their_body.grad.norm().item(), rel=1e-3)

    def test_detections(self, pair: tuple[nn.Module, nn.Module]) -> None:
        ours, theirs = pair
        found = torchvision_backend.predict(ours, self.batch())
        with torch.no_grad():
            expected = [output["instances"] for output in theirs.eval()(self.batch())]
        for image, one, other in zip(self.batch(), found, expected, strict=True):
            assert len(one["scores"]) == 10
            torch.testing.assert_close(one["scores"], other.scores, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(one["boxes"], other.pred_boxes.tensor, rtol=1e-3, atol=1e-2)
            assert one["labels"].equal(other.pred_classes)
            if "masks" in one:
                masks = np.stack([mask_api.decode(rle) for rle in pasted(image, one)["masks"]])
                assert (masks != other.pred_masks.numpy()).mean() < 1e-3

    def test_its_backend_finds_what_it_finds_itself(self, pair: tuple[nn.Module, nn.Module]) -> None:
        """Masks included, once they are pasted, which detectron2 does not do there."""
        model = pair[1]
        found = backends.load("detectron2").predict(model, self.batch())
        with torch.no_grad():
            expected = [output["instances"] for output in model.eval()(self.batch())]
        for image, one, other in zip(self.batch(), found, expected, strict=True):
            fields = {"scores": other.scores, "boxes": other.pred_boxes.tensor, "labels": other.pred_classes}
            assert all(one[name].equal(value) for name, value in fields.items())
            assert ("masks" in one) == other.has("pred_masks")
            for rle, mask in zip(
                pasted(image, one).get("masks", ()), other.get_fields().get("pred_masks", ()), strict=True
            ):
                assert (mask_api.decode(rle) != mask.numpy()).sum() == 0

    @pytest.mark.slow
    def test_a_large_model_sees_the_same_in_photographs(self, tiny_coco: Path) -> None:
        """R50-FPN GN at 800 px; random weights, widened so that there is something to see."""
        cfg = load_config(R50, ["MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]).cfg
        torch.manual_seed(0)
        ours, theirs = (backends.load(name).build(cfg) for name in ("torchvision", "detectron2"))
        with torch.no_grad():
            for layer in (ours.roi_heads.box_predictor.cls_score, ours.roi_heads.box_predictor.bbox_pred,
                          ours.roi_heads.mask_predictor.mask_fcn_logits, ours.rpn.head.cls_logits,
                          ours.rpn.head.bbox_pred):  # fmt: skip
                layer.weight.mul_(10)
        theirs.load_state_dict(_to_detectron2(ours))
        for path in sorted((tiny_coco / "val2017").glob("*.jpg"))[:10]:
            one = load_sample(path, cfg)
            one = resize(one, output_size(one["height"], one["width"], 800, 1333))
            sides = (torchvision_backend, ours), (backends.load("detectron2"), theirs)
            found = agreement(*(pasted(one, backend.predict(model, [one])[0]) for backend, model in sides))
            print(f"{path.name}: {found}")
            assert found.holds, path
            assert found.text.startswith("20 and 20 detections")


def _to_detectron2(model: nn.Module) -> dict[str, torch.Tensor]:
    weights = Weights(Path("memory"), model.state_dict(), "torchvision", is_detector=True)
    return convert(weights, "detectron2")[0]
