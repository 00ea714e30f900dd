"""TEST.PATIENCE: a run ends when the metric of its best checkpoint has not risen in so many evaluations."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from run_folder import NO_TEST, interrupted_after, is_same, lines, read, weights

from scratch_det.engine import checkpointer
from scratch_det.engine.loop import Trainer
from scratch_det.errors import ConfigError

Train = Callable[..., Path]
KEYS = ("SOLVER.MAX_ITER", 6, "TEST.EVAL_PERIOD", 1, "TEST.PATIENCE", 2, "SOLVER.CHECKPOINT_PERIOD", 2)
BY_ITERATION = (
    1.0,
    3.0,
    2.0,
    3.0,
    9.0,
    9.0,
    9.0,
    9.0,
)  # the best is after two iterations, the second after it is the end


@pytest.fixture(autouse=True)
def scores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An evaluation after n iterations finds BY_ITERATION[n - 1]."""
    completed = [0]
    step = Trainer.step

    def noting(self: Trainer, iteration: int, *arguments: Any) -> Any:
        completed[0] = iteration + 1
        return step(self, iteration, *arguments)

    def evaluate(*_: Any, **__: Any) -> dict[str, dict[str, float]]:
        return {"bbox": {"AP": BY_ITERATION[completed[0] - 1]}}

    monkeypatch.setattr(Trainer, "step", noting)
    monkeypatch.setattr("scratch_det.engine.loop.Metrics.show", lambda *_: None)
    monkeypatch.setattr("scratch_det.evaluation.inference.evaluate_predictions", evaluate)
    return completed


def ended(folder: Path) -> None:
    """The run is finished after four iterations, in every respect."""
    result, status = read(folder, "result.json"), read(folder, "status.json")
    assert result["iteration"] == status["iteration"] == 4
    assert status["state"] == "finished"
    assert result["ended_early"] == status["ended_early"] == "ended early: no higher bbox/AP in 2 evaluations"
    assert read(folder, "checkpoints/index.json")["best"]["completed"] == 2
    assert checkpointer.completed_iterations(folder / "checkpoints/model_final.pth") == 4


def test_ends_counts_as_finished_and_goes_on_as_a_branch(train: Train, capsys: pytest.CaptureFixture) -> None:
    folder = train(*KEYS)
    ended(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    train(*KEYS, resume=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    final = folder / "checkpoints/model_final.pth"
    said = capsys.readouterr().out
    assert "holds a finished run of 4 iterations; nothing to do" in said
    assert f"--branch-from {final} TEST.PATIENCE 0 OUTPUT_DIR PATH" in said
    without = (*KEYS, "TEST.PATIENCE", 0)
    branch = train(*without, name="branch", branch_from=str(final))
    assert "ended_early" not in read(branch, "result.json")
    whole = train(*without, name="whole")
    assert all(value.equal(weights(whole)[key]) for key, value in weights(branch).items())
    assert max(line["iteration"] for line in lines(branch)) == 6


def test_the_last_evaluation_is_one_with_test_time_augmentation(train: Train) -> None:
    folder = train(*KEYS, "TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", "(48,)")
    assert set(read(folder, "result.json")["metrics"]) == {"bbox", "bbox_TTA"}
    assert lines(folder)[-1]["iteration"] == 3  # after four iterations, as the evaluation before


@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_resumed_is_uninterrupted(steps: int, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(*KEYS, name="whole")
    with interrupted_after(monkeypatch, steps):
        train(*KEYS, name="parts")
    parts = train(*KEYS, name="parts", resume=True)
    ended(parts)
    assert is_same(parts, whole)


@pytest.mark.slow
def test_died_between_the_decision_and_the_end(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last checkpoint is of the moment: it trains no iteration more."""
    whole = train(*KEYS, name="whole")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "has_stalled", lambda self: 1 / 0 if self.state.iteration == 4 else False)
        with pytest.raises(ZeroDivisionError):
            train(*KEYS, name="parts")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_iteration", lambda *_: 1 / 0)
        parts = train(*KEYS, name="parts", resume=True)
    ended(parts)
    assert is_same(parts, whole)


def test_stop_at(train: Train) -> None:
    paused = train(*KEYS, stop_at=4)
    assert read(paused, "status.json")["state"] == "paused"
    ended(train(*KEYS, resume=True, stop_at=6))


def test_more_patience_trains_to_the_end(train: Train) -> None:
    folder = train(*KEYS, "TEST.PATIENCE", 3)
    assert (read(folder, "result.json")["iteration"], "ended_early" in read(folder, "result.json")) == (6, False)


@pytest.mark.parametrize("keys", [("TEST.EVAL_PERIOD", 0), NO_TEST])
def test_nothing_is_evaluated(keys: tuple, train: Train) -> None:
    with pytest.raises(ConfigError, match=r"TEST\.PATIENCE is 2, but nothing is evaluated before the end"):
        train(*KEYS, *keys)


def test_a_trial_has_one_evaluation(train: Train, tmp_path: Path) -> None:
    train(*KEYS, trial=2)
    assert read(tmp_path / "run_trial", "result.json")["iteration"] == 2
