"""Subsets of a COCO-format data set as json files that record their origin: random ones, or those with given ids."""

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scratch_det.data.catalog import derived, enter, lookup
from scratch_det.data.coco import read_coco
from scratch_det.data.coco_json import Arrays, load_json, rank
from scratch_det.errors import DataError, listed
from scratch_det.files import gc_paused, write_atomically
from scratch_det.log import say_now

# The paper's 35k images are "equivalent to the older val35k": the 35,504 images of train2017 that come from val2014,
# whose other 5,000 are val2017. Without the annotations of 2014 a random draw stands in for them.
COCO, VAL35K, VAL2014 = "coco_2017_train", "35k", "instances_val2014.json"
MOST_SEEDS = 1000  # tried to find one that keeps every class


class Subset(NamedTuple):
    """One subset: the places of its images in the source, ascending, and numbers of objects and of classes with any.

    lost: names of the source's classes that have none here. ids_sha256: over the image ids, ascending. origin: the
    seed, or the file with the ids.
    """

    name: str
    json_file: Path
    places: list[int]
    objects: int
    classes: int
    lost: list[str]
    ids_sha256: str
    origin: dict[str, Any]

    @property
    def images(self) -> int:
        """How many."""
        return len(self.places)

    @property
    def chosen(self) -> str:
        """What chose the images, in words."""
        [(key, value)] = self.origin.items()
        is_stand_in = key == "seed" and self.name == f"{COCO}_{VAL35K}"
        return f"{key} {value}" + is_stand_in * (
            f", in the place of val35k: put COCO's {VAL2014} beside its json for the paper's images"
        )

    def __str__(self) -> str:
        counts = f"{self.images:,} images, {self.objects:,} objects, {self.classes} classes"
        return f"{self.name}: {counts}, of {self.chosen}; {self.json_file} (ids sha256 {self.ids_sha256[:12]})"


def make_subsets(
    source: str, sizes: Sequence[int], seed: int = 0, keep_lost: bool = False, ids_of: Mapping[str, Path] = {}
) -> list[Subset]:
    """Write subsets of data set ``source`` beside its json and enter them in the catalog; returns them, largest first.

    ``seed`` draws one order of all images, and a random subset is its first images. So it is part of every larger
    random subset, also of those that are made later. ``ids_of``: label -> a file with the ids of one, see ``read_ids``;
    35k of coco_2017_train has those of VAL2014 where that lies beside the json. Entries are copied as they are; what a
    run would notice in the source is printed. Raises DataError, before anything is written, for a source that is an
    error for a run without masks, for a size beyond the source's, for ids that the source does not have, for a class
    that a subset would lose (unless ``keep_lost``), and when another subset already has the same file.
    """
    entry = lookup(source)
    data = read_coco(entry, need_masks=False, say=say_now)
    has_class = np.zeros((len(data.images), len(data.classes)), bool)
    has_class[data.arrays["image"][data.arrays["order"]], data.arrays["label"][data.arrays["order"]]] = True
    with gc_paused():
        content = load_json(entry.json_file, entry.json_file.read_bytes())
        ids = [image["id"] for image in content["images"]]
        if wrong := [str(size) for size in sizes if not 0 < size <= len(ids)]:
            raise DataError(f"{source} has {len(ids):,} images: no subset of {', '.join(wrong)}; give other --sizes")
        by_id = sorted(range(len(ids)), key=lambda place: rank(ids[place]))
        seeded: dict[str, Any] = {"seed": seed}
        chosen = {label_of(size): (draw_order(by_id, seed)[:size], seeded) for size in sizes}
        val2014 = entry.json_file.with_name(VAL2014)
        files = {VAL35K: val2014} if source == COCO and VAL35K in chosen and val2014.is_file() else {}
        chosen |= {key: (read_ids(path, ids, source), {"ids": path.name}) for key, path in (files | {**ids_of}).items()}
        subsets = []
        for label, (places, origin) in sorted(chosen.items(), key=lambda item: -len(item[1][0])):
            path, is_there = entry.json_file.with_name(f"{entry.json_file.stem}_{label}.json"), has_class[places].any(0)
            lost = [data.classes[k] for k in np.flatnonzero(has_class.any(0) & ~is_there)]
            members = {*places}
            digest = sha256("".join(f"{ids[k]}\n" for k in by_id if k in members).encode()).hexdigest()
            objects = int(np.diff(data.arrays["first"])[places].sum())
            subset = Subset(f"{source}_{label}", path, sorted(members), objects, is_there.sum(), lost, digest, origin)
            if lost and not keep_lost:
                raise DataError(_lost_classes(subset, has_class, by_id, min(sizes, default=0)))
            there: Any = load_json(path, path.read_bytes()).get("subset") or {} if path.exists() else None
            if there is not None and there.get("ids_sha256") != digest:
                raise DataError(f"{path} exists and holds other images; remove it, or make it as it was made before")
            subsets.append(subset)
        for subset in subsets:
            enter(subset.name, derived(source, subset.json_file))
            write_atomically(subset.json_file, json.dumps(_content(subset, source, content, data.arrays)))
    return subsets


def _lost_classes(subset: Subset, has_class: np.ndarray, by_id: Sequence[int], smallest: int) -> str:
    """The message, with the next seed whose ``smallest`` subset keeps every class, if there is one."""
    seeds = range(seed + 1, seed + 1 + MOST_SEEDS) if (seed := subset.origin.get("seed")) is not None else ()
    needed = has_class.any(0).sum()
    better = (one for one in seeds if has_class[draw_order(by_id, one)[:smallest]].any(0).sum() == needed)
    fix = next((f"--seed {one} keeps all" for one in better), "choose more images")
    return (
        f"{subset.name} of {subset.chosen} would lose {len(subset.lost)} classes: {listed(subset.lost)}; {fix}, or "
        "accept it with --allow-lost-classes"
    )


def _content(subset: Subset, source: str, content: dict[str, Any], arrays: Arrays) -> dict[str, Any]:
    """The json: that of the source, with what belongs to these images."""
    about = {"source": source, **subset.origin, "images": subset.images, "ids_sha256": subset.ids_sha256}
    own = {**content, "subset": about, "images": [content["images"][k] for k in subset.places]}
    if "annotations" in content:
        order, first = arrays["order"], arrays["first"]
        own["annotations"] = [content["annotations"][n] for k in subset.places for n in order[first[k] : first[k + 1]]]
    return own


def label_of(size: int) -> str:
    """35k, 3.5k, 250."""
    return f"{size / 1000:g}k" if size >= 1000 and size % 100 == 0 else str(size)


def read_ids(path: Path, ids: Sequence[Any], source: str) -> list[int]:
    """Places in ``ids`` of a file's ids, once each: of a COCO json those that are there; or of a list, json or text.

    Raises DataError when there are none, when a list has an id that is not among ``ids``, or for other contents.
    """
    try:
        text = path.read_text()
        content: Any = json.loads(text) if text.lstrip()[:1] in ("{", "[") else text.split()
        of_images = isinstance(content, dict)
        found = [str(one["id"]) for one in content["images"]] if of_images else list(map(str, content))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: expected a COCO json or a list of image ids ({error!r})") from None
    places = {str(number): place for place, number in enumerate(ids)}
    unknown = [number for number in found if number not in places]
    if len(unknown) == len(found) or (unknown and not of_images):
        what = f"image {unknown[0]}, which {source} does not have" if unknown else "no image"
        raise DataError(f"{path} has {what}; expected a COCO json or a list of image ids, of its {len(ids):,} images")
    return list(dict.fromkeys(places[number] for number in found if number in places))


def draw_order(by_id: Sequence[int], seed: int) -> list[int]:
    """All images, given by rising id, in the order that ``seed`` draws."""
    return np.random.default_rng(seed).permutation(by_id).tolist()
