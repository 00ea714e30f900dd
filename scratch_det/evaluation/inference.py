"""From a model to COCO results and AP on a test set; the same path for every backend."""

import json
import time
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from scratch_det.data.coco import CocoDataset
from scratch_det.data.dataset import EvaluationSet, Sample, evaluation_batches
from scratch_det.distributed.group import Group
from scratch_det.distributed.stop import Stopped
from scratch_det.evaluation.coco import evaluate_predictions, explain_low_ap, format_table
from scratch_det.evaluation.metrics import TTA, detection_tasks
from scratch_det.evaluation.tta import describe_cost, predict_augmented
from scratch_det.evaluation.voc import evaluate_voc
from scratch_det.log import logger, track

RESULTS_FILE = "coco_instances_results.json"  # detectron2's name


def evaluate(
    backend: ModuleType, model: nn.Module, cfg: CfgNode, data: CocoDataset, out: Path, group: Group
) -> dict[str, Any]:
    """Predict every image of ``data``, shared among the ranks of ``group``, and score the predictions on rank 0.

    With TEST.AUG.ENABLED, do it again with test-time augmentation. Writes the predictions into ``out`` as COCO results,
    augmented ones into ``out`` + "_TTA". Returns metrics in percent by task ("bbox", "segm", "keypoints", "bbox_TTA"
    and so on) and score; an empty dict on other ranks. Raises Stopped when the run was asked to stop.
    """
    began = time.perf_counter()
    results = predict_dataset(lambda batch: backend.predict(model, batch), EvaluationSet(cfg, data), model, data, group)
    seconds = time.perf_counter() - began
    metrics = score_and_write(cfg, data, results, out) if group.is_main else {}
    if cfg.TEST.AUG.ENABLED:
        logger.info(describe_cost(cfg, data.images, seconds))

        def predict(batch: list[Sample]) -> list[dict[str, Any]]:
            return [predict_augmented(backend, model, cfg, sample, data.flip_indices) for sample in batch]

        results = predict_dataset(predict, EvaluationSet(cfg, data, resized=False), model, data, group)
        metrics |= score_and_write(cfg, data, results, out, TTA) if group.is_main else {}
    return metrics


def predict_dataset(
    predict: Callable[[list[Sample]], list[dict[str, Any]]],
    dataset: EvaluationSet,
    model: nn.Module,
    data: CocoDataset,
    group: Group,
) -> list[dict[str, Any]]:
    """Detections of every image as COCO results: json ids, boxes [x, y, width, height] in px of the original image.

    Each image is predicted once, by one of the ranks of ``group``; rank 0 returns all results, in the json's order.
    """

    def results_of(batch: list[Sample]) -> list[list[dict[str, Any]]]:
        found = zip(batch, predict(batch), strict=True)
        return [to_results(sample["image_id"], detections, data.category_ids) for sample, detections in found]

    # rank r of n has images r, r + n, r + 2n, ...
    shares = group.gather(predict_share(results_of, dataset, model, group, f"predicting {data.entry.name}"))
    return [result for images in zip_longest(*shares, fillvalue=()) for image in images for result in image]


def predict_share(
    predict: Callable[[list[Sample]], list[Any]],
    dataset: Any,
    model: nn.Module,
    group: Group,
    described: str,
    size: int = 1,
) -> list[Any]:
    """``predict(batch)`` of this rank's share of the images, in batches of ``size``: one item per image, in order.

    Raises Stopped, in all ranks, when one of them was asked to stop.
    """
    group.broadcast_buffers(model)  # the running statistics of plain BN differ between ranks
    found: list[Any] = []
    batches = evaluation_batches(dataset, dataset.cfg, group.world, size)
    total = -(-len(dataset) // (group.size * size))
    for batch in track(batches, described, total, say=logger.info):
        if group.stop.requested:
            break
        found += predict(batch)
    if group.any(group.stop.requested):
        raise Stopped(group.stop)
    return found


def to_results(image_id: int, found: dict[str, Any], category_ids: list[int]) -> list[dict[str, Any]]:
    """COCO results of one image; ``found`` as from ``backend.predict``: boxes [N, 4] x1 y1 x2 y2, px, and so on."""
    boxes = found["boxes"].clone()
    boxes[:, 2:] -= boxes[:, :2]
    fields = {
        "category_id": [category_ids[label] for label in found["labels"].tolist()],
        "bbox": boxes.tolist(),
        "score": found["scores"].tolist(),
    }
    if "masks" in found:
        fields["segmentation"] = found["masks"]
    if "keypoints" in found:  # COCO's are indices of pixels, ours places in px: the centre of pixel 0 is 0.5
        fields["keypoints"] = (found["keypoints"] - torch.tensor([0.5, 0.5, 0])).flatten(1).tolist()
    return [
        {"image_id": image_id, **dict(zip(fields, values, strict=True))}
        for values in zip(*fields.values(), strict=True)
    ]


def score_and_write(
    cfg: CfgNode, data: CocoDataset, results: list[dict[str, Any]], out: Path, suffix: str = ""
) -> dict[str, Any]:
    """Write the predictions into the folder ``out`` + ``suffix``; return and log the metrics of each task + ``suffix``.

    A data set with ``ap`` has VOC's AP of boxes; masks and keypoints have COCO's everywhere.
    """
    out = out.with_name(out.name + suffix)
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULTS_FILE).write_text(json.dumps(results))
    json_file, tasks, metrics = data.entry.json_file, detection_tasks(cfg), {}
    if data.entry.ap:
        metrics, tasks = evaluate_voc(json_file, results, data.entry.ap), tasks[1:]
    metrics |= evaluate_predictions(json_file, results, tasks, oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS or None)
    named = {task + suffix: scores for task, scores in metrics.items()}
    logger.info(f"{data.entry.name}, {len(data.images)} images:\n{format_table(named)}")
    if words := explain_low_ap(json_file, results, metrics):
        logger.warning(words)
    return named
