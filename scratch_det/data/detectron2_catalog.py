"""Data sets from this repository's catalogs in detectron2's DatasetCatalog, and from there to here."""

import json
from collections.abc import Iterable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.data.datasets.coco import convert_to_coco_dict

from scratch_det.data.catalog import DatasetEntry, catalog_entries, lookup
from scratch_det.data.coco import read_coco
from scratch_det.errors import DataError
from scratch_det.files import cache_folder, locked, write_atomically


def register_data_sets(names: Iterable[str] | None = None) -> None:
    """Register data sets of the catalogs in ``DatasetCatalog`` and ``MetadataCatalog``, each at most once.

    names: of the data sets; None for all that are complete on disk. A name that detectron2 has already stays its own.
    Raises DataError, as ``scratch_det.data.catalog.lookup``, for one of ``names`` that is not there.
    """
    for name in catalog_entries() if names is None else names:
        if name in DatasetCatalog.list():
            continue
        try:
            entry = lookup(name)
        except DataError:
            if names is None:
                continue
            raise
        DatasetCatalog.register(name, partial(_load, entry))
        about = {"json_file": str(entry.json_file), "image_root": str(entry.image_root)}
        MetadataCatalog.get(name).set(**about, evaluator_type="coco")


def _load(entry: DatasetEntry) -> list[dict[str, Any]]:
    """A data set in detectron2's form; sets classes, and keypoints where the json has any, in its metadata."""
    meta, name = MetadataCatalog.get(entry.name), entry.name
    records = load_coco_json(str(entry.json_file), str(entry.image_root), name)
    if any("keypoints" in one for record in records for one in record["annotations"]):
        data = read_coco(entry, need_masks=False, need_keypoints=True)
        pairs = [(k, partner) for k, partner in enumerate(data.flip_indices or ()) if k < partner]
        names = data.keypoints
        meta.set(keypoint_names=list(names), keypoint_flip_map=[(names[a], names[b]) for a, b in pairs])
    return records


def entry_of(name: str) -> DatasetEntry | None:
    """A data set that was registered in ``DatasetCatalog``, for ``scratch_det.data.catalog``; None where it is not.

    One without a json and an image folder in its metadata (``register_coco_instances`` leaves both there) is written as
    COCO json into the cache, with the image names that the registered function gives. Raises DataError when the json is
    missing, and when the function or the conversion of what it returns fails.
    """
    if name not in DatasetCatalog.list():
        return None
    about, where = MetadataCatalog.get(name), f"data set '{name}' of detectron2's DatasetCatalog"
    file, images = about.get("json_file"), about.get("image_root")
    if file and images is not None:
        if not Path(file).is_file():
            raise DataError(f"{where}: {file} is missing; correct its path")
        return DatasetEntry(name, Path(file), Path(images), paths_outside=not images)
    try:
        content = convert_to_coco_dict(name)
    except Exception as error:  # of anybody's function: detectron2's own raise FileNotFoundError without their files
        raise DataError(
            f"{where}: it cannot be read as COCO json ({type(error).__name__}: {error}); correct the function that is "
            "registered, its files, or thing_classes in its metadata"
        ) from error
    if about.get("keypoint_names"):  # which the conversion leaves out
        for category in content["categories"]:
            category |= {"keypoints": list(about.keypoint_names), "flip_map": about.get("keypoint_flip_map") or []}
    text = json.dumps({key: content.get(key, []) for key in ("images", "annotations", "categories")})
    # The digest in its name: other content is another file, so that no run finds a changed one.
    path = cache_folder() / "detectron2" / f"{name}-{sha256(text.encode()).hexdigest()[:16]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock")):  # all ranks get here at the same time
        if not path.is_file():
            write_atomically(path, text)
    return DatasetEntry(name, path, Path(), paths_outside=True)
