"""Helpers of the tests of data: toy data sets are read, rejected, augmented and compared."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import rectangle_mask
from fvcore.common.config import CfgNode
from samples import equal

from scratch_det.config.load import get_cfg, set_key
from scratch_det.data.catalog import lookup
from scratch_det.data.coco import CocoDataset, read_coco
from scratch_det.data.masks import Masks
from scratch_det.errors import DataError


def read_toy(name: str = "toy_train", need_masks: bool = True, need_keypoints: bool = False) -> CocoDataset:
    return read_coco(lookup(name), need_masks, need_keypoints)


def all_objects(data: CocoDataset) -> list[dict[str, Any]]:
    """Of all images, in their order."""
    return [one for k in range(len(data.images)) for one in data.objects(k)]


def rejection(action: Callable, *arguments: Any) -> str:
    """The message of the DataError that ``action`` must raise."""
    with pytest.raises(DataError) as caught:
        action(*arguments)
    return str(caught.value)


def rectangle_sample(kind: str = "polygon", width: int = 60, height: int = 40) -> dict[str, Any]:
    """One image with two bright rectangles, their boxes (x1 y1 x2 y2) and masks."""
    boxes = [(6, 8, 20, 12), (36, 10, 10, 26)]
    image = torch.zeros((3, height, width), dtype=torch.uint8)
    for x, y, w, h in boxes:
        image[:, y : y + h, x : x + w] = 200
    masks = [rectangle_mask(box, width, height, kind) for box in boxes]
    return {
        "image": image,
        "boxes": torch.tensor([[x, y, x + w, y + h] for x, y, w, h in boxes], dtype=torch.float32),
        "labels": torch.tensor([0, 1]),
        "masks": Masks.read(masks),
    }


def extent(mask: torch.Tensor) -> list[int]:
    """x1 y1 x2 y2 of the pixels that are set."""
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)


def config(**changes: Any) -> CfgNode:
    """The defaults with ``SECTION__KEY=value`` changes, small and from scratch."""
    cfg = get_cfg()
    cfg.SEED, cfg.MODEL.MASK_ON, cfg.DATALOADER.NUM_WORKERS = 0, True, 0
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (48, 80), 128
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 80, 128
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER = 3, 4
    for key, value in changes.items():
        set_key(cfg, key.replace("__", "."), value)
    return cfg
