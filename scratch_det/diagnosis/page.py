"""A diagnosis as one HTML page that needs no network, with its numbers as CSV and JSON beside it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scratch_det import tables
from scratch_det.data.image import decode_masks, read_image
from scratch_det.diagnosis import figures
from scratch_det.diagnosis.figures import Colors, Models
from scratch_det.diagnosis.numbers import KINDS, SHOWN_SCORE, SIZES, Diagnosis, Image
from scratch_det.errors import DataError, counted
from scratch_det.evaluation.predictions import Predictions
from scratch_det.evaluation.truth import Truth
from scratch_det.files import write_atomically
from scratch_det.visualization.page import Section, as_jpeg, data_uri, page_text
from scratch_det.visualization.predictions import draw_objects

WORST, DOUBTS = 50, 24  # pictures
SIDE = 420  # px of a picture
RIGHT, WRONG, MISSED = "#3cb44b", "#ff5a5a", "#ffd24d"
MARKS = "green is right, red is wrong, yellow is an object that was missed."


def write_page(
    out: Path, title: str, models: Models, truth: Truth, predictions: Sequence[Predictions], colors: Colors
) -> Path:
    """Write index.html, classes.csv and diagnosis.json into the folder ``out``; returns the page.

    predictions: of the models, in their order. The pictures are of the first one.
    """
    first, classes = next(iter(models.values())), class_rows(models)
    sections = [
        Section("AP", "Average precision in percent; how many objects of a size there are.", overall_rows(models)),
        Section("Kinds of errors", "What AP50 would gain if all errors of a kind were mended (TIDE), and how many "
                "there are among all detections, low scores included.", kind_rows(models)),
        Section("Curves", pictures=[
            (words, data_uri(draw(models, colors).encode(), "svg+xml")) for words, draw in (
                ("precision at each recall, the mean of all classes", figures.precision_and_recall),
                ("AP by the IoU that a detection needs to be right", figures.ap_by_iou),
                ("calibration: on the line a score is a probability", figures.calibration))]),
        Section("Classes", f"Detections: with a score from {SHOWN_SCORE:g}.", classes),
        Section("Confusions", f"Objects by true class (row) and the class of the detection there, score from "
                f"{SHOWN_SCORE:g}; at most {figures.MOST_CLASSES} classes.",
                pictures=[(name, data_uri(figures.confusions(found, colors[name]).encode(), "svg+xml"))
                          for name, found in models.items()], layout="own"),
        Section("Worst images", f"By F1 of {next(iter(models))}, score from {SHOWN_SCORE:g}: {MARKS}",
                pictures=worst(truth, first, predictions[0])),
        Section("Labels that may be wrong", "A detection with a high score where the label says another class, or "
                "nothing: look at them before you trust either.", pictures=doubtful(truth, first, predictions[0])),
    ]  # fmt: skip
    images, objects, of_what = len(truth.images), int(first.counts.sum()), counted(len(first.classes), "classes")
    headline = f"{images:,} images of {truth.data.entry.name}, {objects:,} objects of {of_what}."
    page = render(out, title, headline, sections)
    write_atomically(out / "classes.csv", tables.as_csv(classes))
    write_atomically(out / "diagnosis.json", json.dumps({k: as_json(d, truth) for k, d in models.items()}))
    return page


def render(out: Path, title: str, headline: str, sections: Sequence[Section]) -> Path:
    """Write index.html into the folder ``out``: the sections that have rows or pictures."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "index.html", page_text(title, [headline], sections))
    return out / "index.html"


def overall_rows(models: Models) -> list[list[str]]:
    """AP, at two IoUs and by size of the objects; recall."""
    first = next(iter(models.values()))
    sizes = [f"AP {size} ({count:,})" for size, count in zip(SIZES, first.by_size[1], strict=True)]
    rows = [["model", "AP", "AP50", "AP75", *sizes, "recall"]]
    for name, found in models.items():
        values = [np.nanmean(found.ap(iou)) for iou in (None, 0.5, 0.75)]
        rows.append([name, *map(_number, [*values, *found.by_size[0], 100 * np.nanmean(found.recall)])])
    return rows


def kind_rows(models: Models) -> list[list[str]]:
    prefixes = [f"{name}: " for name in models] if len(models) > 1 else [""]
    rows = [["error", *(prefix + what for prefix in prefixes for what in ("AP50", "errors"))]]
    for kind, (name, meaning) in KINDS.items():
        pairs = [found.kinds[kind] for found in models.values()]
        cells = (cell for gain, count in pairs for cell in (f"+{gain:.1f}", f"{count:,}"))
        rows.append([f"{name}: {meaning}", *cells])
    return rows


def class_rows(models: Models) -> list[list[str]]:
    """A row for each class with objects: counts, AP of each model, and with two models their difference."""
    first, names = next(iter(models.values())), list(models)
    compared = [f"{names[1]} - {names[0]}"] if len(names) == 2 else []
    columns = [
        f"{name}: {what}" if len(names) > 1 else what for name in names for what in ("AP", "AP50", "AP75", "recall")
    ]
    rows = [["class", "objects", "detections", *columns, *compared, "most confused with"]]
    scores = {
        name: [found.ap(), found.ap(0.5), found.ap(0.75), 100 * found.recall.mean(0)] for name, found in models.items()
    }
    for place in np.flatnonzero(first.counts).tolist():
        values = [score[place] for four in scores.values() for score in four]
        apart = [f"{scores[names[1]][0][place] - scores[names[0]][0][place]:+.1f}"] if compared else []
        others = first.confusion[place, : len(first.classes)].copy()
        others[place] = 0
        most = f"{first.classes[others.argmax()]} ({others.max()})" if others.any() else "-"
        counts = (str(first.counts[place]), str(first.detections[place]))
        rows.append([first.classes[place], *counts, *map(_number, values), *apart, most])
    return rows


def worst(truth: Truth, found: Diagnosis, predictions: Predictions) -> list[tuple[str, str]]:
    """Pictures of the images with the lowest F1 that have an error."""
    chosen = [one for one in found.images if one.wrong or one.missed][:WORST]
    return [picture for one in chosen if (picture := marked(truth, found, predictions, one))]


def doubtful(truth: Truth, found: Diagnosis, predictions: Predictions) -> list[tuple[str, str]]:
    """Pictures of detections that contradict a label."""
    pictures = []
    for doubt in sorted(found.doubts, key=lambda one: -one["dt_score"])[:DOUBTS]:
        alone, says = Image(doubt["image_id"], (), (doubt["dt_id"] - 1,), ()), doubt.get("gt_category")
        words = f"detected {doubt['dt_category']} {doubt['dt_score']:.2f}, the label says {says or 'nothing'}"
        if picture := marked(truth, found, predictions, alone, words):
            pictures.append(picture)
    return pictures


def marked(
    truth: Truth, found: Diagnosis, predictions: Predictions, one: Image, words: str = ""
) -> tuple[str, str] | None:
    """The caption and the picture of an image, in grey, with its detections and missed objects; None without file.

    Boxes alone, or for the task segm masks too.
    """
    image = truth.images[one.place]
    try:
        pixels = read_image(truth.data.entry.image_root / image["file_name"])
    except DataError:
        return None
    objects = truth.data.objects(int(truth.numbers[one.place]))
    missed, rows = [objects[k] for k in one.missed], [*one.wrong, *one.right]
    shown = {name: column[rows] for name, column in predictions.items()}
    names = [f"{found.classes[k]} {s:.2f}" for k, s in zip(truth.places(shown)[1], shown["score"], strict=True)]
    boxes = np.array([*(missing["bbox"] for missing in missed), *shown["bbox"]]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    items = {"boxes": boxes, "labels": np.zeros(len(boxes), int),
             "names": [*(found.classes[missing["label"]] for missing in missed), *names],
             "colors": [MISSED] * len(missed) + [WRONG] * len(one.wrong) + [RIGHT] * len(one.right)}  # fmt: skip
    if found.task == "segm":
        masks = [*(missing["segmentation"] for missing in missed), *shown["segmentation"]]
        items["masks"] = decode_masks(masks, *pixels.shape[:2])
    grey = np.repeat((0.5 * pixels.mean(2, keepdims=True) + 50).astype(np.uint8), 3, 2)
    picture = draw_objects(grey, items, found.classes, longer_side=SIDE)
    words = words or f"{len(one.right)} right, {len(one.wrong)} wrong, {len(one.missed)} missed"
    return f"{image['file_name']}: {words}", as_jpeg(picture)


def as_json(found: Diagnosis, truth: Truth) -> dict[str, Any]:
    """The numbers of a diagnosis."""

    def plain(values: np.ndarray) -> list[Any]:
        return [None if np.isnan(value) else round(float(value), 4) for value in values]

    return {
        "task": found.task, "classes": list(found.classes), "objects": found.counts.tolist(),
        "ap": {name: plain(found.ap(iou)) for name, iou in (("AP", None), ("AP50", 0.5), ("AP75", 0.75))},
        "ap_by_iou": plain(found.at_thresholds()), "confusion": found.confusion.tolist(),
        "ap_by_size": plain(found.by_size[0]), "objects_by_size": found.by_size[1].tolist(),
        "kinds": {kind: {"ap50_gain": round(gain, 4), "errors": count} for kind, (gain, count) in found.kinds.items()},
        "calibration": [plain(row) for row in found.calibration],
        "images": [{"file_name": truth.images[one.place]["file_name"], "right": len(one.right),
                    "wrong": len(one.wrong), "missed": len(one.missed)} for one in found.images],
        "doubts": [{"file_name": truth.images[one["image_id"]]["file_name"], "detected": one["dt_category"],
                    "score": one["dt_score"], "label": one.get("gt_category")} for one in found.doubts],
    }  # fmt: skip


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.1f}"
