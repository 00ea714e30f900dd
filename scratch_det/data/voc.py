"""Conversion of PASCAL VOC's devkit folders to json files in COCO's format, one for each year and split."""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from PIL import Image

from scratch_det.data.catalog import ROOT_VARIABLE, datasets_root
from scratch_det.data.checks import Problem, explain
from scratch_det.errors import DataError, did_you_mean
from scratch_det.files import write_atomically
from scratch_det.log import track

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
SPLITS = {2007: ("trainval", "train", "val", "test"), 2012: ("trainval", "train", "val")}  # splits with annotations
NAMES = {f"voc_{year}_{split}": (f"VOC{year}", split) for year, splits in SPLITS.items() for split in splits}
PAPER_NAMES = ("voc_2007_trainval", "voc_2012_train", "voc_2012_val")  # section 5.2
FILES = ("Annotations/{}.xml", "JPEGImages/{}.jpg")  # of an image
FIX = "complete the tree from VOC's archives"


class _Fault(Exception):
    """What is wrong with one image of a split: the kind, as in ``Problem``, and a detail of this image if needed."""


def make_voc(names: Sequence[str] = PAPER_NAMES, force: bool = False) -> list[str]:
    """Write ``<root>/VOC2007/instances_trainval.json`` and so on for ``names`` (see ``read_split``); a line for each.

    Raises DataError, before anything is written, for a name that is none of NAMES, for a tree that is not complete and
    for a json that exists with other content (unless ``force``).
    """
    if unknown := [name for name in names if name not in NAMES]:
        raise DataError(
            f"'{unknown[0]}' is none of VOC's sets{did_you_mean(unknown[0], list(NAMES))}; known: {', '.join(NAMES)}"
        )
    texts: dict[Path, str] = {}
    reports = []
    for name in dict.fromkeys(names):
        year, split = NAMES[name]
        content, path = read_split(datasets_root() / year, split), datasets_root() / year / f"instances_{split}.json"
        texts[path] = json.dumps(content)
        objects, difficult = len(content["annotations"]), sum(one["ignore"] for one in content["annotations"])
        counts = f"{len(content['images']):,} images, {objects:,} objects, {difficult:,} of them difficult"
        reports.append(f"{name}: {counts}; {path}")
    other = [str(path) for path, text in texts.items() if path.exists() and path.read_text() != text]
    if other and not force:
        raise DataError(f"exists with other content: {', '.join(other)}; remove it, or replace it with --force")
    for path, text in texts.items():
        write_atomically(path, text)
    return reports


def read_split(folder: Path, split: str) -> dict[str, Any]:
    """The images that ``ImageSets/Main/<split>.txt`` lists, in its order, as the content of a COCO json.

    Ids count from 1, categories in VOC's order. VOC's corners are 1-based pixels that belong to the box, so x and y are
    xmin - 1 and ymin - 1, and width and height reach to xmax and ymax (as in detectron2). Difficult objects have
    ``ignore`` 1 and are no crowds. Raises DataError with every kind of fault in ``folder``: missing or broken files,
    unknown classes, boxes without area, images of another size than their XML says.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    faults: dict[str, list[dict[str, str]]] = defaultdict(list)
    names = _image_names(folder, split)
    for number, name in enumerate(track(names, f"reading {folder.name} {split}", len(names)), start=1):
        try:
            image, objects = _read_image(folder, name)
        except _Fault as fault:
            kind, *details = fault.args
            faults[kind].append({"id": " ".join([name, *(f"({detail})" for detail in details)])})
            continue
        images.append({"id": number, **image})
        for one in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": number, **one})
    if faults:
        problems = [Problem("error", kind).add(*found) for kind, found in faults.items()]
        raise DataError(f"{explain(folder, problems, most_lines=20)}\n  nothing was written; {FIX}")
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)]
    info = {"description": f"PASCAL {folder.name} {split}"}
    return {"info": info, "images": images, "annotations": annotations, "categories": categories}


def _image_names(folder: Path, split: str) -> list[str]:
    listing = folder / "ImageSets" / "Main" / f"{split}.txt"
    missing = [str(path) for path in (folder / "Annotations", folder / "JPEGImages", listing) if not path.exists()]
    if missing:
        raise DataError(
            f"{folder.name} is not complete under {folder.parent} (set {ROOT_VARIABLE} to use another root): move or "
            f"link VOCdevkit/{folder.name} there, {FIX}\n" + "\n".join(f"  missing {path}" for path in missing)
        )
    names = [line.strip() for line in listing.read_text().splitlines() if line.strip()]
    if not names or len(set(names)) < len(names):
        raise DataError(f"{listing}: {len(names)} ids, {len(set(names))} different; expected each image once; {FIX}")
    return names


def _read_image(folder: Path, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The image entry without its id, and its annotations without ids."""
    xml, jpeg = (folder / file.format(name) for file in FILES)
    try:
        tree = ElementTree.parse(xml).getroot()
        with Image.open(jpeg) as opened:
            size = opened.size
    except FileNotFoundError as missing:
        raise _Fault(f"images without a file in {Path(missing.filename).parent.name}") from None
    except (ElementTree.ParseError, LookupError, ValueError) as broken:
        raise _Fault("broken XML files", broken) from None
    except Image.UnidentifiedImageError:
        raise _Fault("files that are no images") from None
    except OSError as unreadable:
        raise _Fault("files that cannot be read", unreadable) from None
    width, height = (int(_number(tree, f"size/{side}")) for side in ("width", "height"))
    if size != (width, height):
        raise _Fault("images of another size than their XML says", f"{size[0]} x {size[1]}, not {width} x {height}")
    return {"file_name": jpeg.name, "width": width, "height": height}, [_object(one) for one in tree.findall("object")]


def _object(node: ElementTree.Element) -> dict[str, Any]:
    name = node.findtext("name", "").strip()
    if name not in CLASSES:
        raise _Fault("XML files with a class that VOC does not have", f"'{name}'{did_you_mean(name, list(CLASSES))}")
    left, top, right, bottom = (_number(node, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax"))
    x, y = left - 1, top - 1
    width, height = right - x, bottom - y
    if width <= 0 or height <= 0:
        raise _Fault("XML files with a box without area", f"{name} from {left:g}, {top:g} to {right:g}, {bottom:g}")
    ignore = int(node.find("difficult") is not None and _number(node, "difficult") != 0)  # may be left out
    category, box = CLASSES.index(name) + 1, [x, y, width, height]
    return {"category_id": category, "bbox": box, "area": width * height, "iscrowd": 0, "ignore": ignore}


def _number(node: ElementTree.Element, path: str) -> float:
    """A finite number; not all coordinates of 2012 are whole ones."""
    text = node.findtext(path)
    with suppress(ValueError):
        if math.isfinite(number := float(text or "")):
            return number
    raise _Fault("XML files without a number where one belongs", f"{node.tag}/{path}: {text}")
