"""Random subsets of a COCO-format data set, each inside the next larger one, as json files that say what they are."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scratch_det.data.catalog import DatasetEntry, catalog_entries, datasets_root, lookup
from scratch_det.data.coco import gc_paused
from scratch_det.errors import DataError
from scratch_det.files import write_atomically

PAPER_SIZES = (35_000, 10_000, 3_500, 1_000)  # section 5.2 of the paper
MOST_SEEDS = 1000  # tried to find one that keeps every class


class Subset(NamedTuple):
    """What one subset is; ``ids_sha256`` is over its sorted image ids, one a line."""

    name: str
    json_file: Path
    images: int
    objects: int
    classes: int
    lost: list[str]
    ids_sha256: str


def make_subsets(
    source: str,
    sizes: Sequence[int],
    seed: int = 0,
    keep_lost: bool = False,
    say: Callable[[str], object] = print,
) -> list[Subset]:
    """Write subsets of data set ``source`` beside its json and enter them in the catalog; returns them, largest first.

    The images of a size are the first ones of an order that ``seed`` draws, so each subset lies in the larger ones, of
    whatever sizes, now or later. Raises DataError, before anything is written, for a size beyond the source's, for a
    class that a subset would lose (unless ``keep_lost``), and for another subset that has the same name.
    """
    entry = lookup(source)
    with gc_paused():
        content = json.loads(entry.json_file.read_bytes())
        images = {image["id"]: image for image in content["images"]}
        wrong = [size for size in sizes if not 0 < size <= len(images)]
        if wrong:
            raise DataError(
                f"{source} has {len(images):,} images: no subset of {', '.join(map(str, wrong))}; give other --sizes"
            )
        objects: dict[int, list[dict[str, Any]]] = {number: [] for number in images}
        for annotation in content["annotations"]:
            objects[annotation["image_id"]].append(annotation)
        order = draw_order(images, seed)
        found = []
        for size in sorted(set(sizes), reverse=True):
            chosen = order[:size]
            subset = describe(entry, content, objects, chosen)
            if subset.lost and not keep_lost:
                raise DataError(_explain_lost(subset, seed, next_seed(content, objects, sizes, seed)))
            found.append((subset, chosen))
        for subset, _ in found:
            _check_free(subset)
        for subset, chosen in found:
            write(subset, content, images, objects, chosen, {"source": source, "seed": seed})
            enter(subset, entry)
            say(
                f"{subset.name}: {subset.images:,} images, {subset.objects:,} objects, {subset.classes} classes; "
                f"{subset.json_file} (ids sha256 {subset.ids_sha256[:12]})"
            )
    return [subset for subset, _ in found]


def draw_order(ids: dict[int, Any], seed: int) -> list[int]:
    """All image ids in the order that ``seed`` draws; the order in the json has no part in it."""
    return np.random.default_rng(seed).permutation(np.array(sorted(ids))).tolist()


def label(size: int) -> str:
    """35000 -> 35k, 3500 -> 3.5k, 250 -> 250."""
    return f"{size / 1000:g}k" if size >= 1000 and size % 100 == 0 else str(size)


def describe(entry: DatasetEntry, content: dict[str, Any], objects: dict[int, list], chosen: Sequence[int]) -> Subset:
    """The subset of the images ``chosen``."""
    held = [annotation for number in chosen for annotation in objects[number]]
    classes = {annotation["category_id"] for annotation in held}
    everywhere = {annotation["category_id"] for annotations in objects.values() for annotation in annotations}
    names = {category["id"]: category["name"] for category in content["categories"]}
    size = label(len(chosen))
    json_file = entry.json_file.with_name(f"{entry.json_file.stem}_{size}.json")
    ids = "".join(f"{number}\n" for number in sorted(chosen))
    lost = [str(names[number]) for number in sorted(everywhere - classes)]
    digest = hashlib.sha256(ids.encode()).hexdigest()
    return Subset(f"{entry.name}_{size}", json_file, len(chosen), len(held), len(classes), lost, digest)


def next_seed(content: dict[str, Any], objects: dict[int, list], sizes: Sequence[int], seed: int) -> int | None:
    """The first seed after ``seed`` whose smallest subset has every class."""
    classes = {number: {annotation["category_id"] for annotation in held} for number, held in objects.items()}
    everywhere = set().union(*classes.values())
    for other in range(seed + 1, seed + 1 + MOST_SEEDS):
        if set().union(*(classes[number] for number in draw_order(objects, other)[: min(sizes)])) == everywhere:
            return other
    return None


def write(
    subset: Subset,
    content: dict[str, Any],
    images: dict[int, Any],
    objects: dict[int, list],
    chosen: Sequence[int],
    origin: dict[str, Any],
) -> None:
    """The subset's json, the source's order kept, with where it comes from under ``subset``."""
    wanted = set(chosen)
    record = {**origin, "images": subset.images, "ids_sha256": subset.ids_sha256}
    kept = {
        **{key: value for key, value in content.items() if key not in ("images", "annotations")},
        "subset": record,
        "images": [image for number, image in images.items() if number in wanted],
        "annotations": [annotation for number in images if number in wanted for annotation in objects[number]],
    }
    write_atomically(subset.json_file, json.dumps(kept))


def enter(subset: Subset, entry: DatasetEntry) -> None:
    """Add a line to ``<root>/catalog.yaml`` unless a catalog has the name already."""
    if subset.name in catalog_entries():
        return
    catalog = datasets_root() / "catalog.yaml"
    written = catalog.read_text() if catalog.is_file() else ""
    fields: dict[str, Any] = {"json": str(_from_root(subset.json_file)), "images": str(_from_root(entry.image_root))}
    fields.update({"drop_empty_boxes": True} if entry.drop_empty_boxes else {})
    fields.update({"ap": entry.ap} if entry.ap else {})
    line = f"{subset.name}: {json.dumps(fields)}\n"
    write_atomically(catalog, written + ("\n" if written and not written.endswith("\n") else "") + line)


def _from_root(path: Path) -> Path:
    root = datasets_root()
    return path.relative_to(root) if path.is_relative_to(root) else path.absolute()


def _check_free(subset: Subset) -> None:
    """A file of that name may only be the same subset."""
    if subset.json_file.exists():
        known = json.loads(subset.json_file.read_bytes()).get("subset", {}).get("ids_sha256")
        if known != subset.ids_sha256:
            raise DataError(
                f"{subset.json_file} exists and holds other images; remove it, or draw with the seed it was made with"
            )


def _explain_lost(subset: Subset, seed: int, better: int | None) -> str:
    mend = f"--seed {better} keeps all" if better is not None else "choose a larger size"
    return (
        f"{subset.name} with seed {seed} would lose {len(subset.lost)} classes: {', '.join(subset.lost[:5])}"
        f"{', ...' if len(subset.lost) > 5 else ''}; {mend}, or accept it with --allow-lost-classes"
    )
