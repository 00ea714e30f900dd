"""From a model to COCO results and AP on a test set; the same path for every backend."""

import json
import logging
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from fvcore.common.config import CfgNode
from torch import nn

from scratch_det.data.coco import CocoDataset
from scratch_det.data.dataset import EvaluationSet, evaluation_batches
from scratch_det.distributed.group import Group
from scratch_det.distributed.stop import Stopped
from scratch_det.evaluation.coco import evaluate_predictions
from scratch_det.evaluation.diagnosis import explain_low_ap
from scratch_det.evaluation.tables import format_table
from scratch_det.progress import track

logger = logging.getLogger("scratch_det")
Item = TypeVar("Item")
RESULTS_FILE = "coco_instances_results.json"  # detectron2's name


def evaluate(
    backend: ModuleType, model: nn.Module, cfg: CfgNode, data: CocoDataset, out: Path, group: Group
) -> dict[str, Any]:
    """Predict every image of ``data``, shared among the processes of ``group``, and score it in the main one.

    Writes the predictions into ``out`` as COCO results. Returns AP numbers in percent by task ("bbox", "segm") and
    detectron2's metric names; nothing in the other processes. Raises Stopped when the run was asked to stop.
    """
    results = predict_dataset(backend, model, cfg, data, group)
    if not group.is_main:
        return {}
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULTS_FILE).write_text(json.dumps(results))
    tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
    metrics = evaluate_predictions(data.entry.json_file, results, tasks)
    logger.info(f"{data.entry.name}, {len(data.images)} images:\n{format_table(metrics)}")
    if not metrics["bbox"]["AP"] >= 1:
        logger.warning(explain_low_ap(data.entry.json_file, results, metrics))
    return metrics


def predict_dataset(
    backend: ModuleType, model: nn.Module, cfg: CfgNode, data: CocoDataset, group: Group
) -> list[dict[str, Any]]:
    """Detections of every image as COCO results: json ids, boxes x y width height in pixels of the original image.

    Each image is predicted once, in one of the processes of ``group``; the main one has all, in the json's order.
    """
    dataset = EvaluationSet(cfg, data)
    group.broadcast_buffers(model)  # plain BN's running statistics differ between processes
    own: list[list[dict[str, Any]]] = []
    batches = evaluation_batches(dataset, cfg, group.world)
    for batch in track(batches, f"predicting {data.entry.name}", -(-len(dataset) // group.size), say=logger.info):
        if group.stop.requested:
            break
        for sample, found in zip(batch, backend.predict(model, batch), strict=True):
            own.append(_as_results(sample["image_id"], found, data.category_ids))
    if group.any(group.stop.requested):
        raise Stopped(group.stop)
    return [result for image in _in_order(group.gather(own)) for result in image]


def _in_order(shares: list[list[Item]]) -> Iterator[Item]:
    """Images 0, n, 2n, ... come first in share 0, images 1, n + 1, ... in share 1, and so on."""
    for turn in zip_longest(*shares, fillvalue=None):
        yield from (item for item in turn if item is not None)


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
