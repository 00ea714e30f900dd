"""Test-time augmentation: one image seen in several sizes, plain and mirrored, and the detections merged.

As in detectron2: each view is detected by itself, boxes meet in the original image, NMS by class chooses among them,
and the masks of the chosen boxes are the mean over all views, as are keypoints' heat maps in Detectron (detectron2
refuses keypoints). Views are made from the original image, not from one that has been resized already.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.ops import batched_nms

from scratch_det.data.image import encode_masks
from scratch_det.data.transforms import Sample, flip, inside, output_size, resize
from scratch_det.modeling.ops import decode_keypoints, paste_masks

View = tuple[Sample, bool]  # the image, and whether it is mirrored


def predict_augmented(
    backend: ModuleType, model: nn.Module, cfg: CfgNode, sample: Sample, flip_indices: Sequence[int] | None = None
) -> dict[str, Any]:
    """What ``backend.predict`` says of one image, from TEST.AUG's views of it. The sample has the original image.

    flip_indices: of keypoints (see ``CocoDataset``), needed where there are any and views are flipped.
    """
    views = views_of(sample, cfg)
    found = merge([_in_original(backend.detect(model, [view])[0], view, mirrored) for view, mirrored in views], cfg)
    boxes, kept = inside(found["boxes"], sample["height"], sample["width"])
    found = {**{name: value[kept] for name, value in found.items()}, "boxes": boxes}
    if not has_second_pass(cfg):
        return found
    total: dict[str, Tensor] = {}
    for view, mirrored in views:  # heat maps of all views at once would be hundreds of MB
        for name, maps in _shapes(backend, model, found, view, mirrored, flip_indices).items():
            total[name] = total[name] + maps if name in total else maps
    mean = {name: maps / len(views) for name, maps in total.items()}
    if "masks" in mean:
        found["masks"] = encode_masks(paste_masks(mean["masks"], found["boxes"], sample["height"], sample["width"]))
    if "heat_maps" in mean:
        found["keypoints"] = decode_keypoints(mean["heat_maps"], found["boxes"])
    return found


def has_second_pass(cfg: CfgNode) -> bool:
    """Whether anything is asked of the merged boxes."""
    return cfg.MODEL.MASK_ON or cfg.MODEL.KEYPOINT_ON


def views_of(sample: Sample, cfg: CfgNode) -> list[View]:
    """Every size of TEST.AUG.MIN_SIZES, plain and, with TEST.AUG.FLIP, mirrored too."""
    keys = cfg.TEST.AUG
    plain = [resize(sample, size, keys.MAX_SIZE) for size in keys.MIN_SIZES]
    return [
        (flip(view, "horizontal") if mirrored else view, mirrored)
        for view in plain
        for mirrored in ((False, True) if keys.FLIP else (False,))
    ]


def merge(found: list[dict[str, Tensor]], cfg: CfgNode) -> dict[str, Tensor]:
    """The detections of all views, by falling score: NMS among those of a class, DETECTIONS_PER_IMAGE at most."""
    union = {name: torch.cat([one[name] for one in found]) for name in ("boxes", "scores", "labels")}
    kept = batched_nms(union["boxes"], union["scores"], union["labels"], cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST)
    return {name: value[kept[: cfg.TEST.DETECTIONS_PER_IMAGE]] for name, value in union.items()}


def relative_cost(cfg: CfgNode, height: int, width: int) -> float:
    """Pixels of all views, in one pass or two, against those of the one plain image, for an image of this size."""
    keys = cfg.TEST.AUG
    plain = _area(height, width, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    passes = (1 + keys.FLIP) * (1 + has_second_pass(cfg))
    return passes * sum(_area(height, width, size, keys.MAX_SIZE) for size in keys.MIN_SIZES) / plain


def _area(height: int, width: int, short_side: int, max_size: int) -> int:
    rows, columns = output_size(height, width, short_side, max_size)
    return rows * columns


def _in_original(found: dict[str, Tensor], view: Sample, mirrored: bool) -> dict[str, Tensor]:
    boxes = _mirror(found["boxes"], view) if mirrored else found["boxes"]
    return {**found, "boxes": boxes / _scale(view)}


def _shapes(
    backend: ModuleType,
    model: nn.Module,
    found: dict[str, Tensor],
    view: Sample,
    mirrored: bool,
    flip_indices: Sequence[int] | None,
) -> dict[str, Tensor]:
    """What ``backend.shapes`` says of boxes in the original image, turned as they are there."""
    boxes = found["boxes"] * _scale(view)
    given = {"boxes": _mirror(boxes, view) if mirrored else boxes, "labels": found["labels"]}
    (shapes,) = backend.shapes(model, [view], [given])
    if mirrored:
        shapes = {name: maps.flip(-1) for name, maps in shapes.items()}
        if "heat_maps" in shapes:
            assert flip_indices is not None  # refused before
            shapes["heat_maps"] = shapes["heat_maps"][:, list(flip_indices)]
    return shapes


def _scale(view: Sample) -> Tensor:
    """What the corners of a box in the original image are multiplied by."""
    height, width = view["image"].shape[-2:]
    x, y = width / view["width"], height / view["height"]
    return torch.tensor([x, y, x, y])


def _mirror(boxes: Tensor, view: Sample) -> Tensor:
    x1, y1, x2, y2 = boxes.unbind(1)
    width = view["image"].shape[-1]
    return torch.stack([width - x2, y1, width - x1, y2], dim=1)
