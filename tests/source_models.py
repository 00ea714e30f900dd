"""Detectors of other libraries with random weights that detect: their files, and what they themselves find."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor, nn
from torchvision.models._api import WeightsEnum
from torchvision.transforms.functional import pil_to_tensor

from scratch_det.data.transforms import output_size, resize

MISSING_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)  # of COCO's 1 to 90; trained, their scores are as good as 0


def few_photographs(tiny_coco: Path, root: Path, number: int, kind: str = "instances", **sizes: int) -> list[Path]:
    """Register the first images of val2017 as the data set ``few`` below ``root``; returns their files."""
    content = json.loads((tiny_coco / f"annotations/{kind}_val2017.json").read_text())
    content["images"] = content["images"][:number]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] in ids]
    (root / "few.json").write_text(json.dumps(content))
    entry = {"json": "few.json", "images": str(tiny_coco / "val2017"), "drop_empty_boxes": True}
    (root / "catalog.yaml").write_text(yaml.safe_dump({"few": entry}))
    return [tiny_coco / "val2017" / image["file_name"] for image in content["images"]]


SPREAD = {  # what a layer's outputs are to differ by, so that proposals and detections do
    "cls_logits": 1.0, "objectness_logits": 1.0, "anchor_deltas": 0.1, "cls_score": 2.0, "mask_fcn_logits": 2.0,
    "predictor": 2.0, "kps_score_lowres": 2.0, "score_lowres": 2.0, "bbox_pred": 0.3,
}  # fmt: skip


@torch.no_grad()
def widen(model: nn.Module, forward: Callable[[], Any]) -> None:
    """Make a random detector find things: statistics of BN as ``forward`` gives them, and outputs as in SPREAD."""
    model.eval()
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = 1.0
            layer.train()
    changed = set()

    def change(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, spread: float) -> Tensor | None:
        if layer in changed or not len(output):  # of a pyramid the first level counts
            return None
        changed.add(layer)
        over = [axis for axis in range(output.dim()) if axis != 1]
        std = output.std(over).mean()
        layer.weight.mul_(spread / std)
        layer.bias.copy_(-(output.mean(over) - layer.bias) * spread / std)
        return type(layer).forward(layer, *inputs)

    hooks = [
        layer.register_forward_hook(partial(change, spread=spread))
        for name, layer in model.named_modules() if (spread := SPREAD.get(name.rpartition(".")[2]))
        and hasattr(layer, "weight")
    ]  # fmt: skip
    forward()
    for hook in hooks:
        hook.remove()
    model.eval()


class Stock:
    """One of torchvision's builders with random weights, as it would be with those that it downloads."""

    def __init__(self, builder: Callable[..., nn.Module], weights: Any, photograph: Path, **sizes: int):
        torch.manual_seed(3)
        image = read_rgb(photograph) / 255
        model = builder(weights=None, weights_backbone=None, box_nms_thresh=0.5, **sizes).eval()
        widen(model, lambda: model([image]))
        state = model.state_dict()
        bias = state["roi_heads.box_predictor.cls_score.bias"]
        if len(bias) > 2:
            bias[list(MISSING_IDS)] = -60
        if "v2" not in builder.__name__:  # whose file has no counters, as FrozenBN has none
            state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
        self.state = state
        with patch.object(WeightsEnum, "get_state_dict", lambda *_, **__: dict(state)):
            self.model = builder(weights=weights, **sizes).eval()

    @torch.no_grad()
    def detect(self, photograph: Path, shortest: int, longest: int) -> dict[str, Tensor]:
        """What it finds in the photograph as a run resizes it, in pixels of the photograph.

        torchvision's own resizing rounds the sizes down and does not round grey values.
        """
        image = read_rgb(photograph)
        height, width = image.shape[1:]
        size = output_size(height, width, shortest, longest)
        small = resize({"image": image}, size)["image"]
        found = self.model([small / 255])[0]
        return {**found, "boxes": found["boxes"] * torch.tensor([width / size[1], height / size[0]] * 2)}


def read_rgb(photograph: Path) -> Tensor:
    return pil_to_tensor(Image.open(photograph).convert("RGB"))


def with_old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As torchvision's released files of v1 have them, which are older than its names of today."""
    changes = (("_blocks.0.0.", "_blocks.0."), ("_blocks.1.0.", "_blocks.1."), ("_blocks.2.0.", "_blocks.2."),
               ("_blocks.3.0.", "_blocks.3."), ("head.conv.0.0.", "head.conv."),
               *((f"mask_head.{n}.0.", f"mask_head.mask_fcn{n + 1}.") for n in range(4)))  # fmt: skip

    def old(name: str) -> str:
        for new, former in changes:
            name = name.replace(new, former)
        return name

    return {old(name): value for name, value in state.items()}


def far(found: list[dict[str, Any]], boxes: np.ndarray, scores: np.ndarray, most: int) -> tuple[float, float, int]:
    """How far the best of COCO results ``found`` are from the nearest of ``boxes`` (x1 y1 x2 y2) by score.

    Pixels of a box, difference of its score; how many were compared.
    """
    best = sorted(found, key=lambda one: -one["score"])[:most]
    apart, other = [0.0], [0.0]
    for one in best:
        x, y, width, height = one["bbox"]
        distance = np.abs(boxes - [x, y, x + width, y + height]).max(1) + 1e4 * (np.abs(scores - one["score"]) > 0.02)
        apart.append(float(distance.min()))
        other.append(float(abs(scores[distance.argmin()] - one["score"])))
    return max(apart), max(other), len(best)
