"""Every recipe of the paper against Detectron's values: each key is equal, or a row of docs/fidelity.md."""

import math
import re
from fnmatch import fnmatch
from typing import Any

import yaml
from conftest import ROOT

from scratch_det.config.load import flatten, load_config
from scratch_det.study import paper
from scratch_det.study.run import EVALUATE

TABLE = yaml.safe_load((ROOT / "tests/assets/detectron_values.yaml").read_text())
TITLE = "## Keys that differ from Detectron's"


def is_equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(is_equal, ours, theirs))
    is_number = isinstance(ours, float) or isinstance(theirs, float)
    return math.isclose(ours, theirs, rel_tol=1e-3) if is_number else ours == theirs


def differences() -> set[tuple[str, str]]:
    """Recipe and key wherever a recipe has another value than Detectron."""
    found = set()
    for recipe, own in TABLE["recipes"].items():
        cfg = flatten(load_config(ROOT / f"configs/{recipe}.yaml").cfg)
        values = {key: value for key, value in (TABLE["common"] | own).items() if value is not None}
        found |= {(recipe, key) for key, value in values.items() if not is_equal(cfg[key], value)}
    return found


def test_every_recipe_of_the_paper_is_in_the_table() -> None:
    folders = ("COCO-Detection", "COCO-InstanceSegmentation", "COCO-Keypoints", "COCO-LowData", "PascalVOC-Detection")
    recipes = {f"{folder}/{path.stem}" for folder in folders for path in (ROOT / "configs" / folder).glob("*.yaml")}
    assert recipes == set(TABLE["recipes"])


def test_every_difference_is_a_row_of_fidelity() -> None:
    """And every row there is a difference: key by key, with a pattern for the recipes."""
    section = (ROOT / "docs/fidelity.md").read_text().split(TITLE)[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([A-Z_0-9.]+)` \| `([^`]+)` \|", section, re.M)
    assert rows
    found = differences()
    unexplained = {one for one in found if not any(one[1] == key and fnmatch(one[0], to) for key, to in rows)}
    assert not unexplained, sorted(unexplained)
    idle = [row for row in rows if not any(one[1] == row[0] and fnmatch(one[0], row[1]) for one in found)]
    assert not idle


def test_test_time_augmentation_is_detectrons() -> None:
    evaluations = [run for run in paper.runs() if run.kind == EVALUATE]
    assert len(evaluations) == 6
    for run in evaluations:
        cfg = flatten(load_config(ROOT / run.config, run.changes).cfg)
        assert {key for key, value in TABLE["test_aug"].items() if not is_equal(cfg[key], value)} == set(), run.name
