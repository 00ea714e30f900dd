"""The data sections: what the annotation files hold, whether they belong together, whether every image can be read."""

import pickle
from collections.abc import Iterable
from itertools import product
from typing import NamedTuple

from fvcore.common.config import CfgNode

from scratch_det.check.report import Section
from scratch_det.config import LoadedConfig
from scratch_det.data.agreement import (
    category_mismatch,
    class_count_conflict,
    keypoint_conflicts,
    settle_counts,
    shared_images,
)
from scratch_det.data.catalog import lookup
from scratch_det.data.coco import CocoDataset, inspect_coco
from scratch_det.data.problem import Problem
from scratch_det.data.scan import scan_images

SAMPLED = 1000  # images whose records are measured


class Data(NamedTuple):
    """The data sets of a recipe that have no errors."""

    training: list[CocoDataset]
    test: list[CocoDataset]

    def objects(self, cfg: CfgNode) -> list[int]:
        """How many objects each image has that is trained on."""
        return [len(objects) for data in self.training for _, objects in data.training_images(cfg)]

    def packed_bytes(self) -> int:
        """About the memory that the training set's records take, which are pickled; measured on some of them."""
        return sum(round(_mean_record(data) * len(data.images)) for data in self.training)


def read_data(section: Section, recipe: LoadedConfig) -> Data:
    """Read every data set of the recipe, compare them, and set the counts that a run would set."""
    cfg = recipe.cfg
    parts = (
        [_read(section, name, cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON) for name in names]
        for names in (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST)
    )
    data = Data(*([one for one in part if one] for part in parts))
    found = [*data.training, *data.test]
    if found:
        mismatches = (category_mismatch(found[0], other) for other in found[1:])
        conflicts = class_count_conflict(recipe, found[0]), *keypoint_conflicts(recipe, *data)
        for message in (*conflicts, *mismatches):
            if message:
                section.problem("error", message)
        settle_counts(cfg, found[0])
    for training, test in product(*data):
        _tell(section, test.entry.name, shared_images(training, test))
    return data


def read_images(section: Section, data: Data) -> None:
    """Read every image file of ``data``."""
    for one in {part.entry.name: part for part in [*data.training, *data.test]}.values():
        name, scan = one.entry.name, scan_images(one)
        section.add(
            f"{name}: {scan.read:,} read now, {scan.known:,} unchanged since an earlier check",
            **{name: {"read": scan.read, "unchanged": scan.known, "faulty": scan.num_faulty}},
        )
        if scan.num_faulty:
            shown = [*scan.first_faults, *(["..."] if scan.num_faulty > len(scan.first_faults) else [])]
            section.problem("error", f"{name}: {scan.num_faulty} images cannot be trained on:\n  " + "\n  ".join(shown))


def _read(section: Section, name: str, need_masks: bool, need_keypoints: bool) -> CocoDataset | None:
    entry = section.attempt(lookup, name)
    found = entry and section.attempt(inspect_coco, entry, need_masks, need_keypoints)
    if not (entry and found):
        return None
    data, problems = found
    if data is None:
        section.add(f"{name}: {entry.json_file} cannot be used", **{name: {"json": str(entry.json_file)}})
    else:
        objects = sum(map(len, data.annotations.values()))
        facts = {"images": len(data.images), "objects": objects, "classes": len(data.classes)}
        section.add(
            f"{name}: {', '.join(f'{count:,} {what}' for what, count in facts.items())}; "
            f"{entry.json_file} (sha256 {data.digest[:12]})",
            **{name: {**facts, "json": str(entry.json_file), "sha256": data.digest}},
        )
    _tell(section, name, problems)
    return data


def _tell(section: Section, name: str, problems: Iterable[Problem]) -> None:
    for one in problems:
        section.problem(one.severity, f"{name}: {one}" + (f"\n  {one.mend}" if one.mend else ""))


def _mean_record(data: CocoDataset) -> float:
    """Bytes of one image's record."""
    sample = data.images[:: -(-len(data.images) // SAMPLED)]
    records = ((data.entry.image_root, image, data.training_annotations(image["id"])) for image in sample)
    return sum(len(pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL)) for record in records) / len(sample)
