"""Losses that are read one iteration late, as on a GPU: the same run, and no checkpoint once they are not finite."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from run_folder import NO_TEST, is_same, read, without_clock
from torch import nn

from scratch_det.config.load import get_cfg
from scratch_det.distributed.group import Group
from scratch_det.distributed.launch import ALONE
from scratch_det.distributed.stop import StopFlag
from scratch_det.engine import loop
from scratch_det.engine.state import State
from scratch_det.errors import UserError

Train = Callable[..., Path]
SHORT = ("SOLVER.MAX_ITER", 5, "SOLVER.CHECKPOINT_PERIOD", 3, "TEST.EVAL_PERIOD", 2)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """``late()``: from now on as on a GPU."""
    return lambda: monkeypatch.setattr(loop, "READ_LATE", ("cpu",))


def test_changes_nothing(train: Train, late: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints (with their windows of metrics) and evaluations come after the losses of all their iterations."""
    monkeypatch.setattr(loop, "PERIOD", 2)
    kept = ("SEED", 1, *SHORT)
    at_once = train(*kept, name="at_once")
    late()
    folder = train(*kept, name="late")
    assert is_same(folder, at_once)
    for name, unwritten in (("model_0000002.pth", 1), ("model_final.pth", 0)):
        one, other = ([*map(without_clock, torch.load(path / "checkpoints" / name)["window"])]
                      for path in (folder, at_once))  # fmt: skip
        assert one == other
        assert len(one) == unwritten


def test_reads_an_iteration_while_the_next_is_computed(train: Train, late: Callable,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    late()
    said: list[str] = []
    step = loop.Trainer.step

    def watched(trainer: loop.Trainer, iteration: int, *arguments: Any) -> Callable[[], dict[str, float]]:
        read = step(trainer, iteration, *arguments)
        said.append(f"computes {iteration}")
        return lambda: (said.append(f"reads {iteration}"), read())[1]

    monkeypatch.setattr(loop.Trainer, "step", watched)
    train("SOLVER.MAX_ITER", 3, *NO_TEST)
    assert said == ["computes 0", "computes 1", "reads 0", "computes 2", "reads 1", "reads 2"]


def test_a_divergence_is_reported_before_a_checkpoint(train: Train, late: Callable, tmp_path: Path) -> None:
    late()
    with pytest.raises(UserError, match=r"loss is not finite at iteration 1 .*nan(?s:.)*lower SOLVER.BASE_LR"):
        train("SOLVER.BASE_LR", "1e18", "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 3)
    status = read(tmp_path / "run", "status.json")
    assert (status["state"], status["iteration"]) == ("failed", 1)
    assert not list((tmp_path / "run/checkpoints").glob("*.pth"))


def test_a_read_waits_for_its_own_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    """On what says that it is a GPU: the copy and an event are queued by the step, and waited for by the reading."""
    said: list[str] = []
    event = SimpleNamespace(synchronize=lambda: said.append("wait"))
    stream = SimpleNamespace(record_event=lambda: (said.append("event"), event)[1])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    move = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda *given, **how: (said.append(f"copy {how}"), move(*given))[1])
    model = nn.Linear(1, 1)
    state = State(get_cfg(), model, torch.device("cpu"))
    state.device = torch.device("cuda")
    backend = SimpleNamespace(losses=lambda *_: {"loss_cls": model(torch.ones(1, 1)).sum()})
    trainer: Any = loop.Trainer(get_cfg(), backend, Group(ALONE, "cpu", StopFlag()), state, None, None, None)  # type: ignore
    trainer.cfg.SEED = 1
    read_it = trainer.step(0, 0.1, [[]])
    assert said == ["copy {'non_blocking': True}", "event"]
    assert read_it().keys() == {"loss_cls", "total_loss"}
    assert said[2:] == ["wait"]
