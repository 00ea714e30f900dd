"""Names of data sets: from a YAML catalog to the json file and image folder on disk, or to a folder of classes."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scratch_det.errors import DataError, did_you_mean, not_yaml

BUILT_IN = Path(__file__).with_name("catalog.yaml")
ROOT_VARIABLE = "DETECTRON2_DATASETS"  # detectron2's own variable, so that one tree serves both
MAKERS = {  # how a name begins -> the tool that makes such a data set
    "digits_": "prepare_digits.py",
    "coco_2017_train_": "prepare_coco_subsets.py",
    "voc_": "prepare_voc.py {name}",
}
VOC_AP = ("voc_area", "voc_11point")  # PASCAL VOC's box AP from 2010 on, and before


@dataclass(frozen=True)
class DatasetEntry:
    """One catalog entry, its paths resolved against the datasets root.

    drop_empty_boxes: boxes without width or height are left out of training instead of being an error.
    ap: one of VOC_AP, or None for COCO's.
    """

    name: str
    json_file: Path
    image_root: Path
    drop_empty_boxes: bool = False
    ap: str | None = None


@dataclass(frozen=True)
class FolderEntry:
    """A catalog entry of classified images: ``root`` has a folder for each class."""

    name: str
    root: Path


def datasets_root() -> Path:
    """The folder that catalog paths start from: ``$DETECTRON2_DATASETS``, else ``./datasets``."""
    return Path(os.environ.get(ROOT_VARIABLE, "datasets"))


def lookup(name: str) -> DatasetEntry:
    """Resolve a data set name.

    Entries of ``<root>/catalog.yaml`` come before the built-in ones. Raises DataError for an unknown name, a
    malformed entry, or when the json or the image folder is missing (with the expected tree and what was found).
    """
    fields, catalog, [json_file, images] = _find(name, {"json": "PATH", "images": "FOLDER"}, ("ap", "drop_empty_boxes"))
    if (ap := fields.get("ap")) not in (None, *VOC_AP):
        raise DataError(
            f"{catalog}: entry '{name}' has ap {ap!r}; expected {' or '.join(VOC_AP)}, or no such field for COCO's AP"
            f"{did_you_mean(str(ap), list(VOC_AP))}"
        )
    return DatasetEntry(name, json_file, images, bool(fields.get("drop_empty_boxes")), ap)


def lookup_folder(name: str) -> FolderEntry:
    """Resolve the name of a folder of classified images. Raises DataError as ``lookup``."""
    return FolderEntry(name, *_find(name, {"folder": "PATH"})[2])


def catalog_entries() -> dict[str, tuple[Any, Path]]:
    """Every name that a catalog has, complete on disk or not -> its fields as written, and the catalog's file."""
    entries: dict[str, tuple[Any, Path]] = {}
    for path in (BUILT_IN, datasets_root() / "catalog.yaml"):
        try:
            content = yaml.safe_load(path.read_text()) if path.is_file() else None
        except yaml.YAMLError as error:
            raise DataError(not_yaml(path, error)) from None
        if not isinstance(content or {}, dict):
            raise DataError(f"{path}: expected 'name: {{json: PATH, images: FOLDER}}' entries, found {content!r}")
        entries |= {name: (fields, path) for name, fields in (content or {}).items()}
    return entries


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
        images = "classified images" if "folder" in needed else "images with objects"
        raise DataError(
            f"{catalog}: entry '{name}' is {fields!r}; expected {images}, {expected}, "
            f"known fields: {', '.join(sorted([*needed, *optional]))}"
        )
    paths = [root / str(fields[key]) for key in needed]
    is_there = {
        f"{path}" if key == "json" else f"{path}/": path.is_file() if key == "json" else path.is_dir()
        for key, path in zip(needed, paths, strict=True)
    }
    if not all(is_there.values()):
        found = sorted(path.name for path in root.iterdir()) if root.is_dir() else None
        maker = next((tool for start, tool in MAKERS.items() if name.startswith(start)), None)
        hint = f"; make it with: python tools/{maker.format(name=name)}" if maker else ""
        raise DataError(
            f"data set '{name}' is not complete under {root} (set {ROOT_VARIABLE} to use another root){hint}\n"
            + "".join(f"  {'found   ' if there else 'missing '} {path}\n" for path, there in is_there.items())
            + f"  {root} "
            + ("does not exist" if found is None else f"holds: {', '.join(found[:12]) or 'nothing'}")
        )
    return fields, catalog, paths
