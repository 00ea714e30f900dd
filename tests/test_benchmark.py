"""tools/benchmark.py, and the clockwork that lets two training loops take turns."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import load_tool

from scratch_det.benchmark import WARMUP, Pairs, Stepwise, in_both_orders, plan_training, time_pairs
from scratch_det.errors import UserError


def test_pairs_take_turns() -> None:
    calls = ""

    def call(name: str) -> None:
        nonlocal calls
        calls += name

    found = time_pairs(lambda: call("a"), lambda: call("b"), 4)
    assert WARMUP == 3
    assert calls == "abbaab" + "baabbaab"
    assert len(found.first) == len(found.second) == 4


def test_each_way_is_set_up_first_in_one_half() -> None:
    found = in_both_orders(lambda pairs, first: Pairs([float(first)] * pairs, [2.0] * pairs), 5)
    assert found == Pairs([1.0, 1.0, 1.0, 0.0, 0.0], [2.0] * 5)


def test_overhead_is_the_median_of_the_ratios() -> None:
    found = Pairs([1.1, 2.4, 0.3], [1.0, 2.0, 1.0])
    assert found.overhead() == pytest.approx(10)
    assert found.as_text("loop", "bare").splitlines()[1:] == [
        f"  {'loop':<40}  1100.00 (300.00 - 2400.00)",
        f"  {'bare':<40}  1000.00 (1000.00 - 2000.00)",
        f"  {'overhead, median over the pairs':<40}   +10.00 %",
    ]


class TestPlan:
    def test_neither_folder_nor_test_sets_matter(self, toy_recipe: Path, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run/metrics.json").write_text('{"iteration": 19}\n')
        plan = plan_training(str(toy_recipe), ["DATASETS.TEST", "('absent',)", "SEED", "-1"], 2, "torchvision")
        assert (plan.cfg.SEED, plan.test, plan.cfg.MODEL.ROI_HEADS.NUM_CLASSES) == (0, [], 3)

    def test_errors(self, toy_recipe: Path) -> None:
        with pytest.raises(UserError, match=r"^--pairs is 1, expected 2 or more"):
            plan_training(str(toy_recipe), [], 1, "torchvision")
        with pytest.raises(UserError, match=r"^SOLVER\.BASE_LR is -1"):
            plan_training(str(toy_recipe), ["SOLVER.BASE_LR", "-1.0"], 2, "torchvision")


def test_the_loop_beside_its_bare_work(
    toy_recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    words = ["loop", "--config-file", toy_recipe, "--backend", "torchvision", "--pairs", 2]
    monkeypatch.setattr("sys.argv", ["benchmark.py", *map(str, words)])
    load_tool("benchmark").main()
    said = capsys.readouterr().out
    assert re.search(r"^2 pairs, median \(quartiles\) in ms\n  an iteration of the loop +\d", said, re.MULTILINE)
    assert re.search(r"bare forward, backward, update +\d+\.\d\d \(\d+\.\d\d - \d+\.\d\d\)\n  overhead", said)
    assert sorted(tmp_path.iterdir()) == before


class TestStepwise:
    def test_one_iteration_at_a_time(self) -> None:
        done: list[int] = []

        def loop(gate: Callable) -> None:
            for number in gate(range(9)):
                done.append(number)

        stepwise = Stepwise(loop)
        for expected in ([0], [0, 1], [0, 1, 2]):
            stepwise.step()
            assert done == expected

    def test_an_error_comes_back(self) -> None:
        loop = Stepwise(lambda gate: [1 // x for x in gate([1, 0])])
        loop.step()
        with pytest.raises(ZeroDivisionError):
            loop.step()
