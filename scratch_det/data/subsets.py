"""Subsets of a COCO-format data set as json files that record their origin: random ones, or those with given ids."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scratch_det.data.catalog import enter, lookup
from scratch_det.errors import DataError, listed
from scratch_det.files import gc_paused, write_atomically

PAPER_SIZES = (35_000, 10_000, 3_500, 1_000)  # section 5.2 of the paper
# The paper's 35k images are "equivalent to the older val35k": the 35,504 images of train2017 that come from val2014,
# whose other 5,000 are val2017. Without the annotations of 2014 a random draw stands in for them.
COCO, VAL35K, VAL2014 = "coco_2017_train", "35k", "instances_val2014.json"
MOST_SEEDS = 1000  # tried to find one that keeps every class


class Subset(NamedTuple):
    """One subset; ``lost`` has the names of classes without an object, ``ids_sha256`` is over its sorted image ids.

    origin: the seed, or the file with the ids.
    """

    name: str
    json_file: Path
    images: int
    objects: int
    classes: int
    lost: list[str]
    ids_sha256: str
    origin: str

    def __str__(self) -> str:
        counts = f"{self.images:,} images, {self.objects:,} objects, {self.classes} classes"
        return f"{self.name}: {counts}, of {self.origin}; {self.json_file} (ids sha256 {self.ids_sha256[:12]})"


def make_subsets(
    source: str,
    sizes: Sequence[int],
    seed: int = 0,
    keep_lost: bool = False,
    ids_of: Mapping[str, Path] | None = None,
) -> list[Subset]:
    """Write subsets of data set ``source`` beside its json and enter them in the catalog; returns them, largest first.

    ``seed`` draws one order of all images, and a random subset is its first images. So it is part of every larger
    random subset, also of those that are made later. ``ids_of``: label -> a file with the ids of one, see ``read_ids``;
    35k of coco_2017_train has those of VAL2014 where that lies beside the json.
    Raises DataError, before anything is written, for a size beyond the source's, for ids that the source does not have,
    for a class that a subset would lose (unless ``keep_lost``), and when another subset already has the same file.
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

        every, subsets = classes_of(images), []
        chosen_by_label = choose_images(source, json_file, images, sizes, seed, ids_of or {})
        for label, (chosen, origin) in sorted(chosen_by_label.items(), key=lambda item: -len(item[1][0])):
            path = json_file.with_name(f"{json_file.stem}_{label}.json")
            classes = classes_of(chosen)
            lost = [str(one["name"]) for one in content["categories"] if one["id"] in every - classes]
            digest = sha256("".join(f"{number}\n" for number in sorted(chosen)).encode()).hexdigest()
            count = sum(len(objects[number]) for number in chosen)
            words = ", ".join(f"{key} {value}" for key, value in origin.items())
            if (source, label) == (COCO, VAL35K) and "seed" in origin:
                words += (
                    f", in the place of val35k: put COCO's {VAL2014} beside {json_file.name} for the paper's images"
                )
            subset = Subset(f"{source}_{label}", path, len(chosen), count, len(classes), lost, digest, words)
            if lost and not keep_lost:
                seeds = range(seed + 1, seed + 1 + MOST_SEEDS) if "seed" in origin else ()
                better = (s for s in seeds if classes_of(draw_order(images, s)[: min(sizes)]) == every)
                fix = next((f"--seed {one} keeps all" for one in better), "choose more images")
                raise DataError(
                    f"{subset.name} of {words} would lose {len(lost)} classes: {listed(lost)}; {fix}, or accept it "
                    "with --allow-lost-classes"
                )
            if path.exists() and json.loads(path.read_bytes()).get("subset", {}).get("ids_sha256") != digest:
                raise DataError(f"{path} exists and holds other images; remove it, or make it as it was made before")
            subsets.append((subset, set(chosen), origin))
        for subset, chosen_ids, origin in subsets:
            parts = {
                **content,
                "subset": {"source": source, **origin, "images": subset.images, "ids_sha256": subset.ids_sha256},
                "images": [image for number, image in images.items() if number in chosen_ids],
                "annotations": [one for number in images if number in chosen_ids for one in objects[number]],
            }
            write_atomically(subset.json_file, json.dumps(parts))
            enter(subset.name, source, subset.json_file)
    return [subset for subset, _, _ in subsets]


def choose_images(
    source: str, json_file: Path, images: Collection[int], sizes: Sequence[int], seed: int, ids_of: Mapping[str, Path]
) -> dict[str, tuple[list[int], dict[str, Any]]]:
    """Label -> the ids of a subset and its origin, for the arguments of ``make_subsets``."""
    order = draw_order(images, seed)
    chosen: dict[str, tuple[list[int], dict[str, Any]]] = {}
    for size in sizes:
        label = f"{size / 1000:g}k" if size >= 1000 and size % 100 == 0 else str(size)  # 35k, 3.5k, 250
        chosen[label] = order[:size], {"seed": seed}
    if source == COCO and VAL35K in chosen and (val2014 := json_file.with_name(VAL2014)).is_file():
        ids_of = {VAL35K: val2014, **ids_of}
    for label, path in ids_of.items():
        chosen[label] = read_ids(path, images, source), {"ids": path.name}
    return chosen


def read_ids(path: Path, images: Collection[int], source: str) -> list[int]:
    """Ids in a file, once each: of a COCO json, those of its images that are among ``images``; or a list, json or text.

    Raises DataError when there are none, when a list has an id that is not among ``images``, or for other contents.
    """
    try:
        text = path.read_text()
        content: Any = json.loads(text) if text.lstrip()[:1] in ("{", "[") else text.split()
        of_images = isinstance(content, dict)
        found = [int(one["id"]) for one in content["images"]] if of_images else [int(one) for one in content]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: expected a COCO json or a list of image ids ({error!r})") from None
    unknown = [number for number in found if number not in images]
    if len(unknown) == len(found) or (unknown and not of_images):
        what = f"image {unknown[0]}, which {source} does not have" if unknown else "no image"
        raise DataError(f"{path} has {what}; expected ids of its {len(images):,} images")
    return list(dict.fromkeys(number for number in found if number in images))


def draw_order(ids: Iterable[int], seed: int) -> list[int]:
    """All image ids in the order that ``seed`` draws, whatever their order in the json."""
    return np.random.default_rng(seed).permutation(np.array(sorted(ids))).tolist()
