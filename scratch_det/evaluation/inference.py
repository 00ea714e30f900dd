"""From a model to COCO results and AP on a test set, with and without test-time augmentation, for every backend.

Test-time augmentation is as in detectron2: the image is resized to several sizes, plain and flipped; each view is
detected separately; boxes are mapped back to the original image; NMS per class chooses among them; the mask of a chosen
box is the mean over all views. Heat maps of keypoints are averaged too, as in Detectron (detectron2 does not support
keypoints here). Views are made from the original image, not from a resized one.

With TEST.AUG.VOTE_THRESH, as in Detectron, boxes are chosen among all candidates of all views, without NMS and a limit
in each view, and candidates vote for the place of a chosen box.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_area, box_iou, clip_boxes_to_image

from scratch_det.data.coco import CocoDataset
from scratch_det.data.dataset import EvaluationSet
from scratch_det.data.loading import evaluation_batches
from scratch_det.data.transforms import Sample, flip, output_size, resize
from scratch_det.distributed.group import Group
from scratch_det.distributed.stop import Stopped
from scratch_det.evaluation.average_precision import evaluate_predictions
from scratch_det.evaluation.low_ap import explain_low_ap
from scratch_det.evaluation.metrics import EMA, TTA, detection_tasks, format_table
from scratch_det.evaluation.predictions import RESULTS_FILE, Predictions, detections_of, joined, write_predictions
from scratch_det.evaluation.truth import truth_of
from scratch_det.evaluation.voc import evaluate_voc
from scratch_det.log import clock, logger, track
from scratch_det.modeling.ops import decode_keypoints, paste_masks

DETECTRON = "Detectron"  # of ANCHOR_GENERATOR.ROUNDING


def evaluate(
    backend: Any, model: nn.Module, cfg: CfgNode, data: CocoDataset, out: Path, group: Group, suffix: str = ""
) -> dict[str, Any]:
    """Predict every image of ``data``, shared among the ranks of ``group``, and score the predictions on rank 0.

    With TEST.AUG.ENABLED, this is done again with test-time augmentation. Writes the predictions into ``out`` + suffix
    as COCO results, augmented ones into ``out`` + suffix + "_TTA". Returns metrics in percent by task ("bbox", "segm",
    "keypoints", "bbox_TTA" and so on, with the suffix) and score; an empty dict on other ranks. Raises Stopped when the
    run was asked to stop.
    """
    group.broadcast_buffers(model)  # the running statistics of plain BN differ between ranks
    began = time.perf_counter()
    found = predict_dataset(lambda batch: predict(backend, model, cfg, batch), EvaluationSet(cfg, data), data, group)
    seconds = time.perf_counter() - began
    metrics = score_and_write(cfg, data, found, out, suffix) if group.is_main else {}
    if cfg.TEST.AUG.ENABLED:
        logger.info(describe_cost(cfg, data.images, seconds))
        found = predict_dataset(
            lambda batch: [predict_augmented(backend, model, cfg, sample, data.flip_indices) for sample in batch],
            EvaluationSet(cfg, data, resized=False), data, group,
        )  # fmt: skip
        metrics |= score_and_write(cfg, data, found, out, suffix + TTA) if group.is_main else {}
    return metrics


def predict(backend: Any, model: nn.Module, cfg: CfgNode, batch: list[Sample]) -> list[dict[str, Any]]:
    """What ``backend.predict`` returns; with ANCHOR_GENERATOR.ROUNDING Detectron boxes end where Detectron's do.

    Detectron divides a box's last pixel, not its edge, by the scale of the image, and adds the pixel afterwards.
    """
    found = backend.predict(model, batch)
    if cfg.MODEL.ANCHOR_GENERATOR.get("ROUNDING") == DETECTRON:
        for sample, one in zip(batch, found, strict=True):
            one["boxes"][:, 2:] += 1 - 1 / _scale(sample)[2:]
            one["boxes"] = clip_boxes_to_image(one["boxes"], (sample["height"], sample["width"]))
    return found


def predict_dataset(
    predict: Callable[[list[Sample]], list[dict[str, Any]]], dataset: EvaluationSet, data: CocoDataset, group: Group
) -> Predictions:
    """The predictions of every image, on rank 0: in the json's order, each image predicted once, by one rank.

    Masks are pasted in a thread, while a GPU is busy with the next batch.
    """

    def columns(sample: Sample, found: dict[str, Any]) -> Predictions:
        return detections_of(sample["image_id"], pasted(sample, found), data.category_ids)

    def begin(batch: list[Sample]) -> list[Future[Predictions]]:
        nonlocal begun
        found = zip(batch, predict(batch), strict=True)
        for one in begun:  # of the batch before: no queue grows where pasting takes longer, and its errors come at once
            one.result()
        begun = [pool.submit(columns, *of_image) for of_image in found]
        return begun

    begun: list[Future[Predictions]] = []
    with ThreadPoolExecutor(1) as pool:
        share = predict_share(begin, dataset, group, f"predicting {data.entry.name}")
    # rank r of n has images r, r + n, r + 2n, ...
    shares = group.gather([one.result() for one in share])
    return joined([one for images in zip_longest(*shares) for one in images if one])


def pasted(sample: Sample, found: dict[str, Any]) -> dict[str, Any]:
    """What a backend predicts, with ``masks``, if there are any, as COCO RLEs of the original image."""
    size = sample["height"], sample["width"]
    return found | {"masks": paste_masks(found["masks"], found["boxes"], *size)} if "masks" in found else found


def predict_share(
    predict: Callable[[list[Sample]], list[Any]], dataset: Any, group: Group, described: str, size: int = 1
) -> list[Any]:
    """``predict(batch)`` of this rank's share of the images, in batches of ``size``: one item per image, in order.

    Raises Stopped, in all ranks, when one of them was asked to stop.
    """
    found: list[Any] = []
    total = -(-len(dataset) // (group.size * size))
    batches = evaluation_batches(dataset, dataset.cfg, group.world, size, group.stop)
    for batch in track(batches, described, total, say=logger.info):
        found += predict(batch)
    if group.any(group.stop.requested):
        raise Stopped(group.stop)
    return found


def score_and_write(
    cfg: CfgNode, data: CocoDataset, predictions: Predictions, out: Path, suffix: str
) -> dict[str, Any]:
    """Write the predictions into the folder ``out`` + ``suffix``; return and log the metrics of each task + ``suffix``.

    There are none without annotations. A data set with ``ap`` has VOC's AP of boxes; masks and keypoints have COCO's
    everywhere.
    """
    out = out.with_name(out.name + suffix)
    out.mkdir(parents=True, exist_ok=True)
    write_predictions(out / RESULTS_FILE, predictions)
    if not data.is_annotated:
        logger.info(f"{data.entry.name}: no annotations to score by; the predictions are in {out / RESULTS_FILE}")
        return {}
    truth, tasks, metrics = truth_of(data), detection_tasks(cfg), {}
    if data.entry.ap:
        metrics, tasks = evaluate_voc(truth, predictions, data.entry.ap), tasks[1:]
    metrics |= evaluate_predictions(truth, predictions, tasks, oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS or None)
    named = {task + suffix: scores for task, scores in metrics.items()}
    logger.info(f"{data.entry.name}, {len(data.images)} images:\n{format_table(named)}")
    if words := explain_low_ap(truth, predictions, metrics):
        logger.warning("the average of the weights: " * (EMA in suffix) + words)
    return named


def predict_augmented(
    backend: Any, model: nn.Module, cfg: CfgNode, sample: Sample, flip_indices: Sequence[int] | None = None
) -> dict[str, Any]:
    """What ``backend.predict`` returns for one image, from TEST.AUG's views of it. The sample has the original image.

    flip_indices: of keypoints (see ``CocoDataset``), needed where the model predicts keypoints and views are flipped.
    """
    views, height, width = views_of(sample, cfg), sample["height"], sample["width"]
    detections, votes = [], cfg.TEST.AUG.VOTE_THRESH > 0
    for view, is_flipped in views:
        (found,) = backend.detect(model, [view], candidates=votes)
        boxes = _flip_boxes(found["boxes"], view) if is_flipped else found["boxes"]
        detections.append({**found, "boxes": boxes / _scale(view)})
    found = merge(detections, cfg)
    found["boxes"] = clip_boxes_to_image(found["boxes"], (height, width))
    has_area = box_area(found["boxes"]) > 0
    found = {name: value[has_area] for name, value in found.items()}
    boxes = found["boxes"]
    total: dict[str, Tensor] = {}
    has_shapes = len(detection_tasks(cfg)) > 1
    for view, is_flipped in views if has_shapes else ():  # all heat maps at once would be hundreds of MB
        in_view = boxes * _scale(view)
        in_view = _flip_boxes(in_view, view) if is_flipped else in_view
        (maps,) = backend.shapes(model, [view], [{"boxes": in_view, "labels": found["labels"]}])
        for name, value in maps.items():
            value = value.flip(-1) if is_flipped else value
            if is_flipped and name == "heat_maps":
                assert flip_indices is not None  # check_config raises otherwise
                value = value[:, list(flip_indices)]
            total[name] = total[name] + value if name in total else value
    if "masks" in total:
        found["masks"] = total["masks"] / len(views)
    if "heat_maps" in total:
        found["keypoints"] = decode_keypoints(total["heat_maps"] / len(views), boxes)
    return found


def views_of(sample: Sample, cfg: CfgNode) -> list[tuple[Sample, bool]]:
    """The image with its shorter side at each of TEST.AUG.MIN_SIZES, plain and, with TEST.AUG.FLIP, flipped too.

    The bool says whether a view is flipped.
    """
    views = []
    for size in cfg.TEST.AUG.MIN_SIZES:
        view = output_size(sample["height"], sample["width"], size, cfg.TEST.AUG.MAX_SIZE)
        views.append((resize(sample, view), False))
        if cfg.TEST.AUG.FLIP:
            views.append((flip(views[-1][0], "horizontal"), True))
    return views


def merge(detections: list[dict[str, Tensor]], cfg: CfgNode) -> dict[str, Tensor]:
    """The detections of all views, sorted by descending score: NMS within each class, at most DETECTIONS_PER_IMAGE."""
    union = {name: torch.cat([one[name] for one in detections]) for name in ("boxes", "scores", "labels")}
    kept = batched_nms(union["boxes"], union["scores"], union["labels"], cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST)
    found = {name: value[kept[: cfg.TEST.DETECTIONS_PER_IMAGE]] for name, value in union.items()}
    return {**found, "boxes": vote(found, union, threshold)} if (threshold := cfg.TEST.AUG.VOTE_THRESH) else found


def vote(found: dict[str, Tensor], candidates: dict[str, Tensor], threshold: float) -> Tensor:
    """Boxes [N, 4]: the mean, weighted by score, of all candidates of a box's class from IoU ``threshold`` on.

    This is Detectron's box voting (BBOX_VOTE with scores as they are; Gidaris & Komodakis 2015). A box is one of the
    candidates, so it has a vote itself.
    """
    voters = box_iou(found["boxes"], candidates["boxes"]) >= threshold
    weights = candidates["scores"] * (voters & (found["labels"][:, None] == candidates["labels"]))
    total = weights.sum(1, keepdim=True)
    return torch.where(total > 0, weights @ candidates["boxes"] / total, found["boxes"])  # 0: without area


def relative_cost(cfg: CfgNode, height: int, width: int) -> float:
    """Pixels of all views, in one pass or two, divided by the pixels of the plain image, for an image of this size."""
    keys, area = cfg.TEST.AUG, lambda *sides: torch.Size(output_size(height, width, *sides)).numel()
    passes = (1 + keys.FLIP) * min(2, len(detection_tasks(cfg)))  # masks and keypoints in one
    plain = area(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    return passes * sum(area(size, keys.MAX_SIZE) for size in keys.MIN_SIZES) / plain


def describe_cost(cfg: CfgNode, images: Sequence[dict[str, Any]], seconds: float) -> str:
    """Expected time of the augmented evaluation of ``images``, from the ``seconds`` of the plain evaluation."""
    factor = mean(relative_cost(cfg, image["height"], image["width"]) for image in images)
    views = len(cfg.TEST.AUG.MIN_SIZES) * (1 + cfg.TEST.AUG.FLIP)
    passes = "two passes (boxes, then masks and keypoints in them)" if len(detection_tasks(cfg)) > 1 else "one pass"
    return (
        f"test-time augmentation: {views} views of each of {len(images)} images, {passes}; {factor:.0f} times "
        f"the pixels of the plain evaluation, which took {clock(seconds)}: about {clock(factor * seconds)}"
    )


def _scale(view: Sample) -> Tensor:
    """The factors [4] from boxes (x1 y1 x2 y2, px) in the original image to those in the view, before any flip."""
    height, width = view["image"].shape[-2:]
    return torch.tensor([width / view["width"], height / view["height"]]).repeat(2)


def _flip_boxes(boxes: Tensor, view: Sample) -> Tensor:
    """Boxes [N, 4] of a view, in the flipped view, or back."""
    x1, y1, x2, y2 = boxes.unbind(1)
    width = view["image"].shape[-1]
    return torch.stack([width - x2, y1, width - x1, y2], dim=1)
