"""From a model to COCO results and AP on a test set; the same path for every backend."""

import json
import logging
import time
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Any, TypeVar

import torch
from fvcore.common.config import CfgNode
from torch import nn

from scratch_det.data.coco import CocoDataset
from scratch_det.data.dataset import EvaluationSet, Sample, evaluation_batches
from scratch_det.distributed.group import Group
from scratch_det.distributed.stop import Stopped
from scratch_det.evaluation.coco import evaluate_predictions, format_table
from scratch_det.evaluation.diagnosis import explain_low_ap
from scratch_det.evaluation.metrics import TTA, detection_tasks
from scratch_det.evaluation.tta import has_second_pass, predict_augmented, relative_cost
from scratch_det.evaluation.voc import evaluate_voc
from scratch_det.log import clock, track

logger = logging.getLogger("scratch_det")
Item = TypeVar("Item")
RESULTS_FILE = "coco_instances_results.json"  # detectron2's name


def evaluate(
    backend: ModuleType, model: nn.Module, cfg: CfgNode, data: CocoDataset, out: Path, group: Group
) -> dict[str, Any]:
    """Predict every image of ``data``, shared among the processes of ``group``, and score it in the main one.

    With TEST.AUG.ENABLED, do it again with test-time augmentation. Writes the predictions into ``out`` as COCO results,
    augmented ones into ``out`` + "_TTA". Returns AP numbers in percent by task ("bbox", "segm", "keypoints", "bbox_TTA"
    and so on) and detectron2's metric names; nothing in the other processes. Raises Stopped when the run was asked to.
    """
    began = time.perf_counter()
    results = predict_dataset(lambda batch: backend.predict(model, batch), EvaluationSet(cfg, data), model, data, group)
    seconds = time.perf_counter() - began
    metrics = score(cfg, data, results, out) if group.is_main else {}
    if not cfg.TEST.AUG.ENABLED:
        return metrics
    logger.info(cost_line(cfg, data, seconds))
    views = EvaluationSet(cfg, data, resized=False)
    results = predict_dataset(
        lambda batch: [predict_augmented(backend, model, cfg, sample, data.flip_indices) for sample in batch],
        views,
        model,
        data,
        group,
    )
    return metrics | score(cfg, data, results, out, TTA) if group.is_main else {}


def score(
    cfg: CfgNode, data: CocoDataset, results: list[dict[str, Any]], out: Path, suffix: str = ""
) -> dict[str, Any]:
    """Write the predictions into ``out`` and say what they are worth; ``suffix`` ends names, the folder's too."""
    out = out.with_name(out.name + suffix)
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULTS_FILE).write_text(json.dumps(results))
    tasks, sigmas = detection_tasks(cfg), cfg.TEST.KEYPOINT_OKS_SIGMAS or None
    if data.entry.ap:  # of boxes; the others have COCO's everywhere
        metrics = evaluate_voc(data.entry.json_file, results, data.entry.ap)
        metrics |= evaluate_predictions(data.entry.json_file, results, tasks[1:], oks_sigmas=sigmas)
    else:
        metrics = evaluate_predictions(data.entry.json_file, results, tasks, oks_sigmas=sigmas)
    named = {task + suffix: values for task, values in metrics.items()}
    logger.info(f"{data.entry.name}, {len(data.images)} images:\n{format_table(named)}")
    if not metrics["bbox"]["AP"] >= 1:
        logger.warning(explain_low_ap(data.entry.json_file, results, metrics))
    return named


def cost_line(cfg: CfgNode, data: CocoDataset, seconds: float) -> str:
    """What test-time augmentation is about to take, given the ``seconds`` of the plain evaluation before it."""
    factor = mean(relative_cost(cfg, image["height"], image["width"]) for image in data.images)
    number = len(cfg.TEST.AUG.MIN_SIZES) * (1 + cfg.TEST.AUG.FLIP)
    passes = "two passes (boxes, then what is in them)" if has_second_pass(cfg) else "one pass"
    return (
        f"test-time augmentation: {number} views of each of {len(data.images)} images, {passes}; {factor:.0f} times "
        f"the pixels of the plain evaluation, which took {clock(seconds)}: about {clock(factor * seconds)}"
    )


def predict_dataset(
    predict: Callable[[list[Sample]], list[dict[str, Any]]],
    dataset: EvaluationSet,
    model: nn.Module,
    data: CocoDataset,
    group: Group,
) -> list[dict[str, Any]]:
    """Detections of every image as COCO results: json ids, boxes x y width height in pixels of the original image.

    Each image is predicted once, in one of the processes of ``group``; the main one has all, in the json's order.
    """
    group.broadcast_buffers(model)  # plain BN's running statistics differ between processes
    own: list[list[dict[str, Any]]] = []
    batches = evaluation_batches(dataset, dataset.cfg, group.world)
    for batch in track(batches, f"predicting {data.entry.name}", -(-len(dataset) // group.size), say=logger.info):
        if group.stop.requested:
            break
        for sample, found in zip(batch, predict(batch), strict=True):
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
    if "keypoints" in found:
        pixels = found["keypoints"] - torch.tensor([0.5, 0.5, 0])  # COCO has indices of pixels
        for result, points in zip(results, pixels.flatten(1).tolist(), strict=True):
            result["keypoints"] = points
    return results
