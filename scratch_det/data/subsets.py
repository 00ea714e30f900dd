"""Random subsets of a COCO-format data set, each inside the next larger one, as json files that record their origin."""

import json
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scratch_det.data.catalog import catalog_entries, datasets_root, lookup
from scratch_det.data.coco import gc_paused
from scratch_det.errors import DataError, listed
from scratch_det.files import write_atomically

PAPER_SIZES = (35_000, 10_000, 3_500, 1_000)  # section 5.2 of the paper
MOST_SEEDS = 1000  # tried to find one that keeps every class


class Subset(NamedTuple):
    """One subset; ``lost`` has the names of classes without an object, ``ids_sha256`` is over its sorted image ids."""

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

    ``seed`` draws one order of all images, and a subset is its first images. So it is part of every larger subset, also
    of those that are made later. Raises DataError, before anything is written, for a size beyond the source's, for a
    class that a subset would lose (unless ``keep_lost``), and when another subset already has the same file.
    """
    json_file = lookup(source).json_file
    with gc_paused():
        content = json.loads(json_file.read_bytes())
        images = {image["id"]: image for image in content["images"]}
        if wrong := [str(size) for size in sizes if not 0 < size <= len(images)]:
            raise DataError(f"{source} has {len(images):,} images: no subset of {', '.join(wrong)}; give other --sizes")
        objects: dict[int, list[dict[str, Any]]] = {number: [] for number in images}
        for annotation in content["annotations"]:
            objects[annotation["image_id"]].append(annotation)

        def classes_of(ids: Iterable[int]) -> set[int]:
            return {one["category_id"] for number in ids for one in objects[number]}

        every, order, subsets = classes_of(images), draw_order(images, seed), []
        for size in sorted(set(sizes), reverse=True):
            label = f"{size / 1000:g}k" if size >= 1000 and size % 100 == 0 else str(size)  # 35k, 3.5k, 250
            path, chosen = json_file.with_name(f"{json_file.stem}_{label}.json"), order[:size]
            classes = classes_of(chosen)
            lost = [str(one["name"]) for one in content["categories"] if one["id"] in every - classes]
            digest = sha256("".join(f"{number}\n" for number in sorted(chosen)).encode()).hexdigest()
            count = sum(len(objects[number]) for number in chosen)
            subset = Subset(f"{source}_{label}", path, size, count, len(classes), lost, digest)
            if lost and not keep_lost:
                seeds = range(seed + 1, seed + 1 + MOST_SEEDS)
                better = (s for s in seeds if classes_of(draw_order(images, s)[: min(sizes)]) == every)
                fix = next((f"--seed {one} keeps all" for one in better), "choose a larger size")
                raise DataError(
                    f"{subset.name} with seed {seed} would lose {len(lost)} classes: {listed(lost)}; {fix}, or accept "
                    "it with --allow-lost-classes"
                )
            if path.exists() and json.loads(path.read_bytes()).get("subset", {}).get("ids_sha256") != digest:
                raise DataError(f"{path} exists and holds other images; remove it, or give the seed it was made with")
            subsets.append(subset)
        for subset in subsets:
            chosen_ids = set(order[: subset.images])
            parts = {
                **content,
                "subset": {"source": source, "seed": seed, "images": subset.images, "ids_sha256": subset.ids_sha256},
                "images": [image for number, image in images.items() if number in chosen_ids],
                "annotations": [one for number in images if number in chosen_ids for one in objects[number]],
            }
            write_atomically(subset.json_file, json.dumps(parts))
            _enter(subset, source)
    return subsets


def draw_order(ids: Iterable[int], seed: int) -> list[int]:
    """All image ids in the order that ``seed`` draws, whatever their order in the json."""
    return np.random.default_rng(seed).permutation(np.array(sorted(ids))).tolist()


def _enter(subset: Subset, source: str) -> None:
    """Add a line to ``<root>/catalog.yaml``, the source's with another json, unless a catalog has the name already."""
    entries, catalog = catalog_entries(), datasets_root() / "catalog.yaml"
    if subset.name not in entries:
        fields, _ = entries[source]
        line = {**fields, "json": str(Path(fields["json"]).with_name(subset.json_file.name))}
        written = catalog.read_text() if catalog.is_file() else ""
        end = "\n" if written and not written.endswith("\n") else ""
        write_atomically(catalog, f"{written}{end}{subset.name}: {json.dumps(line)}\n")
