"""The pictures that a complete run leaves: curves.png and predictions.png."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode

from scratch_det.data.coco import CocoDataset
from scratch_det.data.image import decode_masks, encode_masks, read_image
from scratch_det.engine.run_dir import RunDir
from scratch_det.evaluation.inference import RESULTS_FILE
from scratch_det.evaluation.predictions import read_predictions
from scratch_det.visualization.curves import draw_curves
from scratch_det.visualization.predictions import draw_predictions

IMAGES_SHOWN = 12  # in predictions.png


def draw(cfg: CfgNode, run_dir: RunDir, test: list[CocoDataset]) -> None:
    """Draw curves.png and, from the last evaluation of the first test set if there is one, predictions.png."""
    draw_curves(run_dir.metrics, cfg.SOLVER.MAX_ITER, run_dir.path / "curves.png", title=str(run_dir.path))
    if test:
        folder = run_dir.path / "inference"
        results = (folder if len(test) == 1 else folder / test[0].entry.name) / RESULTS_FILE
        samples = picture_samples(test[0], results, cfg)
        draw_predictions(samples, test[0].classes, run_dir.path / "predictions.png")


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
