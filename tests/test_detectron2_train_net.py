"""detectron2's own trainer on recipes of this repository, its catalogs, and the way back: where it is installed."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import ROOT
from run_folder import read

pytestmark = pytest.mark.detectron2
TOOL = ROOT / "tools/detectron2_train_net.py"
HEADS = {
    "plain": (),
    "cascade": ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"),
    "keypoints": ("MODEL.MASK_ON", "False", "MODEL.KEYPOINT_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(16,)",
                  "TEST.KEYPOINT_OKS_SIGMAS", "[0.1, 0.1, 0.1]"),
}  # fmt: skip


def with_keypoints(content: dict[str, Any]) -> None:
    """Three named keypoints in every object, at its corner, its other corner and its middle."""
    for category in content["categories"]:
        category |= {"keypoints": ["left_x", "right_x", "top"]}
    for one in content["annotations"]:
        x, y, width, height = one["bbox"]
        points = (x + 1, y + 1, 2, x + width - 2, y + 1, 2, x + width // 2, y + height // 2, 2)
        one |= {"keypoints": list(points), "num_keypoints": 3}


def run(*words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", str(TOOL), "--config-file", "configs/Digits/quickstart.yaml"]
    return subprocess.run([*command, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("head", HEADS)
def test_trains_resumes_and_evaluates(
    head: str, small_model: list[str], coco_factory: Callable[..., Path], tmp_path: Path
) -> None:
    """Two iterations, two more, and the same AP again from the final weights; classes are those of the data."""
    coco_factory("toy", change=with_keypoints if head == "keypoints" else None)
    keys = [*small_model, *HEADS[head], "DATASETS.TRAIN", "('toy',)", "DATASETS.TEST", "('toy',)",
            "INPUT.MASK_FORMAT", "bitmask", "OUTPUT_DIR", str(tmp_path / "run")]  # fmt: skip
    first = run(*keys)
    assert first.returncode == 0, first.stderr[-3000:]
    again = run("--resume", *keys, "SOLVER.MAX_ITER", "4")
    assert "Starting training from iteration 2" in again.stdout
    text = (tmp_path / "run/metrics.json").read_text()  # with NaN: nothing was found
    metrics = [json.loads(line) for line in text.splitlines()]
    assert metrics[-1]["iteration"] == 3
    assert np.isfinite(metrics[-1]["total_loss"])
    evaluated = run("--eval-only", *keys, "MODEL.WEIGHTS", tmp_path / "run/model_final.pth")
    assert evaluated.returncode == 0, evaluated.stderr[-3000:]
    assert (tmp_path / "run/inference/coco_instances_results.json").exists()
    assert "NUM_CLASSES: 3" in (tmp_path / "run/config.yaml").read_text()


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

    def test_a_project_registers_a_function(self, source: Path, train: Callable[..., Path]) -> None:
        """What it returns is written as COCO json, the same bytes every time, so that a run can be resumed."""
        from detectron2.data import DatasetCatalog, MetadataCatalog
        from detectron2.data.datasets import load_coco_json

        from scratch_det.data.catalog import lookup

        images = str(source.with_name("images"))
        DatasetCatalog.register("theirs", lambda: load_coco_json(str(source), images, "theirs_classes"))
        DatasetCatalog.get("theirs")
        MetadataCatalog.get("theirs").thing_classes = MetadataCatalog.get("theirs_classes").thing_classes
        entry = lookup("theirs")
        content = json.loads(entry.json_file.read_text())
        assert len(content["annotations"]) == len(json.loads(source.read_text())["annotations"])
        before = entry.json_file.read_bytes()
        folder = train("DATASETS.TRAIN", "('theirs',)", "DATASETS.TEST", "('theirs',)")
        assert lookup("theirs").json_file.read_bytes() == before
        assert "bbox" in read(folder, "result.json")["metrics"]

    @pytest.fixture
    def source(self, coco_factory: Callable[..., Path]) -> Path:
        return coco_factory("toy")


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
