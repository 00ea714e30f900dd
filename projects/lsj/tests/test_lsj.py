"""Recipes, schedule, rejections and whole runs of the project."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_command, restored_registries
from fvcore.common.config import CfgNode
from run_folder import interrupted_after, is_same, read
from torch import Tensor

from scratch_det import backends
from scratch_det.analysis import analyze
from scratch_det.command_line import load_project
from scratch_det.config.load import flatten, load_config
from scratch_det.config.rules import check_config
from scratch_det.config.schedule import Schedule
from scratch_det.data.catalog import lookup
from scratch_det.data.coco import read_coco
from scratch_det.data.dataset import TrainingSet
from scratch_det.data.digits import make_digits
from scratch_det.engine.command import start
from scratch_det.engine.plan import Request
from scratch_det.errors import UserError
from scratch_det.study.search import Search
from scratch_det.weights.names import renamed

EPOCH = 118_000  # images: detectron2 counts with the rounded size of train2017
BATCH = 64  # images
DROPS = (8 / 9, 26 / 27)  # of a run, the two drops of detectron2's 100 epochs: 163,889 and 177,546 of 184,375
WARMUP = 500 / 184_375  # of a run, its first part: detectron2 means 500 iterations of the 100 epochs
PROJECT = Path(__file__).parents[1]
ROOT = PROJECT.parents[1]
COCO = sorted((PROJECT / "configs").glob("mask_rcnn_*.yaml"))
R50 = PROJECT / "configs/mask_rcnn_R_50_FPN_100ep_lsj.yaml"
DIGITS = PROJECT / "configs/digits_mask_rcnn_R_18_FPN_2ep_lsj.yaml"
NAME = re.compile(r"mask_rcnn_R_(\d+)_FPN_(\d+)ep_lsj")
INSTALLED = [name for name in backends.BACKENDS if backends.is_installed(name)]
# Box and mask AP of detectron2's MODEL_ZOO.md, by depth and epochs.
REPORTED = {
    (50, 100): (44.6, 40.3), (50, 200): (46.3, 41.7), (50, 400): (47.4, 42.5),
    (101, 100): (46.4, 41.6), (101, 200): (48.0, 43.1), (101, 400): (48.9, 43.7),
}  # fmt: skip
FEW = ("SOLVER.IMS_PER_BATCH", "2", "SOLVER.BASE_LR", "0.005", "SOLVER.WARMUP_ITERS", "1", "SOLVER.STEPS", "()",
       "SOLVER.CHECKPOINT_PERIOD", "1", "INPUT.LSJ.SIZE", "64", "INPUT.MIN_SIZE_TEST", "64")  # fmt: skip
Run = Callable[..., Path]


@pytest.fixture(autouse=True)
def project() -> Iterator[None]:
    with restored_registries():
        load_project(PROJECT)
        yield


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_digits(folder / "digits", seed=0, train=24, val=3)
    return folder


@pytest.fixture
def run(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run(KEY, VALUE, ..., name="run", **request)`` on 64 px squares; returns the run's folder."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(digits))

    def begin(*keys: Any, name: str = "run", **request: Any) -> Path:
        start(Request(str(DIGITS), [*FEW, *map(str, keys), "OUTPUT_DIR", str(tmp_path / name)], **request))
        return tmp_path / name

    return begin


def config(path: Path, *overrides: Any) -> CfgNode:
    return load_config(path, overrides).cfg


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
    def test_nonsense_is_rejected(self, numbers: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="must be 1 or more"):
            lsj_schedule(*numbers)


class TestRecipes:
    def test_all_six_are_there(self) -> None:
        assert {depth_and_epochs(path) for path in COCO} == set(REPORTED)

    @pytest.mark.parametrize("path", [*COCO, DIGITS], ids=lambda path: path.stem)
    def test_can_train(self, path: Path) -> None:
        assert check_config(config(path), num_processes=8) == []

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
        assert "scratch-det train --project projects/lsj " in header
        assert f"--config-file {path.relative_to(ROOT)}" in header
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

    @pytest.mark.parametrize("backend", INSTALLED)
    def test_the_model(self, backend: str) -> None:
        """Parameters by hand, but those below the FPN, which are torchvision's classifier's; names there and back."""
        cfg = load_config(R50, (), backends.defaults(backend)).cfg
        backends.check_keys(backend, cfg)
        parts = analyze(backends.load(backend), cfg, (256, 320)).parts
        slots = {"box head": 4 * 1025, "mask head": 257} if backend == "torchvision" else {}  # of the background
        conv = 9 * 256 * 256
        assert {name: part.parameters - slots.get(name, 0) for name, part in parts.items()} == {
            "bottom-up": 23_508_032,
            "FPN": 256 * (256 + 512 + 1024 + 2048) + 4 * conv + 8 * 2 * 256,
            "RPN": 2 * (conv + 256) + 257 * 3 * 5,
            "box head": 4 * (conv + 2 * 256) + (49 * 256 + 1) * 1024 + 1025 * (80 * 5 + 1),
            "mask head": 4 * (conv + 2 * 256) + 4 * 256 * 256 + 256 + 257 * 80,
        }
        with torch.device("meta"):
            names = backends.load(backend).build(cfg).state_dict()
        other = next(name for name in backends.BACKENDS if name != backend)
        theirs = renamed(names, backend, other)
        assert None not in theirs.values()
        assert set(renamed(map(str, theirs.values()), other, backend).values()) == set(names)

    @pytest.mark.detectron2
    @pytest.mark.parametrize("path", COCO, ids=lambda path: path.stem)
    def test_says_what_detectron2s_does(self, path: Path) -> None:
        model_zoo = pytest.importorskip("detectron2.model_zoo", reason="detectron2 is not installed")
        from detectron2.config import instantiate

        cfg = load_config(path, (), backends.defaults("detectron2")).cfg
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
            ours, model = backends.load("detectron2").build(cfg), instantiate(theirs.model)
        assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


class TestRejections:
    @pytest.mark.parametrize(
        ("keys", "expected"),
        [
            (("INPUT.LSJ.SIZE", 0), "INPUT.LSJ.SIZE is 0, expected the side of the training images"),
            (("INPUT.LSJ.SIZE", -64), "INPUT.LSJ.SIZE is -64, expected"),
            (("INPUT.LSJ.SIZE", 64.5), "INPUT.LSJ.SIZE is 64.5 (float), expected int"),
            (("INPUT.LSJ.SCALES", "(2.0, 0.1)"), 'set INPUT.LSJ.SCALES "(0.1, 2.0)"'),
            (("INPUT.LSJ.SCALES", "(0.0, 2.0)"), "INPUT.LSJ.SCALES is (0.0, 2.0), expected the two ends"),
            (("INPUT.LSJ.SCALES", "(0.1, 1.0, 2.0)"), "INPUT.LSJ.SCALES is (0.1, 1.0, 2.0), expected the two ends"),
            (("INPUT.LSJ.SCALE", "(0.1, 2.0)"), "unknown key INPUT.LSJ.SCALE; did you mean 'INPUT.LSJ.SCALES'?"),
            (
                ("INPUT.MIN_SIZE_TRAIN", "(640, 800)"),
                "which INPUT.AUGMENTATION LSJ ignores; leave it",
            ),
            (("INPUT.AUGMENTATION", "resize"), "INPUT.LSJ.SIZE is 64, which INPUT.AUGMENTATION resize ignores"),
            (
                ("INPUT.AUGMENTATION", "LJS"),
                "INPUT.AUGMENTATION is 'LJS', expected 'resize' or 'LSJ'; did you mean 'LSJ'?",
            ),
        ],
    )
    def test_one_line(self, run: Run, tmp_path: Path, keys: tuple, expected: str) -> None:
        with pytest.raises(UserError, match=re.escape(expected)) as raised:
            run(*keys)
        assert len(str(raised.value).splitlines()) == 1
        assert not (tmp_path / "run").exists()

    def test_jitter_is_not_left_out_silently(self) -> None:
        command = [sys.executable, "tools/train_net.py", "--config-file", str(DIGITS)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2
        assert "key INPUT.AUGMENTATION is one of a project: give --project projects/lsj" in done.stderr
        assert done.stderr.endswith(f"give --project {PROJECT}\n")

    def test_rejecting_needs_no_torch(self) -> None:
        code = "import sys, lsj; lsj.add(); assert 'torch' not in sys.modules"
        path = ":".join([str(PROJECT.parent), str(ROOT)])
        subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": path})


def test_a_search_hands_the_project_on(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text("INPUT.LSJ.SCALES: [[0.1, 2.0], [0.8, 1.25]]")
    words = ["--project", str(PROJECT), "--config-file", str(DIGITS), "--grid", str(tmp_path / "grid.yaml")]
    args = load_command("search").build_parser().parse_intermixed_args([*words, "--out", str(tmp_path / "out")])
    del args.choose
    search = Search(**vars(args))
    search.check()
    steps = search.steps()
    assert len(steps) == 2
    assert all(list(step.words[1:3]) == ["--project", str(PROJECT)] for step in steps)


def test_a_sample_depends_on_seed_and_position_alone(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the length of the run, nor on what was read before: what exact resume and a shared beginning rest on."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(digits))
    data = [read_coco(lookup("digits_train"), need_masks=True)]

    def samples(max_iter: int, positions: range) -> dict[int, Tensor]:
        dataset = TrainingSet(config(DIGITS, "SOLVER.MAX_ITER", max_iter), data)
        return {position: dataset[position]["image"] for position in positions}

    first, later = samples(500, range(12)), samples(2000, range(11, -1, -1))
    assert all(torch.equal(first[position], later[position]) for position in range(12))
    assert {image.shape for image in first.values()} == {(3, 128, 128)}
    assert len({tuple(image.flatten().tolist()) for image in first.values()}) == 12


@pytest.mark.parametrize("backend", INSTALLED)
@pytest.mark.parametrize("iterations", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_trains_resumes_and_evaluates(iterations: int, backend: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ("SOLVER.MAX_ITER", iterations, "MODEL.RPN.CONV_DIMS", [-1, -1])
    whole = run(*keys, name="whole", backend=backend)
    with interrupted_after(monkeypatch, iterations - 1):
        run(*keys, name="halves", backend=backend)
    with pytest.raises(UserError, match=r"INPUT\.LSJ\.SCALES was \(0\.1, 2\.0\), now \(0\.8, 1\.25\)"):
        run(*keys, "INPUT.LSJ.SCALES", "(0.8, 1.25)", name="halves", backend=backend, resume=True)
    halves = run(*keys, name="halves", backend=backend, resume=True)
    assert is_same(halves, whole)
    found = read(halves, "result.json")["metrics"]
    assert set(found) == {"bbox", "segm"}
    weights = halves / "checkpoints/model_final.pth"
    again = run(*keys, "MODEL.WEIGHTS", weights, name="again", backend=backend, eval_only=True)
    assert read(again, "inference/result.json")["metrics"] == found


def lsj_schedule(epochs: int, epoch: int = EPOCH, batch: int = BATCH) -> Schedule:
    """``epochs`` of ``epoch`` images, ``batch`` in an iteration; the drops are where they are in 100 epochs, in parts.

    So they scale with the length, where the paper's last 60k and 20k iterations do not, and so does warm-up: a shorter
    run is not the beginning of a longer one. As in detectron2, the drops are whole iterations of the 100 epochs, and
    these are multiplied.
    """
    if min(epochs, epoch, batch) < 1:
        raise ValueError(f"epochs {epochs}, images in one {epoch} and in a batch {batch} must be 1 or more")
    hundred = 100 * epoch / batch
    return Schedule(epochs * epoch // batch, tuple(round(hundred * part) * epochs // 100 for part in DROPS))


def warmup_iters(max_iter: int) -> int:
    """The iterations of warm-up in a run of ``max_iter``."""
    return round(WARMUP * max_iter)
