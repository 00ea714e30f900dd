"""The digits demo: a small detection data set and a pre-training set for it, made offline in about a minute.

Handwritten digits drawn over photographs, by ``digits_scene``, with boxes, polygons and keypoints in COCO's format.
Digits and photographs come inside the wheels of scikit-learn and scikit-image. Train, val and the pre-training set
share none of them; search, to choose hyper-parameters on, shows those of the pre-training set. Only photographs whose
free licence those two projects state are used. The same seed gives the same bytes (under the same versions of OpenCV,
NumPy, scikit-learn and scikit-image).

A folder is complete or absent: it is built in a temporary folder beside it, then renamed. It is replaced only if this
module made it. manifest.json has the parameters and one digest of all generated files. The user may put other files
beside them (but no jpg, which a training might read); --force replaces the whole folder with these files.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np

from scratch_det.data import digits_scene as drawing
from scratch_det.data.digits_scene import LICENSES, NUM_CLASSES, PHOTOGRAPHS, SEEN, SPLITS, Scene
from scratch_det.errors import DataError, UserError
from scratch_det.log import track

VERSION = "2.0"
GENERATOR, MANIFEST = "scratch_det digits", "manifest.json"
GENERATED = (*(f"annotations/instances_{split}.json" for split in drawing.SCENES), "preview.png", "**/*.jpg")
JPEG_QUALITY = 92

POINTS = {"keypoints": ["top", "bottom", "left", "right"], "skeleton": [[1, 2], [3, 4]]}

PREVIEW_SCENES, COLUMNS, ZOOM, CELL = 12, 4, 3, 480  # CELL: px, side of the black square around an enlarged scene
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
PALETTE = [(230, 60, 60), (60, 200, 80), (70, 130, 255), (250, 200, 40), (220, 90, 240), (40, 220, 230)]


def make_digits(out: Path, seed: int, train: int, val: int, force: bool = False) -> dict[Path, bool]:
    """Make ``out`` and ``<out>_pretrain``; returns each folder -> whether it had to be made.

    ``train`` and ``val`` count scenes. The pre-training set grows with them: 5/2 of train, 4 times val.
    Raises UserError before any work.
    """
    for option, value, least in (("--seed", seed, 0), ("--train", train, 1), ("--val", val, 1)):
        if value < least:
            raise UserError(f"{option} {value} is too small: at least {least}")
    out = out.resolve()
    common = {"version": VERSION, "seed": seed}
    scenes = common | {"train": train, "val": val, "search": val}
    singles = common | {"train": max(NUM_CLASSES, 5 * train // 2), "val": max(NUM_CLASSES, 4 * val)}
    folders = {out: (scenes, _write_scenes), out.with_name(f"{out.name}_pretrain"): (singles, _write_singles)}
    missing = {folder: needs_building(folder, parameters, force) for folder, (parameters, _) in folders.items()}
    for folder in (folder for folder in folders if missing[folder]):
        build(folder, *folders[folder])
    return missing


def needs_building(folder: Path, parameters: dict[str, Any], force: bool) -> bool:
    """Whether to build ``folder``. Raises DataError for one that was not made here or, without ``force``, differs."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return True
    manifest = None
    with suppress(OSError, ValueError):
        manifest = json.loads((folder / MANIFEST).read_text())
    if not isinstance(manifest, dict) or manifest.get("generator") != GENERATOR:
        raise DataError(f"{folder} exists but is no digits data set (no {MANIFEST} of ours): choose another --out")
    if force:
        return True
    made, remedy = manifest.get("parameters") or {}, "--force replaces the whole folder, another --out keeps both"
    changed = [f"{key} {made.get(key)}, not {value}" for key, value in parameters.items() if made.get(key) != value]
    if changed:
        raise DataError(f"{folder} was made with {', '.join(changed)}; {remedy}")
    if manifest.get("sha256") != _digest(folder):
        raise DataError(f"{folder} has missing, altered or added files; {remedy}")
    return False


def build(folder: Path, parameters: dict[str, Any], write: Callable[[Path, dict[str, Any]], None]) -> None:
    """Let ``write`` fill a temporary folder beside ``folder``, then rename it. Raises DataError when it cannot."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True) as temporary:
            new = Path(temporary, "new")
            new.mkdir()
            write(new, parameters)
            manifest = {"generator": GENERATOR, "parameters": parameters, "sha256": _digest(new)}
            (new / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
            if folder.exists():
                folder.rename(Path(temporary, "old"))
            new.rename(folder)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"cannot write {folder}: {reason}; free space, or choose another --out") from error


def _digest(folder: Path) -> str:
    """SHA-256 of the lines that ``sha256sum`` prints for all generated files in the order of their names."""
    paths = {path.relative_to(folder).as_posix(): path for pattern in GENERATED for path in folder.glob(pattern)}
    lines = [f"{sha256(paths[name].read_bytes()).hexdigest()}  {name}\n" for name in sorted(paths)]
    return sha256("".join(lines).encode()).hexdigest()


def _write_scenes(folder: Path, parameters: dict[str, Any]) -> None:
    """Fill ``folder`` with train/, val/, search/, annotations/ and preview.png."""
    seed = parameters["seed"]
    (folder / "annotations").mkdir()
    for split in drawing.SCENES:
        (folder / split).mkdir()
        images, annotations, count = [], [], parameters[split]
        for index in track(range(count), f"{split} scenes", count):
            scene, number = drawing.compose(seed, split, index), 1_000_000 * SPLITS[split].stream + index + 1
            license_id = 1 + list(LICENSES).index(PHOTOGRAPHS[scene.photograph].license)
            height, width = scene.image.shape[:2]
            images.append({
                "id": number, "file_name": f"{number:07d}.jpg", "height": height, "width": width,
                "license": license_id, "photograph": scene.photograph,
            })  # fmt: skip
            annotations += drawing.annotation_entries(scene, number)
            _write_image(folder / split / images[-1]["file_name"], scene.image)
        content = coco_json(split, seed, images, annotations)
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        (folder / "annotations" / f"instances_{split}.json").write_text(text)
    shown = range(min(parameters["val"], PREVIEW_SCENES))
    _write_image(folder / "preview.png", _draw_preview([drawing.compose(seed, "val", index) for index in shown]))


def coco_json(split: str, seed: int, images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole json; ``info`` lists the photographs and scans of train, val and search, so that anyone can compare."""
    return {
        "info": {
            "description": f"scratch_det digits demo, {split}: handwritten digits drawn over photographs",
            "version": VERSION,
            "seed": seed,
            "split": split,
            "photographs": {side: drawing.photograph_names(side) for side in drawing.SCENES},
            "scans": {
                side: sorted(chain(*drawing.load_material().shares[SPLITS[side].scans])) for side in drawing.SCENES
            },
            "attribution": {name: f"{p.author}, {p.license}" for name, p in PHOTOGRAPHS.items()},
        },
        "licenses": [{"id": i, "name": name, "url": url} for i, (name, url) in enumerate(LICENSES.items(), start=1)],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": str(i), "supercategory": "digit"} | POINTS for i in range(NUM_CLASSES)],
    }


def _write_singles(folder: Path, parameters: dict[str, Any]) -> None:
    """Fill ``folder`` with train/<digit>/ and val/<digit>/, drawn from its own scans and photographs."""
    for split in ("train", "val"):
        count = parameters[split]
        for label in range(NUM_CLASSES):
            (folder / split / str(label)).mkdir(parents=True)
        for index in track(range(count), f"pre-training {split} images", count):
            image = drawing.compose(parameters["seed"], f"pretrain_{split}", index).image
            _write_image(folder / split / str(index % NUM_CLASSES) / f"{index + 1:07d}.jpg", image)


def _write_image(path: Path, image: np.ndarray) -> None:
    """Write an H x W x 3 uint8 RGB image; the path's suffix names the format."""
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY] if path.suffix == ".jpg" else []
    path.write_bytes(cv2.imencode(path.suffix, image[..., ::-1], options)[1].tobytes())


def _draw_preview(scenes: list[Scene]) -> np.ndarray:
    """Grid (H x W x 3 uint8 RGB) of annotated scenes: box, outline, class; hidden keypoints are hollow."""
    cells = []
    for scene in scenes:  # each enlarged and centred in a black square
        big = cv2.resize(scene.image, None, fx=ZOOM, fy=ZOOM, interpolation=cv2.INTER_CUBIC)
        for annotation, colour in zip(drawing.annotation_entries(scene, 0), PALETTE, strict=False):
            _draw_annotation(big, annotation, colour)
        y, x = CELL - big.shape[0], CELL - big.shape[1]
        cells.append(np.pad(big, ((y // 2, y - y // 2), (x // 2, x - x // 2), (0, 0))))
    cells += [np.zeros_like(cells[0])] * (-len(cells) % COLUMNS)
    return np.vstack([np.hstack(cells[i : i + COLUMNS]) for i in range(0, len(cells), COLUMNS)])


def _draw_annotation(big: np.ndarray, annotation: dict[str, Any], colour: tuple[int, int, int]) -> None:
    """Draw one annotation onto the enlarged image, in place."""
    outlines = [np.reshape(ZOOM * np.array(flat), (-1, 1, 2)) for flat in annotation["segmentation"]]
    for edge, thickness in ((WHITE, 3), (colour, 2)):
        cv2.polylines(big, outlines, True, edge, thickness, cv2.LINE_AA)
    x, y, width, height = (ZOOM * value for value in annotation["bbox"])
    cv2.rectangle(big, (x, y), (x + width, y + height), colour, 1)
    cv2.rectangle(big, (x, y), (x + 18, y + 22), colour, cv2.FILLED)
    name = str(annotation["category_id"] - 1)
    cv2.putText(big, name, (x + 2, y + 18), cv2.FONT_HERSHEY_SIMPLEX, 0.65, BLACK, 2, cv2.LINE_AA)
    for x, y, visible in np.reshape(annotation["keypoints"], (-1, 3)):
        centre, fill = (round(ZOOM * (x + 0.5)), round(ZOOM * (y + 0.5))), cv2.FILLED if visible == SEEN else 1
        for edge, radius in ((WHITE, 5), (colour, 3)):
            cv2.circle(big, centre, radius, edge, fill, cv2.LINE_AA)
