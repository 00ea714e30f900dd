"""VOC's XML files as json files in COCO's format: the devkit's sets, and exports with classes of one's own."""

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from PIL import Image

from scratch_det.data.catalog import CHECK, ROOT_VARIABLE, SUFFIXES, datasets_root, enter, from_root, lookup
from scratch_det.data.checks import Problem, explain
from scratch_det.data.coco import read_coco
from scratch_det.data.image import UNREADABLE, turn_of
from scratch_det.errors import DataError, did_you_mean, listed
from scratch_det.files import write_atomically
from scratch_det.log import say_now, track

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
SPLITS = {2007: ("trainval", "train", "val", "test"), 2012: ("trainval", "train", "val")}  # splits with annotations
NAMES = {f"voc_{year}_{split}": (f"VOC{year}", split) for year, splits in SPLITS.items() for split in splits}
PAPER_NAMES = ("voc_2007_trainval", "voc_2012_train", "voc_2012_val")  # section 5.2
FIX = "complete the tree from VOC's archives"
AUTO, OWN = "auto", "; or, if the classes are your own, give --classes auto"
XMLS, IMAGES = ("Annotations", "annotations", "annots", "xmls", "labels"), ("JPEGImages", "images", "Images")
SHARES = ("train", "trainval", "val", "valid", "test")  # folders whose name says nothing without that of the export
ENDS = re.compile(rf"\.(xml|{'|'.join(end[1:] for end in SUFFIXES)})$", re.IGNORECASE)

Object = tuple[str, list[float], int]  # class, VOC's corners, whether it is difficult
Read = list[tuple[dict[str, Any], list[Object]]]  # file name and size of each image, and its objects


class Source(NamedTuple):
    """A set: the images ``images/NAME.jpg``, or of another format, with ``xmls/NAME.xml``, for each of ``names``."""

    name: str
    xmls: Path
    images: Path
    names: tuple[str, ...]
    json_file: Path


class _Fault(Exception):
    """What is wrong with one image of a set: the kind, as in ``Problem``, and a detail of this image if needed."""


def make_voc(names: Sequence[str] = PAPER_NAMES, force: bool = False, classes: str = "") -> list[str]:
    """Write ``<root>/VOC2007/instances_trainval.json`` and so on for ``names``; a line for each.

    names: of NAMES, or folders; sets in folders, see ``_sets_in``, get an entry in the catalog. classes: AUTO, all that
    there are in alphabetical order, or their names with commas between; by default AUTO where there is a folder, else
    VOC's. What a run would notice is printed. Raises DataError, before anything is written, for a name that is neither,
    for what ``read_set`` rejects and for a json that exists with other content (unless ``force``); and for a json that
    no run can use, such as one with boxes outside their images.
    """
    is_own = bool(classes) or not NAMES.keys() >= {*names}
    listed_once = dict.fromkeys(re.findall(r"[^,\s](?:[^,]*[^,\s])?", classes))
    known = [*CLASSES] if not is_own else [] if classes == AUTO else [*listed_once]
    sets = {one: read_set(one, known, is_own) for name in dict.fromkeys(names) for one in _sets_of(name)}
    every = [one for images in sets.values() for _, objects in images for one in objects]
    if not every:
        raise DataError(
            f"{', '.join(str(one.xmls) for one in sets)}: none of the XML files that the sets list has an object"
        )
    known = known or sorted({name for name, _, _ in every})
    # VOC's first pixel is 1; whoever writes 0 counts from there
    origin = 0 if is_own and any(min(corners[:2]) < 1 for _, corners, _ in every) else 1
    texts = {one.json_file: json.dumps(as_coco(one, images, known, origin)) for one, images in sets.items()}
    other = [str(path) for path, text in texts.items() if path.exists() and path.read_text() != text]
    if other and not force:
        raise DataError(f"exists with other content: {', '.join(other)}; remove it, or replace it with --force")
    reports = []
    for one, images in sets.items():
        if one.name not in NAMES:
            fields = {"json": from_root(one.json_file), "images": from_root(one.images)}
            enter(one.name, {**fields, "drop_empty_boxes": True})
        write_atomically(one.json_file, texts[one.json_file])
        read_coco(lookup(one.name), need_masks=False, say=say_now)  # as a run will
        difficult = [ignore for _, objects in images for *_, ignore in objects]
        counts = f"{len(images):,} images, {len(difficult):,} objects, {sum(difficult):,} of them difficult"
        reports.append(f"{one.name}: {counts}; {one.json_file}")
    trained, *_, tested = 2 * sorted((one.name for one in sets), key=lambda name: ("train" not in name, name))
    own = (
        f"{len(known)} classes: {listed(known, most=20)}",
        f"next: {CHECK.format(trained, tested)} MODEL.MASK_ON False",
    )
    return [*reports, *own * is_own]


def _sets_of(name: str) -> list[Source]:
    """The set of that name in NAMES, or those in a folder, or in the folders in it. Raises DataError for others."""
    root, (year, split) = datasets_root(), NAMES.get(name, ("", ""))
    needed = [root / year / part for part in ("Annotations", "JPEGImages", f"ImageSets/Main/{split}.txt")]
    missing = [f"  missing {path}" for path in needed if not path.exists()]
    if year and missing:
        raise DataError(
            f"{year} is not complete under {root} (set {ROOT_VARIABLE} to use another root): move or link "
            f"VOCdevkit/{year} there, {FIX}; or name the folder of an export of your own\n" + "\n".join(missing)
        )
    if year:
        xmls, images, listing = needed
        return [Source(name, xmls, images, _listed(listing), root / year / f"instances_{split}.json")]
    folder = next((path for path in (Path(name), root / name) if path.is_dir()), None)
    for places in ([folder], sorted(folder.iterdir())) if folder else ():
        if sets := [one for place in places for one in _sets_in(place)]:
            return sets
    raise DataError(
        (f"{folder} has no XML files" if folder else f"there is no folder '{name}', neither here nor in {root}, and no "
         f"set of VOC's of that name{did_you_mean(name, list(NAMES))}; known: {', '.join(NAMES)}")
        + "; expected a folder with Annotations/ beside JPEGImages/ or images/, or with XML files beside their images"
    )  # fmt: skip


def _sets_in(folder: Path) -> Iterator[Source]:
    """One for each list in ImageSets/Main/, else one of all XML files, in Annotations/ or beside the images."""
    xmls = next((folder / name for name in XMLS if (folder / name).is_dir()), folder)
    images = next((folder / name for name in IMAGES if xmls != folder and (folder / name).is_dir()), folder)
    stem = re.sub(r"[^\w.-]+", "_", "_".join(folder.resolve().parts[-1 - (folder.name in SHARES) :]))
    lists = {f"_{path.stem}": found for path in sorted(folder.glob("ImageSets/Main/*.txt")) if (found := _listed(path))}
    if every := sorted(str(path.relative_to(xmls))[:-4] for path in xmls.glob(f"{'**/' * (xmls != folder)}*.xml")):
        for end, names in (lists or {"": tuple(every)}).items():
            yield Source(stem + end, xmls, images, names, folder / f"instances{end}.json")


def _listed(path: Path) -> tuple[str, ...]:
    """The images in a list, without suffix; none of a list for one class, which says -1, 0 or 1 of each.

    Raises DataError for an empty list, and where an image is there twice.
    """
    names = [re.sub(ENDS, "", line.strip()) for line in path.read_text(errors="replace").splitlines() if line.strip()]
    if not names or len(set(names)) < len(names):
        raise DataError(f"{path}: {len(names)} ids, {len(set(names))} different; expected each image once; {FIX}")
    return () if all(re.search(r"\s(-1|0|1)$", name) for name in names) else tuple(names)


def read_set(source: Source, classes: Sequence[str], is_own: bool) -> Read:
    """What the XML files say. classes: none are all. is_own: they need no size.

    Raises DataError with every kind of fault: missing or broken files, unknown classes, boxes without area, images of
    another size than their XML says.
    """
    images, faults = [], defaultdict[str, list[dict[str, str]]](list)
    for name in track(source.names, f"reading {source.name}", len(source.names)):
        try:
            images.append(_read_image(source, name, classes, is_own))
        except _Fault as fault:
            kind, *details = fault.args
            faults[kind].append({"id": " ".join([name, *(f"({detail})" for detail in details)])})
    if faults:
        problems = [Problem("error", kind).add(*found) for kind, found in faults.items()]
        fix = "correct these files" if is_own else FIX + OWN
        raise DataError(f"{explain(source.xmls.parent, problems, most_lines=11)}\n  nothing was written; {fix}")
    return images


def _read_image(source: Source, name: str, classes: Sequence[str], is_own: bool) -> tuple[dict[str, Any], list[Object]]:
    xml = source.xmls / f"{name}.xml"
    if not xml.is_file():  # a pipe would keep its reader waiting
        raise _Fault(f"images without a file in {source.xmls.name}")
    try:
        tree = ElementTree.parse(xml).getroot()
        images = _images_of(source.images, name, tree.findtext("filename", ""))
        if not (path := next((path for path in images if path.is_file()), None)):
            raise _Fault(f"images without a file in {source.images.name}")
        with Image.open(path) as opened:
            stored = opened.size
            is_turned = is_own and turn_of(opened)[2]
    except (ElementTree.ParseError, LookupError) as broken:
        raise _Fault("broken XML files", f"{xml}:{getattr(broken, 'position', (1,))[0]}: {broken}") from None
    except UNREADABLE as unreadable:  # no image, a damaged one, or no leave
        raise _Fault("files that cannot be read", unreadable) from None
    if tree.tag != "annotation":
        raise _Fault("XML files in another format than VOC's", f"<{tree.tag}>, expected <annotation>")
    size = upright = stored[::-1] if is_turned else stored
    if not is_own or tree.findtext("size/width", "").strip(" 0"):
        size = int(_number(tree, "size/width")), int(_number(tree, "size/height"))
    if size not in (stored, upright):
        raise _Fault("images of another size than their XML says", "{} x {}, not {} x {}".format(*stored, *size))
    entry = {"file_name": os.path.relpath(path, source.images), "width": size[0], "height": size[1]}
    return entry, [_object(one, classes) for one in tree.findall("object")]


def _images_of(folder: Path, name: str, file_name: str) -> Iterator[Path]:
    """The image that an XML file is called after, of any format, else the one that it names, on whatever machine."""
    for base in (folder / name, folder / Path(name).name):  # XML files may lie in subfolders that images do not have
        named = base.with_name(re.split(r"[\\/]", file_name.strip())[-1] or base.name)
        yield from [*[named] * (named.stem == base.name), *(Path(f"{base}{end}") for end in SUFFIXES), named]


def _object(node: ElementTree.Element, classes: Sequence[str]) -> Object:
    name = node.findtext("name", "").strip()
    if not name or (classes and name not in classes):
        raise _Fault("XML files with a class that is not expected", f"'{name}'{did_you_mean(name, [*classes])}")
    left, top, right, bottom = corners = [_number(node, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
    if right - left <= -1 or bottom - top <= -1:
        raise _Fault("XML files with a box without area", f"{name} from {left:g}, {top:g} to {right:g}, {bottom:g}")
    is_difficult = bool(node.findtext("difficult", "").strip()) and _number(node, "difficult") != 0  # may be left out
    return name, corners, int(is_difficult)


def _number(node: ElementTree.Element, path: str) -> float:
    """A finite number; not all coordinates of 2012 are whole ones."""
    text = node.findtext(path)
    with suppress(ValueError):
        if math.isfinite(number := float(text or "")):
            return number
    raise _Fault("XML files without a number where one belongs", f"{node.tag}/{path}: {text}")


def as_coco(source: Source, read: Read, classes: Sequence[str], origin: int) -> dict[str, Any]:
    """The content of a COCO json, in the order of the set; ids count from 1.

    VOC's corners are pixels that belong to the box, counted from ``origin``, 1, so x and y are xmin - 1 and ymin - 1,
    and width and height reach to xmax and ymax (as in detectron2). Difficult objects have ``ignore`` 1 and are no
    crowds.
    """
    annotations: list[dict[str, Any]] = []
    for image, (_, objects) in enumerate(read, start=1):
        for name, (left, top, right, bottom), ignore in objects:
            x, y = left - origin, top - origin
            width, height = right - x, bottom - y
            annotations.append({
                "id": len(annotations) + 1, "image_id": image, "category_id": classes.index(name) + 1,
                "bbox": [x, y, width, height], "area": width * height, "iscrowd": 0, "ignore": ignore,
            })  # fmt: skip
    images = [{"id": number, **image} for number, (image, _) in enumerate(read, start=1)]
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, start=1)]
    info = {"description": "PASCAL {} {}".format(*NAMES[source.name]) if source.name in NAMES else source.name}
    return {"info": info, "images": images, "annotations": annotations, "categories": categories}
