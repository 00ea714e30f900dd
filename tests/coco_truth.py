"""A small truth in COCO's format, and predictions of it."""

import contextlib
import copy
import io
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from scratch_det.evaluation.average_precision import evaluate_predictions, run_cocoeval
from scratch_det.evaluation.low_ap import explain_low_ap
from scratch_det.evaluation.metrics import Metrics
from scratch_det.evaluation.predictions import Predictions, read_predictions
from scratch_det.evaluation.truth import load_truth

WIDTH, HEIGHT = 320, 240
SIZES = (12, 50, 130)  # px: one object in each of COCO's size ranges


def polygon(x: float, y: float, w: float, h: float) -> list[list[float]]:
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def compressed(segmentation, height: int, width: int) -> dict:
    """Polygons or RLE as RLE with str counts."""
    rle = segmentation
    if isinstance(rle, list):
        rle = mask_api.merge(mask_api.frPyObjects(rle, height, width))
    elif isinstance(rle["counts"], list):
        rle = mask_api.frPyObjects(rle, height, width)
    counts = rle["counts"]
    return {"size": list(rle["size"]), "counts": counts.decode() if isinstance(counts, bytes) else counts}


def annotation(number: int, image: int, category: int, box: tuple, kind: str = "polygon") -> dict:
    """One truth object; ``kind`` is polygon, rle, or crowd (uncompressed RLE, as COCO stores crowds)."""
    mask = polygon(*box)
    if kind != "polygon":
        mask = compressed(mask, HEIGHT, WIDTH)
    if kind == "crowd":
        flat = mask_api.decode(mask).ravel(order="F").astype(int)
        cuts = np.flatnonzero(np.diff(flat)) + 1
        mask = {"size": [HEIGHT, WIDTH], "counts": np.diff([0, *cuts, flat.size]).tolist()}
    entry = {"id": number, "image_id": image, "category_id": category, "bbox": list(box), "area": box[2] * box[3]}
    return entry | {"iscrowd": int(kind == "crowd"), "segmentation": mask}


def small_coco(**changes) -> dict:
    """Twelve images, three classes with gaps in their ids, all sizes, a crowd, RLEs, and an image without objects."""
    rng = np.random.default_rng(0)
    annotations = []
    for image in range(1, 12):
        for slot, size in enumerate(SIZES):
            x, y = (float(rng.integers(0, WIDTH - size)), float(rng.integers(0, HEIGHT - size)))
            kind = "rle" if slot == image % 3 else "polygon"
            annotations.append(
                annotation(len(annotations) + 1, image, (2, 5, 9)[(image + slot) % 3], (x, y, size, size), kind)
            )
    annotations.append(annotation(len(annotations) + 1, 3, 5, (10.0, 20.0, 100.0, 60.0), "crowd"))
    images = [{"id": i, "file_name": f"{i}.jpg", "width": WIDTH, "height": HEIGHT} for i in range(1, 13)]
    categories = [{"id": 2, "name": "cat"}, {"id": 5, "name": "dog"}, {"id": 9, "name": "owl"}]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories} | changes


def write(folder: Path, coco: dict) -> Path:
    path = folder / "truth.json"
    path.write_text(json.dumps(coco))
    return path


def results_of(coco: dict, noise: float = 0.0) -> list[dict]:
    """The truth as predictions; with noise (px) boxes and masks are moved and false positives added."""
    rng = np.random.default_rng(1)
    sizes = {image["id"]: (image["height"], image["width"]) for image in coco["images"]}
    categories = [category["id"] for category in coco["categories"]]
    results = []
    for entry in (entry for entry in coco["annotations"] if not entry["iscrowd"]):
        height, width = sizes[entry["image_id"]]
        box, rle = entry["bbox"], compressed(entry["segmentation"], height, width)
        if noise:
            box = [float(value) for value in np.add(box, rng.normal(0, noise, 4))]
            moved = np.roll(mask_api.decode(rle), rng.integers(-noise, noise + 1, 2), (0, 1))
            rle = compressed(mask_api.encode(np.asfortranarray(moved)), height, width)
        base = {"image_id": entry["image_id"], "bbox": box, "segmentation": rle}
        results.append(base | {"category_id": entry["category_id"], "score": float(rng.uniform(0.3, 1))})
        if noise and rng.random() < 0.5:
            results.append(base | {"category_id": int(rng.choice(categories)), "score": float(rng.uniform(0, 0.9))})
    return results


def predictions_of(results: list[dict]) -> Predictions:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        path.write_text(json.dumps(results))
        return read_predictions(path)


def evaluate(path: Path, results: list[dict], *arguments, **keywords) -> Metrics:
    return evaluate_predictions(load_truth(path), predictions_of(results), *arguments, **keywords)


def explain(path: Path, results: list[dict], metrics: Metrics) -> str:
    return explain_low_ap(load_truth(path), predictions_of(results), metrics)


def pycocotools_eval(path: Path, results: list[dict], task: str, oks_sigmas: list[float] | None = None) -> COCOeval:
    """The reference, treated as detectron2 treats it: without boxes for masks, so that areas are the masks'."""
    results = copy.deepcopy(results)
    for result in results if task == "segm" else []:
        del result["bbox"]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluator = COCOeval(truth, truth.loadRes(results), task)
        if oks_sigmas:
            evaluator.params.kpt_oks_sigmas = np.array(oks_sigmas)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator


def assert_same(path: Path, results: list[dict], task: str, oks_sigmas: list[float] | None = None) -> COCOeval:
    """All that COCO's AP is computed from equals pycocotools' to the last bit."""
    reference = pycocotools_eval(path, results, task, oks_sigmas)
    ours = run_cocoeval(load_truth(path), predictions_of(results), task, oks_sigmas)
    for name in ("precision", "recall", "scores"):
        np.testing.assert_array_equal(ours.eval[name], reference.eval[name], err_msg=name)
    return reference
