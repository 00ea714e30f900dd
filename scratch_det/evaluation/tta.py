"""Test-time augmentation: an image is resized to several sizes, plain and flipped, and the detections are merged.

As in detectron2: each view is detected by itself, boxes are mapped back to the original image, NMS per class chooses
among them, and the mask of a chosen box is the mean over all views, as are heat maps of keypoints in Detectron
(detectron2 does not support keypoints here). Views are made from the original image, not from a resized one.
"""

from collections.abc import Sequence
from statistics import mean
from types import ModuleType
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_area, clip_boxes_to_image

from scratch_det.data.image import encode_masks
from scratch_det.data.transforms import Sample, flip, output_size, resize
from scratch_det.evaluation.metrics import detection_tasks
from scratch_det.log import clock
from scratch_det.modeling.ops import decode_keypoints, paste_masks


def predict_augmented(
    backend: ModuleType, model: nn.Module, cfg: CfgNode, sample: Sample, flip_indices: Sequence[int] | None = None
) -> dict[str, Any]:
    """What ``backend.predict`` returns for one image, from TEST.AUG's views of it. The sample has the original image.

    flip_indices: of keypoints (see ``CocoDataset``), needed where there are any and views are flipped.
    """
    views, height, width = views_of(sample, cfg), sample["height"], sample["width"]
    detections = []
    for view, is_flipped in views:
        (found,) = backend.detect(model, [view])
        boxes = _flip_boxes(found["boxes"], view) if is_flipped else found["boxes"]
        detections.append({**found, "boxes": boxes / _scale(view)})
    found = merge(detections, cfg)
    found["boxes"] = clip_boxes_to_image(found["boxes"], (height, width))
    has_area = box_area(found["boxes"]) > 0
    found = {name: value[has_area] for name, value in found.items()}
    boxes = found["boxes"]
    total: dict[str, Tensor] = {}
    has_shapes = len(detection_tasks(cfg)) > 1
    for view, is_flipped in views if has_shapes else ():  # all heat maps at once would be hundreds of MB
        in_view = boxes * _scale(view)
        in_view = _flip_boxes(in_view, view) if is_flipped else in_view
        (maps,) = backend.shapes(model, [view], [{"boxes": in_view, "labels": found["labels"]}])
        for name, value in maps.items():
            value = value.flip(-1) if is_flipped else value
            if is_flipped and name == "heat_maps":
                assert flip_indices is not None  # check_config raises otherwise
                value = value[:, list(flip_indices)]
            total[name] = total[name] + value if name in total else value
    if "masks" in total:
        found["masks"] = encode_masks(paste_masks(total["masks"] / len(views), boxes, height, width))
    if "heat_maps" in total:
        found["keypoints"] = decode_keypoints(total["heat_maps"] / len(views), boxes)
    return found


def views_of(sample: Sample, cfg: CfgNode) -> list[tuple[Sample, bool]]:
    """The image with its shorter side at each of TEST.AUG.MIN_SIZES, plain and, with TEST.AUG.FLIP, flipped too.

    The bool says whether a view is flipped.
    """
    views = []
    for size in cfg.TEST.AUG.MIN_SIZES:
        view = output_size(sample["height"], sample["width"], size, cfg.TEST.AUG.MAX_SIZE)
        views.append((resize(sample, view), False))
        if cfg.TEST.AUG.FLIP:
            views.append((flip(views[-1][0], "horizontal"), True))
    return views


def merge(detections: list[dict[str, Tensor]], cfg: CfgNode) -> dict[str, Tensor]:
    """The detections of all views, sorted by descending score: NMS within each class, at most DETECTIONS_PER_IMAGE."""
    union = {name: torch.cat([one[name] for one in detections]) for name in ("boxes", "scores", "labels")}
    kept = batched_nms(union["boxes"], union["scores"], union["labels"], cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST)
    return {name: value[kept[: cfg.TEST.DETECTIONS_PER_IMAGE]] for name, value in union.items()}


def relative_cost(cfg: CfgNode, height: int, width: int) -> float:
    """Pixels of all views, in one pass or two, divided by those of the one plain image, for an image of this size."""
    keys, area = cfg.TEST.AUG, lambda *sides: torch.Size(output_size(height, width, *sides)).numel()
    passes = (1 + keys.FLIP) * min(2, len(detection_tasks(cfg)))  # masks and keypoints in one
    plain = area(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    return passes * sum(area(size, keys.MAX_SIZE) for size in keys.MIN_SIZES) / plain


def describe_cost(cfg: CfgNode, images: Sequence[dict[str, Any]], seconds: float) -> str:
    """Expected time of the augmented evaluation of ``images``, from the ``seconds`` of the plain evaluation."""
    factor = mean(relative_cost(cfg, image["height"], image["width"]) for image in images)
    views = len(cfg.TEST.AUG.MIN_SIZES) * (1 + cfg.TEST.AUG.FLIP)
    passes = "two passes (boxes, then masks and keypoints in them)" if len(detection_tasks(cfg)) > 1 else "one pass"
    return (
        f"test-time augmentation: {views} views of each of {len(images)} images, {passes}; {factor:.0f} times "
        f"the pixels of the plain evaluation, which took {clock(seconds)}: about {clock(factor * seconds)}"
    )


def _scale(view: Sample) -> Tensor:
    """The factors [4] from boxes (x1 y1 x2 y2, px) in the original image to those in the view, before any flip."""
    height, width = view["image"].shape[-2:]
    return torch.tensor([width / view["width"], height / view["height"]]).repeat(2)


def _flip_boxes(boxes: Tensor, view: Sample) -> Tensor:
    """Boxes [N, 4] of a view, or of its mirror image, in the other one."""
    x1, y1, x2, y2 = boxes.unbind(1)
    width = view["image"].shape[-1]
    return torch.stack([width - x2, y1, width - x1, y2], dim=1)
