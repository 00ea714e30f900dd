"""The files in configs/: each resolves to the same keys as ever, can train, and says what the paper says.

resolved.json has a digest of every recipe's resolved configuration. After a change that is meant, or a new default:

    python tests/config/test_recipes.py
"""

import hashlib
import json
import re
from pathlib import Path

import pytest
import yaml

from scratch_det.config.choices import PROJECT_KEYS
from scratch_det.config.load import flatten, get_cfg, load_config
from scratch_det.config.schedule import Schedule, kx_schedule
from scratch_det.engine.plan import CLASSIFICATION, DETECTION, Request, check_recipe
from scratch_det.errors import Section
from scratch_det.study.digits import PER_X

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
RESOLVED = Path(__file__).with_name("resolved.json")
ALL_FILES = sorted(CONFIGS.rglob("*.yaml"))
LEAVES = [path for path in ALL_FILES if "_base_" not in path.parts]
TABLE1 = sorted((CONFIGS / "COCO-InstanceSegmentation").glob("*_FPN_?x_gn.yaml"))
KX = re.compile(r"_(\d+)x(?:_|$)")  # "3x" of ..._FPN_3x_gn.yaml

# Box AP of the paper's Table 1: the columns are 2x to 6x.
TABLE1_BOX_AP = {
    ("R_50", "scratch"): (36.8, 39.5, 40.6, 40.7, 41.3),
    ("R_50", "pretrained"): (40.3, 40.8, 40.9, 40.9, 41.1),
    ("R_101", "scratch"): (38.2, 41.0, 41.8, 42.2, 42.7),
    ("R_101", "pretrained"): (41.8, 42.3, 42.3, 41.9, 42.2),
}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def bases_of(leaf: Path) -> list[str]:
    return yaml.safe_load(leaf.read_text())["_BASE_"]


def kx_of(path: Path) -> int:
    found = KX.search(path.stem)
    assert found, path
    return int(found[1])


def digests() -> dict[str, str]:
    """SHA-256 of every recipe's resolved configuration, as yacs writes it."""
    return {relative(path): hashlib.sha256(load_config(path).cfg.dump().encode()).hexdigest() for path in LEAVES}


def test_every_recipe_resolves_to_the_same_configuration() -> None:
    """However the bases are cut. If the change is meant: python tests/config/test_recipes.py."""
    written, found = json.loads(RESOLVED.read_text()), digests()
    assert sorted(written) == sorted(found)
    assert not [path for path in found if found[path] != written[path]]


def test_every_file_loads_as_in_fvcore() -> None:
    for path in ALL_FILES:
        stock = get_cfg()
        stock.merge_from_file(str(path))
        assert load_config(path).cfg == stock, path


def test_every_recipe_can_train() -> None:
    """With the flags of its own command."""
    for path in LEAVES:
        recipe, text = load_config(path), path.read_text()
        asked = re.search(r"--num-gpus (\d+)", text)
        num_processes = int(asked[1]) if asked else 1 if recipe.cfg.MODEL.DEVICE == "cpu" else 8
        waived = re.findall(r"--waive (\w+)", text)
        section, request = Section(strict=True), Request(str(path), [], waive=tuple(waived))
        task = CLASSIFICATION if path.parent.name == "Pretraining" else DETECTION
        check_recipe(section, request, recipe, "torchvision", num_processes, task)
        notices = [message for _, message in section.problems]
        assert {notice.split(":")[0] for notice in notices} == {f"--waive {rule}" for rule in waived}, path


def test_a_recipe_says_what_differs() -> None:
    """No file sets a key to the value that its bases have set already."""
    for path in ALL_FILES:
        own = yaml.safe_load(path.read_text())
        bases = own.pop("_BASE_", [])
        set_before: dict[str, object] = {}
        for base in [bases] if isinstance(bases, str) else bases:
            loaded = load_config(path.parent / base)
            set_before |= {key: flatten(loaded.cfg)[key] for key in loaded.explicit}
        after, written = flatten(load_config(path).cfg), flatten(own)
        assert not [key for key in written if key in set_before and after[key] == set_before[key]], path


def test_every_header_names_its_own_command() -> None:
    for path in LEAVES:
        header = path.read_text().split("_BASE_")[0]
        command = "pretrain" if path.parent.name == "Pretraining" else "train"
        assert f"scratch-det {command} --config-file {relative(path)}" in header, path


def test_kx_recipes_are_the_papers_and_drops_are_evaluated_and_saved() -> None:
    """The miniature's too, with its own 1x."""
    checked = 0
    for path in LEAVES:
        if not KX.search(path.stem):
            continue
        cfg = load_config(path).cfg
        schedule = kx_schedule(kx_of(path), PER_X if path.parent.name == "Digits" else 90_000)
        assert Schedule(cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == schedule, path
        saved = (*cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER) if path.parent.name != "Digits" else cfg.SOLVER.STEPS[:1]
        for iteration in saved:
            assert iteration % cfg.TEST.EVAL_PERIOD == iteration % cfg.SOLVER.CHECKPOINT_PERIOD == 0, path
        checked += 1
    assert checked > 70


@pytest.mark.parametrize("depth", ["R_50", "R_101"])
def test_recipes_of_a_figure_differ_in_initialisation_and_length(depth: str) -> None:
    leaves = [path for path in TABLE1 if f"_{depth}_" in path.name]
    assert len(leaves) == 10
    for path in leaves:
        init = "scratch" if path.name.startswith("scratch") else f"imagenet_{depth}_gn"
        parts = f"model/mask_rcnn_{depth}_FPN_gn", "data/coco_2017", f"init/{init}", "solver/coco"
        assert bases_of(path) == [f"../_base_/{part}.yaml" for part in parts]
        own = yaml.safe_load(path.read_text())
        assert own.keys() == {"_BASE_", "SOLVER"}
        assert own["SOLVER"].keys() == {"STEPS", "MAX_ITER"}


def test_headers_say_what_table_1_says() -> None:
    for path in TABLE1:
        init, depth, k = path.name.split("_")[0], "R_101" if "R_101" in path.name else "R_50", kx_of(path)
        header = path.read_text()
        assert f"{TABLE1_BOX_AP[depth, init][k - 2]} box AP" in header, path
        assert f"{90_000 * k:,} iterations" in header, path


@pytest.mark.detectron2
def test_every_file_loads_in_stock_detectron2() -> None:
    from detectron2.config import get_cfg as stock_cfg

    for path in ALL_FILES:
        if path.parent.name == "Torchvision" or path.name == "torchvision.yaml":
            continue  # detectron2 does not lay torchvision's anchors
        cfg = stock_cfg()
        cfg.merge_from_file(str(path))
        stock = PROJECT_KEYS | flatten(cfg)
        for key, value in flatten(load_config(path).cfg).items():
            assert stock[key] == value, (path, key)


if __name__ == "__main__":
    RESOLVED.write_text(json.dumps(digests(), indent=1) + "\n")
