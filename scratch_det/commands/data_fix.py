"""Write a repaired copy of a COCO json beside it, NAME_fixed: ids, sizes, file names, polygons, crowds, categories.

    scratch-det data fix my_train
    scratch-det data fix path/to/train.json --images path/to/train --dry-run
    scratch-det data fix my_train --exif turned --boxes-as-masks

The json itself stays as it is. A data set of the catalog gets an entry for its copy there. The copy is then read as for
a run. Exit code 0: it reads without errors, or nothing was to be mended; 2: errors are left, or a user error.
"""

import json
from dataclasses import replace
from pathlib import Path
from shlex import quote

from scratch_det.command_line import ToolParser, exit_on_user_error
from scratch_det.data.catalog import CHECK, DatasetEntry, catalog_entries, datasets_root, derived, enter, lookup
from scratch_det.data.checks import explain, how_to_mend
from scratch_det.data.coco import inspect_coco
from scratch_det.data.coco_json import load_json
from scratch_det.data.repair import Wishes, encode, repair
from scratch_det.errors import DataError
from scratch_det.files import gc_paused, write_atomically


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


def build_parser() -> ToolParser:
    parser = ToolParser(description=__doc__)
    parser.add_argument("source", metavar="NAME|FILE", help="a data set of the catalog, or a COCO json")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="of FILE (the folder that it lies in)")
    parser.add_argument("--dry-run", action="store_true", help="only count what would be mended")
    parser.add_argument("--force", action="store_true", help="replace a copy that is there")
    drawn = "images that their EXIF tag turns: were the objects drawn on them as turned, or as stored in the file?"
    parser.add_argument("--exif", choices=("turned", "stored"), default="", help=drawn)
    parser.add_argument("--boxes-as-masks", action="store_true", help="objects without a mask get their box as mask")
    parser.add_argument("--boxes-from-masks", action="store_true", help="all boxes are computed from the masks")
    parser.add_argument("--no-crowds", action="store_true", help="iscrowd becomes 0: crowds are not trained on")
    parser.add_argument("--boxes-are-corners", action="store_true", help="all boxes are x0, y0, x1, y1")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    with exit_on_user_error():
        entry, is_listed = find(args.source, args.images)
        name, path = f"{entry.name}_fixed", entry.json_file.with_name(f"{entry.json_file.stem}_fixed.json")
        with gc_paused():
            content = load_json(entry.json_file, entry.json_file.read_bytes())
            if path.exists() and not (args.force or args.dry_run):
                raise DataError(f"{path} exists; --force replaces it")
            wishes = Wishes(entry.image_root, args.exif, args.boxes_as_masks, args.boxes_from_masks, args.no_crowds,
                            args.boxes_are_corners)  # fmt: skip
            done = repair(content, wishes)
            has_masks = any(one.get("segmentation") for one in content.get("annotations", ()))
            has_keypoints = any(one.get("keypoints") for one in content["categories"])
            text = encode(content) if done and not args.dry_run else b""
            if done:
                del content
        print(*done or [f"{entry.json_file}: nothing is to be mended without a flag; --help lists them"], sep="\n")
        if args.dry_run:
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
