"""The pictures that a run draws: predictions.png at evaluations, training.png every VIS_PERIOD iterations."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from scratch_det.data.coco import CocoDataset
from scratch_det.data.image import decode_masks, encode_masks, read_image
from scratch_det.data.masks import Masks
from scratch_det.data.transforms import Sample
from scratch_det.engine.run_dir import RunDir
from scratch_det.errors import counted
from scratch_det.evaluation.predictions import RESULTS_FILE, read_predictions
from scratch_det.visualization.predictions import draw_predictions

IMAGES_SHOWN = 12  # in predictions.png
MASK_SIDE = 420  # of a training mask's bitmap


def draw_found(cfg: CfgNode, run_dir: RunDir, test: list[CocoDataset]) -> Path:
    """Draw predictions.png, of the last evaluation of the first test set; its path."""
    folder = run_dir.path / "inference"
    results = (folder if len(test) == 1 else folder / test[0].entry.name) / RESULTS_FILE
    samples = picture_samples(test[0], results, cfg)
    return draw_predictions(samples, test[0].classes, run_dir.path / "predictions.png")


def draw_training(
    cfg: CfgNode, batch: Sequence[Sample], found: Sequence[Mapping[str, Tensor]], iterations: int, out_png: Path
) -> Path:
    """Draw training samples beside what ``Backend.detect`` finds after so many iterations; the path of the PNG."""
    pairs = []
    for sample, boxes in zip(batch, found, strict=True):
        image, truth = seen_by_model(cfg, sample)
        prediction = {name: values.numpy() for name, values in boxes.items()}
        pairs.append({"image": image, "truth": truth, "prediction": prediction, "title": sample["file_name"]})
    return draw_predictions(pairs, cfg.DATASETS.CLASS_NAMES, out_png, f"after {counted(iterations, 'iterations')}: ")


def seen_by_model(cfg: CfgNode, sample: Sample) -> tuple[np.ndarray, dict[str, Any]]:
    """A training sample's image, uint8 [H, W, 3] RGB, and its objects, for ``draw_objects``."""
    image = sample["image"].permute(1, 2, 0).numpy()
    pixels = np.ascontiguousarray(image[..., ::-1] if cfg.INPUT.FORMAT == "BGR" else image)
    items: dict[str, Any] = {key: sample[key].numpy() for key in ("boxes", "labels", "keypoints") if key in sample}
    if "masks" in sample:
        items["masks"] = bitmaps(sample["masks"], *pixels.shape[:2])
    return pixels, items


def bitmaps(masks: Masks, height: int, width: int) -> np.ndarray:
    """bool [N, MASK_SIDE, MASK_SIDE], the whole image of each mask."""
    whole = torch.tensor([[0.0, 0.0, width, height]]).expand(len(masks), 4)
    return masks.crop_and_resize(whole, MASK_SIDE).numpy()


def picture_samples(data: CocoDataset, results_file: Path, cfg: CfgNode) -> list[dict[str, Any]]:
    """Truth and prediction of a few images that hold objects, spread evenly over the set, for ``draw_predictions``."""
    labels = {category: label for label, category in enumerate(data.category_ids)}
    with_objects = np.flatnonzero(data.object_counts())
    numbers = with_objects if len(with_objects) else np.arange(len(data.images))
    chosen = numbers[np.linspace(0, len(numbers) - 1, min(IMAGES_SHOWN, len(numbers))).astype(int)]
    predictions = read_predictions(results_file)

    def as_arrays(items: Mapping[str, Any], image: dict[str, Any]) -> dict[str, Any]:
        """COCO's columns as arrays: boxes x1 y1 x2 y2, 0-based labels, RLE masks, keypoints x y v."""
        boxes = np.array(items["bbox"], dtype=float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        own = np.array([labels[category] for category in items["category_id"]], dtype=int)
        found: dict[str, Any] = {"boxes": boxes, "labels": own, "masks": None, "keypoints": None}
        if cfg.MODEL.MASK_ON:
            found["masks"] = encode_masks(decode_masks(list(items["segmentation"]), image["height"], image["width"]))
        if cfg.MODEL.KEYPOINT_ON:
            points = np.array(items["keypoints"], dtype=float)
            found["keypoints"] = points.reshape(-1, cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, 3)
            found["keypoints"][..., :2] += 0.5  # from pixel indices to pixel centres
        return found

    samples = []
    for number in chosen.tolist():
        image, objects = data.images[number], data.training_objects(number)
        rows = predictions["image_id"] == image["id"]
        truth = {name: [one.get(name) for one in objects] for name in predictions}
        found = {name: column[rows] for name, column in predictions.items()}
        samples.append(
            {"title": image["file_name"],
             "image": read_image(data.entry.image_root / image["file_name"], image["width"], image["height"]),
             "truth": as_arrays(truth, image), "prediction": {**as_arrays(found, image), "scores": found["score"]}}
        )  # fmt: skip
    return samples
