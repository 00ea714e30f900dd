"""The grid search: what a grid is, what is rejected, and what is left behind. Runs are played by a script."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, load_command
from run_folder import is_same, read
from study.player import until

from scratch_det import command_line, files
from scratch_det.config.load import flatten, load_config
from scratch_det.distributed.stop import Stopped
from scratch_det.errors import UserError
from scratch_det.study import local
from scratch_det.study import search as module
from scratch_det.study.run import EXIT_SOME_FAILED, Step
from scratch_det.study.search import Search, points_of, read_grid
from scratch_det.study.study import Study

LOW_DATA = ROOT / "configs/COCO-LowData"
OLD, FOUND = (LOW_DATA / f"pretrained_mask_rcnn_R_50_FPN_6x_gn_35k{end}.yaml" for end in ("_old", ""))
SCRATCH = LOW_DATA / "scratch_mask_rcnn_R_50_FPN_9x_gn_35k.yaml"
TWO_BY_TWO = {"SOLVER": {"BASE_LR": [0.02, 0.04], "GAMMA": [0.1, 0.02]}}
NAMES = [f"trial_BASE_LR-{rate}_GAMMA-{gamma}" for rate in (0.02, 0.04) for gamma in (0.1, 0.02)]
TRAINER = """
import json, os, sys
from pathlib import Path
folder, values = Path(sys.argv[-1]), dict(zip(sys.argv, sys.argv[1:]))
folder.mkdir(parents=True, exist_ok=True)
with open(folder.parent / "starts", "a") as starts:
    starts.write(folder.name + "\\n")
if (folder.parent / (folder.name + ".fail")).exists():
    sys.exit("error: it was not to be")
if (folder.parent / (folder.name + ".stop")).exists():
    os.kill(os.getppid(), 15)
    sys.exit(75)
ap = float(values.get("SOLVER.BASE_LR", 0)) * 100 + float(values.get("SOLVER.GAMMA", 0))
ap += len(values.get("INPUT.MIN_SIZE_TRAIN", ""))
result = {"seconds": 60.0, "metrics": {"bbox": {"AP": round(ap, 2), "APl": None}}}
(folder / "result.json").write_text(json.dumps(result))
"""


class Trainers(local.Local):
    """Points are the script above; DIR/POINT.fail makes one fail, DIR/POINT.stop asks the search to stop."""

    @staticmethod
    def command(step: Step) -> list[str]:
        return [sys.executable, "-c", TRAINER, *step.words]


def write_grid(path: Path, content: Any) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Search]:
    """``search(grid=TWO_BY_TWO, **fields)``, of the paper's recipe for 35k images, into ``tmp_path / "out"``."""
    monkeypatch.setattr(local, "SECONDS_BETWEEN_LOOKS", 0.02)
    monkeypatch.setattr(module, "Local", Trainers)

    def make(grid: Any = TWO_BY_TWO, **fields: Any) -> Search:
        path = write_grid(tmp_path / "grid.yaml", grid)
        return Search(**{"config_file": str(OLD), "grid": str(path), "out": tmp_path / "out", **fields})

    return make


def search_grid(search: Search) -> int:
    search.check()
    return module.search_grid(search)


def starts(search: Search) -> list[str]:
    path = search.out / "starts"
    return path.read_text().split() if path.exists() else []


class TestGrid:
    def test_of_35k_images(self) -> None:
        """Its last point is the recipe that the paper's search led to."""
        points = points_of(read_grid(ROOT / "docs/grid_35k.yaml"))
        assert len({point.name for point in points}) == 8
        assert points[-1].name == "trial_BASE_LR-0.04_GAMMA-0.02_scales-512-544-576-608-640-672-704-736-768-800"
        first, last = (flatten(load_config(OLD, point.overrides).cfg) for point in (points[0], points[-1]))
        assert first == flatten(load_config(OLD).cfg)
        assert last == flatten(load_config(FOUND).cfg)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"SOLVER": {"GAMMA": [0.1]}}, "one point, expected two or more"),
            ({"SOLVER": {"GAMMA": []}}, r"grid.yaml:2: SOLVER.GAMMA is \[\], expected a list of values"),
            ({"SOLVER": {"GAMMA": 0.1}}, "SOLVER.GAMMA is 0.1, expected a list of values"),
            ({"SOLVER": {"GAMMA": [0.1, 0.1]}}, "SOLVER.GAMMA has 0.1 twice"),
            ({"one": [{"A": 1}, {"B": 2}]}, "each choice on this axis has to set the same keys"),
            ({"one": [{"A": 1}, 2]}, "each choice on this axis has to set the same keys"),
            ({"A": [1, 2], "one": [{"A": 1}, {"A": 2}]}, "A is set by the axis A and by the axis one: leave out one"),
            (
                {"OUTPUT_DIR": ["a", "b"]},
                "OUTPUT_DIR is set by --out, where each point has a folder of its own, and by the axis",
            ),
            ({"_BASE_": "other.yaml", "A": [1, 2]}, "a grid has no _BASE_"),
            ({}, "found no keys at all|one point"),
        ],
    )
    def test_rejected(self, content: Any, message: str, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=message):
            read_grid(write_grid(tmp_path / "grid.yaml", content))

    def test_names(self, tmp_path: Path) -> None:
        """Brackets are left out of them; two keys with the same last word are named in full."""
        grid = {"MODEL": {"FPN": {"NORM": ["GN", ""]}, "ROI_BOX_HEAD": {"NORM": ["GN"]}}, "SEED": [-1, "(1, 2)"]}
        names = [point.name for point in points_of(read_grid(write_grid(tmp_path / "grid.yaml", grid)))]
        assert names[0] == "trial_MODEL.FPN.NORM-GN_MODEL.ROI_BOX_HEAD.NORM-GN_SEED--1"
        assert names[3] == "trial_MODEL.FPN.NORM-empty_MODEL.ROI_BOX_HEAD.NORM-GN_SEED-1-2"


class TestRejections:
    def test_a_runs_folder(self, search: Callable, tmp_path: Path) -> None:
        own = search()
        own.out.mkdir(parents=True)
        (own.out / "metrics.json").write_text("{}")
        with pytest.raises(UserError, match="is the folder of a run"):
            own.check()

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"grid": {"SOLVER": {"BASE_LRR": [1, 2]}}}, "at the grid point BASE_LRR 1: .*you mean 'SOLVER.BASE_LR'"),
            ({"grid": {"SOLVER": {"GAMMA": [0.1, "high"]}}}, "at the grid point GAMMA high: .*expected float"),
            (
                {"grid": {"INPUT": {"MIN_SIZE_TRAIN": [[800], [512, 800]]}, "SEED": [1]},
                 "overrides": ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "range")},
                r"at the grid point MIN_SIZE_TRAIN 800, SEED 1: .*a range needs its two ends",
            ),
            ({"grid": {"SOLVER": {"GAMMA": [0.1, "1e-1"]}}}, "GAMMA 0.1 and GAMMA 1e-1 are one and the same point"),
            ({"metric": "bbox/AP5"}, "--metric is bbox/AP5, expected one of bbox/AP, .*did you mean 'bbox/AP75'|AP50"),
            ({"metric": "bbox"}, "--metric is bbox, expected"),
            ({"metric": "keypoints/AP"}, "--metric is keypoints/AP, expected"),
            ({"overrides": ("DATASETS.TEST", "()")}, "DATASETS.TEST is empty"),
            ({"overrides": ("SOLVER.GAMMA", "1")}, "GAMMA is set by the command line and by the axis SOLVER.GAMMA"),
            ({"overrides": ("OUTPUT_DIR", "there")}, "OUTPUT_DIR is set by --out, .* and by the command line"),
            ({"apply_to": ("missing.yaml",)}, "missing.yaml does not exist"),
            ({"apply_to": (str(SCRATCH), str(SCRATCH))}, "would be written twice"),
            ({"num_gpus": -1}, "--num-gpus -1: expected 1 or more"),
            ({"num_gpus": 3}, "SOLVER.IMS_PER_BATCH is 16"),
        ],
    )  # fmt: skip
    def test_before_anything_is_written(self, search: Callable, fields: dict, message: str, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=message):
            search(**fields).check()
        assert not (tmp_path / "out").exists()

    def test_per_class_metric(self, search: Callable) -> None:
        search(metric="segm/AP-person").check()

    def begin(self, search: Search) -> None:
        """What a point's run leaves when it has begun."""
        folder = search.out / NAMES[0]
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text('{"iteration": 1}\n')
        (folder / "config.yaml").write_text(search.recipe(search.points[0]).dump())

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("SOLVER.MOMENTUM", "0.8"), "SOLVER.MOMENTUM 0.9, its recipe 0.8"),
            (("SOLVER.MAX_ITER", "530000"), "SOLVER.MAX_ITER 540000, its recipe 530000"),
            (("INPUT.MIN_SIZE_TEST", "600"), "INPUT.MIN_SIZE_TEST 800, its recipe 600"),
        ],
    )
    def test_another_search_in_the_folder(self, search: Callable, words: tuple, message: str) -> None:
        self.begin(search())
        with pytest.raises(UserError, match=rf"holds another search:\n  .*config.yaml has {message}"):
            search(overrides=words).check()

    def test_another_machine_may_differ(self, search: Callable) -> None:
        self.begin(search())
        search(overrides=("MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "1")).check()

    def test_without_locks(self, search: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
        def flock(*_: Any) -> None:
            raise OSError(37, "No locks available")

        monkeypatch.setattr(files.fcntl, "flock", flock)
        with pytest.raises(UserError, match="No locks available"):
            search_grid(search())

    def test_tool(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
        words = ["--config-file", OLD, "--grid", ROOT / "docs/grid_35k.yaml", "--out", tmp_path / "out", "SEEED", 1]
        monkeypatch.setattr(sys, "argv", ["search.py", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            load_command("search").main()
        assert end.value.code == 2
        assert "unknown key SEEED; did you mean 'SEED'?" in capsys.readouterr().err


class TestSearch:
    def test_winner_is_applied(self, search: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        wanted = search(apply_to=(str(SCRATCH),), overrides=("SEED", "3"))
        assert search_grid(wanted) == 0
        assert starts(wanted) == NAMES
        said = capsys.readouterr().out
        assert "BASE_LR 0.04, GAMMA 0.02: bbox/AP 4.02; 4 of 4, eta 0:00:00" in said
        table = [line for line in said.splitlines() if line.startswith("|")]
        assert [[cell.strip() for cell in line.split("|")[2:5]] for line in table[2:]] == [
            ["0.04", "0.1", "4.10"], ["0.04", "0.02", "4.02"], ["0.02", "0.1", "2.10"], ["0.02", "0.02", "2.02"]
        ]  # fmt: skip
        assert len({len(line) for line in table}) == 1
        assert [line.startswith("| best ") for line in table[2:]] == [True, False, False, False]
        out = tmp_path / "out"
        assert (out / "search.md").read_text().splitlines() == table
        assert (out / "search.png").read_bytes().startswith(b"\x89PNG")
        assert yaml.safe_load((out / "best.yaml").read_text()) == {"SOLVER": {"BASE_LR": 0.04, "GAMMA": 0.1}}
        assert "bbox/AP 4.10" in (out / "best.yaml").read_text()
        assert json.loads((out / "result.json").read_text())["metrics"] == {"bbox": {"AP": 4.1}}
        applied, expected = (
            flatten(load_config(path, words).cfg)
            for path, words in ((out / SCRATCH.name, []), (SCRATCH, ["SOLVER.BASE_LR", "0.04", "SOLVER.GAMMA", "0.1"]))
        )
        assert applied == expected

    def test_tuples_of_the_winner(self, search: Callable, tmp_path: Path) -> None:
        grid = yaml.safe_load((ROOT / "docs/grid_35k.yaml").read_text())
        assert search_grid(search({"scales": grid["scales"]})) == 0
        found = yaml.safe_load((tmp_path / "out/best.yaml").read_text())
        assert found["INPUT"] == {"MIN_SIZE_TRAIN": [512, 544, 576, 608, 640, 672, 704, 736, 768, 800]}

    def test_more_gpus_than_there_are(self, search: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Rejected before anything is written; the GPUs would be waited for without end."""
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        with pytest.raises(UserError, match=r"trial_.* needs 4 GPUs, and CUDA_VISIBLE_DEVICES names 2; give"):
            search_grid(search(num_gpus=4))
        assert not (tmp_path / "out").exists()

    def test_no_gpus_are_one_process(self, search: Callable) -> None:
        """As for scratch-det train."""
        assert search_grid(search(num_gpus=0)) == 0

    def test_failed_points(self, search: Callable, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
        """The others go on; the same command tries the failed ones again, and only these."""
        out = tmp_path / "out"
        out.mkdir()
        (out / f"{NAMES[2]}.fail").touch()
        assert search_grid(search()) == EXIT_SOME_FAILED
        assert starts(search()) == NAMES
        said = capsys.readouterr().out
        assert f"failed: BASE_LR 0.04, GAMMA 0.1 ({out}/{NAMES[2]}): exit code 1: it was not to be" in said
        assert yaml.safe_load((out / "best.yaml").read_text())["SOLVER"] == {"BASE_LR": 0.04, "GAMMA": 0.02}
        assert not (out / "result.json").exists()
        (out / f"{NAMES[2]}.fail").unlink()
        assert search_grid(search()) == 0
        assert starts(search()) == [*NAMES, NAMES[2]]
        assert yaml.safe_load((out / "best.yaml").read_text())["SOLVER"] == {"BASE_LR": 0.04, "GAMMA": 0.1}

    def test_no_winner(self, search: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        """A metric that is null, of sizes that do not occur, makes a point fail."""
        assert search_grid(search(metric="bbox/APl")) == EXIT_SOME_FAILED
        out = tmp_path / "out"
        assert capsys.readouterr().out.count("its result.json has no number for bbox/APl") == 4
        assert (out / "search.png").exists()
        assert not (out / "best.yaml").exists()
        assert not (out / "result.json").exists()

    def test_stopped(self, search: Callable, tmp_path: Path) -> None:
        """The point that was stopped is the first of the next start."""
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / f"{NAMES[1]}.stop").touch()
        with pytest.raises(Stopped):
            search_grid(search())
        (tmp_path / "out" / f"{NAMES[1]}.stop").unlink()
        assert search_grid(search()) == 0
        assert starts(search()) == [*NAMES[:2], *NAMES[1:]]

    def test_choose_alone(
        self, search: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        """As a step of a study: it trains nothing."""
        assert search_grid(search()) == 0
        (tmp_path / "out/result.json").unlink()
        words = ["--config-file", OLD, "--grid", tmp_path / "grid.yaml", "--out", tmp_path / "out", "--choose"]
        monkeypatch.setattr(sys, "argv", ["search.py", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            load_command("search").main()
        assert end.value.code == 0
        assert starts(search()) == NAMES
        assert json.loads((tmp_path / "out/result.json").read_text())["best"]["SOLVER.GAMMA"] == "0.1"


class TestWords:
    def test_command(self, search: Callable, tmp_path: Path) -> None:
        (first, *_) = search(overrides=("SEED", "3"), num_gpus=2, scale_to_batch=4).steps()
        assert [word.removeprefix(f"{ROOT}/") for word in first.command()[1:]] == [
            "-m", "scratch_det", "train", "--num-gpus", "2", "--config-file", str(OLD).removeprefix(f"{ROOT}/"),
            "--scale-to-batch", "4", "--resume", "SEED", "3", "SOLVER.BASE_LR", "0.02", "SOLVER.GAMMA", "0.1",
            "OUTPUT_DIR", str(tmp_path / "out" / NAMES[0]),
        ]  # fmt: skip

    def test_one_seed_for_all(self, search: Callable) -> None:
        """0 unless the recipe or the command line has one."""
        words = search().steps()[0].words
        assert words[words.index("--resume") + 1 :][:2] == ("SEED", "0")

    def test_projects_are_handed_on(self, search: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(command_line, "GIVEN", ["projects/one", "projects/other"])
        words = search().steps()[0].words
        assert words[1:5] == ("--project", "projects/one", "--project", "projects/other")

    def test_of_a_study(self, tmp_path: Path) -> None:
        """The search of the miniature has the same grid, targets and folder as its command says."""
        study = Study("digits/small_data", tmp_path / "study", backend="torchvision")
        job = next(job for job in study.jobs if job.name == "search_third")
        steps = {step.name: step for step in study.steps([job])}
        assert len(steps) == 1 + job.run.points
        choice = steps.pop("search_third")
        assert (choice.processes, choice.needs) == (0, tuple(steps))
        args = vars(load_command("search").build_parser().parse_intermixed_args(list(choice.words[1:])))
        assert args.pop("choose")
        asked = Search(**{key: tuple(value) if isinstance(value, list) else value for key, value in args.items()})
        assert asked == study.search(job)
        weights = str(study.out / "pretrain_digits_R_18_gn/backbone.pth")
        assert all(weights in step.words and step.needs == ("pretrain_digits_R_18_gn",) for step in steps.values())


@pytest.mark.slow
def test_real_runs(toy_recipe: Path, tmp_path: Path) -> None:
    """Killed in the middle of a run and started again: that run is the one that was never interrupted."""
    recipe = yaml.safe_load(toy_recipe.read_text())
    recipe["SOLVER"] |= {"MAX_ITER": 60, "STEPS": [50], "CHECKPOINT_PERIOD": 10}
    toy_recipe.write_text(yaml.safe_dump(recipe))
    out, environment = tmp_path / "out", {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    grid = write_grid(tmp_path / "grid.yaml", TWO_BY_TWO)
    words = [sys.executable, ROOT / "tools/search.py", "--config-file", toy_recipe, "--grid", grid, "--out", out]
    first = subprocess.Popen([*map(str, words)], cwd=ROOT, env=environment)
    until((out / NAMES[0] / "checkpoints/model_0000009.pth").exists)
    first.send_signal(signal.SIGKILL)
    first.wait()
    until(lambda: files.try_lock(out / "search.lock"))  # its run has ended
    assert not (out / NAMES[0] / "result.json").exists()
    assert subprocess.run([*map(str, words)], cwd=ROOT, env=environment).returncode == 0
    assert [len(read(out / name, "environment.json")["earlier_starts"]) for name in NAMES] == [1, 0, 0, 0]
    changes = ["SOLVER.BASE_LR", 0.02, "SOLVER.GAMMA", 0.1, "OUTPUT_DIR", tmp_path / "direct"]
    direct = [sys.executable, ROOT / "tools/train_net.py", "--config-file", toy_recipe, *changes]
    subprocess.run([*map(str, direct)], cwd=ROOT, env=environment, check=True, capture_output=True)
    assert is_same(out / NAMES[0], tmp_path / "direct")
