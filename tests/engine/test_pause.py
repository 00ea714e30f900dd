"""--stop-at: a run that pauses goes on as if it had not, and others may branch off it meanwhile."""

from collections.abc import Callable
from pathlib import Path

import pytest
from run_folder import NO_TEST, interrupted_after, is_same, lines, read

from scratch_det.engine import loop
from scratch_det.errors import ConfigError, UserError

Train = Callable[..., Path]
KEYS = ("SOLVER.MAX_ITER", 6, "SOLVER.STEPS", "(4, 5)", "SOLVER.CHECKPOINT_PERIOD", 2)
SHORT = ("SOLVER.MAX_ITER", 5, "SOLVER.STEPS", "(3, 4)", "SOLVER.CHECKPOINT_PERIOD", 2)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("*.pth"))


@pytest.mark.parametrize("stop_at", [3, 4, 6])
def test_goes_on_bit_for_bit(stop_at: int, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two checkpoints and evaluations, at one, and before the final evaluation."""
    monkeypatch.setattr(loop, "PERIOD", 4)
    keys = (*KEYS, "TEST.EVAL_PERIOD", 2)
    whole = train(*keys, name="whole")
    paused = train(*keys, name="paused", stop_at=stop_at)
    assert not (paused / "result.json").exists()
    status = read(paused, "status.json")
    assert (status["state"], status["iteration"], status["max_iter"]) == ("paused", stop_at, 6)
    assert f"model_{stop_at - 1:07d}.pth" in checkpoints(paused)
    assert f"paused after {stop_at} of 6 iterations" in (paused / "log.txt").read_text()
    evaluated = [line["iteration"] for line in lines(paused) if any("/" in key for key in line)]
    assert evaluated == [number - 1 for number in (2, 4) if number <= stop_at]
    train(*keys, name="paused", resume=True)
    assert is_same(paused, whole)
    assert read(paused, "result.json")["metrics"] == read(whole, "result.json")["metrics"]
    assert read(paused, "status.json")["state"] == "finished"


def test_its_checkpoint_stays_and_a_later_stop_follows(train: Train) -> None:
    whole = train(*KEYS, *NO_TEST, name="whole")
    for number in (1, 3):
        paused = train(*KEYS, *NO_TEST, name="paused", stop_at=number, keep_last=1, resume=True)
    assert checkpoints(paused) == ["model_0000000.pth", "model_0000002.pth"]
    train(*KEYS, *NO_TEST, name="paused", keep_last=1, resume=True)
    assert {"model_0000000.pth", "model_0000002.pth"} < set(checkpoints(paused))
    assert is_same(paused, whole)


def test_a_branch_from_a_paused_trunk(train: Train) -> None:
    trunk = train(*KEYS, *NO_TEST, name="trunk", stop_at=3)
    branch = train(*SHORT, *NO_TEST, name="branch", branch_from=str(trunk / "checkpoints/model_0000002.pth"))
    assert is_same(branch, train(*SHORT, *NO_TEST, name="direct"))
    assert is_same(train(*KEYS, *NO_TEST, name="trunk", resume=True), train(*KEYS, *NO_TEST, name="whole"))


def test_a_branch_may_pause_too_but_not_before_it_starts(train: Train) -> None:
    trunk = train(*KEYS, *NO_TEST, name="trunk", stop_at=3)
    start = {"name": "branch", "branch_from": str(trunk / "checkpoints/model_0000002.pth")}
    with pytest.raises(UserError, match=r"--stop-at is 3, but .* has 3 completed iterations, so nothing would"):
        train(*SHORT, *NO_TEST, **start, stop_at=3)
    assert not (trunk.parent / "branch").exists()
    train(*SHORT, *NO_TEST, **start, stop_at=4)
    branch = train(*SHORT, *NO_TEST, **start, resume=True)
    assert is_same(branch, train(*SHORT, *NO_TEST, name="direct"))


def test_far_enough_already(train: Train, capsys: pytest.CaptureFixture) -> None:
    """Paused, then finished: nothing is touched but the status."""
    folder = train(*KEYS, *NO_TEST, stop_at=3)
    before = contents(folder)
    for number in (3, 2):
        capsys.readouterr()
        train(*KEYS, *NO_TEST, stop_at=number, resume=True)
        assert "paused after 3 of 6 iterations" in capsys.readouterr().out
    assert contents(folder).keys() == before.keys()
    assert read(folder, "status.json")["state"] == "paused"
    with pytest.raises(UserError, match=r"SOLVER\.BASE_LR was 0\.01, now 0\.5"):
        train(*KEYS, *NO_TEST, "SOLVER.BASE_LR", 0.5, stop_at=3, resume=True)
    train(*KEYS, *NO_TEST, resume=True)
    before = contents(folder)
    train(*KEYS, *NO_TEST, stop_at=3, resume=True)
    assert "holds a finished run of 6 iterations; nothing to do" in capsys.readouterr().out
    assert contents(folder) == before


def test_a_checkpoint_that_is_there_already_is_kept_from_then_on(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    with interrupted_after(monkeypatch, 2):
        train(*KEYS, *NO_TEST)
    folder = train(*KEYS, *NO_TEST, stop_at=2, resume=True)
    assert read(folder, "status.json")["state"] == "paused"
    train(*KEYS, *NO_TEST, keep_last=1, resume=True)
    assert "model_0000001.pth" in checkpoints(folder)


@pytest.mark.parametrize("stop_at", [0, -1, 7])
def test_outside_the_run(stop_at: int, train: Train, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"--stop-at is {stop_at}, expected .* from 1 to SOLVER.MAX_ITER 6"):
        train(*KEYS, stop_at=stop_at)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="--stop-at: not allowed with --eval-only"):
        train("MODEL.WEIGHTS", "a.pth", stop_at=stop_at, eval_only=True)
