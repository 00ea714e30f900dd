"""Predictions to COCO's AP, one code path for every backend.

Results are COCO result dicts: ``image_id``, ``category_id`` (the id in the json, not the contiguous label), ``score``,
``bbox`` [x, y, w, h] in px of the original image, ``segmentation`` (compressed RLE), ``keypoints`` [x, y, v] * K.
Metrics are ``{task: {name: value}}`` with detectron2's names, in percent; nan where there is no truth to score against.

AP numbers as Markdown tables and as strict JSON.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as mask_api

from scratch_det.errors import DataError
from scratch_det.evaluation.metrics import metrics_of
from scratch_det.tables import markdown

Metrics = dict[str, dict[str, float]]
Result = Mapping[str, Any]

RESULT_KEY = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}
IOU_THRESHOLDS = np.arange(50, 100, 5) / 100


def evaluate_predictions(
    json_file: str | Path,
    results: Sequence[Result],
    iou_types: Sequence[str] = ("bbox", "segm"),
    image_ids: Iterable[int] | None = None,
    oks_sigmas: Sequence[float] | None = None,
) -> Metrics:
    """COCO AP of ``results`` against the truth in ``json_file``.

    ``image_ids`` restricts the evaluation to these images (default: all of the json; results on others are left out).
    ``oks_sigmas``: one fall-off per keypoint; default: COCO's 17 of a person. The results are not changed.
    Raises DataError where results and json do not belong together.
    """
    truth = load_truth(json_file)
    chosen = sorted(truth.imgs) if image_ids is None else sorted(set(image_ids))
    check_ids(truth, results, chosen)
    return {task: _metrics(score(truth, results, task, chosen, oks_sigmas), task) for task in iou_types}


def load_truth(json_file: str | Path) -> COCO:
    """The annotations of a COCO json, indexed.

    COCO's matching takes annotation id 0 for "unmatched", so the ids are renumbered from 1. A missing ``iscrowd``
    counts as 0, a missing ``area`` as that of the box, a missing ``num_keypoints`` as those with v above 0.
    """
    dataset = json.loads(Path(json_file).read_bytes())  # UTF-8, also with a mark, or UTF-16
    for number, annotation in enumerate(dataset.setdefault("annotations", []), start=1):
        annotation["id"] = number
        annotation.setdefault("iscrowd", 0)
        if "area" not in annotation:
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        if "keypoints" in annotation:
            annotation.setdefault("num_keypoints", sum(v > 0 for v in annotation["keypoints"][2::3]))
    return COCO(dataset, print_function=_silent)


def score(
    truth: COCO,
    results: Sequence[Result],
    iou_type: str,
    image_ids: Sequence[int],
    oks_sigmas: Sequence[float] | None = None,
) -> COCOeval_faster:
    """The finished COCOeval of one task ("bbox", "segm" or "keypoints"): read ``eval["precision"]`` [T, R, K, A, M]."""
    if iou_type not in RESULT_KEY:
        raise DataError(f"unknown iou type '{iou_type}'; expected one of {', '.join(RESULT_KEY)}")
    chosen = set(image_ids)
    found = [result for result in results if result["image_id"] in chosen and RESULT_KEY[iou_type] in result]
    if results and not any(RESULT_KEY[iou_type] in result for result in results):
        raise DataError(f"no result holds '{RESULT_KEY[iou_type]}': leave '{iou_type}' out, or predict it")
    detections = {**truth.dataset, "annotations": _detections(found, iou_type)}
    scorer = COCOeval_faster(
        truth, COCO(detections, print_function=_silent), iou_type, print_function=_silent, kpt_oks_sigmas=oks_sigmas
    )
    scorer.params.imgIds = list(image_ids)
    scorer.params.catIds = _categories(truth, iou_type)
    _check_truth(truth, scorer, iou_type)
    scorer.evaluate()
    scorer.accumulate()
    return scorer


def _detections(results: Sequence[Result], iou_type: str) -> list[dict[str, Any]]:
    """New annotations with the area that COCO's size ranges go by: of the box, or for "segm" of the mask."""
    key = RESULT_KEY[iou_type]
    if iou_type == "segm":
        areas = mask_api.area([result[key] for result in results]) if results else []
    else:
        areas = [_box_area(result) for result in results]
    return [
        {name: result[name] for name in ("image_id", "category_id", "score", key)}
        | {"id": number, "area": float(area), "iscrowd": 0}
        for number, (result, area) in enumerate(zip(results, areas, strict=True), start=1)
    ]


def _box_area(result: Result) -> float:
    """The area of the box in px, or where there is none the extent of the keypoints (as COCO's loadRes has it)."""
    if "bbox" in result:
        return result["bbox"][2] * result["bbox"][3]
    return float(np.ptp(result["keypoints"][0::3]) * np.ptp(result["keypoints"][1::3]))


def _categories(truth: COCO, iou_type: str) -> list[int]:
    """Sorted category ids; for keypoints those whose category names its keypoints, if any does."""
    named = [key for key, category in truth.cats.items() if category.get("keypoints")]
    return sorted(named if iou_type == "keypoints" and named else truth.cats)


def _metrics(scorer: COCOeval_faster, iou_type: str) -> dict[str, float]:
    """The task's METRICS and AP-<class> in percent, from precision [IoU, recall, class, area, maxDets]."""
    precision, areas = scorer.eval["precision"][..., -1], scorer.params.areaRngLbl
    metrics = {
        score: _mean(precision[at_iou(metric.iou), ..., areas.index(metric.area)])
        for score, metric in metrics_of(iou_type).items()
    }
    every, ids = precision[..., 0], scorer.params.catIds
    if len(ids) > 1:
        metrics |= {f"AP-{scorer.cocoGt.cats[key]['name']}": _mean(every[:, :, k]) for k, key in enumerate(ids)}
    return metrics


def at_iou(threshold: float | None) -> Any:
    """The index of a threshold, or of all of them, along an axis of IOU_THRESHOLDS."""
    return slice(None) if threshold is None else np.isclose(IOU_THRESHOLDS, threshold)


def _mean(precision: np.ndarray) -> float:
    """The mean in percent over the entries that have truth (COCO marks the others -1); nan when none has."""
    valid = precision[precision > -1]
    return float(valid.mean()) * 100 if valid.size else math.nan


def check_ids(truth: COCO, results: Sequence[Result], image_ids: Sequence[int]) -> None:
    """Raise DataError for image or category ids that the json does not know."""
    asked = set(image_ids) | {result["image_id"] for result in results}
    if strangers := sorted(asked - truth.imgs.keys(), key=str):
        raise DataError(
            f"{len(strangers)} image ids are not in the json, the first is {strangers[0]!r}: "
            "score predictions against the json of the data set they were made on"
        )
    if strangers := sorted({result["category_id"] for result in results} - truth.cats.keys(), key=str):
        raise DataError(
            f"category_id {strangers[0]!r} of the results is not among the json's {len(truth.cats)} category ids "
            f"({', '.join(map(str, sorted(truth.cats)[:5]))}, ...): results carry the json's ids, not contiguous labels"
        )


def _check_truth(truth: COCO, scorer: COCOeval_faster, iou_type: str) -> None:
    """Raise DataError where the json cannot serve the task: no masks, no keypoints, a wrong number of sigmas."""
    images, classes, key = set(scorer.params.imgIds), set(scorer.params.catIds), RESULT_KEY[iou_type]
    used = [a for a in truth.dataset["annotations"] if a["image_id"] in images and a["category_id"] in classes]
    if lacking := next((a for a in used if not a.get(key)), None):
        raise DataError(
            f"{iou_type} AP needs '{key}' in every annotation, but one of image {lacking['image_id']} has none; "
            f"add it, or leave '{iou_type}' out"
        )
    if iou_type == "keypoints" and used and len(used[0][key]) != 3 * len(scorer.params.kpt_oks_sigmas):
        raise DataError(
            f"{len(used[0][key]) // 3} keypoints in the json but {len(scorer.params.kpt_oks_sigmas)} OKS sigmas; "
            "set TEST.KEYPOINT_OKS_SIGMAS to one number per keypoint"
        )


def _silent(*_: object) -> None:
    """Swallow the progress lines of COCO's API."""


PAIRS_PER_ROW = 3  # of class and AP


def format_table(metrics: Metrics) -> str:
    """A Markdown table: one row per task, its METRICS in percent with one decimal, '-' for nan or absent."""
    columns = list(dict.fromkeys(score for task in RESULT_KEY for score in metrics_of(task)))
    rows = [[task, *(_cell(values.get(name)) for name in columns)] for task, values in metrics.items()]
    return markdown(["task", *columns], rows, align=["left"] + ["right"] * len(columns))


def format_per_class(metrics: Metrics) -> str:
    """A Markdown table of AP per class (one column per task), PAIRS_PER_ROW classes side by side, read downwards.

    An empty string for a single class, where the per-class AP is the AP.
    """
    names = [key for key in next(iter(metrics.values()), {}) if key.startswith("AP-")]
    if not names:
        return ""
    cells = [[name[3:], *(_cell(v.get(name)) for v in metrics.values())] for name in names]
    pairs = min(PAIRS_PER_ROW, len(cells))
    height = math.ceil(len(cells) / pairs)
    cells += [[""] * (1 + len(metrics))] * (pairs * height - len(cells))
    rows = [list(chain.from_iterable(cells[start::height])) for start in range(height)]
    return markdown(["class", *metrics] * pairs, rows, align=(["left"] + ["right"] * len(metrics)) * pairs)


def to_json_numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The same nested mapping with None for nan and infinities, which ``json.dump(..., allow_nan=False)`` accepts."""
    return {name: to_json_numbers(v) if isinstance(v, Mapping) else _finite(v) for name, v in metrics.items()}


def _finite(value: Any) -> Any:
    """None for a float that JSON has no word for, a plain float for numpy's, everything else as it is."""
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value


def _cell(value: float | None) -> str:
    """One decimal, or '-' for nan and for None, its form in JSON."""
    return "-" if value is None or math.isnan(value) else f"{value:.1f}"
