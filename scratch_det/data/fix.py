"""A repaired copy of a COCO json beside it, and what a run then says about it."""

import json
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

from scratch_det.data.catalog import CHECK, DatasetEntry, catalog_entries, datasets_root, derived, enter, lookup
from scratch_det.data.checks import explain, how_to_mend
from scratch_det.data.coco import inspect_coco
from scratch_det.data.coco_json import load_json
from scratch_det.data.repair import Wishes, encode, repair
from scratch_det.errors import DataError
from scratch_det.files import gc_paused, write_atomically


def fix(source: str, images: Path | None, dry_run: bool, force: bool, **flags: Any) -> None:
    """Write NAME_fixed beside the json of ``source``, a data set of the catalog or a file; print what was mended.

    images: the folder of a file's images. dry_run: write nothing. flags: fields of ``Wishes``. Raises DataError, before
    anything is written, for a json that cannot be read and for a copy that is there (unless ``force``); and at the end
    where errors are left.
    """
    entry, is_listed = find(source, images)
    name, path = f"{entry.name}_fixed", entry.json_file.with_name(f"{entry.json_file.stem}_fixed.json")
    with gc_paused():
        content = load_json(entry.json_file, entry.json_file.read_bytes())
        if path.exists() and not (force or dry_run):
            raise DataError(f"{path} exists; --force replaces it")
        wishes = Wishes(entry.image_root, **flags)
        done = repair(content, wishes)
        has_masks = any(one.get("segmentation") for one in content.get("annotations", ()))
        has_keypoints = any(one.get("keypoints") for one in content["categories"])
        text = encode(content) if done and not dry_run else b""
        if done:
            del content
    print(*done or [f"{entry.json_file}: nothing is to be mended without a flag; --help lists them"], sep="\n")
    if dry_run:
        return
    if done:
        if is_listed:  # first: an entry of that name may be another json's
            enter(name, derived(entry.name, path))
        write_atomically(path, text)
        entry = replace(entry, name=name, json_file=path)
        print(f"written: {path}" + (f", {name} in {datasets_root() / 'catalog.yaml'}" if is_listed else ""))
    left = inspect_coco(entry, has_masks, has_keypoints)[1]
    left = [one if one.mend else replace(one, mend=None) for one in left]  # what needs a flag can still be mended
    if any(one.severity == "error" for one in left):
        for flag in () if done else ("boxes_from_masks", "boxes_as_masks", "no_crowds"):  # in the order of REPAIRS
            for line in repair(content, Wishes(**{**wishes._asdict(), flag: True})):
                print(f"  with --{flag.replace('_', '-')}: {line}")
        raise DataError(f"what is left, in {explain(entry.json_file, left, most_lines=12)}")
    print(f"{entry.json_file} reads without errors", *(f"  notice: {one}" for one in left), sep="\n")
    for line in how_to_mend(entry.name if is_listed else str(entry.json_file), left):
        print(f"  {line}")
    if is_listed:
        masks = "" if has_masks else " MODEL.MASK_ON False"
        print("next, with your test set as DATASETS.TEST:", CHECK.format(entry.name, entry.name) + masks)
    else:
        fields = {"json": str(entry.json_file.resolve()), "images": str(entry.image_root.resolve())}
        line, catalog = f"{entry.name}: {json.dumps(fields)}", datasets_root() / "catalog.yaml"
        print(f"next: echo {quote(line)} >> {quote(str(catalog))}")


def find(source: str, images: Path | None) -> tuple[DatasetEntry, bool]:
    """The data set, and whether a catalog has it."""
    entries, places = catalog_entries(), [Path(source), datasets_root() / source]
    file = next((path for path in places if path.is_file()), None)
    if source not in entries and not file and Path(source).suffix:
        raise DataError(
            f"no file {source}: tried {' and '.join(dict.fromkeys(str(path.absolute()) for path in places))}"
        )
    if source not in entries and file:
        if images or not (names := [name for name, (fields, _) in entries.items() if _is_of(fields, file)]):
            return DatasetEntry(file.stem, file, images or file.parent), False
        source = names[0]
    if images:
        raise DataError(f"--images {images} is for a FILE; the catalog tells where the images of {source} are")
    return lookup(source), True


def _is_of(fields: object, file: Path) -> bool:
    return isinstance(fields, dict) and (datasets_root() / str(fields.get("json"))).resolve() == file.resolve()
