"""Made-up data of COCO's size: annotations in its format with image files, and predictions of them."""

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
from hotcoco import mask as mask_api
from PIL import Image

from scratch_det.evaluation.predictions import Predictions, as_columns

IMAGES, OBJECTS_PER_IMAGE, CLASSES = 118_287, 860_001 / 118_287, 80  # train2017's
WIDTH, HEIGHT = 640, 480
NAME = "made_up"
FILES = 8  # different images; the others are links to them


def write_coco(root: Path, images: int = IMAGES) -> Path:
    """The data set NAME with as many objects an image as COCO's train2017, in the catalog of the folder ``root``.

    Returns its json (1 % of the objects are crowds, in RLE, the others polygons). The same bytes every time.
    """
    rng, draw = np.random.default_rng(0), random.Random(0)
    json_file, folder = root / "annotations" / f"{NAME}.json", root / "images"
    for path in (json_file.parent, folder):
        path.mkdir(parents=True)
    (root / "catalog.yaml").write_text(f"{NAME}: {{json: annotations/{json_file.name}, images: {folder.name}}}\n")
    names = [f"{number:012d}.jpg" for number in range(1, images + 1)]
    for place, name in enumerate(names):
        if place < FILES:
            Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(folder / name)
        else:
            os.link(folder / names[place % FILES], folder / name)
    common = {"width": WIDTH, "height": HEIGHT, "license": 1, "date_captured": "2013-11-14 16:28:13"}
    entries = [
        {"id": number, "file_name": name, "coco_url": f"http://images.cocodataset.org/train2017/{name}", **common}
        for number, name in enumerate(names, start=1)
    ]
    categories = [{"id": number, "name": f"class{number}"} for number in range(1, CLASSES + 1)]
    shapes = [json.dumps(polygon_object(rng))[1:-1] for _ in range(min(20_000, 10 * images))]
    crowd = json.dumps(crowd_object())[1:-1]
    with open(json_file, "w") as file:
        file.write(f'{{"images": {json.dumps(entries)}, "categories": {json.dumps(categories)}, "annotations": [')
        for number in range(round(images * OBJECTS_PER_IMAGE)):
            shape = crowd if number % 100 == 99 else draw.choice(shapes)
            image = number + 1 if number < images else draw.randint(1, images)  # no image without an object
            ids = f'"id": {number + 1}, "image_id": {image}, "category_id": {draw.randint(1, CLASSES)}'
            file.write(f"{', ' if number else ''}{{{shape}, {ids}}}")
        file.write("]}")
    return json_file


def polygon_object(rng: np.random.Generator) -> dict[str, Any]:
    """An object in one polygon, of about 30 corners in the mean, inside the image."""
    corners = int(np.clip(rng.lognormal(3.1, 0.75), 4, 300))
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
    points = np.stack([np.cos(angles), np.sin(angles)], 1) * rng.uniform(20, 90) * rng.uniform(0.7, 1, (corners, 1))
    points = (points + rng.uniform(100, 380, 2)).round(2)
    low, high = points.min(0), points.max(0)
    box = [*low.tolist(), *(high - low).round(2).tolist()]
    return {"segmentation": [points.ravel().tolist()], "area": box[2] * box[3], "iscrowd": 0, "bbox": box}


def crowd_object() -> dict[str, Any]:
    """A rectangle in uncompressed RLE."""
    x, y, width, height = 100, 50, 300, 200
    columns = [height, HEIGHT - height] * width
    runs = [x * HEIGHT + y, *columns[:-1], (WIDTH - x - width + 1) * HEIGHT - y - height]
    mask = {"size": [HEIGHT, WIDTH], "counts": runs}
    return {"segmentation": mask, "area": width * height, "iscrowd": 1, "bbox": [x, y, width, height]}


def made_up_predictions(json_file: Path, per_image: int = 100) -> Predictions:
    """Boxes and masks: objects of the image, moved, scaled, and of another class one time in five; always the same."""
    rng, truth = np.random.default_rng(1), json.loads(json_file.read_bytes())
    objects: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in truth["images"]}
    for one in truth["annotations"]:
        objects[one["image_id"]].append(one)
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    results = []
    for image, present in objects.items():
        for place in rng.integers(0, len(present), per_image):
            (x, y, *extent), category = present[place]["bbox"], present[place]["category_id"]
            size = extent * rng.uniform(0.7, 1.3, 2)
            centre = (x, y) + extent * rng.uniform(0.4, 0.6, 2)
            points = centre + circle * size / 2 * rng.uniform(0.8, 1, (len(circle), 1))
            rle = mask_api.frPyObjects([points.ravel().tolist()], HEIGHT, WIDTH)[0]
            mask = {"size": rle["size"], "counts": rle["counts"].decode()}
            category = int(rng.integers(1, CLASSES + 1)) if rng.random() < 0.2 else category
            results.append((image, category, rng.random(), (*(centre - size / 2), *size), mask))
    names = ("image_id", "category_id", "score", "bbox", "segmentation")
    return as_columns(dict(zip(names, zip(*results, strict=True), strict=True)))
