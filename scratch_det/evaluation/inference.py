"""From a model to COCO results and AP on a test set; the same path for every backend."""

import json
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

from fvcore.common.config import CfgNode
from torch import nn

from scratch_det.data.coco import CocoDataset
from scratch_det.data.dataset import EvaluationSet, evaluation_batches
from scratch_det.evaluation.coco import evaluate_predictions
from scratch_det.evaluation.diagnosis import explain_low_ap
from scratch_det.evaluation.tables import format_table
from scratch_det.progress import track

logger = logging.getLogger("scratch_det")
RESULTS_FILE = "coco_instances_results.json"  # detectron2's name


def evaluate(backend: ModuleType, model: nn.Module, cfg: CfgNode, data: CocoDataset, out: Path) -> dict[str, Any]:
    """Predict every image of ``data`` and score it.

    Writes the predictions into ``out`` as COCO results. Returns AP numbers in percent by task ("bbox", "segm") and
    detectron2's metric names.
    """
    results = predict_dataset(backend, model, cfg, data)
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULTS_FILE).write_text(json.dumps(results))
    tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
    metrics = evaluate_predictions(data.entry.json_file, results, tasks)
    logger.info(f"{data.entry.name}, {len(data.images)} images:\n{format_table(metrics)}")
    if not metrics["bbox"]["AP"] >= 1:
        logger.warning(explain_low_ap(data.entry.json_file, results, metrics))
    return metrics


def predict_dataset(backend: ModuleType, model: nn.Module, cfg: CfgNode, data: CocoDataset) -> list[dict[str, Any]]:
    """Detections of every image as COCO results: json ids, boxes x y width height in pixels of the original image."""
    dataset = EvaluationSet(cfg, data)
    results: list[dict[str, Any]] = []
    batches = evaluation_batches(dataset, cfg)
    for batch in track(batches, f"predicting {data.entry.name}", len(dataset), say=logger.info):
        for sample, found in zip(batch, backend.predict(model, batch), strict=True):
            results.extend(_as_results(sample["image_id"], found, data.category_ids))
    return results


def _as_results(image_id: int, found: dict[str, Any], category_ids: list[int]) -> list[dict[str, Any]]:
    boxes = found["boxes"].clone()
    boxes[:, 2:] -= boxes[:, :2]
    numbers = zip(boxes.tolist(), found["scores"].tolist(), found["labels"].tolist(), strict=True)
    results = [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for box, score, label in numbers
    ]
    if "masks" in found:
        for result, mask in zip(results, found["masks"], strict=True):
            result["segmentation"] = mask
    return results
