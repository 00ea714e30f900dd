"""What detectron2 computes from fixed inputs: stored numbers that hold environments without detectron2 to its results.

Every case has ``ours``, computed by this repository, and ``theirs``, computed by detectron2; both give numbers by name.
``python tests/backends/detectron2_values.py`` writes ``theirs`` into FILE, in an environment with detectron2. Inputs
are drawn by NumPy's RandomState, whose numbers are the same in every version.
"""

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as mask_api
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from samples import rectangles

from scratch_det import backends
from scratch_det.backends import torchvision as torchvision_backend
from scratch_det.backends.torchvision_heads import (
    RPN,
    ImageAnchors,
    ROIPooler,
    box_losses,
    keypoint_loss,
    keypoint_samples,
)
from scratch_det.config.load import get_cfg, load_config, set_key
from scratch_det.evaluation.inference import pasted
from scratch_det.modeling.norm import NORMS
from scratch_det.modeling.ops import decode_keypoints, paste_masks
from scratch_det.weights.convert import convert
from scratch_det.weights.origin import Weights

ROOT = Path(__file__).parents[2]
FILE = ROOT / "tests/assets/detectron2_values.json"
STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}
Values = dict[str, Any]


def drawn(*shape: int, seed: int = 0, std: float = 1.0) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32)) * std


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).random_sample(shape).astype(np.float32))


class Pooling:
    """Boxes of 1 to 900 px, so of all levels, some beyond the border."""

    def __init__(self, kind: str, ratio: int):
        self.kind, self.ratio = kind, ratio
        self.maps = {name: drawn(2, 1, 96 >> i, 96 >> i, seed=i) for i, name in enumerate(STRIDES)}
        corners, sides = uniform(2, 8, 2, seed=8) * 220 - 20, uniform(2, 8, 2, seed=9) ** 3 * 900 + 1
        self.boxes = list(torch.cat([corners, corners + sides], dim=2))

    def ours(self) -> Values:
        return {"pooled": ROIPooler(self.kind, STRIDES, 2, self.ratio)(self.maps, self.boxes)}

    def theirs(self) -> Values:
        from detectron2.modeling.poolers import ROIPooler as TheirPooler
        from detectron2.structures import Boxes

        pooler = TheirPooler(2, [1 / stride for stride in STRIDES.values()], self.ratio, self.kind)
        return {"pooled": pooler(list(self.maps.values()), [Boxes(boxes) for boxes in self.boxes])}


class Levels:
    """The pyramid's level by a box's size, on both sides of every boundary."""

    def __init__(self) -> None:
        sides = torch.tensor([0.0, 1, 56, 111.9, 112, 150, 223.9, 224, 300, 447.9, 448, 449, 900, 3000])
        self.boxes = torch.stack([sides * 0, sides * 0 + 5, sides * 2, 5 + sides / 2], dim=1)

    def ours(self) -> Values:
        maps = {name: torch.full((1, 1, 256 >> i, 1024 >> i), float(i)) for i, name in enumerate(STRIDES)}
        pooled = ROIPooler("ROIAlignV2", STRIDES, 1, 1)(maps, [self.boxes])  # constant maps tell the level
        return {"levels": pooled.flatten().round().to(torch.int64)}

    def theirs(self) -> Values:
        from detectron2.modeling.poolers import assign_boxes_to_levels
        from detectron2.structures import Boxes

        return {"levels": assign_boxes_to_levels([Boxes(self.boxes)], 2, 5, 224, 4)}


class Grid:
    """Anchors of two levels, two sizes and three ratios each."""

    sizes, ratios, strides = [[8, 12.5], [33, 64]], [[0.5, 1.0, 2.0]], [4, 8]

    def __init__(self, offset: float):
        self.offset, self.maps = offset, [torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 1, 2)]

    def ours(self) -> Values:
        images = ImageList(torch.zeros(1, 3, 8, 12), [(8, 12)])
        return {"anchors": ImageAnchors(self.sizes, self.ratios, self.strides, self.offset)(images, self.maps)[0]}

    def theirs(self) -> Values:
        from detectron2.modeling.anchor_generator import DefaultAnchorGenerator

        make = DefaultAnchorGenerator(
            sizes=self.sizes, aspect_ratios=self.ratios, strides=self.strides, offset=self.offset
        )
        return {"anchors": torch.cat([boxes.tensor for boxes in make(self.maps)])}


class RPNLosses:
    """Two images of 12 anchors, of which some are not sampled, with and without a smooth part of the loss."""

    def __init__(self, beta: float):
        self.cfg = get_cfg()
        keys = {"SMOOTH_L1_BETA": beta, "LOSS_WEIGHT": 2.0, "BBOX_REG_LOSS_WEIGHT": 3.0, "IN_FEATURES": ["p2"]}
        keys["BBOX_REG_WEIGHTS"] = (1.0, 2.0, 3.0, 4.0)
        for name, value in keys.items():
            set_key(self.cfg, f"MODEL.RPN.{name}", value)
        corners = uniform(2, 12, 2, seed=1) * 50
        self.truth = torch.cat([corners, corners + 4 + uniform(2, 12, 2, seed=2) * 40], dim=2)
        self.anchors = self.truth[0] + drawn(12, 4, seed=3)
        self.logits, self.deltas = drawn(2, 12, seed=4), drawn(2, 12, 4, seed=5)
        self.labels = torch.tensor([1.0, 0, -1, 1, 0, 0, -1, 1, 1, 0, 0, -1]).repeat(2, 1)

    def ours(self) -> Values:
        rpn = RPN(self.cfg, 8, [4])
        targets = rpn.box_coder.encode(list(self.truth), [self.anchors] * 2)
        logits, deltas = self.logits.flatten()[:, None], self.deltas.flatten(0, 1)
        loss_cls, loss_loc = rpn.compute_loss(logits, deltas, list(self.labels), list(targets))
        return {"loss_rpn_cls": loss_cls, "loss_rpn_loc": loss_loc}

    def theirs(self) -> Values:
        from detectron2.layers import ShapeSpec
        from detectron2.modeling.proposal_generator.rpn import RPN as TheirRPN
        from detectron2.structures import Boxes
        from detectron2.utils.events import EventStorage

        rpn = TheirRPN(stock(self.cfg), {"p2": ShapeSpec(channels=8, stride=4)})
        with EventStorage():
            return rpn.losses(
                [Boxes(self.anchors)], [self.logits], list(self.labels.int()), [self.deltas], list(self.truth)
            )


class BoxLosses:
    """Class scores and boxes of ten samples, four of them background."""

    def __init__(self, beta: float, agnostic: bool):
        self.beta, self.agnostic = beta, agnostic
        self.labels = torch.tensor([2, 0, 3, 1, 0, 0, 1, 3, 0, 2])  # 0 is background
        self.logits, self.deltas = drawn(10, 4), drawn(10, 4 if agnostic else 16, seed=1)
        corners = uniform(10, 2, seed=2) * 50
        self.boxes = torch.cat([corners, corners + 4 + uniform(10, 2, seed=3) * 40], dim=1)
        self.truth = self.boxes + drawn(10, 4, seed=4)

    def ours(self) -> Values:
        from torchvision.models.detection._utils import BoxCoder

        targets = BoxCoder((10.0, 10.0, 5.0, 5.0)).encode_single(self.truth, self.boxes)
        keys = get_cfg().MODEL.ROI_BOX_HEAD
        keys.SMOOTH_L1_BETA, keys.BBOX_REG_LOSS_WEIGHT = self.beta, 2.0
        return box_losses(self.logits, self.deltas, self.labels, targets, keys)

    def theirs(self) -> Values:
        from detectron2.layers import ShapeSpec
        from detectron2.modeling.box_regression import Box2BoxTransform
        from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
        from detectron2.structures import Boxes, Instances
        from detectron2.utils.events import EventStorage

        layers = FastRCNNOutputLayers(
            ShapeSpec(channels=1), box2box_transform=Box2BoxTransform((10.0, 10.0, 5.0, 5.0)), num_classes=3,
            cls_agnostic_bbox_reg=self.agnostic, smooth_l1_beta=self.beta, loss_weight={"loss_box_reg": 2.0},
        )  # fmt: skip
        proposals = Instances((90, 90), proposal_boxes=Boxes(self.boxes), gt_boxes=Boxes(self.truth))
        proposals.gt_classes = (self.labels - 1) % 4
        deltas = self.deltas if self.agnostic else self.deltas[:, 4:]
        with EventStorage():
            return layers.losses((self.logits.roll(-1, 1), deltas), [proposals])


class Pasting:
    """Smooth masks pasted into an image, some across its border."""

    def __init__(self) -> None:
        smooth = torch.nn.functional.interpolate(uniform(6, 1, 5, 5), (48, 48), mode="bilinear")[:, 0]
        corners = uniform(6, 2, seed=1) * 40 - 8
        self.boxes = torch.cat([corners, corners + 2 + uniform(6, 2, seed=2) * 30], dim=1)
        self.pasted = smooth[:, ::4, ::4]

    def ours(self) -> Values:
        return {"areas": mask_api.area(paste_masks(self.pasted, self.boxes, 40, 50)).astype(int)}

    def theirs(self) -> Values:
        from detectron2.layers import paste_masks_in_image

        return {"areas": paste_masks_in_image(self.pasted, self.boxes, (40, 50)).sum((1, 2))}


class Keypoints:
    """Which boxes train keypoints, the loss of their heat maps, and points found in heat maps.

    Keypoints lie inside the boxes, on their borders, outside, and unlabelled.
    """

    def __init__(self, by_visible: bool):
        self.by_visible = by_visible
        corners = uniform(9, 2, seed=1) * 40
        self.boxes = torch.cat([corners, corners + 2 + uniform(9, 2, seed=2) * 30], dim=1)
        low, high = self.boxes[:, None, :2], self.boxes[:, None, 2:]
        shares = uniform(9, 4, 2, seed=3) * 1.6 - 0.3
        shares[:3, 0], shares[3, :] = torch.tensor([1.0, 1.0]), torch.tensor([1.4, -0.2])
        seen = torch.from_numpy(np.random.RandomState(4).randint(0, 3, (9, 4, 1))).float()
        seen[5] = 0
        self.points = torch.cat([low + shares * (high - low), seen], dim=2)
        self.labels = torch.tensor([1, 0, 1, 1, 1, 1, 0, 1, 1])
        self.maps = drawn(9, 4, 8, 8, seed=5, std=2)

    def ours(self) -> Values:
        foreground = self.labels > 0
        [boxes], [points] = keypoint_samples([self.boxes[foreground]], [self.points[foreground]])
        keys = get_cfg().MODEL.ROI_KEYPOINT_HEAD
        keys.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS, keys.LOSS_WEIGHT = self.by_visible, 3.0
        loss = keypoint_loss(self.maps[: len(boxes)], boxes, points, keys, most_boxes=16)
        return {"boxes": boxes, "loss": loss, "found": decode_keypoints(self.maps, self.boxes)}

    def theirs(self) -> Values:
        from detectron2.modeling.roi_heads.keypoint_head import keypoint_rcnn_loss
        from detectron2.modeling.roi_heads.roi_heads import (
            select_foreground_proposals,
            select_proposals_with_visible_keypoints,
        )
        from detectron2.structures import Boxes, Instances, Keypoints, heatmaps_to_keypoints
        from detectron2.utils.events import EventStorage

        instances = Instances((90, 90), proposal_boxes=Boxes(self.boxes), gt_classes=1 - self.labels)
        instances.gt_boxes, instances.gt_keypoints = Boxes(self.boxes), Keypoints(self.points)
        with EventStorage():
            chosen, _ = select_foreground_proposals([instances], 1)
            [chosen] = select_proposals_with_visible_keypoints(chosen)
            normalizer = None if self.by_visible else 16 * 4
            loss = 3 * keypoint_rcnn_loss(self.maps[: len(chosen)], [chosen], normalizer)
        found = heatmaps_to_keypoints(self.maps, self.boxes)[..., [0, 1, 3]]
        return {"boxes": chosen.proposal_boxes.tensor, "loss": loss, "found": found}


class Norm:
    """A layer's output, its weights and statistics away from the identity."""

    def __init__(self, name: str):
        self.name = name

    def through(self, layer: nn.Module) -> Values:
        for place, value in enumerate(layer.state_dict().values()):
            if value.is_floating_point():
                value.copy_(0.5 + uniform(*value.shape, seed=place))
        return {"output": layer.eval()(drawn(2, 64, 2, 2, seed=9))[:, ::8]}

    def ours(self) -> Values:
        return self.through(NORMS[self.name](64))

    def theirs(self) -> Values:
        from detectron2.layers import get_norm

        return self.through(get_norm(self.name, 64))


SMALL = [
    "MODEL.DEVICE", "cpu", "MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ANCHOR_GENERATOR.SIZES", "[[8],[16],[32],[64],[128]]",
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN", "50", "MODEL.RPN.PRE_NMS_TOPK_TEST", "20", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "20",
    "MODEL.RPN.POST_NMS_TOPK_TEST", "10", "MODEL.ROI_BOX_HEAD.NUM_CONV", "1", "MODEL.ROI_BOX_HEAD.CONV_DIM", "32",
    "MODEL.ROI_BOX_HEAD.NUM_FC", "1", "MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.ROI_MASK_HEAD.NUM_CONV", "1",
    "MODEL.ROI_MASK_HEAD.CONV_DIM", "32", "MODEL.ROI_HEADS.NUM_CLASSES", "10", "TEST.DETECTIONS_PER_IMAGE", "10",
    # every anchor and proposal is sampled, so that chance has no part in the losses
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "16384", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "512",
    "MODEL.ROI_HEADS.POSITIVE_FRACTION", "0.5", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0",
]  # fmt: skip
CASCADE = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"]
R50_BN = [
    "MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.RES2_OUT_CHANNELS", "256", "MODEL.RESNETS.STRIDE_IN_1X1", "True",
    "MODEL.ROI_BOX_HEAD.NORM", "", "MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "", "MODEL.ROI_MASK_HEAD.NORM", "",
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlign", "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", "1.0",
    "MODEL.RPN.SMOOTH_L1_BETA", "0.1111", "MODEL.ROI_MASK_HEAD.NUM_CONV", "2", "MODEL.RPN.CONV_DIMS", "[-1, -1]",
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE", "ROIAlign",
]  # fmt: skip
VGG16 = [
    "MODEL.ANCHOR_GENERATOR.SIZES", "[[8, 16, 32]]", "MODEL.ROI_BOX_HEAD.NUM_CONV", "0", "MODEL.ROI_BOX_HEAD.NUM_FC",
    "2",
]  # fmt: skip
BORDER = ["MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIPool", "MODEL.RPN.BOUNDARY_THRESH", "4"]
KEYPOINTS = [
    "MODEL.KEYPOINT_ON", "True", "MODEL.MASK_ON", "False", "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(16, 16)",
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "3",
]  # fmt: skip
BOTH_HEADS = [
    *KEYPOINTS, "MODEL.MASK_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE", "ROIAlign",
    "MODEL.ROI_KEYPOINT_HEAD.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS", "False",
    "MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT", "4.0",
]  # fmt: skip


class Model:
    """A whole model with drawn weights: losses, gradients and detections on two images of noise, and weights' names."""

    def __init__(self, recipe: str, *overrides: str, salt: str = ""):
        self.salt = salt  # of the weights' seeds; some weights make proposals that rounding decides about
        self.cfg = load_config(ROOT / f"configs/Digits/{recipe}.yaml", [*SMALL, *overrides]).cfg

    def batch(self) -> list[dict[str, Any]]:
        """Keypoints inside the boxes, on their borders, outside and unlabelled."""
        samples = []
        for seed, (height, width, objects, scale) in enumerate([(64, 96, 3, 1.5), (80, 64, 2, 1.0)]):
            image = torch.from_numpy(np.random.RandomState(seed).randint(0, 256, (3, height, width), dtype=np.uint8))
            boxes = torch.tensor([(4.0 + 8 * i, 6 + 4 * i, 28 + 8 * i, 40 + 4 * i) for i in range(objects)])
            one = {"image": image, "height": round(height * scale), "width": round(width * scale), "boxes": boxes}
            one["labels"] = torch.arange(objects)
            low, high = boxes[:, None, :2], boxes[:, None, 2:]
            shares = torch.tensor([[[0.3, 0.6], [1.0, 1.0], [1.4, -0.2]]])
            seen = torch.tensor([[2.0], [1.0], [2.0]]).expand(objects, 3, 1)
            one |= {"masks": rectangles(boxes - torch.tensor([0.0, 0, 5, 0]))} if self.cfg.MODEL.MASK_ON else {}
            one |= (
                {"keypoints": torch.cat([low + shares * (high - low), seen], 2)} if self.cfg.MODEL.KEYPOINT_ON else {}
            )
            samples.append(one)
        samples[1].get("keypoints", torch.zeros(2))[-1] = 0
        return samples

    def built(self) -> nn.Module:
        """This repository's model; weights are drawn by detectron2's rules' widths, predictors wider, norms too."""
        model = torchvision_backend.build(self.cfg)
        wide = {"cls_score": 0.03, "mask_fcn_logits": 0.03, "bbox_pred": 0.005}
        with torch.no_grad():
            for name, layer in model.named_modules():
                seed, kind = zlib.crc32((self.salt + name).encode()), name.rpartition(".")[2]
                if isinstance(layer, nn.BatchNorm2d):
                    layer.momentum = 1.0  # take over the next batch's statistics: without, activations overflow
                if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                    width = wide.get(kind) or (2 / (layer.weight[0].numel())) ** 0.5
                    layer.weight.copy_(drawn(*layer.weight.shape, seed=seed, std=width))
                    if layer.bias is not None:
                        layer.bias.copy_(drawn(*layer.bias.shape, seed=seed + 1, std=0.01))
                elif isinstance(layer, nn.GroupNorm | nn.BatchNorm2d):
                    layer.weight.copy_(1 + drawn(*layer.weight.shape, seed=seed, std=0.1))
                    layer.bias.copy_(drawn(*layer.bias.shape, seed=seed + 1, std=0.1))
            model.train().extract_features(self.batch())
        return model

    def results(self, backend: Any, model: nn.Module, parts: dict[str, str]) -> Values:
        losses = backend.losses(model, self.batch())
        sum(losses.values()).backward()
        gradients = {
            part: sum(
                p.grad.double().square().sum() for n, p in model.named_parameters() if n.startswith(prefix)
            ).sqrt()
            for part, prefix in parts.items()
        }
        values: Values = {"losses": losses, "gradients": gradients}
        for number, found in enumerate(backend.predict(model, self.batch())):
            if "masks" in found:
                found["masks"] = mask_api.area(pasted(self.batch()[number], found)["masks"]).tolist()
            values[f"image {number}"] = found
        return values

    def ours(self) -> Values:
        model = self.built()
        weights = Weights(Path("memory"), model.state_dict(), "torchvision", is_detector=True)
        shapes = {name: list(value.shape) for name, value in convert(weights, "detectron2")[0].items()}
        parts = {"bottom-up": "backbone.body.", "rpn": "rpn.", "heads": "roi_heads."}
        return {**self.results(torchvision_backend, model, parts), "names": shapes}

    def theirs(self) -> Values:
        backend = backends.load("detectron2")
        weights = Weights(Path("memory"), self.built().state_dict(), "torchvision", is_detector=True)
        model = backend.build(self.cfg)
        model.load_state_dict(convert(weights, "detectron2")[0])
        shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
        parts = {"bottom-up": "backbone.bottom_up.", "rpn": "proposal_generator.", "heads": "roi_heads."}
        return {**self.results(backend, model, parts), "names": shapes}


CASES = {
    **{f"{kind}, {ratio} samples": Pooling(kind, ratio) for kind in ("ROIAlign", "ROIAlignV2") for ratio in (0, 2)},
    "ROIPool": Pooling("ROIPool", 0),
    "levels": Levels(),
    **{f"anchors, offset {offset}": Grid(offset) for offset in (0.0, 0.5)},
    **{f"RPN losses, beta {beta}": RPNLosses(beta) for beta in (0.0, 0.5)},
    **{f"box losses, beta {beta}": BoxLosses(beta, agnostic=False) for beta in (0.0, 0.5)},
    "box losses, one box for all classes": BoxLosses(1.0, agnostic=True),
    "pasted masks": Pasting(),
    "keypoints, by the visible": Keypoints(by_visible=True),
    "keypoints, fixed normaliser": Keypoints(by_visible=False),
    **{norm: Norm(norm) for norm in ("GN", "BN", "FrozenBN")},
    "model: R18 GN, ROIAlignV2, L1": Model("quickstart"),
    "model: R50 BN, ROIAlign, smooth L1": Model("quickstart", *R50_BN, salt="3"),
    "model: cascade": Model("quickstart", *CASCADE),
    "model: VGG-16": Model("vgg16", *VGG16),
    "model: VGG-16, ROIPool, border": Model("vgg16", *VGG16, *BORDER),
    "model: keypoints": Model("keypoints", *KEYPOINTS),
    "model: masks and keypoints, ROIAlign": Model("keypoints", *BOTH_HEADS),
}


def stock(cfg: Any) -> Any:
    from scratch_det.backends.detectron2 import stock_cfg

    return stock_cfg(cfg, "cpu")


def plain(values: Any) -> Any:
    """Tensors as nested lists of numbers of seven digits, for JSON."""
    if isinstance(values, dict):
        return {name: plain(value) for name, value in values.items()}
    if isinstance(values, Tensor | np.ndarray):
        return plain(values.tolist())
    if isinstance(values, list | tuple):
        return [plain(value) for value in values]
    return float(f"{values:.7g}") if isinstance(values, float) else int(values)


if __name__ == "__main__":
    texts = {name: json.dumps(plain(case.theirs())) for name, case in CASES.items()}
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text("{\n" + ",\n".join(f"{json.dumps(name)}: {text}" for name, text in texts.items()) + "\n}\n")
