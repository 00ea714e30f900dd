"""Data for the checks on a GPU: ellipses on clouds, in COCO's format, so that nothing has to be downloaded."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml
from conftest import name_points

OBJECTS, CLASSES = 7, 5  # as many objects an image as COCO has on average


def draw_data(root: Path, size: tuple[int, int], train: int, val: int) -> None:
    """drawn_train and drawn_val in the datasets folder ``root``: polygons and keypoints; ``size``: width, height."""
    rng = np.random.default_rng(0)
    kinds = [{"id": label + 1, "name": f"kind {label + 1}"} for label in range(CLASSES)]
    for name, count in {"drawn_train": train, "drawn_val": val}.items():
        content: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "categories": kinds}
        (root / name).mkdir()
        for number in range(1, count + 1):
            pixels = cv2.resize(rng.integers(0, 256, (9, 12, 3), np.uint8), size, interpolation=cv2.INTER_CUBIC)
            for _ in range(OBJECTS):
                content["annotations"].append(_draw(pixels, rng) | {"image_id": number})
            cv2.imwrite(str(root / name / f"{number}.jpg"), pixels)
            image = {"id": number, "file_name": f"{number}.jpg", "width": size[0], "height": size[1]}
            content["images"].append(image)
        for number, annotation in enumerate(content["annotations"], 1):
            annotation["id"] = number
        name_points(content)
        (root / f"{name}.json").write_text(json.dumps(content))
    entries = {name: {"json": f"{name}.json", "images": name} for name in ("drawn_train", "drawn_val")}
    (root / "catalog.yaml").write_text(yaml.safe_dump(entries))


def _draw(pixels: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    """Draw an ellipse into ``pixels``; its annotation."""
    height, width = pixels.shape[:2]
    middle, axes, label = rng.integers((0, 0), (width, height)), rng.integers(8, height // 4, 2), rng.integers(CLASSES)
    corners = cv2.ellipse2Poly(middle.tolist(), axes.tolist(), int(rng.integers(180)), 0, 360, 12)
    corners = corners.clip(0, (width - 1, height - 1))
    cv2.fillPoly(pixels, [corners], (50 * int(label), 255 - 50 * int(label), 120))
    (x, y), (right, bottom) = corners.min(0).tolist(), corners.max(0).tolist()
    return {
        "category_id": int(label) + 1, "iscrowd": 0, "bbox": [x, y, right - x, bottom - y],
        "area": float(cv2.contourArea(corners)), "segmentation": [corners.ravel().tolist()],
    }  # fmt: skip
