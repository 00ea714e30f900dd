"""docs/new_data.md: every block is written or run as it stands, on shapes that nobody tuned for.

Runs are short, and of a small model. The one address of the page, of ImageNet weights, is replaced by a file that is
made here.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, SMALL_MODEL, rectangle_mask
from PIL import Image, ImageDraw

from scratch_det.data.catalog import lookup
from scratch_det.data.coco import inspect_coco

PAGE = (ROOT / "docs/new_data.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
FILES = re.findall(r"`((?:my|datasets)/\w+\.yaml)`[^`]*```yaml\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.replace("\\\n", " ").splitlines()]
SIZE = (128, 96)  # pixels, of the drawn images
CATEGORIES = {3: "circle", 7: "square", 90: "triangle"}
SHORTER = SMALL_MODEL | {"INPUT.MIN_SIZE_TRAIN": "(64, 80)", "SOLVER.CHECKPOINT_PERIOD": "1", "TEST.EVAL_PERIOD": "1"}
CLASSIFIER = {
    **{key: value for key, value in SHORTER.items() if key.startswith(("MODEL.RESNETS", "SOLVER", "DATALOADER"))},
    "DATASETS.TRAIN": "('my_classes',)",
    "DATASETS.TEST": "('my_classes',)",
    "MODEL.DEVICE": "cpu",
    "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "INPUT.MIN_SIZE_TEST": "64",
    "SOLVER.MAX_ITER": "1",
}


def draw_set(root: Path, name: str, count: int, seed: int) -> None:
    """``my/NAME.json`` and its images: one to three shapes on noise each, the first one with a crowd of squares."""
    rng = np.random.default_rng(seed)
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": number, "name": word} for number, word in CATEGORIES.items()],
    }
    for number in range(count):
        image = {"id": 1000 * seed + 7 * number, "file_name": f"{name}/{number:04d}.jpg"}
        picture = Image.fromarray(rng.integers(0, 120, (*SIZE[::-1], 3), dtype=np.uint8))
        for shape in range(rng.integers(1, 4)):
            category = list(CATEGORIES)[(number + shape) % 3]
            content["annotations"].append(draw_shape(picture, category, rng) | {"image_id": image["id"]})
        if number == 0:
            crowd = {"category_id": 7, "bbox": [0, 0, 128, 20], "area": 2560, "iscrowd": 1, "image_id": image["id"]}
            mask = rectangle_mask((0, 0, 128, 20), *SIZE, "uncompressed")
            content["annotations"].append(crowd | {"segmentation": mask})
        (root / "images" / name).mkdir(parents=True, exist_ok=True)
        picture.save(root / "images" / image["file_name"])
        content["images"].append(image | {"width": SIZE[0], "height": SIZE[1]})
    for number, one in enumerate(content["annotations"]):
        one["id"] = 500 + 3 * number
    (root / f"{name}.json").write_text(json.dumps(content))


def draw_shape(picture: Image.Image, category: int, rng: np.random.Generator) -> dict[str, Any]:
    """Its annotation, without ids; the mask is a polygon."""
    side = int(rng.integers(16, 48))
    x, y = (int(rng.integers(0, length - side)) for length in SIZE)
    turns = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    corners = {
        "circle": [(x + side / 2 * (1 + np.cos(turn)), y + side / 2 * (1 + np.sin(turn))) for turn in turns],
        "square": [(x, y), (x + side, y), (x + side, y + side), (x, y + side)],
        "triangle": [(x + side / 2, y), (x + side, y + side), (x, y + side)],
    }[CATEGORIES[category]]
    ImageDraw.Draw(picture).polygon(corners, fill=tuple(int(level) for level in rng.integers(130, 256, 3)))
    polygon = [float(number) for corner in corners for number in corner]
    return {"category_id": category, "bbox": [x, y, side, side], "area": side**2 / 2, "iscrowd": 0,
            "segmentation": [polygon]}  # fmt: skip


def words_of(values: dict[str, str]) -> list[str]:
    return [word for pair in values.items() for word in pair]


def test_blocks() -> None:
    """All YAML is a file; nothing is asked of a user but YAML and commands."""
    assert [Path(name).name for name, _ in FILES] == [
        "catalog.yaml", "common.yaml", "pretrained.yaml", "scratch.yaml", "study.yaml",
    ]  # fmt: skip
    assert [text for kind, text in BLOCKS if kind == "yaml"] == [text for _, text in FILES]
    assert {kind for kind, _ in BLOCKS} == {"json", "yaml", "sh"}


def test_the_json_can_be_read(datasets_root: Path) -> None:
    (text,) = [text for kind, text in BLOCKS if kind == "json"]
    (datasets_root / "my/images/site_a").mkdir(parents=True)
    (datasets_root / "my/train.json").write_text(text)
    Image.new("RGB", SIZE).save(datasets_root / "my/images/site_a/0001.jpg")
    (datasets_root / "catalog.yaml").write_text(dict(FILES)["datasets/catalog.yaml"])
    data, problems = inspect_coco(lookup("my_train"), need_masks=True)
    assert data
    assert data.classes == list(CATEGORIES.values())
    assert [one.kind for one in problems] == ["categories without an annotation"]  # the page shows one of each entry


class Shell:
    """Runs commands in a folder that has the drawn data."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {key: value for key, value in os.environ.items() if key != "DETECTRON2_DATASETS"}
        self.environment |= {
            "PYTHONPATH": str(ROOT),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "CUDA_VISIBLE_DEVICES": "",
        }

    def run(self, *words: str) -> str:
        command = [sys.executable, "-m", "scratch_det", *words]
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done.stdout


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    for name, text in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for name, count, seed in (("train", 110, 1), ("val", 4, 2)):
        draw_set(tmp_path / "datasets/my", name, count, seed)
    return Shell(tmp_path)


def make_weights(shell: Shell) -> Path:
    """A small ResNet with GN after one iteration of classification, in the place of FAIR's."""
    for name in ("a", "b"):
        folder = shell.folder / "datasets/classes" / name
        folder.mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (64, 64), (90 * number, 50, 50)).save(folder / f"{number}.jpg")
    with open(shell.folder / "datasets/catalog.yaml", "a") as catalog:
        catalog.write("my_classes: {folder: classes}\n")
    recipe = "configs/Pretraining/imagenet_R_50_gn.yaml"
    shell.run("pretrain", "--config-file", recipe, *words_of(CLASSIFIER), "OUTPUT_DIR", "output/weights")
    return shell.folder / "output/weights/backbone.pth"


def shorten_study(path: Path, weights: Path) -> None:
    """Append to each run what is appended to a command."""
    lines = path.read_text().splitlines()
    changes = [SHORTER | ({"MODEL.WEIGHTS": str(weights)} if "pretrained" in line else {}) for line in lines]
    short = [
        f"{line.removesuffix('}')}, changes: {json.dumps(more)}}}" for line, more in zip(lines, changes, strict=True)
    ]
    path.write_text("\n".join(short))


@pytest.mark.slow
def test_from_a_json_to_both_curves(shell: Shell) -> None:
    weights = make_weights(shell)
    shorten_study(shell.folder / "my/study.yaml", weights)
    said = {}
    for line in COMMANDS:
        program, *words = shlex.split(line)
        assert program == "scratch-det"
        if "my/pretrained.yaml" in words:
            words += words_of(SHORTER | {"MODEL.WEIGHTS": str(weights)})
        said[" ".join(words[:2])] = shell.run(*words)
    assert "my_train: 110 images" in said["check --images"]
    assert "3 classes" in said["check --images"]
    assert "my_train: 110 read now" in said["check --images"]
    assert "iterations: 4, every run on its own" in said["study plan"]
    assert "2 finished; 4 of 4 iterations" in said["study status"]
    quick = json.loads((shell.folder / "output/my_quick/result.json").read_text())
    assert set(quick["metrics"]) == {"bbox", "segm"}
    assert (shell.folder / "output/my_quick/predictions.png").exists()
    report = shell.folder / "output/my_study/report"
    header, *rows = (report / "runs.csv").read_text().splitlines()
    assert header.startswith(",box AP,box AP50,box AP75,mask AP")
    assert [row.split(",")[0] for row in rows] == ["scratch", "pretrained", "scratch - pretrained"]
    assert header.endswith(",epochs")
    assert all(re.fullmatch(r"\d+\.\d", cell) for row in rows[:2] for cell in row.split(",")[1:-1])
    assert all(float(row.split(",")[-1]) > 0 for row in rows[:2])
    figure = (report / "runs.svg").read_text()
    assert "scratch: " in figure
    assert "pretrained: " in figure
    page = (report / "index.html").read_text()
    assert page.count("data:image/jpeg") == 2
    assert "MODEL.WEIGHTS" in page.partition("<h2>Config keys that differ</h2>")[2]
