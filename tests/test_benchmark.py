"""scratch-det benchmark without its peers: the stopwatch, the table, made-up data, and every row at a tiny size."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from conftest import load_command

from scratch_det.benchmark import Options, data, report, rows, scoring
from scratch_det.benchmark.loops import in_both_orders, plan_training
from scratch_det.benchmark.measure import LEAST, Cost, Rounds, in_fresh_process, take_turns, timed
from scratch_det.benchmark.report import Figure, document
from scratch_det.benchmark.scoring import SCORERS
from scratch_det.data.catalog import lookup
from scratch_det.data.coco import inspect_coco
from scratch_det.errors import UserError
from scratch_det.evaluation import predictions


def test_ways_take_turns() -> None:
    calls = ""

    def way(name: str) -> Callable[[], str]:
        def call() -> str:
            nonlocal calls
            calls += name
            return name.upper()

        return call

    found = take_turns([way("a"), way("b"), way("c")], Rounds(2, warmup=3))
    assert calls == "abccbaabc" + "cbaabc"
    assert [[cost.value for cost in costs] for costs in found] == [["A"] * 2, ["B"] * 2, ["C"] * 2]


def test_no_time_left() -> None:
    costs = take_turns([lambda: None], Rounds(10, warmup=10, seconds=0))
    assert len(costs[0]) == LEAST == 3


def test_each_way_is_set_up_first_in_one_half() -> None:
    found = in_both_orders(lambda rounds, first: [[float(first)] * rounds.times, [2.0] * rounds.times], Rounds(5))
    assert found == [[1.0, 1.0, 1.0, 0.0, 0.0], [2.0] * 5]


class TestFreshProcess:
    def test_value_and_memory(self) -> None:
        cost = in_fresh_process("json:loads", "[1.5, 2]")
        assert cost.value == [1.5, 2]
        assert 0 < cost.seconds < cost.peak_mb
        added = in_fresh_process("random:randbytes", 80_000_000)
        assert 80 <= added.private_mb < 120
        assert added.peak_mb > cost.peak_mb + 60
        assert added.value is None  # only lists and numbers come back

    def test_its_environment_and_all_of_it(self) -> None:
        cost = in_fresh_process("os:get_exec_path", whole=True, env={"PATH": Path("/bin:/usr/bin")})
        assert cost.value == ["/bin", "/usr/bin"]
        assert min(cost.seconds, cost.cpu_seconds) > 0.001  # Python's own start

    def test_failure(self) -> None:
        with pytest.raises(UserError, match=r"^json:loads in a fresh process: json\.decoder\.JSONDecodeError"):
            in_fresh_process("json:loads", "[")


class TestTable:
    def test_times_better_is_the_median_over_the_pairs(self) -> None:
        assert Figure("sample", "ms", [1.0, 2.0, 4.0], "peer", [2.0, 6.0, 4.0]).times_better() == 2
        assert Figure("loader", "images/s", [60.0], "peer", [20.0]).times_better() == 3
        assert math.isnan(Figure("sample", "ms", [1.0]).times_better())

    def test_document(self) -> None:
        found = [
            Figure("sample", "ms", [12.04, 11.0], "peer", [1234.5, 22.0], "AP equal: yes"),
            Figure("iteration", "", [], "peer is not installed"),
        ]
        lines = document("command", ["- a machine"], found).splitlines()
        assert "Written by `command`." in lines
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
        assert cells[0] == ["what", "unit", "beside", "peer", "ours", "times better", ""]
        assert cells[2] == ["sample", "ms", "peer", "628", "11.5", "52.3", "AP equal: yes"]
        assert cells[3] == ["iteration", "", "peer is not installed", "-", "-", "-", ""]
        assert lines[-1] == "- sample, ms: ours 12.0 11.0; peer 1,234 22.0"


class TestMadeUpData:
    def test_it_is_sound_and_always_the_same(self, datasets_root: Path) -> None:
        json_file = data.write_coco(datasets_root, 30)
        found, problems = inspect_coco(lookup(data.NAME), need_masks=True)
        assert found is not None
        assert [one.kind for one in problems] == ["categories without an annotation"]  # of 218 objects in 80 classes
        every = json.loads(json_file.read_bytes())["annotations"]
        assert len(every) == 218
        assert [one["id"] for one in every if one["iscrowd"]] == [100, 200]
        assert len({path.stat().st_ino for path in (datasets_root / "images").iterdir()}) == data.FILES
        assert data.write_coco(datasets_root / "again", 30).read_bytes() == json_file.read_bytes()
        one, same = (data.made_up_predictions(json_file, per_image=5) for _ in range(2))
        assert len(one["score"]) == 150
        assert all((one[name] == same[name]).all() for name in ("image_id", "category_id", "score", "bbox"))
        assert one["segmentation"].tolist() == same["segmentation"].tolist()


def test_plan_needs_neither_folder_nor_test_sets(toy_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.json").write_text('{"iteration": 19}\n')
    plan = plan_training(str(toy_recipe), ["DATASETS.TEST", "('absent',)", "SEED", "-1"], "torchvision")
    assert (plan.cfg.SEED, plan.test, plan.cfg.MODEL.ROI_HEADS.NUM_CLASSES) == (0, [], 3)


def test_ap_is_that_of_pycocotools(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    json_file = data.write_coco(tmp_path, 20)
    predictions.write_predictions(tmp_path / "results.json", data.made_up_predictions(json_file))
    for task in ("bbox", "segm"):
        ours, theirs = (score(json_file, read(tmp_path / "results.json"), task) for read, score in SCORERS.values())
        assert repr(ours) == repr(theirs)  # to the last digit; nan is nan
        assert 20 < ours[0] < 80


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """scratch-det benchmark at a tiny size in this process, which fresh processes are replaced by; what it prints."""

    def here(function: str, *arguments: Any, whole: bool = False, env: dict[str, Path] | None = None) -> Cost:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (env or {}).items():
                patch.setenv(name, str(value))
            return timed(lambda: resolve_name(function)(*arguments))._replace(peak_mb=1.0, private_mb=1.0)

    def run(*words: Any) -> str:
        sizes = ("--pairs", 1, "--repeats", 1, "--scale", 1e-4)
        monkeypatch.setattr("sys.argv", ["benchmark.py", *map(str, (*words, *sizes))])
        load_command("benchmark").main()
        return capsys.readouterr().out

    for module in (rows, scoring):
        monkeypatch.setattr(module, "in_fresh_process", here)
    return run


def test_every_row_without_peers(
    toy_recipe: Path, tool: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in (rows, scoring, report):
        monkeypatch.setattr(module, "is_installed", lambda library: False)
    before = sorted(tmp_path.iterdir())
    said = tool("all", "--out", tmp_path / "table.md", "--config-file", toy_recipe)
    assert "not measured" not in said
    lines = (tmp_path / "table.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")][2:]
    found = {(what.split(",")[0], unit): (beside, peer, ours) for what, unit, beside, peer, ours, *_ in cells}
    for what, unit, library in (
        ("scoring boxes", "wall s", "pycocotools"),
        ("scoring masks", "CPU s", "pycocotools"),
        ("scoring masks from files", "peak MB", "pycocotools"),
        ("first start", "private MB", "detectron2"),
        ("later start", "wall s", "detectron2"),
        ("sample", "CPU ms", "detectron2"),
        ("loader", "images/s", "detectron2"),
        ("model step", "wall ms", "detectron2"),
        ("iteration", "", "detectron2"),
        ("start to the first iteration's end", "wall s", "detectron2"),
    ):
        beside, peer, ours = found[what, unit]
        assert (beside, peer) == (f"{library} is not installed", "-")
        assert (ours == "-") == (what == "iteration")
    assert found["iteration of the loop", "wall ms"][0] == "its bare work"
    assert found["start with nothing to do", "CPU s"][0] == ""
    assert sum(line.startswith("- ") and ": ours " in line for line in lines) == len(cells) - 1
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "table.md"])


def test_first_starts_find_no_packed_data_set(toy_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def fresh(function: str, config_file: str, words: list[str], *_: Any, env: dict[str, Path] | None = None) -> Cost:
        (root,) = (env or {}).values()
        if function.startswith(rows.__name__):  # ours, not the peer's
            found.append(bool(list(root.rglob("*.pack"))))
            monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
            rows.first_batch(config_file, words, "torchvision")
        return Cost(1.0, 1.0)

    monkeypatch.setattr(rows, "in_fresh_process", fresh)
    list(rows.start(Options([(str(toy_recipe), [])], "torchvision", Rounds(1), Rounds(2), scale=1e-4)))
    assert found == [False, True, False, True]


class TestTool:
    def test_missing_data_leaves_a_row_out(self, toy_recipe: Path, tool: Callable[..., str], tmp_path: Path) -> None:
        recipe = ("--config-file", toy_recipe, "DATASETS.TRAIN", "('absent',)")
        said = tool("loop,scoring", "--out", tmp_path / "table.md", *recipe)
        assert "- not measured: loop. data set 'absent' is not in the catalog" in said
        assert "- not measured: loop" in (tmp_path / "table.md").read_text()
        assert "scoring boxes, 1 images" in said

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["loops"], "loops is not a row; expected all, or some of scoring,start"),
            (["loop", "--pairs", "0"], "--pairs and --repeats are 1 or more"),
            (["loop", "--config-file", "absent.yaml"], "absent.yaml"),
        ],
    )
    def test_user_errors(
        self, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        monkeypatch.setattr("sys.argv", ["benchmark.py", *words])
        with pytest.raises(SystemExit, match="2"):
            load_command("benchmark").main()
        assert message in capsys.readouterr().err
