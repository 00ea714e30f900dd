"""The task detection: boxes, and masks or keypoints where the recipe has them; see ``engine.train.Task``."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode

from scratch_det import backends
from scratch_det.data.coco import CocoDataset
from scratch_det.data.dataset import TrainingSet
from scratch_det.data.image import decode_masks, encode_masks, read_image
from scratch_det.engine.run_dir import RunDir
from scratch_det.engine.state import State
from scratch_det.evaluation.inference import RESULTS_FILE, evaluate
from scratch_det.evaluation.metrics import main_score
from scratch_det.log import logger
from scratch_det.visualization.curves import draw_curves
from scratch_det.visualization.predictions import draw_predictions

__all__ = ["BEST", "conclude", "evaluate", "load", "training_set"]
load, training_set = backends.load, TrainingSet
BEST = main_score("bbox")
IMAGES_SHOWN = 12


def conclude(cfg: CfgNode, run_dir: RunDir, state: State, test: list[CocoDataset]) -> None:
    """Draw curves.png and predictions.png, the latter from the last evaluation of the first test set.

    An error in drawing is only logged: the run is still complete.
    """
    try:
        draw_curves(run_dir.metrics, cfg.SOLVER.MAX_ITER, run_dir.path / "curves.png", title=str(run_dir.path))
        if test:
            folder = run_dir.path / "inference"
            results = (folder if len(test) == 1 else folder / test[0].entry.name) / RESULTS_FILE
            samples = picture_samples(test[0], results, cfg)
            draw_predictions(samples, test[0].classes, run_dir.path / "predictions.png")
    except Exception:
        logger.exception("the pictures could not be drawn")


def picture_samples(data: CocoDataset, results_file: Path, cfg: CfgNode) -> list[dict[str, Any]]:
    """Truth and prediction of a few images that hold objects, spread evenly over the set, for ``draw_predictions``."""
    labels = {category: label for label, category in enumerate(data.category_ids)}
    with_objects = [image for image in data.images if data.training_annotations(image["id"])] or data.images
    places = np.linspace(0, len(with_objects) - 1, min(IMAGES_SHOWN, len(with_objects))).astype(int)
    results: dict[int, list[dict[str, Any]]] = {with_objects[place]["id"]: [] for place in places}
    for result in json.loads(results_file.read_text()):
        if result["image_id"] in results:
            results[result["image_id"]].append(result)

    def as_arrays(items: list[dict[str, Any]], image: dict[str, Any]) -> dict[str, Any]:
        """COCO annotations or results as arrays: boxes x1 y1 x2 y2, 0-based labels, RLE masks, keypoints x y v."""
        boxes = np.array([item["bbox"] for item in items], dtype=float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        own = np.array([labels[item["category_id"]] for item in items], dtype=int)
        found: dict[str, Any] = {"boxes": boxes, "labels": own, "masks": None, "keypoints": None}
        if cfg.MODEL.MASK_ON:
            masks = [item["segmentation"] for item in items]
            found["masks"] = encode_masks(decode_masks(masks, image["height"], image["width"]))
        if cfg.MODEL.KEYPOINT_ON:
            points = np.array([item["keypoints"] for item in items], dtype=float)
            found["keypoints"] = points.reshape(-1, cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, 3)
            found["keypoints"][..., :2] += 0.5  # from pixel indices to pixel centres
        return found

    samples = []
    for image in (with_objects[place] for place in places):
        own = results[image["id"]]
        sample = {
            "title": image["file_name"],
            "image": read_image(data.entry.image_root / image["file_name"], image["width"], image["height"]),
            "truth": as_arrays(data.training_annotations(image["id"]), image),
            "prediction": {**as_arrays(own, image), "scores": np.array([result["score"] for result in own])},
        }
        samples.append(sample)
    return samples
