"""Random subsets of a COCO-format data set, each inside the next larger one, as json files that say what they are."""

import json
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scratch_det.data.catalog import DatasetEntry, catalog_entries, datasets_root, lookup
from scratch_det.data.coco import gc_paused
from scratch_det.errors import DataError, listed
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

    def __str__(self) -> str:
        counts = f"{self.images:,} images, {self.objects:,} objects, {self.classes} classes"
        return f"{self.name}: {counts}; {self.json_file} (ids sha256 {self.ids_sha256[:12]})"


def make_subsets(source: str, sizes: Sequence[int], seed: int = 0, keep_lost: bool = False) -> list[Subset]:
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
        names = {category["id"]: str(category["name"]) for category in content["categories"]}
        order = draw_order(images, seed)
        subsets = [_describe(entry, order[:size], objects, names) for size in sorted(set(sizes), reverse=True)]
        for subset in subsets:
            if subset.lost and not keep_lost:
                better = _next_seed(objects, min(sizes), seed)
                fix = f"--seed {better} keeps all" if better is not None else "choose a larger size"
                raise DataError(
                    f"{subset.name} with seed {seed} would lose {len(subset.lost)} classes: "
                    f"{listed(subset.lost)}; {fix}, or accept it with --allow-lost-classes"
                )
            path = subset.json_file
            if path.exists() and json.loads(path.read_bytes()).get("subset", {}).get("ids_sha256") != subset.ids_sha256:
                raise DataError(
                    f"{path} exists and holds other images; remove it, or draw with the seed it was made with"
                )
        for subset in subsets:
            chosen = set(order[: subset.images])
            parts = {
                **content,
                "subset": {"source": source, "seed": seed, "images": subset.images, "ids_sha256": subset.ids_sha256},
                "images": [image for number, image in images.items() if number in chosen],
                "annotations": [one for number in images if number in chosen for one in objects[number]],
            }
            write_atomically(subset.json_file, json.dumps(parts))
            _enter(subset, source)
    return subsets


def draw_order(ids: Iterable[int], seed: int) -> list[int]:
    """All image ids in the order that ``seed`` draws; their order in the json has no part in it."""
    return np.random.default_rng(seed).permutation(np.array(sorted(ids))).tolist()


def _classes(objects: dict[int, list[dict[str, Any]]], ids: Iterable[int]) -> set[int]:
    """The category ids of the images ``ids``."""
    return {one["category_id"] for number in ids for one in objects[number]}


def _describe(
    entry: DatasetEntry, chosen: list[int], objects: dict[int, list[dict[str, Any]]], names: dict[int, str]
) -> Subset:
    count, classes = len(chosen), _classes(objects, chosen)
    size = f"{count / 1000:g}k" if count >= 1000 and count % 100 == 0 else str(count)  # 35k, 3.5k, 250
    lost = [names[number] for number in sorted(_classes(objects, objects) - classes)]
    digest = sha256("".join(f"{number}\n" for number in sorted(chosen)).encode()).hexdigest()
    json_file = entry.json_file.with_name(f"{entry.json_file.stem}_{size}.json")
    held = sum(len(objects[number]) for number in chosen)
    return Subset(f"{entry.name}_{size}", json_file, count, held, len(classes), lost, digest)


def _next_seed(objects: dict[int, list[dict[str, Any]]], size: int, seed: int) -> int | None:
    """The first seed after ``seed`` whose subset of ``size`` images has every class."""
    every = _classes(objects, objects)
    seeds = range(seed + 1, seed + 1 + MOST_SEEDS)
    return next((other for other in seeds if _classes(objects, draw_order(objects, other)[:size]) == every), None)


def _enter(subset: Subset, source: str) -> None:
    """Add a line to ``<root>/catalog.yaml``, the source's with another json, unless a catalog has the name already."""
    entries, catalog = catalog_entries(), datasets_root() / "catalog.yaml"
    if subset.name not in entries:
        fields, _ = entries[source]
        line = {**fields, "json": str(Path(fields["json"]).with_name(subset.json_file.name))}
        written = catalog.read_text() if catalog.is_file() else ""
        end = "\n" if written and not written.endswith("\n") else ""
        write_atomically(catalog, f"{written}{end}{subset.name}: {json.dumps(line)}\n")
