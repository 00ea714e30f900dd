"""detectron2's own trainer on recipes of this repository, its catalogs, and the way back: where it is installed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import ROOT, edit
from run_folder import read

from scratch_det.data.catalog import lookup
from scratch_det.errors import DataError

pytestmark = pytest.mark.detectron2
QUICKSTART = "configs/Digits/quickstart.yaml"
MASKS = ("INPUT.MASK_FORMAT", "bitmask")  # the toy data have RLE
RECIPES = {
    "COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_2x_gn": MASKS,
    "COCO-InstanceSegmentation/scratch_cascade_mask_rcnn_R_50_FPN_9x_gn_train_aug": MASKS,
    "COCO-Keypoints/scratch_keypoint_rcnn_R_50_FPN_2x_gn": (
        "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(16,)", "TEST.KEYPOINT_OKS_SIGMAS", "[0.1, 0.1, 0.1]"),
}  # fmt: skip
TOY = ("DATASETS.TRAIN", "('toy',)", "DATASETS.TEST", "('toy',)")
AUG = ("TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(48, 64)", "TEST.AUG.MAX_SIZE", "120")
PROJECT = """
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances


def add():
    for part in ("train", "val"):
        register_coco_instances(f"balloons_{part}", {}, f"balloons/{part}.json", f"balloons/{part}")
    DatasetCatalog.register("others", list)  # which takes a name once only
"""


def with_keypoints(content: dict[str, Any]) -> None:
    """Three named keypoints in every object, at its corner, its other corner and its middle."""
    for category in content["categories"]:
        category |= {"keypoints": ["left_x", "right_x", "top"]}
    for one in content["annotations"]:
        x, y, width, height = one["bbox"]
        points = (x + 1, y + 1, 2, x + width - 2, y + 1, 2, x + width // 2, y + height // 2, 2)
        one |= {"keypoints": list(points), "num_keypoints": 3}


def run(
    *words: object, config: str = QUICKSTART, tool: str = "detectron2_train_net", cwd: Path = ROOT
) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", ROOT / f"tools/{tool}.py", "--config-file", ROOT / config, *words]
    path = {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=os.environ | path, capture_output=True, text=True, timeout=300
    )


def trained(*words: object, **where: Any) -> subprocess.CompletedProcess:
    found = run(*words, **where)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-3000:]
    return found


def last(folder: Path, key: str) -> dict[str, Any]:
    """The last line of metrics.json that has ``key``: an iteration, or an evaluation."""
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]  # NaN: no large objects
    return [row for row in rows if key in row][-1]


@pytest.mark.parametrize("recipe", RECIPES)
def test_trains_resumes_and_evaluates(
    recipe: str, small_model: list[str], coco_factory: Callable[..., Path], tmp_path: Path
) -> None:
    """Two iterations, two more, and the same AP again from the final weights; classes are those of the data."""
    coco_factory("toy", change=with_keypoints if "Keypoints" in recipe else None)
    keys = [*small_model, *RECIPES[recipe], *TOY, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "OUTPUT_DIR"]
    config, folder = f"configs/{recipe}.yaml", tmp_path / "run"
    trained(*keys, folder, config=config)
    again = trained("--resume", *keys, folder, "SOLVER.MAX_ITER", "4", config=config)
    assert "Starting training from iteration 2" in again.stdout
    metrics = last(folder, "total_loss")
    assert metrics["iteration"] == 3
    assert np.isfinite(metrics["total_loss"])
    assert ("loss_keypoint" if "Keypoints" in recipe else "loss_mask") in metrics
    assert ("loss_cls_stage2" in metrics) == ("cascade" in recipe)
    predictions = folder / "inference/coco_instances_results.json"
    before = json.loads(predictions.read_text())
    trained("--eval-only", *keys, folder, "MODEL.WEIGHTS", folder / "model_final.pth", config=config)
    assert json.loads(predictions.read_text()) == before
    assert before
    assert "NUM_CLASSES: 3" in (folder / "config.yaml").read_text()


def test_test_time_augmentation_and_what_only_detectron2s_trainer_reads(
    small_model: list[str], coco_factory: Callable[..., Path], tmp_path: Path
) -> None:
    """VIS_PERIOD and TEST.EXPECTED_RESULTS are accepted; the latter's bounds hold for the plain AP."""
    coco_factory("toy")
    keys = [*small_model, *TOY, *MASKS, *AUG, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "VIS_PERIOD", "1",
            "OUTPUT_DIR", tmp_path / "run", "TEST.EXPECTED_RESULTS"]  # fmt: skip
    trained(*keys, "[['bbox', 'AP', 50.0, 50.0]]")
    metrics = last(tmp_path / "run", "bbox/AP")
    assert {f"{task}/AP" for task in ("bbox", "segm", "bbox_TTA", "segm_TTA")} <= metrics.keys()
    assert (tmp_path / "run/inference_TTA/coco_instances_results.json").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--eval-only", *AUG, "TEST.AUG.VOTE_THRESH", "0.9"), "VOTE_THRESH is 0.9, but detectron2 has no box voting"),
        ((*AUG, "TEST.AUG.VOTE_THRESH", "0.9"), "VOTE_THRESH is 0.9, but detectron2 has no box voting"),
        (("WRITERS", "[]"), "WRITERS is [], but detectron2's trainer writes TensorBoard alone"),
        (("MODEL.KEYPOINT_ON", "True", *AUG), "detectron2 does not augment keypoints"),
        (("--num-gpus", "2", "MODEL.DEVICE", "cpu"), "detectron2 trains several processes on GPUs only"),
    ],
)
def test_what_detectron2s_trainer_lacks(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    found = run(*words, "OUTPUT_DIR", tmp_path / "run")
    assert found.returncode == 2
    assert said in found.stderr
    assert "scratch-det " in found.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--num-gpus", "2", "MODEL.DEVICE", "cuda"),
            "MODEL.DEVICE is cuda in 2 processes, but no GPU is visible",
        ),
        (("MODEL.DEVICE", "cuda:1"), "MODEL.DEVICE is cuda:1, but no GPU is visible"),
        (("--num-gpus", "-1"), "--num-gpus -1 "),
    ],
)
def test_gpus_that_are_not_there(
    words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = run(*words, "OUTPUT_DIR", tmp_path / "run")
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.splitlines()[-1].startswith(f"error: {said}")


class TestProject:
    """A folder whose add() registers data sets, as in docs/detectron2.md."""

    @pytest.mark.parametrize("processes", [1, 2])
    def test_our_trainer(self, processes: int, small_model: list[str], folder: Path) -> None:
        flags = ("--project", "my_data", "--num-gpus", processes)
        trained(*flags, *small_model, *self.KEYS, tool="train_net", cwd=folder)
        found = read(folder / "run", "environment.json")["datasets"]
        assert {name: found[name]["images"] for name in found} == {"balloons_train": 4, "balloons_val": 4}
        assert read(folder / "run", "environment.json")["processes"] == processes
        assert "bbox" in read(folder / "run", "result.json")["metrics"]

    def test_detectron2s_trainer(self, small_model: list[str], folder: Path) -> None:
        """add() is called once in a process: detectron2 takes no name twice."""
        trained("--project", "my_data", *small_model, *MASKS, *self.KEYS, cwd=folder)
        assert np.isfinite(last(folder / "run", "total_loss")["total_loss"])

    KEYS = ("DATASETS.TRAIN", "('balloons_train',)", "DATASETS.TEST", "('balloons_val',)", "OUTPUT_DIR", "run")

    @pytest.fixture
    def folder(self, coco_factory: Callable[..., Path], tmp_path: Path) -> Path:
        (tmp_path / "my_data").mkdir()
        (tmp_path / "my_data/__init__.py").write_text(PROJECT)
        (tmp_path / "balloons").mkdir()
        for seed, part in enumerate(("train", "val")):
            source = coco_factory(part, seed=seed)
            source.rename(tmp_path / f"balloons/{part}.json")
            source.with_name("images").rename(tmp_path / f"balloons/{part}")
        return tmp_path


def test_the_rules_of_training_from_scratch_hold(coco_factory: Callable[..., Path], tmp_path: Path) -> None:
    coco_factory("toy")
    found = run("MODEL.BACKBONE.FREEZE_AT", "2", "DATASETS.TRAIN", "('toy',)", "OUTPUT_DIR", tmp_path / "run")
    assert found.returncode == 2
    assert "MODEL.BACKBONE.FREEZE_AT" in found.stderr
    assert not (tmp_path / "run").exists()
    found = run("DATASETS.TRAIN", "('toyy',)", "OUTPUT_DIR", tmp_path / "run")
    assert (found.returncode, "did you mean 'toy'" in found.stderr) == (2, True)


class TestCatalogs:
    def test_a_project_registers_a_data_set_by_its_json(self, source: Path, train: Callable[..., Path]) -> None:
        from detectron2.data.datasets import register_coco_instances

        register_coco_instances("theirs_by_json", {}, str(source), str(source.with_name("images")))
        folder = train("DATASETS.TRAIN", "('theirs_by_json',)", "DATASETS.TEST", "()")
        assert read(folder, "environment.json")["datasets"]["theirs_by_json"]["images"] == 4
        source.unlink()
        with pytest.raises(DataError, match=r"'theirs_by_json' of .*annotations.json is missing"):
            lookup("theirs_by_json")

    def test_a_project_registers_a_function(self, source: Path, train: Callable[..., Path]) -> None:
        """What it returns is written as COCO json, the same bytes every time, so that a run can be resumed."""
        self.register("theirs", source)
        entry = lookup("theirs")
        content = json.loads(entry.json_file.read_text())
        assert len(content["annotations"]) == len(json.loads(source.read_text())["annotations"])
        before = entry.json_file.stat().st_mtime_ns
        folder = train("DATASETS.TRAIN", "('theirs',)", "DATASETS.TEST", "('theirs',)")
        assert lookup("theirs") == entry
        assert entry.json_file.stat().st_mtime_ns == before
        assert "bbox" in read(folder, "result.json")["metrics"]

    def test_other_content_is_another_file(self, source: Path) -> None:
        """Two projects may have the same name for their data: none changes the file that a run of the other reads."""
        self.register("theirs", source)
        first = lookup("theirs").json_file
        before = first.read_bytes()
        edit(source, lambda content: content["annotations"].pop())
        second = lookup("theirs").json_file
        assert len(json.loads(second.read_text())["annotations"]) == len(json.loads(before)["annotations"]) - 1
        assert first != second
        assert first.read_bytes() == before

    def test_a_json_without_an_image_folder(self, source: Path) -> None:
        """The function says where the images are."""
        from detectron2.data import MetadataCatalog

        self.register("theirs", source)
        MetadataCatalog.get("theirs").json_file = str(source)
        entry = lookup("theirs")
        assert entry.json_file != source
        assert Path(json.loads(entry.json_file.read_text())["images"][0]["file_name"]).is_file()

    def test_images_without_objects(self, source: Path) -> None:
        edit(source, lambda content: content.update(annotations=[]))
        self.register("theirs", source)
        content = json.loads(lookup("theirs").json_file.read_text())
        assert (len(content["images"]), content["annotations"]) == (4, [])

    def test_a_function_that_fails(self, tmp_path: Path) -> None:
        """As detectron2's own for Cityscapes, when its files are not there."""
        from detectron2.data import DatasetCatalog

        DatasetCatalog.register("theirs", lambda: Path(tmp_path / "gone").read_text())
        with pytest.raises(DataError, match=r"'theirs' of detectron2's DatasetCatalog: .*FileNotFoundError: .*gone"):
            lookup("theirs")
        DatasetCatalog.register("theirs_too", list)
        with pytest.raises(DataError, match=r"'theirs_too' .*thing_classes"):
            lookup("theirs_too")
        with pytest.raises(DataError, match=r"'cityscapes_fine_instance_seg_val' of detectron2's"):
            lookup("cityscapes_fine_instance_seg_val")

    @staticmethod
    def register(name: str, source: Path) -> None:
        """A function that reads ``source`` when it is called, and the names of its classes."""
        from detectron2.data import DatasetCatalog, MetadataCatalog
        from detectron2.data.datasets import load_coco_json

        images = str(source.with_name("images"))
        DatasetCatalog.register(name, lambda: load_coco_json(str(source), images, "theirs_classes"))
        DatasetCatalog.get(name)
        MetadataCatalog.get(name).thing_classes = MetadataCatalog.get("theirs_classes").thing_classes

    @pytest.fixture
    def source(self, coco_factory: Callable[..., Path]) -> Path:
        return coco_factory("toy")

    @pytest.fixture(autouse=True)
    def catalogs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """An own cache; what a test registers is removed after it."""
        from detectron2.data import DatasetCatalog, MetadataCatalog

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        names, about = set(DatasetCatalog.list()), set(MetadataCatalog.list())
        yield
        for name in set(DatasetCatalog.list()) - names:
            DatasetCatalog.remove(name)
        for name in set(MetadataCatalog.list()) - about:
            MetadataCatalog.remove(name)


def test_back_to_detectron2(small_model: list[str], train: Callable[..., Path], tmp_path: Path) -> None:
    """DefaultPredictor reads a run folder of the detectron2 backend, as docs/detectron2.md says."""
    from detectron2.config import get_cfg
    from detectron2.engine import DefaultPredictor

    folder = train(backend="detectron2")
    cfg: Any = get_cfg()
    cfg.set_new_allowed(True)
    cfg.merge_from_file(str(folder / "config.yaml"))
    cfg.MODEL.WEIGHTS, cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = str(folder / "checkpoints/model_final.pth"), 0.0
    cv2.imwrite(str(tmp_path / "image.png"), np.zeros((64, 96, 3), np.uint8))
    found = DefaultPredictor(cfg)(cv2.imread(str(tmp_path / "image.png")))["instances"]
    assert len(found) == 10
    assert found.pred_masks.shape[1:] == (64, 96)
