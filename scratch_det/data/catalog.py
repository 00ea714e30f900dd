"""The catalog of data sets: from a name to its files on disk, and the list of images of a classification data set.

Needs no torch.
"""

import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from scratch_det.errors import DataError, did_you_mean, listed, quoted
from scratch_det.files import write_atomically
from scratch_det.log import track
from scratch_det.reading import read_yaml

BUILT_IN = Path(__file__).with_name("catalog.yaml")
ROOT_VARIABLE = "DETECTRON2_DATASETS"  # detectron2's own variable, so that one tree serves both
DOWNLOAD = "download it as datasets/README.md shows"
MAKERS = {  # how a name begins -> how to get such a data set
    "digits_train_": "make it with: scratch-det data digits, then "
    "scratch-det data subsets --dataset digits_train --sizes 120,40,12",
    "digits_": "make it with: scratch-det data digits",
    "coco_2017_train_": "make it with: scratch-det data subsets",
    "voc_": "make it with: scratch-det data voc {name}",
    **dict.fromkeys(("coco_", "keypoints_coco_", "imagenet_"), DOWNLOAD),
}
SWITCHES = ("drop_empty_boxes", "drop_objects_without_mask", "paths_outside")  # fields that are true or false
CHECK = """scratch-det check --images --config-file configs/Digits/quickstart.yaml \\
    DATASETS.TRAIN "('{0}',)" DATASETS.TEST "('{1}',)" OUTPUT_DIR output/{0}"""  # what to do with a new data set
VOC_AP = ("voc_area", "voc_11point")  # PASCAL VOC's box AP from 2010 on, and before
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's IMG_EXTENSIONS


@dataclass(frozen=True)
class DatasetEntry:
    """A catalog entry of images with objects; its paths start at the datasets root.

    drop_empty_boxes: boxes without width or height are left out of training instead of being an error.
    drop_objects_without_mask: where a run needs masks, they are left out instead of being an error.
    ap: one of VOC_AP, or None for COCO's AP.
    paths_outside: names of image files may be absolute or have "..", and so lead out of ``image_root``.
    """

    name: str
    json_file: Path
    image_root: Path
    drop_empty_boxes: bool = False
    ap: str | None = None
    paths_outside: bool = False
    drop_objects_without_mask: bool = False


@dataclass(frozen=True)
class FolderEntry:
    """A catalog entry of classified images: ``root`` has a folder for each class."""

    name: str
    root: Path


@dataclass(frozen=True)
class ImageFolder:
    """Classified images in ImageNet's layout, ``<root>/<class>/**/<image>``, which torchvision's ImageFolder reads too.

    classes: the folders' names in alphabetical order; the index of a name is its label. images: path below the root
    and label, in the order of classes and paths. digest: SHA-256 of the paths; the images themselves are not read.
    """

    entry: FolderEntry
    classes: list[str]
    images: list[tuple[str, int]]
    digest: str

    def recorded(self, _: Any) -> dict[str, Any]:
        """What a run notes of it."""
        return {"files_sha256": self.digest, "images": len(self.images)}


def datasets_root() -> Path:
    """The folder that the catalog's paths start at: ``$DETECTRON2_DATASETS``, else ``./datasets``."""
    return Path(os.environ.get(ROOT_VARIABLE, "datasets"))


def lookup(name: str) -> DatasetEntry:
    """The entry of images with objects that has this name.

    An entry of ``<root>/catalog.yaml`` replaces a built-in one. Raises DataError for an unknown name, for a malformed
    entry, and when the json or the image folder is missing (the message has the expected paths and what was found).
    A name that no catalog has is looked up in detectron2's DatasetCatalog, once a project has imported that.
    """
    if "detectron2.data" in sys.modules and name not in catalog_entries():
        from scratch_det.data.detectron2_catalog import entry_of

        if entry := entry_of(name):
            return entry
    fields, catalog, [json_file, images] = _find(name, {"json": "PATH", "images": "FOLDER"}, ("ap", *SWITCHES))
    if (ap := fields.get("ap")) not in (None, *VOC_AP):
        raise DataError(
            f"{catalog}: entry '{name}' has ap {ap!r}; expected {' or '.join(VOC_AP)}, or no such field for COCO's AP"
            f"{did_you_mean(str(ap), list(VOC_AP))}"
        )
    return DatasetEntry(name, json_file, images, ap=ap, **{key: bool(fields.get(key)) for key in SWITCHES})


def lookup_folder(name: str) -> FolderEntry:
    """The entry of classified images that has this name. Raises DataError as ``lookup``."""
    return FolderEntry(name, *_find(name, {"folder": "PATH"})[2])


def catalog_entries() -> dict[str, tuple[Any, Path]]:
    """Every name in the catalogs, whether on disk or not -> its fields as written, and the catalog's file."""
    entries: dict[str, tuple[Any, Path]] = {}
    for path in (BUILT_IN, datasets_root() / "catalog.yaml"):
        content = read_yaml(path) if path.exists() else None
        if not isinstance(content or {}, dict):
            raise DataError(f"{path}: expected 'name: {{json: PATH, images: FOLDER}}' entries, found {content!r}")
        entries |= {name: (fields, path) for name, fields in (content or {}).items()}
    return entries


def enter(name: str, fields: Mapping[str, Any]) -> None:
    """Add a line to ``<root>/catalog.yaml``, unless a catalog has one with this json.

    Raises DataError where the file has the name for another json; a built-in entry is replaced by the line.
    """
    entries, catalog = catalog_entries(), datasets_root() / "catalog.yaml"
    known, where = entries.get(name, ({}, None))
    if isinstance(known, dict) and known.get("json") == fields["json"]:
        return
    if where == catalog:
        raise DataError(
            f"{catalog}: '{name}' is {known} already, and would be {dict(fields)}; rename or remove it there"
        )
    written = catalog.read_text() if catalog.is_file() else ""
    end = "\n" if written and not written.endswith("\n") else ""
    line = yaml.safe_dump({name: dict(fields)}, default_flow_style=None, sort_keys=False, width=math.inf)
    write_atomically(catalog, f"{written}{end}{line}")


def from_root(path: Path) -> str:
    """A path as the catalog has it: from the datasets root where it lies in there."""
    path, root = (Path(os.path.abspath(one)) for one in (path, datasets_root()))  # without .., links as they are
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def derived(source: str, json_file: Path) -> dict[str, Any]:
    """The fields of ``source`` with a json beside its own."""
    fields, _ = catalog_entries()[source]
    return {**fields, "json": str(Path(fields["json"]).with_name(json_file.name))}


def _find(name: str, needed: dict[str, str], optional: tuple[str, ...] = ()) -> tuple[dict[str, Any], Path, list[Path]]:
    """The fields of an entry, its catalog and the paths of its ``needed`` fields; raises DataError as ``lookup``.

    needed: field -> what it holds, in a word.
    """
    entries, root = catalog_entries(), datasets_root()
    expected = f"{{{', '.join(f'{key}: {value}' for key, value in needed.items())}}}"
    if name not in entries:
        raise DataError(
            f"data set '{name}' is not in the catalog{did_you_mean(name, list(entries))}\n"
            f"  known: {', '.join(sorted(entries))}\n"
            f"  to add it, write into {root / 'catalog.yaml'}:  {name}: {expected}"
        )
    fields, catalog = entries[name]
    if not isinstance(fields, dict) or not needed.keys() <= fields.keys() <= {*needed, *optional}:
        images, asked, other, command = "images with objects", "json", "folder", "pretrain"
        if "folder" in needed:
            images, asked, other, command = "classified images", "folder", "json", "train"
        is_other = isinstance(fields, dict) and other in fields and asked not in fields
        hint = f"; one with {other} is for scratch-det {command}" if is_other else ""
        raise DataError(
            f"{catalog}: entry '{name}' is {fields!r}; expected {images}, {expected}, "
            f"known fields: {', '.join(sorted([*needed, *optional]))}{hint}"
        )
    paths = {key: root / str(fields[key]) for key in needed}
    is_there = {key: path.is_file() if key == "json" else path.is_dir() for key, path in paths.items()}
    if not all(is_there.values()):
        found = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
        holds = f"holds: {listed(found, most=12) or 'nothing'}" if root.is_dir() else "does not exist"
        maker = next((tool for start, tool in MAKERS.items() if name.startswith(start)), None)
        hint = f"; {maker.format(name=quoted(name))}" if maker else ""
        raise DataError(
            f"data set '{name}' is not complete under {root} (set {ROOT_VARIABLE} to use another root){hint}\n"
            + "".join(
                f"  {'found   ' if is_there[key] else 'missing '} {path}{'' if key == 'json' else '/'}\n"
                for key, path in paths.items()
            )
            + f"  {root} {holds}"
        )
    return fields, catalog, list(paths.values())


def read_image_folder(entry: FolderEntry) -> ImageFolder:
    """List the images. Raises DataError for fewer than two classes, and for a class without an image."""
    root = entry.root
    children = sorted(child.name for child in os.scandir(root) if not child.name.startswith("."))
    classes = [name for name in children if (root / name).is_dir()]
    if len(classes) < 2:
        raise DataError(
            f"{root} has {f'one folder, {classes[0]}' if classes else 'no folders'}; expected a folder for each of two "
            f"or more classes, {root}/<class>/<image>\n  it holds: {listed(children) or 'nothing'}"
        )
    images, empty = [], []
    for label, name in enumerate(track(classes, f"listing {entry.name} (classes)", len(classes))):
        found = sorted(_images(root, name))
        images += [(path, label) for path in found]
        empty += [] if found else [name]
    if empty:
        raise DataError(
            f"{root}: {len(empty)} of {len(classes)} class folders have no image, {listed(empty)}\n"
            f"  expected files ending in {' '.join(SUFFIXES)}; delete the folders, or fill them"
        )
    digest = sha256("\n".join(path for path, _ in images).encode(errors="surrogateescape")).hexdigest()
    return ImageFolder(entry, classes, images, digest)


def class_mismatch(first: ImageFolder, other: ImageFolder) -> str | None:
    """A message on the classes that only one of the two has; None when both have the same."""
    only = [
        f"only {one.entry.root} has {len(names)} classes, {listed(names)}"
        for one, another in ((first, other), (other, first))
        if (names := [name for name in one.classes if name not in set(another.classes)])
    ]
    return "; ".join([*only, "training and test data need the same class folders"]) if only else None


def _images(root: Path, name: str) -> Iterator[str]:
    """Paths below ``root`` of every image of class ``name``, those in subfolders too."""
    for folder, _, files in os.walk(root / name, followlinks=True):
        within = os.path.relpath(folder, root)
        yield from (f"{within}/{file}" for file in files if file.lower().endswith(SUFFIXES))
