"""The digits demo: a small detection data set that is made in about a minute, and what to pre-train on for it.

Real handwritten digits drawn over real photographs, with boxes, polygons and keypoints in COCO's format. The same seed
gives the same bytes (under the same versions of OpenCV, NumPy, scikit-learn and scikit-image).
"""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..errors import UserError
from .digits_annotation import VERSION, annotation_entries, coco_json, image_entry, image_id
from .digits_folder import build, needs_building
from .digits_preview import draw_preview
from .digits_scene import compose_scene, compose_single
from .digits_source import NUM_CLASSES, load_material

JPEG_QUALITY = 92
PREVIEW_SCENES = 12

Progress = Callable[[str, int, int], None]
"""Called as (what is being made, images done, images in all)."""


def make_digits(
    out: Path, seed: int, train: int, val: int, force: bool = False, progress: Progress = lambda *_: None
) -> dict[Path, bool]:
    """Make ``out`` and ``<out>_pretrain``; returns each folder -> whether it had to be made.

    ``train`` and ``val`` count scenes. The pre-training set grows with them: 5/2 of train, 4 times val.
    Every refusal comes before any work.
    """
    _check_numbers(seed, train, val)
    out = Path(os.path.realpath(out))
    scenes = {"train": train, "val": val}
    singles = {"train": max(NUM_CLASSES, 5 * train // 2), "val": max(NUM_CLASSES, 4 * val)}
    plans = [
        (out, scenes, _write_scenes),
        (out.with_name(f"{out.name}_pretrain"), singles, _write_singles),
    ]
    parameters = [{"version": VERSION, "seed": seed, **counts} for _, counts, _ in plans]
    todo = [needs_building(folder, wanted, force) for (folder, *_), wanted in zip(plans, parameters, strict=True)]
    for (folder, counts, write), wanted, missing in zip(plans, parameters, todo, strict=True):
        if missing:
            build(folder, wanted, partial(write, seed=seed, counts=counts, progress=progress))
    return {folder: missing for (folder, *_), missing in zip(plans, todo, strict=True)}


def _check_numbers(seed: int, train: int, val: int) -> None:
    """Refuse what no set can be made from."""
    for option, value, least in (("--seed", seed, 0), ("--train", train, 1), ("--val", val, 1)):
        if value < least:
            raise UserError(f"{option} {value} is too small: at least {least}")


def _write_scenes(folder: Path, seed: int, counts: dict[str, int], progress: Progress) -> dict[str, Any]:
    """Fill ``folder`` with train/, val/, annotations/ and preview.png; returns how much of everything there is."""
    contents: dict[str, Any] = {}
    (folder / "annotations").mkdir()
    for split, count in counts.items():
        data, shown = _write_split(folder / split, seed, split, count, progress)
        compact = json.dumps(data, sort_keys=True, separators=(",", ":"))
        (folder / "annotations" / f"instances_{split}.json").write_text(compact)
        contents[split] = {"images": count, "annotations": len(data["annotations"])}
    write_image(folder / "preview.png", draw_preview(shown))  # the last split: val
    return contents


def _write_split(
    folder: Path, seed: int, split: str, count: int, progress: Progress
) -> tuple[dict[str, Any], list[tuple[np.ndarray, list[dict[str, Any]]]]]:
    """Write the images of a split; returns its COCO json, and the first images with their annotations."""
    folder.mkdir()
    material = load_material(split)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    shown = []
    for index in range(count):
        scene, number = compose_scene(material, seed, split, index), image_id(split, index)
        entry = image_entry(scene, number, f"{number:07d}.jpg")
        own = annotation_entries(scene, number)
        write_image(folder / entry["file_name"], scene.image)
        images.append(entry)
        annotations += own
        if index < PREVIEW_SCENES:
            shown.append((scene.image, own))
        progress(f"{split} scenes", index + 1, count)
    return coco_json(split, seed, images, annotations), shown


def _write_singles(folder: Path, seed: int, counts: dict[str, int], progress: Progress) -> dict[str, Any]:
    """Fill ``folder`` with train/<digit>/ and val/<digit>/, drawn from the train scans and photographs only."""
    for split, count in counts.items():
        stream = f"pretrain_{split}"
        material = load_material(stream)
        for label in range(NUM_CLASSES):
            (folder / split / str(label)).mkdir(parents=True)
        for index in range(count):
            scene = compose_single(material, seed, stream, index)
            write_image(folder / split / str(scene.digits[0].label) / f"{index + 1:07d}.jpg", scene.image)
            progress(f"pre-training {split} images", index + 1, count)
    return {split: {"images": count} for split, count in counts.items()}


def write_image(path: Path, image: np.ndarray) -> None:
    """Write an H x W x 3 uint8 RGB image in the format of the path's ending."""
    bgr = np.ascontiguousarray(image[..., ::-1])
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY] if path.suffix == ".jpg" else []
    _, encoded = cv2.imencode(path.suffix, bgr, options)
    path.write_bytes(encoded.tobytes())
