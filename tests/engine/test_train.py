"""A whole run and its folder, weights at random, evaluation only."""

import errno
import json
import math
import re
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from run_folder import CLOCK, NO_TEST, interrupted_after, lines, read, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from scratch_det import backends
from scratch_det.config.load import flatten, get_cfg, load_config
from scratch_det.engine import loop
from scratch_det.engine.checkpointer import read_checkpoint
from scratch_det.engine.run_dir import Facts, RunDir
from scratch_det.engine.train import git_state
from scratch_det.engine.writers import Run, start_writers
from scratch_det.errors import ConfigError, UserError
from scratch_det.reading import read_json
from scratch_det.weights.read import weights_sha256

LOSSES = {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"}
AP_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")

Train = Callable[..., Path]


class TestRun:
    def test_folder(self, train: Train, toy_recipe: Path) -> None:
        folder = train("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 2)
        self.check_files(folder)
        self.check_metrics(lines(folder))
        self.check_json(folder)
        cfg = load_config(toy_recipe, ["SOLVER.MAX_ITER", "4", "SOLVER.CHECKPOINT_PERIOD", "2", "TEST.EVAL_PERIOD", "2",
                                       "OUTPUT_DIR", str(folder), "MODEL.ROI_HEADS.NUM_CLASSES", "3",
                                       "DATASETS.CLASS_NAMES", "['class2', 'class5', 'class9']"],
                          backends.defaults(backends.choose("auto"))).cfg  # fmt: skip
        found, expected = flatten(RunDir(folder).read_config()), flatten(cfg)
        assert found.keys() == expected.keys()
        assert all(json.dumps(found[key]) == json.dumps(expected[key]) for key in expected)  # tuples as lists
        for picture in ("curves.png", "predictions.png"):
            with Image.open(folder / picture) as image:
                assert min(image.size) > 200

    @staticmethod
    def check_files(folder: Path) -> None:
        assert {path.name for path in folder.iterdir()} == {
            "config.yaml", "environment.json", "metrics.json", "checkpoints", "inference", "status.json", "result.json",
            "log.txt", "tensorboard", "curves.png", "predictions.png", "lock",
        }  # fmt: skip
        assert {path.name for path in (folder / "checkpoints").iterdir()} == {
            "model_0000001.pth", "model_best.pth", "model_final.pth", "last_checkpoint", "index.json",
        }  # fmt: skip
        assert [path.name for path in (folder / "inference").iterdir()] == ["coco_instances_results.json"]
        assert (folder / "checkpoints/last_checkpoint").read_text() == "model_final.pth"
        assert read_checkpoint(folder / "checkpoints/model_0000001.pth")["iteration"] == 1

    @staticmethod
    def check_metrics(found: list[dict[str, Any]]) -> None:
        """An evaluation after two iterations, a line of losses after the fourth, the last evaluation at MAX_ITER."""
        assert [line["iteration"] for line in found] == [1, 3, 4]
        middle, losses, final = found
        assert set(losses) == {"iteration", "total_loss", "lr", *LOSSES, *CLOCK}
        assert losses["total_loss"] == pytest.approx(sum(losses[key] for key in LOSSES), rel=0.1)  # medians
        assert (losses["lr"], losses["eta_seconds"]) == (0.01, 0)
        names = [*AP_NAMES, "AP-class2", "AP-class5", "AP-class9"]
        for line in (middle, final):
            assert set(line) == {"iteration", *(f"{task}/{name}" for task in ("bbox", "segm") for name in names)}
            assert line["bbox/APl"] is None  # no large object: not a number, which JSON cannot say

    @staticmethod
    def check_json(folder: Path) -> None:
        result, environment, status = (read(folder, f"{name}.json") for name in ("result", "environment", "status"))
        assert (result["backend"], result["iteration"]) == (backends.choose("auto"), 4)
        assert result["seconds"] > 0
        assert result["weights_sha256"] == weights_sha256(folder / "checkpoints/model_final.pth") != ""
        assert result["metrics"]["bbox"]["AP"] == lines(folder)[-1]["bbox/AP"]
        assert status["state"] == "finished"
        assert (status["iteration"], status["max_iter"]) == (4, 4)
        assert environment["packages"]["torch"] in torch.__version__
        assert {"command", "backend", "library", "python", "platform", "threads", "gpus", "git"} <= environment.keys()
        assert {name: data["images"] for name, data in environment["datasets"].items()} == {
            "toy_train": 4,
            "toy_val": 4,
        }
        assert all(re.fullmatch("[0-9a-f]{64}", data["json_sha256"]) for data in environment["datasets"].values())

    @pytest.mark.parametrize(("switch", "size", "is_saved"), [("", 9, False), ("1", 9, True), ("1", 2_000_000, False)])
    def test_uncommitted_changes_are_not_shown(
        self, switch: str, size: int, is_saved: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A digest tells whether two runs had the same ones."""

        def git(command: list[str], **_: Any) -> SimpleNamespace:
            return SimpleNamespace(stdout="c0ffee\n" if "rev-parse" in command else "x" * size)

        monkeypatch.setattr("scratch_det.engine.train.subprocess.run", git)
        monkeypatch.setenv("SCRATCH_DET_SAVE_DIFF", switch)
        found = git_state()
        assert (found["commit"], len(found["changes"]), found.get("diff")) == (
            "c0ffee",
            64,
            "x" * size if is_saved else None,
        )

    def test_losses_are_medians_of_the_window(self, tmp_path: Path) -> None:
        writer = loop.Metrics(start_writers(Run(RunDir(tmp_path), get_cfg(), 0)), max_iter=25, window=[])
        written = [writer.add(i, {"total_loss": float(i), "lr": i / 10, "time": 2.0}) for i in range(25)]
        writer.close("finished")
        assert [i for i, line in enumerate(written) if line] == [19, 24]
        assert lines(tmp_path) == [
            {"iteration": 19, "total_loss": 9.5, "lr": 1.9, "time": 2.0, "eta_seconds": 10.0},
            {"iteration": 24, "total_loss": 22.0, "lr": 2.4, "time": 2.0, "eta_seconds": 0.0},
        ]

    @pytest.mark.parametrize("most", [0, 3 * 2**30])
    def test_the_memory_of_a_gpu(self, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The most so far, MiB, also in a window that began on a CPU."""
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: most)
        scalars = {"total_loss": 1.0, "lr": 0.1, "time": 1.0, "data_time": 0.0}
        writer = loop.Metrics(start_writers(Run(RunDir(tmp_path), get_cfg(), 1)), max_iter=2, window=[scalars])
        medians = writer.add(1, scalars)
        writer.close("finished")
        assert medians
        assert json.loads((tmp_path / "metrics.json").read_text()).get("max_mem") == (3072 if most else None)
        assert loop.log_line(1, 2, medians).endswith("max_mem: 3072M" if most else "data 0.000 s")

    def test_log_is_kept(self, train: Train) -> None:
        log = (train() / "log.txt").read_text()
        assert f"backend {backends.library(backends.choose('auto'))}" in log
        assert "random initialisation" in log
        assert re.search(r"iter 2/2 .*total_loss \d", log)

    def test_a_folder_that_holds_a_run_is_rejected(self, train: Train) -> None:
        folder = train()
        before = (folder / "metrics.json").read_bytes()
        with pytest.raises(UserError, match="already holds a run"):
            train()
        assert (folder / "metrics.json").read_bytes() == before

    def test_same_seed_same_weights(self, train: Train) -> None:
        runs = [("a", 3), ("b", 3), ("c", 4)]
        first, again, other = (weights(train("SEED", seed, *NO_TEST, name=name)) for name, seed in runs)
        assert all(first[key].equal(again[key]) for key in first)
        assert not next(iter(first.values())).equal(next(iter(other.values())))

    def test_length_of_the_schedule_does_not_change_its_start(self, train: Train) -> None:
        short = weights(train("SOLVER.MAX_ITER", 2, *NO_TEST, name="short"))
        long = train("SOLVER.MAX_ITER", 3, "SOLVER.CHECKPOINT_PERIOD", 2, *NO_TEST, name="long")
        long = weights(long, "model_0000001.pth")
        assert all(short[key].equal(long[key]) for key in short)

    def test_divergence_is_said_and_recorded(self, train: Train, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"loss is not finite at iteration 1 .*nan(?s:.)*lower SOLVER.BASE_LR"):
            train("SOLVER.BASE_LR", "1e18", "SOLVER.MAX_ITER", 3, "SOLVER.CHECKPOINT_PERIOD", 1)
        status = read(tmp_path / "run", "status.json")
        assert (status["state"], status["iteration"]) == ("failed", 1)
        assert "not finite" in status["error"]
        assert not (tmp_path / "run/result.json").exists()
        assert (tmp_path / "run/checkpoints/last_checkpoint").read_text() == "model_0000000.pth"

    def test_weights_that_are_not_finite_are_not_saved(
        self, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A finite loss may have a gradient that is not; the next loss would tell, but after the checkpoint."""

        def spoil(run: loop.Trainer, *arguments: Any) -> tuple[dict[str, float], bool]:
            found = original(run, *arguments)
            if run.state.iteration == 1:
                next(run.state.model.parameters()).data[0] = math.inf
            return found

        original = loop.Trainer.step
        monkeypatch.setattr(loop.Trainer, "step", spoil)
        with pytest.raises(UserError, match=r"1 weights are not finite after 2 iterations(?s:.)*not saved(?s:.)*lower"):
            train("SOLVER.MAX_ITER", 3, "SOLVER.CHECKPOINT_PERIOD", 1, *NO_TEST)
        assert [path.name for path in (tmp_path / "run/checkpoints").glob("*.pth")] == ["model_0000000.pth"]

    def test_bf16(self, train: Train) -> None:
        folder = train("SOLVER.AMP.ENABLED", True, "SOLVER.CLIP_GRADIENTS.ENABLED", True, *NO_TEST)
        assert all(math.isfinite(lines(folder)[0][key]) for key in LOSSES)
        assert {value.dtype for value in weights(folder).values()} == {torch.float32}


class TestGoesOn:
    """What is lost beside a run must not end it."""

    def test_a_log_on_a_full_disk(self, train: Train, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run/log.txt").symlink_to("/dev/full")
        assert read(train(*NO_TEST), "result.json")["iteration"] == 2
        assert capfd.readouterr().err == ""

    def test_json_files_that_vanish_and_change(
        self, train: Train, datasets_root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A run is scored by what it has read."""
        val, training = (datasets_root / f"{name}/annotations.json" for name in ("toy_val", "toy_train"))
        assert val.exists()
        assert training.exists()

        def step(*arguments: Any) -> dict[str, float]:
            training.unlink(missing_ok=True)
            val.write_text("{}")
            return original(*arguments)

        original, expected = loop.Trainer.step, read(train(name="whole"), "result.json")
        monkeypatch.setattr(loop.Trainer, "step", step)
        assert read(train(), "result.json")["metrics"] == expected["metrics"]


def test_tensorboard_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It misses what cannot be written; what follows is in another file, and hides nothing that came before."""

    def write(writer: RecordWriter, data: bytes) -> None:
        if next(calls) == 3:  # each file begins with two records
            raise OSError(errno.ENOSPC, "No space left on device")
        original(writer, data)

    original, calls = RecordWriter.write, count()
    monkeypatch.setattr(RecordWriter, "write", write)
    metrics = loop.Metrics(start_writers(Run(RunDir(tmp_path), get_cfg(), 0)), 100, [])
    for iteration in (19, 39, 59):
        metrics.write(iteration, {"total_loss": iteration / 2})
    metrics.close("failed")
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("total_loss")
    assert [(one.step, one.value) for one in found] == [(19, 9.5), (59, 29.5)]
    assert [line["iteration"] for line in lines(tmp_path)] == [19, 39, 59]


class TestInitStd:
    def test_is_drawn_and_said(self, train: Train, capsys: pytest.CaptureFixture) -> None:
        train("SOLVER.BASE_LR", 1e-12, *NO_TEST, name="alike", init_std=0.3)
        assert "every layer from N(0, 0.3)" in capsys.readouterr().out

    def test_rejections(self, train: Train, tmp_path: Path) -> None:
        weights = train(*NO_TEST) / "checkpoints/model_final.pth"
        with pytest.raises(UserError, match="--init-std initialises random weights, but this run starts from "):
            train("MODEL.WEIGHTS", weights, *NO_TEST, name="other", init_std=0.1)
        with pytest.raises(UserError, match="--init-std is 0, expected above 0 and below 1"):
            train(*NO_TEST, name="other", init_std=0.0)
        with pytest.raises(UserError, match="--init-std: not allowed with --eval-only"):
            train(name="other", init_std=0.1, eval_only=True)
        with pytest.raises(UserError, match="this run starts from "):
            train(*NO_TEST, name="other", init_std=0.1, branch_from=str(weights))

    def test_is_kept_with_the_run(self, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
        keys = ("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 1, *NO_TEST)
        with interrupted_after(monkeypatch, 2):
            train(*keys, init_std=0.1)
        with pytest.raises(UserError, match=r"holds a run that began with 0\.1"):
            train(*keys, resume=True)
        train(*keys, resume=True, init_std=0.1)
        train("SOLVER.MAX_ITER", 4, resume=True, eval_only=True)  # no --init-std needed


class TestEvalOnly:
    def test_reproduces_the_runs_result(self, train: Train) -> None:
        folder = train("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.01, "SOLVER.MAX_ITER", 3)
        keys = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.01, "MODEL.WEIGHTS", folder / "checkpoints/model_final.pth")
        again = train(*keys, name="again", eval_only=True)
        assert read(again, "inference/result.json")["metrics"] == read(folder, "result.json")["metrics"]
        as_study = read_json(again / "inference/result.json", Facts)  # an evaluation may be a run of one
        assert as_study["metrics"]["bbox"]["AP"] == read(folder, "result.json")["metrics"]["bbox"]["AP"]
        results = "inference/coco_instances_results.json"
        assert read(again, results)
        assert (again / results).read_bytes() == (folder / results).read_bytes()
        assert [path.name for path in again.iterdir()] == ["inference"]

    def test_with_resume_takes_the_folders_last_checkpoint(self, train: Train) -> None:
        folder = train()
        expected = (folder / "inference/coco_instances_results.json").read_bytes()
        (folder / "inference/coco_instances_results.json").unlink()
        train(eval_only=True, resume=True)
        results = folder / "inference/coco_instances_results.json"
        assert results.read_bytes() == expected
        train("DATASETS.TEST", ("toy_train",), eval_only=True, resume=True)  # beside them
        assert results.read_bytes() == expected
        assert read(folder, "inference_toy_train/result.json")["classes"] == ["class2", "class5", "class9"]

    @pytest.mark.parametrize(("resume", "why"), [(False, "--resume"), (True, "there is no checkpoint in ")])
    def test_random_weights(self, train: Train, tmp_path: Path, resume: bool, why: str) -> None:
        with pytest.raises(ConfigError, match=rf'MODEL.WEIGHTS is "", .*{why}.* MODEL.WEIGHTS FILE'):
            train(eval_only=True, resume=resume)
        assert not (tmp_path / "run").exists()

    def test_a_model_that_finds_nothing(self, train: Train) -> None:
        train()
        folder = train("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.99, eval_only=True, resume=True)
        assert read(folder, "inference/coco_instances_results.json") == []
        assert read(folder, "inference/result.json")["metrics"]["segm"]["AP"] == 0

    def test_missing_weights(self, train: Train, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"absent\.pth is missing"):
            train("MODEL.WEIGHTS", tmp_path / "absent.pth", eval_only=True)
        assert not (tmp_path / "run").exists()

    def test_nothing_to_evaluate(self, train: Train) -> None:
        with pytest.raises(UserError, match=r"DATASETS\.TEST is empty"):
            train("DATASETS.TEST", "()", eval_only=True)
