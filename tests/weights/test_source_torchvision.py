"""torchvision's own detectors: evaluated as they are, and as a start for other classes."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from source_models import Stock, far, few_photographs, with_old_names
from torch import Tensor, nn
from torchvision.models import detection

from scratch_det import backends
from scratch_det.config.load import load_config
from scratch_det.conversion import convert_file
from scratch_det.engine.command import start
from scratch_det.engine.plan import Request
from scratch_det.errors import UserError
from scratch_det.weights.classes import COCO, with_new_classes
from scratch_det.weights.load import load_weights
from scratch_det.weights.origin import read_weights

RECIPES = ROOT / "configs/Torchvision"
MODELS: dict[str, tuple[Callable[..., nn.Module], Any, str, str]] = {  # builder, weights, recipe, kind of the json
    "Mask R-CNN": (detection.maskrcnn_resnet50_fpn, detection.MaskRCNN_ResNet50_FPN_Weights.COCO_V1,
                   "mask_rcnn_R_50_FPN", "instances"),
    "Mask R-CNN v2": (detection.maskrcnn_resnet50_fpn_v2, detection.MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
                      "mask_rcnn_R_50_FPN_v2", "instances"),
    "Faster R-CNN v2": (detection.fasterrcnn_resnet50_fpn_v2, detection.FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
                        "mask_rcnn_R_50_FPN_v2", "instances"),
    "Keypoint R-CNN": (detection.keypointrcnn_resnet50_fpn, detection.KeypointRCNN_ResNet50_FPN_Weights.COCO_V1,
                       "keypoint_rcnn_R_50_FPN", "person_keypoints"),
}  # fmt: skip
LIBRARIES = ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)]
SHORTEST, LONGEST = 160, 256  # no multiple of 64: the stride of p6 is not 64 there


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "Mask R-CNN")) for name in MODELS]
)
def test_an_evaluation_finds_what_the_source_finds(
    name: str, library: str, tiny_coco: Path, datasets_root: Path, tmp_path: Path
) -> None:
    builder, weights, recipe, kind = MODELS[name]
    (photograph,) = few_photographs(tiny_coco, datasets_root, 1, kind)
    source = Stock(builder, weights, photograph, min_size=SHORTEST, max_size=LONGEST)
    file, config = tmp_path / "a.pth", RECIPES / f"{recipe}.yaml"
    torch.save({"model": source.state if "v2" in name else with_old_names(source.state)}, file)
    if library == "detectron2":
        convert_file(str(file), tmp_path / "b.pth", library, config)
        file = tmp_path / "b.pth"
    keys = ["MODEL.WEIGHTS", str(file), "DATASETS.TEST", "('few',)", "MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS",
            "0", "INPUT.MIN_SIZE_TEST", str(SHORTEST), "INPUT.MAX_SIZE_TEST", str(LONGEST), "OUTPUT_DIR",
            str(tmp_path / "run"), "MODEL.MASK_ON", str("Mask" in name)]  # fmt: skip
    start(Request(str(config), keys, backend=library, eval_only=True))
    found = json.loads((tmp_path / "run/inference/coco_instances_results.json").read_text())
    expected = source.detect(photograph, SHORTEST, LONGEST)
    boxes, scores, number = far(found, expected["boxes"].numpy(), expected["scores"].numpy(), 50)
    assert number >= 20
    assert boxes < 0.05  # pixels of the photograph
    assert scores < 2e-3


def small(outputs: int) -> dict[str, Tensor]:
    """Names and classes of torchvision's Mask R-CNN; row i of every layer of the classes is i."""
    rows = torch.arange(float(outputs))
    return {
        "rpn.head.bbox_pred.weight": torch.ones(1), "roi_heads.box_head.fc6.weight": torch.ones(1),
        "roi_heads.box_predictor.cls_score.weight": rows[:, None],
        "roi_heads.box_predictor.bbox_pred.bias": rows.repeat_interleave(4),
        "roi_heads.mask_predictor.mask_fcn_logits.bias": rows,
    }  # fmt: skip


def test_of_91_outputs_cocos_classes_are_left(tmp_path: Path) -> None:
    """By category id: 1 is person, 13 stop sign, 90 toothbrush; 12 is nobody's."""
    torch.save(small(91), tmp_path / "a.pth")
    weights = read_weights(tmp_path / "a.pth")
    assert weights.classes == COCO
    scores = weights.tensors["roi_heads.box_predictor.cls_score.weight"][:, 0].int().tolist()
    assert [len(scores), scores[:2], scores[11:13], scores[-1]] == [81, [0, 1], [11, 13], 90]
    assert weights.tensors["roi_heads.box_predictor.bbox_pred.bias"].int().tolist() == [
        n for n in scores for _ in "xywh"
    ]
    assert weights.tensors["roi_heads.mask_predictor.mask_fcn_logits.bias"].int().tolist() == scores
    wanted = {name: -torch.ones(4 * (len(value) // 81), *value.shape[1:]) if len(value) > 1 else value
              for name, value in weights.tensors.items()}  # fmt: skip
    tensors, said = with_new_classes(weights, ["toothbrush", "my own", "stop sign"], wanted)
    assert tensors["roi_heads.box_predictor.cls_score.weight"][:, 0].tolist() == [0, 90, -1, 13]
    assert said == "of 3 classes, 1 start at random in 3 tensors; rows of 2 are the file's (toothbrush, stop sign)"


def test_of_another_number_no_class_is_named(tmp_path: Path) -> None:
    torch.save(small(3), tmp_path / "a.pth")
    weights = read_weights(tmp_path / "a.pth")
    assert weights.classes == ()
    assert len(weights.tensors["roi_heads.mask_predictor.mask_fcn_logits.bias"]) == 3


def test_the_norm_that_adds_nothing_to_the_variance(tmp_path: Path) -> None:
    """torchvision divides by sqrt(variance), here sqrt(variance + 1e-5) is the divisor, also where it is almost 0."""
    variance, weight = torch.tensor([2.0, 1e-5, 1e-9, 1e-42]), torch.tensor([3.0, 1.0, 2.0, 1e-20])
    torch.save({**small(3), "bn1.running_var": variance, "bn1.weight": weight}, tmp_path / "a.pth")
    found = read_weights(tmp_path / "a.pth").tensors
    ours = found["bn1.weight"] / (found["bn1.running_var"] + 1e-5).sqrt()
    torch.testing.assert_close(ours.double(), weight.double() / variance.double().sqrt(), rtol=1e-6, atol=0)
    torch.save(
        {**small(3), "bn1.running_var": variance, "bn1.num_batches_tracked": torch.tensor(1)}, tmp_path / "a.pth"
    )
    assert read_weights(tmp_path / "a.pth").tensors["bn1.running_var"].equal(variance)


@pytest.mark.parametrize(("builder", "recipe", "expected"), [
    (detection.maskrcnn_resnet50_fpn_v2, "mask_rcnn_R_50_FPN", "72 without a place, the first is backbone.fpn.inner"),
    (detection.fasterrcnn_mobilenet_v3_large_fpn, "mask_rcnn_R_50_FPN", "missing, the first is backbone.body.conv1"),
    (partial(detection.keypointrcnn_resnet50_fpn, num_keypoints=3), "keypoint_rcnn_R_50_FPN",
     "train other keypoints with MODEL.WEIGHTS_NEW_CLASSES True"),
])  # fmt: skip
def test_what_does_not_fit_is_told(
    builder: Callable[..., nn.Module], recipe: str, expected: str, tmp_path: Path
) -> None:
    with torch.device("meta"):
        state = builder(weights=None, weights_backbone=None).state_dict()
    torch.save({name: torch.ones(()).expand(value.shape) for name, value in state.items()}, tmp_path / "a.pth")
    cfg = load_config(RECIPES / f"{recipe}.yaml", ["MODEL.ROI_HEADS.NUM_CLASSES", 1 if "key" in recipe else 80]).cfg
    with torch.device("meta"):
        model = backends.load("torchvision").build(cfg)
    with pytest.raises(UserError, match="(?s)does not fit the .* tensors of the model.*" + re.escape(expected)):
        load_weights(model, tmp_path / "a.pth", "torchvision", cfg)
