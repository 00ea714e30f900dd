"""COCO's average precision of predictions, the same for every backend.

Metrics are ``{task: {score: value}}`` with detectron2's names, in percent; nan where there is no truth to compare with.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from hotcoco import COCOeval, Params, StreamingEval
from hotcoco import mask as mask_api

from scratch_det.errors import DataError
from scratch_det.evaluation.metrics import Metrics, metrics_of
from scratch_det.evaluation.predictions import Predictions
from scratch_det.evaluation.truth import Truth
from scratch_det.files import gc_paused

Record = dict[str, Any]
FIELDS = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}  # task -> the field that it compares
IMAGES_AT_ONCE = 200  # that the scorer holds; more are no faster
IOU_THRESHOLDS = np.arange(50, 100, 5) / 100


def evaluate_predictions(
    truth: Truth,
    predictions: Predictions,
    tasks: Sequence[str] = ("bbox", "segm"),
    oks_sigmas: Sequence[float] | None = None,
) -> Metrics:
    """COCO AP: the METRICS of each task, and "AP-<class>".

    ``oks_sigmas``: one fall-off per keypoint; default: COCO's 17 of a person.
    Raises DataError where predictions and truth do not belong together.
    """
    metrics: Metrics = {}
    for task in tasks:
        scorer: Any = run_cocoeval(truth, predictions, task, oks_sigmas)
        precision = scorer.eval["precision"][..., -1]  # [IoU threshold, recall, class, area]
        areas, classes = scorer.params.area_rng_lbl, scorer.params.cat_ids
        metrics[task] = {
            score: _mean(precision[at_iou(metric.iou), ..., areas.index(metric.area)])
            for score, metric in metrics_of(task).items()
        }
        if len(classes) > 1:
            names = [truth.data.classes[place] for place in classes]
            metrics[task] |= {f"AP-{name}": _mean(precision[:, :, k, 0]) for k, name in enumerate(names)}
    return metrics


def run_cocoeval(
    truth: Truth, predictions: Predictions, task: str, oks_sigmas: Sequence[float] | None = None
) -> COCOeval:
    """The finished COCOeval of one task ("bbox", "segm" or "keypoints"): read ``eval["precision"]`` [T, R, K, A, M].

    Its ids of images and categories are places in ``truth``, since it takes no negative ones and none above 2^53.
    """
    if task not in FIELDS:
        raise DataError(f"unknown iou type '{task}'; expected one of {', '.join(FIELDS)}")
    if FIELDS[task] not in predictions:
        raise DataError(f"no result holds '{FIELDS[task]}': leave '{task}' out, or predict it")
    images, classes = truth.places(predictions)
    every = range(len(truth.categories))
    scored = [k for k in every if task == "keypoints" and truth.categories[k].get("keypoints")] or every
    parameters = Params(task)
    if oks_sigmas:
        parameters.kpt_oks_sigmas = list(oks_sigmas)
    scorer = StreamingEval([{"id": k, "name": str(k)} for k in scored], task, params=parameters)
    order = np.argsort(images, kind="stable")
    order = order[np.isin(classes[order], scored)]
    with gc_paused():
        for start in range(0, len(truth.images), IMAGES_AT_ONCE):
            part = slice(start, start + IMAGES_AT_ONCE)
            rows = order[slice(*np.searchsorted(images[order], [part.start, part.stop]))]
            chosen = {name: column[rows] for name, column in predictions.items()}
            chosen |= {"image_id": images[rows], "category_id": classes[rows]}
            objects = list(annotations_of(truth, part, scored, task, len(parameters.kpt_oks_sigmas)))
            records = [image | {"id": place} for place, image in enumerate(truth.images[part], start)]
            scorer.update(records, objects, **detections_for(chosen, task))
    finished = scorer.finalize()
    finished.accumulate()
    return finished


def annotations_of(
    truth: Truth, images: slice, scored: Sequence[int], task: str, num_keypoints: int
) -> Iterator[Record]:
    """The annotations of these images and of ``scored`` categories, as the scorer takes them.

    Raises DataError where the json cannot serve the task: no masks, no keypoints, a wrong number of sigmas.
    """
    field = FIELDS[task]
    for number, (image, category, one) in enumerate(truth.annotated(images), start=1):
        if category not in scored:
            continue
        if not one.get(field):
            raise DataError(
                f"{task} AP needs '{field}' in every annotation, but one of image {one['image_id']} has none; "
                f"add it, or leave '{task}' out"
            )
        if task == "keypoints" and len(one[field]) != 3 * num_keypoints:
            raise DataError(
                f"{len(one[field]) // 3} keypoints in the json but {num_keypoints} OKS sigmas; "
                "set TEST.KEYPOINT_OKS_SIGMAS to one number per keypoint"
            )
        yield {"id": number, "image_id": image, "category_id": category, "area": one["area"], "bbox": one.get("bbox"),
               "iscrowd": one["iscrowd"], "ignore": one["ignore"], "num_keypoints": one.get("num_keypoints"),
               field: one[field]}  # fmt: skip


def detections_for(rows: Predictions, task: str) -> dict[str, Any]:
    """The predictions as the scorer takes them. COCO's size ranges go by the area of what the task compares.

    For keypoints that is the box's or, without boxes, that of the points' extent, as in COCO's loadRes.
    """
    if task == "keypoints":
        names = [name for name in ("image_id", "category_id", "score", "bbox", "keypoints") if name in rows]
        values = zip(*(rows[name].tolist() for name in names), strict=True)
        return {"dt_anns": [dict(zip(names, row, strict=True)) for row in values]}
    if task == "bbox":
        masks, boxes = None, rows["bbox"]
    else:  # the scorer takes areas from boxes, by which it does not compare masks
        masks = rows["segmentation"].tolist()
        boxes = np.outer(mask_api.area(masks), [0, 0, 1, 0]) + np.array([0, 0, 0, 1])
    table = np.column_stack([rows["image_id"], boxes, rows["score"], rows["category_id"]])
    return {"dt_anns": table, "segmentation": masks}


def at_iou(threshold: float | None) -> Any:
    """The index of a threshold, or of all of them, along an axis of IOU_THRESHOLDS."""
    return slice(None) if threshold is None else np.isclose(IOU_THRESHOLDS, threshold)


def _mean(precision: np.ndarray) -> float:
    """The mean in percent over the entries that have truth (COCO marks the others -1); nan when none has."""
    valid = precision[precision > -1]
    return float(valid.mean()) * 100 if valid.size else math.nan
