"""Runs with the detectron2 backend, and detectron2 without this repository on its configs and weights."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from fvcore.common.config import CfgNode
from run_folder import NO_TEST, interrupted_after, is_same, read
from samples import sample

from scratch_det import backends
from scratch_det.config.load import load_config
from scratch_det.conversion import convert_file
from scratch_det.data.digits import make_digits
from scratch_det.engine.command import start
from scratch_det.engine.plan import Request
from scratch_det.errors import UserError

SMALL = ROOT / "configs/Digits/quickstart.yaml"
THREE = ("SOLVER.MAX_ITER", 3, "SOLVER.CHECKPOINT_PERIOD", 1, *NO_TEST)


@pytest.mark.detectron2
class TestRuns:
    def test_the_folder_says_who_built_the_model(self, train: Callable, capsys: pytest.CaptureFixture) -> None:
        folder = train(*NO_TEST, backend="detectron2")
        library = backends.library("detectron2")
        assert f"backend {library}" in capsys.readouterr().out.splitlines()[0]
        environment = read(folder, "environment.json")
        assert (environment["backend"], environment["library"]) == ("detectron2", library)
        assert read(folder, "result.json")["backend"] == "detectron2"

    def test_resumed_and_branched_bit_for_bit(self, train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
        use = {"backend": "detectron2"}
        whole = train(*THREE, name="whole", keep_at=(2,), **use)
        with interrupted_after(monkeypatch, 2):
            train(*THREE, name="halves", **use)
        assert is_same(train(*THREE, name="halves", resume=True, **use), whole)
        longer = ("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 1, *NO_TEST)
        branch = train(*longer, name="branch", branch_from=str(whole / "model_0000001.pth"), **use)
        assert is_same(branch, train(*longer, name="direct", **use))

    def test_resume_keeps_the_backend(self, train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
        """A requeued command goes on with the backend that began, whatever has been installed since."""
        whole = train(*THREE, name="whole", backend="torchvision")
        with interrupted_after(monkeypatch, 2):
            train(*THREE, name="halves", backend="torchvision")
        assert is_same(train(*THREE, name="halves", resume=True), whole)

    def test_two_processes(self, toy_recipe: Path, tmp_path: Path, datasets_root: Path) -> None:
        """With SyncBN, and from a checkpoint: on the CPU detectron2's own trainer starts one process only."""
        keys = ("MODEL.RESNETS.NORM", "SyncBN", "MODEL.FPN.NORM", "SyncBN", "MODEL.ROI_BOX_HEAD.NORM", "SyncBN",
                "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.MAX_ITER", 4, *NO_TEST)  # fmt: skip
        command = (sys.executable, ROOT / "tools/train_net.py", "--config-file", toy_recipe, "--backend", "detectron2",
                   "--num-gpus", 2, *keys)  # fmt: skip

        def run(name: str, *flags: Any) -> Path:
            words = [*command, *flags, "OUTPUT_DIR", tmp_path / name]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=environment)
            assert done.returncode == 0, done.stderr[-3000:]
            return tmp_path / name

        whole = run("whole")
        assert is_same(run("branch", "--branch-from", whole / "model_0000001.pth"), whole)

    def test_a_checkpoint_of_the_other_backend(self, train: Callable) -> None:
        """Recognised and named, with what to do, for weights and for --resume."""
        made = {name: train(*THREE, name=name, backend=name) for name in backends.BACKENDS}
        for other, name in (backends.BACKENDS, backends.BACKENDS[::-1]):
            file = made[other] / "checkpoints/model_final.pth"
            with pytest.raises(UserError, match=rf"is a {other} checkpoint, .*scratch-det convert .* --to {name}"):
                train("MODEL.WEIGHTS", file, *NO_TEST, name="new", backend=name)
            (made[other] / "result.json").unlink()
            with pytest.raises(UserError, match=rf"the backend was '{other}'.* give --backend {other}"):
                train(*THREE, name=other, backend=name, resume=True)


@pytest.mark.detectron2
class TestStock:
    """detectron2 without this repository, on its recipes and weights."""

    @pytest.fixture
    def stock(self, toy_recipe: Path, tmp_path: Path, datasets_root: Path) -> CfgNode:
        from detectron2.config import get_cfg as stock_cfg
        from detectron2.data import DatasetCatalog, MetadataCatalog
        from detectron2.data.datasets import register_coco_instances

        cfg = stock_cfg()
        cfg.merge_from_file(str(toy_recipe))
        cfg.merge_from_list(["MODEL.ROI_HEADS.NUM_CLASSES", 3, "DATASETS.TEST", "()", "INPUT.MASK_FORMAT", "bitmask",
                             "OUTPUT_DIR", str(tmp_path / "stock")])  # fmt: skip
        folder = datasets_root / "toy_train"
        register_coco_instances("toy_train", {}, str(folder / "annotations.json"), str(folder / "images"))
        yield cfg
        DatasetCatalog.remove("toy_train")
        MetadataCatalog.pop("toy_train")

    def test_its_trainer_trains_our_recipe(self, stock: CfgNode) -> None:
        from detectron2.engine import DefaultTrainer

        Path(stock.OUTPUT_DIR).mkdir()
        trainer = DefaultTrainer(stock)
        trainer.resume_or_load(resume=False)
        trainer.train()
        assert (Path(stock.OUTPUT_DIR) / "model_final.pth").exists()

    def test_its_checkpointer_loads_our_checkpoint(self, stock: CfgNode, train: Callable) -> None:
        from detectron2.checkpoint import DetectionCheckpointer
        from detectron2.modeling import build_model

        keys = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
        folder = train(*THREE, *keys, backend="detectron2")
        stock.merge_from_list(keys)
        theirs = build_model(stock)
        DetectionCheckpointer(theirs).load(str(folder / "checkpoints/model_final.pth"))
        backend = backends.load("detectron2")
        ours = backend.build(load_config(folder / "config.yaml", defaults=backends.defaults("detectron2")).cfg)
        ours.load_state_dict(torch.load(folder / "checkpoints/model_final.pth", weights_only=True)["model"])
        one, other = (backend.predict(model, [sample()])[0] for model in (ours, theirs))
        assert len(one["scores"]) > 0
        assert all(one[key].equal(other[key]) for key in ("boxes", "scores", "labels"))
        assert one["masks"].equal(other["masks"])


BITMASKS = ["INPUT.MASK_FORMAT", "bitmask"]  # the toy data set has masks that are no polygons


@pytest.mark.detectron2
@pytest.mark.slow
@pytest.mark.parametrize("source", backends.BACKENDS)
def test_a_trained_detector_is_worth_as_much_with_the_other_backend(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    make_digits(tmp_path / "digits", seed=0, train=400, val=60)
    target = next(name for name in backends.BACKENDS if name != source)
    keys = ("SOLVER.MAX_ITER", "160", "SOLVER.STEPS", "(140,)", "SOLVER.WARMUP_ITERS", "20")
    start(Request(str(SMALL), [*keys, "OUTPUT_DIR", str(tmp_path / "run")], backend=source))
    convert_file(str(tmp_path / "run/checkpoints/model_final.pth"), tmp_path / "converted.pth", target)
    keys = ("MODEL.WEIGHTS", str(tmp_path / "converted.pth"), "OUTPUT_DIR", str(tmp_path / "other"))
    start(Request(str(SMALL), list(keys), backend=target, eval_only=True))
    before, after = read(tmp_path / "run", "result.json"), read(tmp_path / "other", "inference/result.json")
    for task in ("bbox", "segm"):
        assert before["metrics"][task]["AP"] > 0.5
        assert after["metrics"][task]["AP"] == pytest.approx(before["metrics"][task]["AP"], abs=0.1)
