"""Every kind of experiment, from its own recipe at reduced size: trains, is cut off, resumes, evaluates, reports."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from run_folder import interrupted_after, is_same, read

from scratch_det import backends
from scratch_det.data.digits import make_digits
from scratch_det.data.subsets import make_subsets
from scratch_det.engine.command import start
from scratch_det.engine.plan import Request

COCO = "configs/COCO-InstanceSegmentation"
KINDS = {  # recipe, and the tasks that it evaluates
    "plain": (f"{COCO}/scratch_mask_rcnn_R_50_FPN_2x_gn.yaml", {"bbox", "segm"}),
    "SyncBN": (f"{COCO}/scratch_mask_rcnn_R_50_FPN_2x_syncbn.yaml", {"bbox", "segm", "bbox_EMA", "segm_EMA"}),
    "cascade": (f"{COCO}/pretrained_cascade_mask_rcnn_R_50_FPN_6x_gn_train_aug.yaml", {"bbox", "segm"}),
    "test aug": (
        f"{COCO}/scratch_cascade_mask_rcnn_R_50_FPN_9x_gn_train_aug.yaml",
        {"bbox", "segm", "bbox_TTA", "segm_TTA"},
    ),
    "VGG": ("configs/COCO-Detection/scratch_faster_rcnn_VGG16_11x_train_aug.yaml", {"bbox"}),
    "keypoints": (
        "configs/COCO-Keypoints/scratch_keypoint_rcnn_R_50_FPN_2x_gn.yaml",
        {"bbox", "keypoints", "bbox_TTA", "keypoints_TTA"},
    ),
    "subset": ("configs/COCO-LowData/scratch_mask_rcnn_R_50_FPN_22k_gn_1k.yaml", {"bbox", "segm"}),
}
REDUCED = {
    "SOLVER.MAX_ITER": 3,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": "choice",
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.WEIGHTS": "",
    "TEST.AUG.MIN_SIZES": "(48, 64)",
    "TEST.AUG.MAX_SIZE": 96,
    "SEED": 1,
}
OF_KIND: dict[str, dict[str, Any]] = {
    "SyncBN": {"MODEL_EMA.ENABLED": True},
    "test aug": {"TEST.AUG.ENABLED": True},
    "VGG": {"MODEL.ANCHOR_GENERATOR.SIZES": "[[8, 16, 32]]", "MODEL.ROI_BOX_HEAD.NUM_CONV": 0},
    "keypoints": {"MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": "(32, 32)", "TEST.AUG.ENABLED": True},
}
KEYPOINTS_OF = {  # of digits no mirror is known, and COCO has no sigmas
    "digits": {"INPUT.RANDOM_FLIP": "none", "TEST.AUG.FLIP": False, "TEST.KEYPOINT_OKS_SIGMAS": "[0.1, 0.1, 0.1, 0.1]"},
    "coco": {},
}
INSTALLED = [name for name in backends.BACKENDS if backends.is_installed(name)]
DATA = ["digits", pytest.param("coco", marks=pytest.mark.slow)]
ELSEWHERE = {"plain", "cascade"}  # in subset and test aug
FEW_KINDS = [pytest.param(kind, marks=pytest.mark.slow) if kind in ELSEWHERE else kind for kind in KINDS]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    make_digits(folder, seed=0, train=24, val=3)
    return folder


@pytest.fixture
def register(datasets_root: Path, digits: Path, request: pytest.FixtureRequest) -> Callable[[str, str], list[str]]:
    """``register(kind, "digits" or "coco")``: the ``KEY VALUE`` overrides that train and test on few images."""

    def make(kind: str, data: str) -> list[str]:
        entries = {}
        for split in ("train", "val"):
            folder, json_file, images = digits, f"annotations/instances_{split}.json", split
            if data == "coco":
                folder, images = request.getfixturevalue("tiny_coco"), f"{split}2017"
                json_file = f"annotations/{'person_keypoints' if kind == 'keypoints' else 'instances'}_{images}.json"
            shutil.copy(folder / json_file, datasets_root / f"few_{split}.json")
            entries[f"few_{split}"] = {"json": f"few_{split}.json", "images": str(folder / images)}
        (datasets_root / "catalog.yaml").write_text(yaml.safe_dump(entries))
        train = make_subsets("few_train", [12], keep_lost=True)[0].name if kind == "subset" else "few_train"
        return ["DATASETS.TRAIN", f"('{train}',)", "DATASETS.TEST", "('few_val',)"]

    return make


@pytest.fixture
def run(register: Callable, small_model: list[str], tmp_path: Path) -> Callable[..., Path]:
    """``run(kind, data, name, KEY, VALUE, ..., **request)``: the run's folder."""

    def begin(kind: str, data: str, name: str, *overrides: Any, **request: Any) -> Path:
        keys = {**REDUCED, **OF_KIND.get(kind, {}), **(KEYPOINTS_OF[data] if kind == "keypoints" else {})}
        words = [*small_model, *(str(word) for pair in keys.items() for word in pair), *map(str, overrides)]
        words += [*register(kind, data), "OUTPUT_DIR", str(tmp_path / name)]
        start(Request(str(ROOT / KINDS[kind][0]), words, **request))
        return tmp_path / name

    return begin


@pytest.mark.parametrize("backend", INSTALLED)
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("kind", FEW_KINDS)
def test_trains_resumes_and_evaluates(
    kind: str, data: str, backend: str, run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(kind, data, "whole", backend=backend)
    with interrupted_after(monkeypatch, 2):
        run(kind, data, "halves", backend=backend)
    halves = run(kind, data, "halves", backend=backend, resume=True)
    assert is_same(halves, whole)
    assert set(read(halves, "result.json")["metrics"]) == KINDS[kind][1]
    assert (halves / "curves.png").is_file()
    assert (halves / "predictions.png").is_file()


@pytest.mark.parametrize("data", DATA)
def test_a_switch(data: str, run: Callable[..., Path]) -> None:
    """The paper's: a plain run, and the cascade recipe of the same name from its second iteration on."""
    plain = run("plain", data, "plain", "SOLVER.BASE_LR", 0.01, backend="torchvision")
    cascade = run("cascade", data, "cascade", "MODEL.RPN.POST_NMS_TOPK_TRAIN", 30,
                  switch_from=str(plain / "model_0000001.pth"), backend="torchvision")  # fmt: skip
    assert read(cascade, "parent.json")["completed_iterations"] == 2
    assert set(read(cascade, "result.json")["metrics"]) == {"bbox", "segm"}


@pytest.mark.slow  # SyncBN in two processes is in test_faults.py as well
@pytest.mark.parametrize("backend", INSTALLED)
def test_sync_bn_in_two_processes(
    backend: str, register: Callable, small_model: list[str], tmp_path: Path, datasets_root: Path
) -> None:
    """Trained and evaluated by two; again off the checkpoint after two iterations, with the same weights."""
    norms = [f"MODEL.{part}.NORM" for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")]
    keys = [*small_model, *(str(word) for pair in REDUCED.items() for word in pair), *register("SyncBN", "digits")]
    keys += [word for norm in norms for word in (norm, "SyncBN")]

    def run(name: str, *flags: Any) -> Path:
        command = [sys.executable, ROOT / "tools/train_net.py", "--config-file", ROOT / KINDS["SyncBN"][0],
                   "--num-gpus", 2, "--backend", backend, *flags, *keys, "OUTPUT_DIR", tmp_path / name]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return tmp_path / name

    whole = run("whole", "--keep-at", 2)
    assert set(read(whole, "result.json")["metrics"]) == {"bbox", "segm"}
    assert is_same(run("branch", "--branch-from", whole / "model_0000001.pth"), whole)
