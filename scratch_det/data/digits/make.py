"""The digits demo: a small detection data set that is made in about a minute, and what to pre-train on for it.

Real handwritten digits drawn over real photographs, with boxes, polygons and keypoints in COCO's format. The same seed
gives the same bytes (under the same versions of OpenCV, NumPy, scikit-learn and scikit-image).

A folder is whole or absent: built in a temporary sibling, renamed into place, replaced only if it was made here.
manifest.json says what it was made from and holds one digest of all generated files. Other files may lie between them
(but no jpg, which a training might pick up); --force replaces the whole folder, them included.
"""

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np

from scratch_det.data.digits.scene import (
    VERSION,
    annotation_entries,
    coco_json,
    compose,
    draw_preview,
    image_entry,
)
from scratch_det.data.digits.source import NUM_CLASSES
from scratch_det.errors import DataError, UserError
from scratch_det.log import track

GENERATOR = "scratch_det digits"
MANIFEST = "manifest.json"
GENERATED = ("annotations/instances_train.json", "annotations/instances_val.json", "preview.png", "**/*.jpg")
JPEG_QUALITY, PREVIEW_SCENES = 92, 12
SPLITS = ("train", "val")


def make_digits(out: Path, seed: int, train: int, val: int, force: bool = False) -> dict[Path, bool]:
    """Make ``out`` and ``<out>_pretrain``; returns each folder -> whether it had to be made.

    ``train`` and ``val`` count scenes. The pre-training set grows with them: 5/2 of train, 4 times val.
    Raises UserError before any work.
    """
    for option, value, least in (("--seed", seed, 0), ("--train", train, 1), ("--val", val, 1)):
        if value < least:
            raise UserError(f"{option} {value} is too small: at least {least}")
    out = out.resolve()
    pretrain = out.with_name(f"{out.name}_pretrain")
    scenes = {"version": VERSION, "seed": seed, "train": train, "val": val}
    singles = scenes | {"train": max(NUM_CLASSES, 5 * train // 2), "val": max(NUM_CLASSES, 4 * val)}
    folders = {out: (scenes, _write_scenes), pretrain: (singles, _write_singles)}
    missing = {folder: needs_building(folder, parameters, force) for folder, (parameters, _) in folders.items()}
    for folder in (folder for folder in folders if missing[folder]):
        build(folder, *folders[folder])
    return missing


def needs_building(folder: Path, parameters: dict[str, Any], force: bool) -> bool:
    """Whether to build ``folder``. Raises DataError for one that was not made here or, without ``force``, differs."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return True
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        is_ours = manifest["generator"] == GENERATOR
    except (OSError, ValueError, KeyError, TypeError):
        is_ours = False
    if not is_ours:
        raise DataError(f"{folder} exists but is no digits data set (no {MANIFEST} of ours): choose another --out")
    if force:
        return True
    made, remedy = manifest.get("parameters") or {}, "--force replaces the whole folder, another --out keeps both"
    changed = [f"{key} {made.get(key)}, not {value}" for key, value in parameters.items() if made.get(key) != value]
    if changed:
        raise DataError(f"{folder} was made with {', '.join(changed)}; {remedy}")
    if manifest.get("sha256") != digest(folder):
        raise DataError(f"{folder} has missing, altered or added files; {remedy}")
    return False


def build(folder: Path, parameters: dict[str, Any], write: Callable[[Path, dict[str, Any]], None]) -> None:
    """Let ``write`` fill a temporary sibling, then put it in ``folder``'s place."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True) as temporary:
            new = Path(temporary, "new")
            new.mkdir()
            write(new, parameters)
            manifest = {"generator": GENERATOR, "parameters": parameters, "sha256": digest(new)}
            (new / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
            if folder.exists():
                folder.rename(Path(temporary, "old"))
            new.rename(folder)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"cannot write {folder}: {reason}; free space, or choose another --out") from error


def digest(folder: Path) -> str:
    """SHA-256 of the lines that ``sha256sum`` prints for all generated files in the order of their names."""
    paths = {path.relative_to(folder).as_posix(): path for pattern in GENERATED for path in folder.glob(pattern)}
    lines = [f"{sha256(paths[name].read_bytes()).hexdigest()}  {name}\n" for name in sorted(paths)]
    return sha256("".join(lines).encode()).hexdigest()


def _write_scenes(folder: Path, parameters: dict[str, Any]) -> None:
    """Fill ``folder`` with train/, val/, annotations/ and preview.png."""
    seed = parameters["seed"]
    (folder / "annotations").mkdir()
    for split in SPLITS:
        (folder / split).mkdir()
        images, annotations, count = [], [], parameters[split]
        for index in track(range(count), f"{split} scenes", count):
            scene = compose(seed, split, index)
            images.append(image_entry(scene, split, index))
            annotations += annotation_entries(scene, images[-1]["id"])
            _write_image(folder / split / images[-1]["file_name"], scene.image)
        content = coco_json(split, seed, images, annotations)
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        (folder / "annotations" / f"instances_{split}.json").write_text(text)
    shown = range(min(parameters["val"], PREVIEW_SCENES))
    preview = draw_preview([compose(seed, "val", index) for index in shown])
    _write_image(folder / "preview.png", preview)


def _write_singles(folder: Path, parameters: dict[str, Any]) -> None:
    """Fill ``folder`` with train/<digit>/ and val/<digit>/, drawn from the train scans and photographs only."""
    for split in SPLITS:
        count, stream = parameters[split], f"pretrain_{split}"
        for label in range(NUM_CLASSES):
            (folder / split / str(label)).mkdir(parents=True)
        for index in track(range(count), f"pre-training {split} images", count):
            image = compose(parameters["seed"], stream, index).image
            _write_image(folder / split / str(index % NUM_CLASSES) / f"{index + 1:07d}.jpg", image)


def _write_image(path: Path, image: np.ndarray) -> None:
    """Write an H x W x 3 uint8 RGB image in the format of the path's ending."""
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY] if path.suffix == ".jpg" else []
    path.write_bytes(cv2.imencode(path.suffix, image[..., ::-1], options)[1].tobytes())
