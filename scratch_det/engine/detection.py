"""The pictures that every run leaves in its folder.

What a run of detection is made of.

A module like this one tells a run what is trained; everything else is the same for all of them:

``BEST``: task and name of the metric that model_best.pth is chosen by.
``load(backend) -> ModuleType``: who builds the model and computes losses, see ``scratch_det.backends``.
``training_set(cfg, data) -> Dataset``: samples by stream position, with a length and, for the log, ``describe()``.
``evaluate(backend, model, cfg, data, out, group) -> dict``: metrics in percent by task and name on one test set, in the
    main process; nothing in the others. Files go into the folder ``out``.
``conclude(cfg, run_dir, state, test)``: what a complete run leaves beside checkpoints and metrics.
"""

import json
from collections import defaultdict
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode

from scratch_det.backends import load
from scratch_det.data.coco import CocoDataset
from scratch_det.data.dataset import TrainingSet
from scratch_det.data.image import read_image, to_rle
from scratch_det.engine.run_dir import RunDir
from scratch_det.engine.state import State
from scratch_det.evaluation.inference import RESULTS_FILE, evaluate
from scratch_det.evaluation.metrics import main_score
from scratch_det.log import logger
from scratch_det.visualization.curves import draw_curves
from scratch_det.visualization.predictions import draw_predictions

IMAGES_SHOWN = 12


def draw(cfg: CfgNode, run_dir: RunDir, test: list[CocoDataset]) -> None:
    """curves.png from metrics.json and predictions.png from the last evaluation of the first test set.

    A picture that fails is told in the log and does not undo the run.
    """
    try:
        _draw(cfg, run_dir, test)
    except Exception:
        logger.exception("the pictures could not be drawn")


def _draw(cfg: CfgNode, run_dir: RunDir, test: list[CocoDataset]) -> None:
    draw_curves(run_dir.metrics, cfg.SOLVER.MAX_ITER, run_dir.path / "curves.png", title=str(run_dir.path))
    if not test:
        return
    folder = run_dir.path / "inference"
    results_file = folder / RESULTS_FILE if len(test) == 1 else folder / test[0].entry.name / RESULTS_FILE
    samples = _samples(test[0], json.loads(results_file.read_text()), cfg)
    draw_predictions(samples, test[0].classes, run_dir.path / "predictions.png")


def _samples(data: CocoDataset, results: list[dict[str, Any]], cfg: CfgNode) -> list[dict[str, Any]]:
    """Truth and prediction of a few images that hold objects, spread evenly over the set."""
    by_image = defaultdict(list)
    for result in results:
        by_image[result["image_id"]].append(result)
    labels = {category: label for label, category in enumerate(data.category_ids)}
    with_objects = [image for image in data.images if data.training_annotations(image["id"])] or data.images
    chosen = np.linspace(0, len(with_objects) - 1, min(IMAGES_SHOWN, len(with_objects))).astype(int)
    return [_sample(data, with_objects[i], by_image[with_objects[i]["id"]], labels, cfg) for i in chosen]


def _sample(
    data: CocoDataset, image: dict[str, Any], results: list[dict[str, Any]], labels: dict[int, int], cfg: CfgNode
) -> dict[str, Any]:
    return {
        "title": image["file_name"],
        "image": read_image(data.entry.image_root / image["file_name"], image["width"], image["height"]),
        "truth": _objects(data.training_annotations(image["id"]), image, labels, cfg),
        "prediction": {**_objects(results, image, labels, cfg), "scores": np.array([r["score"] for r in results])},
    }


def _objects(
    items: list[dict[str, Any]], image: dict[str, Any], labels: dict[int, int], cfg: CfgNode
) -> dict[str, Any]:
    """COCO annotations or results as arrays: boxes x1 y1 x2 y2, 0-based labels, RLE masks, keypoints x y v."""
    boxes = np.array([item["bbox"] for item in items], dtype=float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    height, width = image["height"], image["width"]
    return {
        "boxes": boxes,
        "labels": np.array([labels[item["category_id"]] for item in items], dtype=int),
        "masks": [to_rle(item["segmentation"], height, width) for item in items] if cfg.MODEL.MASK_ON else None,
        "keypoints": _points(items, cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS) if cfg.MODEL.KEYPOINT_ON else None,
    }


def _points(items: list[dict[str, Any]], count: int) -> np.ndarray:
    """Float [N, count, 3]; the json's indices of pixels become the places of their centres."""
    points = np.array([item["keypoints"] for item in items], dtype=float).reshape(-1, count, 3)
    points[..., :2] += 0.5
    return points


__all__ = ["BEST", "conclude", "evaluate", "load", "training_set"]
BEST = main_score("bbox")
training_set = TrainingSet


def conclude(cfg: CfgNode, run_dir: RunDir, state: State, test: list[CocoDataset]) -> None:
    """Draw curves.png and predictions.png."""
    draw(cfg, run_dir, test)
