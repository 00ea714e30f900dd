"""COCO data sets: annotation files that passed their checks, as arrays. Needs no torch."""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode

from scratch_det.data import checks
from scratch_det.data.catalog import DatasetEntry
from scratch_det.data.checks import Problem, fatal, notice
from scratch_det.data.coco_json import Arrays, by_image, read_json
from scratch_det.data.file_names import is_outside, other_spellings
from scratch_det.data.packed import load
from scratch_det.errors import DataError


class Images(Sequence[dict[str, Any]]):
    """The image entries (``id``, ``file_name``, ``width``, ``height``; pixels), made of ``arrays`` when asked for."""

    def __init__(self, arrays: Arrays):
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays["image_id"])

    def names(self) -> list[str]:
        """Every ``file_name``, faster than one by one."""
        text, at = self.arrays["file_name"].tobytes(), self.arrays["file_name_at"].tolist()
        return [text[a:b].decode("utf-8", "surrogatepass") for a, b in pairwise(at)]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        own = {name: int(self.arrays[name][index]) for name in ("width", "height")}
        return {"id": self.id(index), "file_name": _text(self.arrays, "file_name", index), **own}

    def id(self, index: int) -> Any:
        """The json's id of one."""
        has_own = "id_text" in self.arrays
        return json.loads(_text(self.arrays, "id_text", index)) if has_own else int(self.arrays["image_id"][index])


@dataclass(frozen=True)
class CocoDataset:
    """A validated data set.

    Attributes:
        categories: id and name of each, keypoints and flip_map where the json has them, ordered by id; a label is a
            0-based index into this list.
        arrays: what the json holds, see ``data/coco_json.py``; read-only, and shared by all processes.
        digest: SHA-256 of the annotation file's bytes.
        is_annotated: whether it has a list of annotations; without one it can only be predicted on.
        keypoints: their names, where they were asked for.
        flip_indices: keypoint i of a flipped object is keypoint flip_indices[i] of the original; None where the json
            does not tell.
    """

    entry: DatasetEntry
    categories: list[dict[str, Any]]
    arrays: Arrays
    digest: str
    is_annotated: bool = True
    keypoints: tuple[str, ...] = ()
    flip_indices: tuple[int, ...] | None = None

    @cached_property
    def classes(self) -> list[str]:
        """The name of each label, with its id where another has the same name."""
        times = Counter(str(category["name"]) for category in self.categories)
        return [str(category["name"]) + f" (id {category['id']})" * (times[str(category["name"])] > 1)
                for category in self.categories]  # fmt: skip

    @cached_property
    def category_ids(self) -> list[Any]:
        """The json's category id of each label."""
        return [category["id"] for category in self.categories]

    @property
    def images(self) -> Images:
        """The image entries in the json's order."""
        return Images(self.arrays)

    def recorded(self, cfg: CfgNode) -> dict[str, Any]:
        """What a run notes of it: counts; digests of the json, of images and categories with their order, and of the
        numbers of the images that are trained on.
        """
        listed = [self.arrays[name].tobytes() for name in ("image_id", "height", "width", "file_name", "file_name_at")]
        listed.append(json.dumps([self.category_ids, [str(one["name"]) for one in self.categories]]).encode())
        return {
            "images": len(self.images),
            "objects": len(self.arrays["order"]),
            "json_sha256": self.digest,
            "images_sha256": sha256(b"".join(listed)).hexdigest(),
            "used_images_sha256": sha256(self.training_images(cfg).tobytes()).hexdigest(),
        }

    def objects(self, image: int) -> list[dict[str, Any]]:
        """The annotations of image number ``image``, in the json's order.

        ``bbox`` is x, y, width, height in pixels; ``segmentation`` polygons (an array of each), RLE or None;
        ``keypoints`` x, y, v of each (x and y are indices of pixels); ``label`` is 0-based. An area that the json does
        not have is that of the box, a missing ``num_keypoints`` the number of those with v above 0.
        """
        first = self.arrays["first"]
        return [self._object(k) for k in self.arrays["order"][first[image] : first[image + 1]].tolist()]

    def training_objects(self, image: int) -> list[dict[str, Any]]:
        """The objects of image number ``image`` to learn from: no crowd regions and no boxes without area.

        This is as in detectron2. Objects marked ``ignore`` (PASCAL VOC's difficult ones) are left out too, as in
        Detectron.
        """
        return [
            one for one in self.objects(image) if not (one["iscrowd"] or one["ignore"]) and min(one["bbox"][2:]) > 0
        ]

    def object_counts(self) -> np.ndarray:
        """How many objects to learn from each image has, int [images]."""
        arrays = self.arrays
        is_learned = ~(arrays["iscrowd"] | arrays["ignore"]) & (arrays["box"][:, 2:] > 0).all(1)
        order = arrays["order"]
        return np.bincount(arrays["image"][order[is_learned[order]]], minlength=len(self.images))

    def training_images(self, cfg: CfgNode) -> np.ndarray:
        """The numbers of the images to train on, ascending.

        As in detectron2, FILTER_EMPTY_ANNOTATIONS leaves out images without objects, MIN_KEYPOINTS_PER_IMAGE images
        with fewer labelled keypoints, those of crowds counted.
        """
        is_usable = np.ones(len(self.images), bool)
        if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
            is_usable = self.object_counts() > 0
        if cfg.MODEL.KEYPOINT_ON and (least := cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE) > 0:
            visible = (self.arrays["keypoints"].reshape(-1, 3 * len(self.keypoints))[:, 2::3] > 0).sum(1)
            order = self.arrays["order"]
            is_usable &= np.bincount(self.arrays["image"][order], visible[order], len(self.images)) >= least
        return np.flatnonzero(is_usable)

    def _object(self, k: int) -> dict[str, Any]:
        arrays, label = self.arrays, int(self.arrays["label"][k])
        bbox, area, points = arrays["box"][k].tolist(), float(arrays["area"][k]), _item(arrays, "keypoints", k).tolist()
        labelled = int(arrays["num_keypoints"][k])
        size = arrays["rle_size"][k].tolist()
        mask: Any = [_item(arrays, "polygon", j) for j in range(*arrays["polygons_at"][k : k + 2].tolist())] or None
        if size[0]:
            mask = {"size": size, "counts": _item(arrays, "rle_counts", k).tolist()}
        return {
            "image_id": self.images.id(int(arrays["image"][k])),
            "category_id": self.category_ids[label],
            "label": label,
            "bbox": bbox,
            "segmentation": mask,
            "keypoints": points,
            "num_keypoints": sum(v > 0 for v in points[2::3]) if labelled < 0 else labelled,
            "area": bbox[2] * bbox[3] if math.isnan(area) else area,
            "iscrowd": int(arrays["iscrowd"][k]),
            "ignore": int(arrays["ignore"][k]),
        }


def nothing_to_train_on(cfg: CfgNode, datasets: Sequence[CocoDataset]) -> str:
    """The message where ``training_images`` names no image of these."""
    least, images = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE, sum(len(data.images) for data in datasets)
    is_crowd = np.concatenate([data.arrays["iscrowd"] for data in datasets])
    needed = "an object; DATALOADER.FILTER_EMPTY_ANNOTATIONS False keeps them"
    if cfg.MODEL.KEYPOINT_ON and least > 0:
        needed = f"an object and {least} labelled keypoints (MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE)"
    entry, crowds = datasets[0].entry, int(is_crowd.sum())
    if crowds and crowds == len(is_crowd):
        needed = "an object"
    lines = [f"{entry.json_file}: data set is empty for training: none of its {images} images has {needed}"]
    if crowds:
        lines += [f"{crowds} of {len(is_crowd)} annotations are crowds (iscrowd 1), which are not trained on",
                  *checks.how_to_mend(entry.name, [checks.CHECKS["crowds"]])]  # fmt: skip
    return "\n  ".join(lines)


def read_coco(
    entry: DatasetEntry,
    need_masks: bool,
    need_keypoints: bool = False,
    say: Callable[[str], object] = lambda notice: None,
) -> CocoDataset:
    """Read and check an annotation file. Raises DataError (seven lines at most) with the errors of ``inspect_coco``.

    say: receives the notices.
    """
    dataset, problems = inspect_coco(entry, need_masks, need_keypoints)
    if dataset is None:
        raise DataError(checks.explain(entry.json_file, problems))
    for one in problems:
        say(checks.told(entry.name, one))
    return dataset


def inspect_coco(
    entry: DatasetEntry, need_masks: bool, need_keypoints: bool = False
) -> tuple[CocoDataset | None, list[Problem]]:
    """Read one annotation file: the data set (None when its problems include an error), and every kind of problem.

    The kinds are those of checks.CHECKS, and images that are not on disk; masks and keypoints count only where they are
    needed. Raises DataError when the file is no json with COCO's three lists.
    """
    header, arrays, fault = load(entry.json_file, read_json)
    num_images, num_categories, is_annotated = header["counts"]
    if not num_images or not num_categories:
        counts = f"{num_images} images, {num_categories} categories"
        return None, [Problem("error", f"data set '{entry.name}' is empty: {counts}")]
    concerned = {"": True, checks.MASKS: need_masks, checks.NO_MASK: need_masks and not entry.drop_objects_without_mask,
                 checks.KEYPOINTS: need_keypoints, checks.EMPTY_BOXES: not entry.drop_empty_boxes}  # fmt: skip
    problems = [one for fields in header["problems"] if concerned[(one := Problem(**fields)).only]]
    problems += _missing_files(entry, Images(arrays))
    if not is_annotated:
        problems.append(notice("no list 'annotations': it is predicted on, but neither trained on nor scored"))
    if fault:
        problems.append(notice(f"each start reads the whole json, as its packed form cannot be kept: {fault}"))
    if any(one.severity == "error" for one in problems):
        return None, problems
    if need_masks:  # what has none is to be dropped, or an empty box, or was an error
        has_mask = (np.diff(arrays["polygons_at"]) > 0) | (arrays["rle_size"][:, 0] > 0)
        if not has_mask.all():
            arrays |= by_image(arrays["image"], has_mask & (arrays["image"] >= 0), num_images)
    first = header["categories"][0]
    points = (tuple(first["keypoints"]), flip_indices_of(first)) if need_keypoints else ()
    return CocoDataset(entry, header["categories"], arrays, header["digest"], is_annotated, *points), problems


def _missing_files(entry: DatasetEntry, images: Images) -> list[Problem]:
    """The images that are not on disk, or not where they may be."""
    root, names = entry.image_root, images.names()
    # without subfolders one listing answers for all
    files = {name for name in names if (root / name).is_file()} if "/" in "".join(names) else set(os.listdir(root))
    outside = set() if entry.paths_outside else {name for name in names if is_outside(root, name)}
    missing = [images[k] for k, name in enumerate(names) if name not in files or name in outside]
    found = other_spellings(root, names) if missing else {}
    spelled, led_out, absent = problems = (
        fatal(f"images whose file_name is spelled in another way in {root}", "", "{id} ({file_name} is {found})",
              mend=""),
        fatal(f"images that an absolute file_name or '..' leads out of {root}", "correct the names, or set "
              "'paths_outside: true' in the data set's catalog entry", "{id} ({file_name})"),
        fatal(f"images that are not in {root}", "complete the folder", "{id} ({file_name})"),
    )  # fmt: skip
    for one in missing:
        name = one["file_name"]
        (spelled if name in found else led_out if name in outside else absent).add(one | {"found": found.get(name)})
    return [one for one in problems if one.count]


def flip_indices_of(category: dict[str, Any]) -> tuple[int, ...] | None:
    """Keypoint flip indices (see ``CocoDataset``) by the category's ``flip_map``, else by names: left_X and right_X.

    None when there is no ``flip_map``, and either no left_X or a left_X or right_X without its partner.
    """
    names = category["keypoints"]
    if (pairs := category.get("flip_map")) is None:
        left, right = ({name for name in names if name.startswith(side)} for side in ("left_", "right_"))
        pairs = [(name, name.replace("left_", "right_", 1)) for name in left]
        if not left or right != {other for _, other in pairs}:
            return None
    partner = {one: other for pair in pairs for one, other in (pair, reversed(pair))}
    return tuple(names.index(partner.get(name, name)) for name in names)


def _item(arrays: Arrays, name: str, k: int) -> np.ndarray:
    """Item ``k`` of the items of different length that lie one after another in ``arrays[name]``."""
    start = arrays[f"{name}_at"]
    return arrays[name][start[k] : start[k + 1]]


def _text(arrays: Arrays, name: str, k: int) -> str:
    return _item(arrays, name, k).tobytes().decode("utf-8", "surrogatepass")
