"""A picture of annotated digits scenes, drawn from the json alone, so that a person can check the annotations."""

from typing import Any

import cv2
import numpy as np

ZOOM, CELL = 3, 480
"""Enlargement of a scene, and the side in px of the square it is shown in."""
PALETTE = [(230, 60, 60), (60, 200, 80), (70, 130, 255), (250, 200, 40), (220, 90, 240), (40, 220, 230)]
"""RGB of the first, second, ... digit of a scene."""


def draw_preview(scenes: list[tuple[np.ndarray, list[dict[str, Any]]]], columns: int = 4) -> np.ndarray:
    """Grid (H x W x 3 uint8 RGB) of (image, its COCO annotations): box, outline, class; hidden keypoints are hollow."""
    cells = [_cell(image, annotations) for image, annotations in scenes]
    cells += [np.zeros_like(cells[0])] * (-len(cells) % columns)
    return np.vstack([np.hstack(cells[i : i + columns]) for i in range(0, len(cells), columns)])


def _cell(image: np.ndarray, annotations: list[dict[str, Any]]) -> np.ndarray:
    """One scene, enlarged and centred in a black square."""
    big = cv2.resize(image, None, fx=ZOOM, fy=ZOOM, interpolation=cv2.INTER_CUBIC)
    for order, annotation in enumerate(annotations):
        _draw_annotation(big, annotation, PALETTE[order % len(PALETTE)])
    cell = np.zeros((CELL, CELL, 3), np.uint8)
    y, x = (CELL - big.shape[0]) // 2, (CELL - big.shape[1]) // 2
    cell[y : y + big.shape[0], x : x + big.shape[1]] = big
    return cell


def _draw_annotation(big: np.ndarray, annotation: dict[str, Any], colour: tuple[int, int, int]) -> None:
    """Draw one annotation onto the enlarged image, in place."""
    for flat in annotation["segmentation"]:
        outline = np.rint(ZOOM * np.array(flat).reshape(-1, 1, 2)).astype(np.int32)
        cv2.polylines(big, [outline], True, (255, 255, 255), 3, cv2.LINE_AA)
        cv2.polylines(big, [outline], True, colour, 2, cv2.LINE_AA)
    x, y, width, height = (round(ZOOM * value) for value in annotation["bbox"])
    cv2.rectangle(big, (x, y), (x + width, y + height), colour, 1)
    name = str(annotation["category_id"] - 1)
    cv2.rectangle(big, (x, y), (x + 18, y + 22), colour, cv2.FILLED)
    cv2.putText(big, name, (x + 2, y + 18), cv2.FONT_HERSHEY_SIMPLEX, 0.65, (0, 0, 0), 2, cv2.LINE_AA)
    for x, y, visible in np.array(annotation["keypoints"]).reshape(-1, 3):
        centre = (round(ZOOM * (x + 0.5)), round(ZOOM * (y + 0.5)))
        cv2.circle(big, centre, 5, (255, 255, 255), cv2.FILLED if visible == 2 else 1, cv2.LINE_AA)
        cv2.circle(big, centre, 3, colour, cv2.FILLED if visible == 2 else 1, cv2.LINE_AA)
