"""Shared fixtures: a toy data set in COCO's format, a recipe that trains on it in seconds, and the command line.

``coco_factory``  makes data sets      ``datasets_root``  the temporary folder that they are registered in
``toy_recipe``    a recipe for them    ``small_model``    the overrides that make any Mask R-CNN recipe tiny
``train_net``     scratch-det train    ``tiny_coco``      100 real COCO images, where they are at hand
``train``         starts a run of ``toy_recipe`` in this process
``points_recipe`` ``toy_recipe`` with keypoints in its data
``study_tool``    scratch-det study  ``small_detector``  a detector at random
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import yaml
from fvcore.common.config import CfgNode
from PIL import Image
from pycocotools import mask as mask_api

from scratch_det import backends
from scratch_det.backends import is_installed
from scratch_det.command_line import GIVEN, LOADED
from scratch_det.config.choices import BACKBONES, LISTS, PROJECT_KEYS
from scratch_det.config.load import load_config
from scratch_det.engine.command import start
from scratch_det.engine.plan import Request

ROOT = Path(__file__).parents[1]
TINY_COCO = Path(os.environ.get("TINY_COCO", ROOT.parent / "shared" / "tiny_coco"))
MASK_KINDS = ("polygon", "uncompressed", "compressed")
POINTS = ["left_top", "centre", "right_top"]
COLOURS = ((220, 40, 40), (40, 200, 40), (40, 60, 220))
SMALL_MODEL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.DEPTH": "18",
    "MODEL.RESNETS.RES2_OUT_CHANNELS": "64",
    "MODEL.FPN.OUT_CHANNELS": "32",
    "MODEL.FPN.NORM": "GN",
    "MODEL.ANCHOR_GENERATOR.SIZES": "[[8],[16],[32],[64],[128]]",
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": "32",
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": "50",
    "MODEL.RPN.PRE_NMS_TOPK_TEST": "20",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": "20",
    "MODEL.RPN.POST_NMS_TOPK_TEST": "10",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": "16",
    "MODEL.ROI_BOX_HEAD.NUM_CONV": "1",
    "MODEL.ROI_BOX_HEAD.CONV_DIM": "32",
    "MODEL.ROI_BOX_HEAD.NORM": "GN",
    "MODEL.ROI_BOX_HEAD.NUM_FC": "1",
    "MODEL.ROI_BOX_HEAD.FC_DIM": "32",
    "MODEL.ROI_MASK_HEAD.NUM_CONV": "1",
    "MODEL.ROI_MASK_HEAD.CONV_DIM": "32",
    "MODEL.ROI_MASK_HEAD.NORM": "GN",
    "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "INPUT.MAX_SIZE_TRAIN": "96",
    "INPUT.MIN_SIZE_TEST": "64",
    "INPUT.MAX_SIZE_TEST": "96",
    "DATALOADER.NUM_WORKERS": "0",
    "TEST.DETECTIONS_PER_IMAGE": "10",
    "TEST.EVAL_PERIOD": "0",
    "SOLVER.IMS_PER_BATCH": "2",
    "SOLVER.MAX_ITER": "2",
    "SOLVER.STEPS": "()",
    "SOLVER.WARMUP_ITERS": "0",
    "SOLVER.BASE_LR": "0.01",
}


def rectangle_mask(box: tuple[int, int, int, int], width: int, height: int, kind: str) -> Any:
    """A filled rectangle (x, y, width, height; pixels) in one of COCO's three ways to write a mask."""
    x, y, w, h = box
    polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    if kind == "polygon":
        return polygon
    rle = mask_api.merge(mask_api.frPyObjects(polygon, height, width))
    if kind == "compressed":
        return {"size": [height, width], "counts": rle["counts"].decode()}
    flat = mask_api.decode(rle).ravel(order="F").astype(int)
    cuts = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *cuts, flat.size]).tolist()
    return {"size": [height, width], "counts": [0, *runs] if flat[0] else runs}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``detectron2`` where there is none."""
    if not is_installed("detectron2"):
        for item in items:
            if item.get_closest_marker("detectron2"):
                item.add_marker(pytest.mark.skip(reason="detectron2 is not installed"))


@contextmanager
def restored_registries() -> Iterator[None]:
    """On leaving, take back what projects have added: keys, choices, and that they are loaded."""
    loaded, given = set(LOADED), list(GIVEN)
    with ExitStack() as stack:
        for registry in (PROJECT_KEYS, BACKBONES, *LISTS.values()):
            stack.enter_context(patch.dict(registry))
        yield
    LOADED.intersection_update(loaded)
    GIVEN[:] = given


@pytest.fixture(autouse=True, scope="module")
def registries() -> Iterator[None]:
    """No module of tests leaves a loaded project to the next one of its process."""
    with restored_registries():
        yield


@pytest.fixture
def datasets_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty datasets root; ``DETECTRON2_DATASETS`` points to it for the length of the test."""
    root = tmp_path / "datasets"
    root.mkdir()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    return root


@pytest.fixture
def coco_factory(datasets_root: Path) -> Callable[..., Path]:
    """``make(name="toy_train", num_images=4, size=(96, 64), category_ids=(2, 5, 9), seed=0, change=None, **fields)``.

    Writes a data set below ``datasets_root``, registers it in its catalog.yaml and returns the json's path
    (``<root>/<name>/annotations.json``; the images lie in ``<root>/<name>/images``).

    Images have ids 1, 2, ... and are ``size`` = (width, height) pixels, every third one (2, 5, ...) upright instead.
    Each shows two rectangles of different classes on noise, but the last one has no objects; image 1 also has a crowd
    region. Masks take turns: polygon, uncompressed RLE, compressed RLE. Annotation ids are 101, 102, ... Classes are
    called ``class2`` and so on after their ids. The same arguments make the same bytes.

    change: called with the json's content (a dict) before it is written, to damage it.
    fields: further fields of the catalog entry, such as ``drop_empty_boxes=True``.
    """

    def make(
        name: str = "toy_train",
        num_images: int = 4,
        size: tuple[int, int] = (96, 64),
        category_ids: tuple[int, ...] = (2, 5, 9),
        seed: int = 0,
        change: Callable[[dict], Any] | None = None,
        **fields: Any,
    ) -> Path:
        folder = datasets_root / name
        (folder / "images").mkdir(parents=True)
        content: dict[str, list] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": number, "name": f"class{number}"} for number in category_ids],
        }
        for number in range(1, num_images + 1):
            width, height = size[::-1] if number % 3 == 2 else size
            objects = _objects(content, number, width, height) if number < num_images or num_images == 1 else []
            rng = np.random.default_rng([seed, number])
            pixels = _draw(objects, category_ids, width, height, rng)
            Image.fromarray(pixels).save(folder / "images" / f"{number}.jpg", quality=95)
            image = {"id": number, "file_name": f"{number}.jpg", "width": width, "height": height}
            content["images"].append(image)
            content["annotations"] += objects
        if change:
            change(content)
        path = folder / "annotations.json"
        path.write_text(json.dumps(content))
        _register(datasets_root, name, {"json": f"{name}/annotations.json", "images": f"{name}/images", **fields})
        return path

    return make


def _objects(content: dict[str, list], image: int, width: int, height: int) -> list[dict]:
    boxes = [(4, 6, width // 3, height // 2), (width // 2, height // 4, width // 3, height // 2)]
    if image == 1:
        boxes.append((2, 2, width - 4, height // 3))  # the crowd
    objects = []
    for place, box in enumerate(boxes):
        number = 101 + len(content["annotations"]) + place
        category = content["categories"][(image + place) % len(content["categories"])]["id"]
        crowd = place == 2
        kind = "uncompressed" if crowd else MASK_KINDS[number % len(MASK_KINDS)]
        objects.append(
            {"id": number, "image_id": image, "category_id": category, "bbox": list(box), "area": box[2] * box[3]}
            | {"iscrowd": int(crowd), "segmentation": rectangle_mask(box, width, height, kind)}
        )
    return objects


def _draw(
    objects: list[dict], category_ids: tuple[int, ...], width: int, height: int, rng: np.random.Generator
) -> np.ndarray:
    pixels = rng.integers(90, 150, (height, width, 3), dtype=np.uint8)
    for entry in objects:
        if not entry["iscrowd"]:
            x, y, w, h = entry["bbox"]
            pixels[y : y + h, x : x + w] = COLOURS[category_ids.index(entry["category_id"]) % len(COLOURS)]
    return pixels


def _register(root: Path, name: str, fields: dict[str, Any]) -> None:
    catalog = root / "catalog.yaml"
    entries = yaml.safe_load(catalog.read_text()) if catalog.exists() else {}
    catalog.write_text(yaml.safe_dump({**entries, name: fields}))


@pytest.fixture
def small_model() -> list[str]:
    """``KEY VALUE`` overrides that make any Mask R-CNN recipe tiny.

    ResNet-18, 32 channels with GN in FPN and heads, few proposals, 64 px, batches of 2, MAX_ITER 2, on the CPU.
    """
    return [word for pair in SMALL_MODEL.items() for word in pair]


@pytest.fixture(scope="session")
def small_detector() -> Any:
    """A ``Detector`` at random, with three classes, masks and three keypoints, that finds ten objects in any image."""
    import torch

    from scratch_det.detector import Detector

    changes = SMALL_MODEL | {"MODEL.ROI_HEADS.SCORE_THRESH_TEST": "0.0", "MODEL.ROI_HEADS.NUM_CLASSES": "3"}
    changes |= {"MODEL.KEYPOINT_ON": "True", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": "3"}
    words = [word for pair in changes.items() for word in pair]
    cfg = backends.model_config(ROOT / "configs/Digits/quickstart.yaml", words, "torchvision")
    torch.manual_seed(0)
    return Detector(cfg, "torchvision", backends.load("torchvision").build(cfg), ("ant", "bee", "cat"))


@pytest.fixture
def toy_recipe(tmp_path: Path, coco_factory: Callable[..., Path]) -> Path:
    """A recipe file, ``small_model`` included: ``toy_train`` to train on, ``toy_val`` to evaluate (both are made).

    From scratch, SEED 1, OUTPUT_DIR is ``tmp_path / "run"`` (not made).
    """
    coco_factory("toy_train")
    coco_factory("toy_val", seed=1)
    recipe: dict[str, Any] = {
        "_BASE_": [
            str(ROOT / "configs/_base_/model/mask_rcnn_R_18_FPN_gn_small.yaml"),
            str(ROOT / "configs/_base_/init/scratch.yaml"),
        ],
        "DATASETS": {"TRAIN": ["toy_train"], "TEST": ["toy_val"]},
        "SEED": 1,
        "OUTPUT_DIR": str(tmp_path / "run"),
    }
    for key, value in SMALL_MODEL.items():
        *sections, name = key.split(".")
        node = recipe
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = yaml.safe_load(value)
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture
def points_recipe(toy_recipe: Path, datasets_root: Path) -> Path:
    """``toy_recipe`` whose data sets have keypoints; MODEL.KEYPOINT_ON and 3 sigmas go with it."""
    for name in ("toy_train", "toy_val"):
        edit(datasets_root / name / "annotations.json", name_points)
    return toy_recipe


def edit(path: Path, change: Callable[[dict], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def name_points(content: dict[str, Any]) -> None:
    """Both upper corners and the hidden middle of every box of a json, as pixel indices."""
    for category in content["categories"]:
        category["keypoints"] = POINTS
    for one in content["annotations"]:
        x, y, width, height = one["bbox"]
        one["keypoints"] = [x, y, 2, x + width // 2, y + height // 2, 1, x + width - 1, y, 2]


@pytest.fixture
def train(toy_recipe: Path, tmp_path: Path) -> Callable[..., Path]:
    """``train(KEY, VALUE, ..., name="run", resume=False, ...)`` starts a run, returns its folder.

    Keyword arguments are those of ``Request``.
    """

    def begin(*overrides: Any, name: str = "run", **request: Any) -> Path:
        folder = tmp_path / name
        start(Request(str(toy_recipe), [*map(str, overrides), "OUTPUT_DIR", str(folder)], **request))
        return folder

    return begin


def load_command(name: str) -> Any:
    """The module of a command of ``scratch-det``."""
    return import_module(f"scratch_det.commands.{name}")


@pytest.fixture(scope="session")
def train_net_module() -> Any:
    """scratch-det train as a module."""
    return load_command("train")


@pytest.fixture
def train_net(train_net_module: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``train_net("--config-file", path, "KEY", value, ...)`` runs scratch-det train inside this process.

    Arguments may be of any type; a mistake of the user leaves as SystemExit with code 2 and a message on stderr.
    """

    def run(*arguments: Any) -> None:
        monkeypatch.setattr(sys, "argv", ["train_net.py", *map(str, arguments)])
        train_net_module.main()

    return run


@pytest.fixture(scope="session")
def tiny_coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like tiny_coco (annotations/, train2017/, val2017/), to be written to; skips where that is absent."""
    if not (TINY_COCO / "annotations").is_dir():
        pytest.skip(f"needs tiny_coco at {TINY_COCO} (or set TINY_COCO)")
    folder = tmp_path_factory.mktemp("tiny_coco")
    shutil.copytree(TINY_COCO / "annotations", folder / "annotations")
    for images in ("train2017", "val2017"):
        (folder / images).symlink_to(TINY_COCO.resolve() / images)
    return folder


@pytest.fixture
def study_tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """scratch-det study in this process: its exit code and what it says."""

    def call(*words: Any) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["study.py", *map(str, words)])
        try:
            load_command("study").main()
            code: Any = 0
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        return int(code or 0), said.out + said.err

    return call


@pytest.fixture
def config(small_model: list[str]) -> Callable[..., CfgNode]:
    """``config(KEY, VALUE, ...)``: the quickstart's Mask R-CNN made tiny, with ten classes."""
    overrides = [*small_model, "MODEL.ROI_HEADS.NUM_CLASSES", "10"]
    return lambda *words: load_config(ROOT / "configs/Digits/quickstart.yaml", [*overrides, *words]).cfg
