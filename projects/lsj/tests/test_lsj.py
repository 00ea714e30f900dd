"""Recipes, schedule, refusals and whole runs of the project."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lsj.recipe import add_keys, lsj_schedule, problems, warmup_iters, without_keys
from run_folder import interrupted_after, is_same, read

from scratch_det import backends
from scratch_det.config import check_config, flatten, get_cfg, load_config
from scratch_det.schedule import Schedule
from scratch_det.train import metrics
from scratch_det.train.rundir import RunDir

PROJECT = Path(__file__).parents[1]
ROOT = PROJECT.parents[1]
COCO = sorted((PROJECT / "configs").glob("mask_rcnn_*.yaml"))
DIGITS = PROJECT / "configs/digits_mask_rcnn_R_18_FPN_2ep_lsj.yaml"
NAME = re.compile(r"mask_rcnn_R_(\d+)_FPN_(\d+)ep_lsj")
# Box and mask AP of detectron2's MODEL_ZOO.md, by depth and epochs.
REPORTED = {
    (50, 100): (44.6, 40.3), (50, 200): (46.3, 41.7), (50, 400): (47.4, 42.5),
    (101, 100): (46.4, 41.6), (101, 200): (48.0, 43.1), (101, 400): (48.9, 43.7),
}  # fmt: skip
Net = Callable[..., Path]


def config(path: Path, *overrides: Any) -> Any:
    known = get_cfg()
    add_keys(known)
    return load_config(path, overrides, known).cfg


def depth_and_epochs(path: Path) -> tuple[int, int]:
    found = NAME.search(path.stem)
    assert found, path
    return int(found[1]), int(found[2])


class TestSchedule:
    @pytest.mark.parametrize(
        ("epochs", "expected"),
        [  # detectron2's configs/new_baselines
            (50, Schedule(92_187, (81_944, 88_773))),
            (100, Schedule(184_375, (163_889, 177_546))),
            (200, Schedule(368_750, (327_778, 355_092))),
            (400, Schedule(737_500, (655_556, 710_184))),
        ],
    )
    def test_is_detectron2s(self, epochs: int, expected: Schedule) -> None:
        assert lsj_schedule(epochs) == expected

    def test_warm_up_scales_too(self) -> None:
        assert [warmup_iters(lsj_schedule(epochs).max_iter) for epochs in (100, 200, 400)] == [500, 1000, 2000]

    @pytest.mark.parametrize("numbers", [(0,), (100, 0), (100, 118_000, 0)])
    def test_nonsense_is_refused(self, numbers: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="must be 1 or more"):
            lsj_schedule(*numbers)


class TestRecipes:
    def test_all_six_are_there(self) -> None:
        assert {depth_and_epochs(path) for path in COCO} == set(REPORTED)

    @pytest.mark.parametrize("path", [*COCO, DIGITS], ids=lambda path: path.stem)
    def test_can_train(self, path: Path) -> None:
        cfg = config(path)
        assert check_config(cfg, num_processes=8) == []
        assert list(problems(cfg)) == []

    @pytest.mark.parametrize("path", COCO, ids=lambda path: path.stem)
    def test_schedule_is_recomputed(self, path: Path) -> None:
        cfg, (depth, epochs) = config(path), depth_and_epochs(path)
        assert depth == cfg.MODEL.RESNETS.DEPTH
        assert cfg.SOLVER.IMS_PER_BATCH == 64
        assert Schedule(cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == lsj_schedule(epochs)
        assert warmup_iters(cfg.SOLVER.MAX_ITER) == cfg.SOLVER.WARMUP_ITERS

    def test_schedule_of_digits_is_recomputed(self) -> None:
        solver = config(DIGITS).SOLVER
        assert Schedule(solver.MAX_ITER, solver.STEPS) == lsj_schedule(2, epoch=2000, batch=solver.IMS_PER_BATCH)

    @pytest.mark.parametrize("path", [*COCO, DIGITS], ids=lambda path: path.stem)
    def test_header(self, path: Path) -> None:
        header, solver = path.read_text().split("_BASE_")[0], config(path).SOLVER
        assert f"python projects/lsj/train_net.py --config-file {path.relative_to(ROOT)}" in header
        first, second = solver.STEPS
        assert f"{solver.MAX_ITER:,} iterations of {solver.IMS_PER_BATCH} images" in header
        assert f"drops at {first:,} and {second:,}" in header
        if path in COCO:
            box, mask = REPORTED[depth_and_epochs(path)]
            assert f"box AP {box}, mask AP {mask} " in header

    def test_lengths_differ_in_the_schedule_alone(self) -> None:
        for depth in (50, 101):
            of_depth = [flatten(config(path)) for path in COCO if depth_and_epochs(path)[0] == depth]
            differing = {key for key, value in of_depth[0].items() if any(cfg[key] != value for cfg in of_depth)}
            assert differing == {"SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.WARMUP_ITERS"}

    def test_keys_are_removed_without_a_trace(self) -> None:
        cfg = config(COCO[0])
        assert flatten(without_keys(cfg)).keys() == flatten(get_cfg()).keys()
        assert "INPUT.LSJ.SIZE" in flatten(cfg)

    @pytest.mark.detectron2
    @pytest.mark.parametrize("path", COCO, ids=lambda path: path.stem)
    def test_says_what_detectron2s_does(self, path: Path) -> None:
        from detectron2 import model_zoo
        from detectron2.config import instantiate

        cfg = config(path)
        theirs = model_zoo.get_config(f"new_baselines/{path.stem.replace('lsj', 'LSJ')}.py")
        scheduler, solver = theirs.lr_multiplier.scheduler, cfg.SOLVER
        assert (theirs.train.max_iter, tuple(scheduler.milestones)) == (solver.MAX_ITER, solver.STEPS)
        assert theirs.lr_multiplier.warmup_length * theirs.train.max_iter == pytest.approx(
            solver.WARMUP_ITERS
        )  # a part of the run
        assert theirs.lr_multiplier.warmup_factor == solver.WARMUP_FACTOR
        assert (theirs.optimizer.lr, theirs.optimizer.weight_decay) == (solver.BASE_LR, solver.WEIGHT_DECAY)
        assert theirs.dataloader.train.total_batch_size == solver.IMS_PER_BATCH
        scale, cut, _ = theirs.dataloader.train.mapper.augmentations
        assert (scale.min_scale, scale.max_scale) == cfg.INPUT.LSJ.SCALES
        assert {scale.target_height, scale.target_width, *cut.crop_size} == {cfg.INPUT.LSJ.SIZE}
        assert (theirs.model.pixel_mean, theirs.model.pixel_std) == (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
        assert theirs.model.backbone.bottom_up.freeze_at == cfg.MODEL.BACKBONE.FREEZE_AT
        assert theirs.train.amp.enabled == cfg.SOLVER.AMP.ENABLED
        with torch.device("meta"):
            ours, model = backends.load("detectron2").build(without_keys(cfg)), instantiate(theirs.model)
        assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


class TestRefusals:
    @pytest.mark.parametrize(
        ("overrides", "expected"),
        [
            (("INPUT.LSJ.SIZE", 0), "INPUT.LSJ.SIZE is 0, expected the side of the training images"),
            (("INPUT.LSJ.SIZE", 0, "INPUT.MIN_SIZE_TRAIN", "(96,)"), "or train this recipe without jitter"),
            (("INPUT.LSJ.SIZE", -64), "INPUT.LSJ.SIZE is -64, expected"),
            (("INPUT.LSJ.SIZE", 64.5), "INPUT.LSJ.SIZE"),
            (("INPUT.LSJ.SCALES", "(2.0, 0.1)"), 'set INPUT.LSJ.SCALES "(0.1, 2.0)"'),
            (("INPUT.LSJ.SCALES", "(0.0, 2.0)"), "INPUT.LSJ.SCALES is (0.0, 2.0), expected the two ends"),
            (("INPUT.LSJ.SCALES", "(0.1, 1.0, 2.0)"), "INPUT.LSJ.SCALES is (0.1, 1.0, 2.0), expected the two ends"),
            (("INPUT.MIN_SIZE_TRAIN", "(640, 800)"), "INPUT.MIN_SIZE_TRAIN would change nothing"),
            (("INPUT.LSJ.SCALE", "(0.1, 2.0)"), "unknown key INPUT.LSJ.SCALE; did you mean 'INPUT.LSJ.SCALES'?"),
        ],
    )
    def test_one_line_and_exit_code_2(
        self, lsj_net: Net, tmp_path: Path, capsys: pytest.CaptureFixture, overrides: tuple, expected: str
    ) -> None:
        with pytest.raises(SystemExit) as exit_info:
            lsj_net(*overrides)
        assert exit_info.value.code == 2
        message = capsys.readouterr().err
        assert expected in message
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        assert not (tmp_path / "run").exists()

    def test_jitter_is_not_left_out_silently(self) -> None:
        """The plain tool does not train a recipe of this project as if it said nothing of jitter."""
        command = [sys.executable, "tools/train_net.py", "--config-file", str(DIGITS)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2
        assert "unknown key INPUT.LSJ.SIZE" in done.stderr

    def test_refusing_needs_no_torch(self) -> None:
        code = "import sys, lsj.start; assert 'torch' not in sys.modules"
        path = ":".join([str(PROJECT), str(ROOT)])
        subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": path})


class TestRuns:
    KEYS = ("SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 3, "SOLVER.STEPS", "(4, 5)")

    def test_resumes_bit_for_bit_and_evaluates(self, lsj_net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(metrics, "PERIOD", 1)
        whole = lsj_net(*self.KEYS, name="whole")
        with interrupted_after(monkeypatch, 4):
            lsj_net(*self.KEYS, name="halves")
        halves = lsj_net(*self.KEYS, name="halves", flags=("--resume",))
        assert is_same(whole, halves)
        assert RunDir(whole).read_config().INPUT.LSJ.SIZE == 64
        result = read(halves, "result.json")
        assert result["iteration"] == 6
        assert {"bbox", "segm"} <= result["metrics"].keys()

    def test_another_jitter_is_another_run(self, lsj_net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
        with interrupted_after(monkeypatch, 4):
            lsj_net(*self.KEYS)
        with pytest.raises(SystemExit) as exit_info:
            lsj_net(*self.KEYS, "INPUT.LSJ.SCALES", "(0.8, 1.25)", flags=("--resume",))
        assert exit_info.value.code == 2

    def test_shapes_training(self, lsj_net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
        """The jitter reaches the loss: another range of scales, other numbers."""
        monkeypatch.setattr(metrics, "PERIOD", 1)
        keys = ("SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()")
        folders = [lsj_net(*keys, name="one"), lsj_net(*keys, "INPUT.LSJ.SCALES", "(1.0, 1.0)", name="other")]
        losses = [json.loads((folder / "metrics.json").read_text().splitlines()[0])["total_loss"] for folder in folders]
        assert losses[0] != losses[1]

    def test_eval_only(self, lsj_net: Net) -> None:
        folder = lsj_net("SOLVER.MAX_ITER", 1)
        weights = folder / "checkpoints/model_final.pth"
        found = lsj_net("MODEL.WEIGHTS", weights, name="again", flags=("--eval-only",))
        assert read(found, "inference/result.json")["metrics"] == read(folder, "result.json")["metrics"]

    @pytest.mark.detectron2
    def test_on_detectron2(self, lsj_net: Net) -> None:
        flags = ("--backend", "detectron2")
        folder = lsj_net("SOLVER.MAX_ITER", 1, "MODEL.RPN.CONV_DIMS", "[-1, -1]", flags=flags)
        weights = folder / "checkpoints/model_final.pth"
        found = lsj_net("MODEL.WEIGHTS", weights, "MODEL.RPN.CONV_DIMS", "[-1, -1]", name="again",
                        flags=(*flags, "--eval-only"))  # fmt: skip
        assert read(found, "inference/result.json")["backend"] == "detectron2"
