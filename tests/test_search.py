"""The grid search: what a grid is, what is refused, sharing and taking over of points, and what is left behind."""

import importlib.util
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, load_tool
from run_folder import is_same, read

from scratch_det import command_line, files
from scratch_det.config import flatten, load_config
from scratch_det.distributed.stop import StopFlag, Stopped
from scratch_det.errors import UserError
from scratch_det.search import board, work
from scratch_det.search.grid import Point, points_of, read_grid
from scratch_det.search.search import Search
from scratch_det.search.trainer import RunFailed, command, run_point

LOW_DATA = ROOT / "configs/COCO-LowData"
OLD, FOUND = (LOW_DATA / f"pretrained_mask_rcnn_R_50_FPN_6x_gn_35k{end}.yaml" for end in ("_old", ""))
SCRATCH = LOW_DATA / "scratch_mask_rcnn_R_50_FPN_9x_gn_35k.yaml"
TWO_BY_TWO = {"SOLVER": {"BASE_LR": [0.02, 0.04], "GAMMA": [0.1, 0.02]}}
NAMES = [f"trial_BASE_LR-{rate}_GAMMA-{gamma}" for rate in (0.02, 0.04) for gamma in (0.1, 0.02)]
TRAINER = """
import json, os, sys, time
folder = sys.argv[-1]
if os.path.exists(folder + "/result.json"):
    sys.exit()
open(folder + "/started", "a").write("x")
while not os.path.exists(folder + "/go"):
    time.sleep(0.02)
ap = float(sys.argv[sys.argv.index("SOLVER.BASE_LR") + 1])
json.dump({"metrics": {"bbox": {"AP": ap}}}, open(folder + "/result.json", "w"))
"""
WORKER = """
import sys
from pathlib import Path
from scratch_det.search import work
work.SECONDS_BETWEEN_LOOKS = 0.1
recipe, grid, out, trainer = sys.argv[1:]
sys.exit(work.search_grid(Search(recipe, grid, Path(out), train_net=Path(trainer))))
"""


def write_grid(path: Path, content: Any) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture
def search(tmp_path: Path) -> Callable[..., Search]:
    """``search(grid=TWO_BY_TWO, **fields)``, of the paper's recipe for 35k images, into ``tmp_path / "out"``."""

    def make(grid: Any = TWO_BY_TWO, **fields: Any) -> Search:
        path = write_grid(tmp_path / "grid.yaml", grid)
        return Search(**{"config_file": str(OLD), "grid": str(path), "out": tmp_path / "out", **fields})

    return make


class Runs:
    """In the place of the trainer: remembers the points and makes their results; those of ``fails`` fail."""

    def __init__(self, *fails: str):
        self.fails, self.points = fails, []

    def __call__(self, search: Search, point: Point, files: Any, stop: StopFlag) -> dict[str, Any]:
        self.points.append(point.name)
        if point.name in self.fails:
            raise RunFailed("exit code 2: it was not to be")
        ap = float(point.values["SOLVER.BASE_LR"]) * 100 + float(point.values["SOLVER.GAMMA"])
        return {"seconds": 60.0, "metrics": {"bbox": {"AP": ap, "APl": None}}}


class TestGrid:
    def test_of_35k_images(self) -> None:
        """Its last point is the recipe that the paper's search led to."""
        points = points_of(read_grid(ROOT / "docs/grid_35k.yaml"))
        assert len({point.name for point in points}) == 8
        assert points[-1].name == "trial_BASE_LR-0.04_GAMMA-0.02_scales-512-800-range"
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
            ({"one": [{"A": 1}, {"B": 2}]}, "each of its choices has to set all"),
            ({"one": [{"A": 1}, 2]}, "each of its choices has to set all"),
            ({"A": [1, 2], "one": [{"A": 1}, {"A": 2}]}, "A is set by two axes, A and one"),
            ({"OUTPUT_DIR": ["a", "b"]}, "OUTPUT_DIR cannot be searched"),
            ({"_BASE_": "other.yaml", "A": [1, 2]}, "a grid has no _BASE_"),
            ({}, "found no keys at all|one point"),
        ],
    )
    def test_refused(self, content: Any, message: str, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=message):
            read_grid(write_grid(tmp_path / "grid.yaml", content))

    def test_names(self, tmp_path: Path) -> None:
        """Brackets are left out of them; two keys with the same last word are named in full."""
        grid = {"MODEL": {"FPN": {"NORM": ["GN", ""]}, "ROI_BOX_HEAD": {"NORM": ["GN"]}}, "SEED": [-1, "(1, 2)"]}
        names = [point.name for point in points_of(read_grid(write_grid(tmp_path / "grid.yaml", grid)))]
        assert names[0] == "trial_MODEL.FPN.NORM-GN_MODEL.ROI_BOX_HEAD.NORM-GN_SEED--1"
        assert names[3] == "trial_MODEL.FPN.NORM-empty_MODEL.ROI_BOX_HEAD.NORM-GN_SEED-1-2"


class TestRefusals:
    def test_a_runs_folder(self, search: Callable, tmp_path: Path) -> None:
        own = search()
        own.out.mkdir(parents=True)
        (own.out / "metrics.json").write_text("{}")
        with pytest.raises(UserError, match="is the folder of a run"):
            work.search_grid(own, Runs())

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
            ({"overrides": ("OUTPUT_DIR", "there")}, "OUTPUT_DIR is not for a search to set"),
            ({"apply_to": ("missing.yaml",)}, "missing.yaml does not exist"),
            ({"apply_to": (str(SCRATCH), str(SCRATCH))}, "would be written twice"),
            ({"num_gpus": 3}, "SOLVER.IMS_PER_BATCH is 16"),
        ],
    )  # fmt: skip
    def test_before_anything_is_written(self, search: Callable, fields: dict, message: str, tmp_path: Path) -> None:
        runs = Runs()
        with pytest.raises(UserError, match=message):
            work.search_grid(search(**fields), runs)
        assert not runs.points
        assert not (tmp_path / "out").exists()

    def test_per_class_metric(self, search: Callable) -> None:
        search(metric="segm/AP-person").check()

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"grid": {"SOLVER": {"BASE_LR": [0.02, 0.08], "GAMMA": [0.1, 0.02]}}}, "grid was .*, now "),
            ({"metric": "segm/AP"}, "metric was bbox/AP, now segm/AP"),
            ({"overrides": ("SOLVER.MOMENTUM", "0.8")}, "SOLVER.MOMENTUM was 0.9, now 0.8"),
            ({"overrides": ("SOLVER.MAX_ITER", "530000")}, "SOLVER.MAX_ITER was 540000, now 530000"),
            ({"overrides": ("INPUT.MIN_SIZE_TEST", "600")}, "INPUT.MIN_SIZE_TEST was 800, now 600"),
        ],
    )
    def test_another_search_in_the_folder(self, search: Callable, fields: dict, message: str) -> None:
        assert work.search_grid(search(), Runs()) == 0
        with pytest.raises(UserError, match=rf"holds another search:\n  {message}"):
            work.search_grid(search(**fields), Runs())

    def test_another_machine_may_differ(self, search: Callable) -> None:
        work.search_grid(search(), Runs())
        assert work.search_grid(search(overrides=("MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "1")), Runs()) == 0

    def test_no_database(self, search: Callable, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/search.db").write_text("not a database, and long enough to be read as one\n" * 50)
        with pytest.raises(UserError, match=r"search.db cannot be used .*file is not a database"):
            work.search_grid(search(), Runs())

    def test_database_in_use(self, search: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        work.search_grid(search(), Runs(NAMES[0]))
        monkeypatch.setattr(board, "SECONDS_FOR_DATABASE", 0.1)
        other = sqlite3.connect(tmp_path / "out/search.db")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match="database is locked"):
            work.search_grid(search(), Runs())
        other.close()

    def test_without_optuna(self, search: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(work, "find_spec", lambda name: None if name == "optuna" else find(name))
        with pytest.raises(UserError, match=r"pip install -e '\.\[search\]'"):
            work.search_grid(search(), Runs())
        assert not (tmp_path / "out").exists()

    def test_without_locks(self, search: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
        def flock(*_: Any) -> None:
            raise OSError(37, "No locks available")

        monkeypatch.setattr(files.fcntl, "flock", flock)
        with pytest.raises(UserError, match="No locks available"):
            work.search_grid(search(), Runs())

    def test_tool(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
        words = ["--config-file", OLD, "--grid", ROOT / "docs/grid_35k.yaml", "--out", tmp_path / "out", "SEEED", 1]
        monkeypatch.setattr(sys, "argv", ["search.py", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            load_tool("search").main()
        assert end.value.code == 2
        assert "unknown key SEEED; did you mean 'SEED'?" in capsys.readouterr().err


class TestSearch:
    def test_winner_is_applied(self, search: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        runs = Runs()
        wanted = search(apply_to=(str(SCRATCH),), overrides=("SEED", "3"))
        assert work.search_grid(wanted, runs) == 0
        assert runs.points == NAMES
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
        work.search_grid(search(grid), lambda search, point, *_: {"metrics": {"bbox": {"AP": len(point.name)}}})
        found = yaml.safe_load((tmp_path / "out/best.yaml").read_text())
        assert found["INPUT"] == {"MIN_SIZE_TRAIN": [512, 800], "MIN_SIZE_TRAIN_SAMPLING": "range"}

    def test_failed_points(self, search: Callable, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
        """The others go on; the same command tries the failed ones again, and only these."""
        runs = Runs(NAMES[2])
        assert work.search_grid(search(), runs) == work.EXIT_SOME_FAILED
        assert runs.points == NAMES
        said = capsys.readouterr().out
        assert f"failed: BASE_LR 0.04, GAMMA 0.1 ({tmp_path}/out/{NAMES[2]}): exit code 2: it was not to be" in said
        assert yaml.safe_load((tmp_path / "out/best.yaml").read_text())["SOLVER"] == {"BASE_LR": 0.04, "GAMMA": 0.02}
        again = Runs()
        assert work.search_grid(search(), again) == 0
        assert again.points == [NAMES[2]]
        assert yaml.safe_load((tmp_path / "out/best.yaml").read_text())["SOLVER"] == {"BASE_LR": 0.04, "GAMMA": 0.1}

    def test_no_winner(self, search: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        """A metric that is null, of sizes that do not occur, makes a point fail."""
        assert work.search_grid(search(metric="bbox/APl"), Runs()) == work.EXIT_SOME_FAILED
        assert capsys.readouterr().out.count("its result.json has no number for bbox/APl") == 4
        assert (tmp_path / "out/search.png").exists()
        assert not (tmp_path / "out/best.yaml").exists()
        assert not (tmp_path / "out/result.json").exists()

    def test_stopped(self, search: Callable) -> None:
        """The point that was stopped is the first of the next worker's."""

        def stops(*_: Any) -> dict[str, Any]:
            os.kill(os.getpid(), signal.SIGTERM)
            raise Stopped(StopFlag())

        with pytest.raises(Stopped):
            work.search_grid(search(), stops)
        runs = Runs()
        assert work.search_grid(search(), runs) == 0
        assert sorted(runs.points) == sorted(NAMES)


class TestTrainer:
    @pytest.fixture
    def run(self, search: Callable, tmp_path: Path) -> Callable[..., dict]:
        """``run(code)``: a point whose trainer is a script of that code."""

        def begin(code: str, stop: StopFlag | None = None) -> dict:
            (tmp_path / "train.py").write_text(code)
            wanted = search(train_net=tmp_path / "train.py")
            held = files.try_lock(wanted.folder(wanted.points[0]) / "worker.lock")
            assert held
            with held:
                return run_point(wanted, wanted.points[0], held, stop or StopFlag())

        return begin

    @pytest.mark.parametrize(
        ("code", "message"),
        [
            ("raise SystemExit('error: SOLVER.GAMMA is bad\\n  mend it')", "exit code 1: SOLVER.GAMMA is bad"),
            ("print(1, flush=True); 1 / 0", "exit code 1: ZeroDivisionError: division by zero"),
            ("import os; os.kill(os.getpid(), 9)", r"ended by SIGKILL \(out of memory\?\)"),
            ("raise SystemExit(3)", "exit code 3: it said nothing"),
        ],
    )
    def test_last_word(self, run: Callable, code: str, message: str) -> None:
        with pytest.raises(RunFailed, match=message):
            run(code)

    def test_request_to_stop_is_handed_on(self, run: Callable) -> None:
        code = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); time.sleep(60)"
        stop = StopFlag()
        stop.requested = True
        with pytest.raises(Stopped):
            run(code, stop)

    def test_stopped_by_someone_else(self, run: Callable) -> None:
        with pytest.raises(Stopped):
            run("raise SystemExit(75)")

    def test_command(self, search: Callable, tmp_path: Path) -> None:
        wanted = search(overrides=("SEED", "3"), num_gpus=2, scale_to_batch=4, train_net=Path("train_net.py"))
        assert command(wanted, wanted.points[0])[1:] == [
            "train_net.py", "--config-file", str(OLD), "--num-gpus", "2", "--scale-to-batch", "4", "--resume",
            "SEED", "3", "SOLVER.BASE_LR", "0.02", "SOLVER.GAMMA", "0.1",
            "OUTPUT_DIR", str(tmp_path / "out" / NAMES[0]),
        ]  # fmt: skip

    def test_projects_are_handed_on(self, search: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(command_line, "GIVEN", ["projects/one", "projects/other"])
        wanted = search(train_net=Path("train_net.py"))
        words = command(wanted, wanted.points[0])
        assert words[1:6] == ["train_net.py", "--project", "projects/one", "--project", "projects/other"]


@pytest.fixture
def worker(tmp_path: Path, toy_recipe: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """``worker(trainer)`` starts one of the toy recipe's search, in a session of its own."""
    grid, started = write_grid(tmp_path / "grid.yaml", TWO_BY_TWO), []

    def start(trainer: Path) -> subprocess.Popen:
        words = [sys.executable, "-c", WORKER, str(toy_recipe), str(grid), str(tmp_path / "out"), str(trainer)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen(words, cwd=ROOT, env=environment, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        with suppress(ProcessLookupError):  # the trainer too, which may have outlived its worker
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class TestWorkers:
    @pytest.fixture
    def trainer(self, tmp_path: Path) -> Path:
        """A script that counts its starts and waits for a file ``go`` in its folder; AP is the learning rate."""
        (tmp_path / "train.py").write_text(TRAINER)
        return tmp_path / "train.py"

    def starts(self, out: Path) -> list[int]:
        """How often a trainer was started that found no result, by point."""
        return [len((out / name / "started").read_text()) if (out / name / "started").exists() else 0 for name in NAMES]

    def finish(self, out: Path, names: list[str]) -> None:
        for name in names:
            wait_for((out / name / "started").exists)
            (out / name / "go").touch()
        wait_for(lambda: all((out / name / "result.json").exists() for name in names))

    @pytest.mark.parametrize("trainer_lives", [True, False])
    def test_killed(self, worker: Callable, trainer: Path, tmp_path: Path, trainer_lives: bool) -> None:
        """What a dead worker had is taken over when its trainer is gone as well, and not before."""
        out = tmp_path / "out"
        first = worker(trainer)
        wait_for(lambda: self.starts(out) == [1, 0, 0, 0])
        (os.kill if trainer_lives else os.killpg)(first.pid, signal.SIGKILL)
        first.wait()
        others = [worker(trainer), worker(trainer)]
        self.finish(out, NAMES[1:])
        if trainer_lives:
            time.sleep(1)  # the others look every tenth of a second
            assert self.starts(out) == [1, 1, 1, 1]
        else:
            wait_for(lambda: self.starts(out) == [2, 1, 1, 1])
        self.finish(out, NAMES[:1])
        assert [process.wait(300) for process in others] == [0, 0]
        assert self.starts(out) == [1 if trainer_lives else 2, 1, 1, 1]
        assert yaml.safe_load((out / "best.yaml").read_text())["SOLVER"] == {"BASE_LR": 0.04, "GAMMA": 0.1}

    @pytest.mark.slow
    def test_real_runs(self, worker: Callable, toy_recipe: Path, tmp_path: Path) -> None:
        """Killed in the middle of a run, continued by two others: that run is the one that was never interrupted."""
        recipe = yaml.safe_load(toy_recipe.read_text())
        recipe["SOLVER"] |= {"MAX_ITER": 60, "STEPS": [50], "CHECKPOINT_PERIOD": 10}
        toy_recipe.write_text(yaml.safe_dump(recipe))
        out, train_net = tmp_path / "out", ROOT / "tools/train_net.py"
        first = worker(train_net)
        wait_for((out / NAMES[0] / "checkpoints/model_0000009.pth").exists)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        assert not (out / NAMES[0] / "result.json").exists()
        others = [worker(train_net), worker(train_net)]
        assert [process.wait(300) for process in others] == [0, 0]
        assert [len(read(out / name, "environment.json")["earlier_starts"]) for name in NAMES] == [1, 0, 0, 0]
        words = [train_net, "--config-file", toy_recipe, "SOLVER.BASE_LR", 0.02, "SOLVER.GAMMA", 0.1]
        direct = [sys.executable, *map(str, words), "OUTPUT_DIR", str(tmp_path / "direct")]
        subprocess.run(direct, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
        assert is_same(out / NAMES[0], tmp_path / "direct")
