"""Errors of the disk when a run writes, and jumps of the clock: one message, and --resume ends with the same."""

import errno
import os
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from run_folder import NO_TEST, attempt, is_same

from scratch_det.engine import checkpointer, loop

Train = Callable[..., Path]
KEYS = ("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 1, *NO_TEST)
ERRORS = ("ENOSPC", "EIO", "ESTALE", "EDQUOT")
CALLS: dict[str, tuple[Any, str]] = {
    "fsync": (os, "fsync"),
    "rename": (os, "replace"),
    "write": (checkpointer._HashingFile, "write"),
    "metrics": (loop.Metrics, "write"),
}


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_an_error_of_the_disk(call: str, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first and at a later call, once: what was trained before is not lost."""
    monkeypatch.setattr(loop, "PERIOD", 1)
    whole, (owner, name) = train(*KEYS, name="whole"), CALLS[call]
    original, later = getattr(owner, name), 30 if call == "write" else 3
    for kind, at in ((kind, at) for kind in ERRORS for at in (0, later)):
        calls, number = count(), getattr(errno, kind)

        def failing(*arguments: Any, calls: Any = calls, at: int = at, number: int = number, **keywords: Any) -> Any:
            if next(calls) == at:
                raise OSError(number, os.strerror(number))
            return original(*arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            said = attempt(lambda: train(*KEYS, name=f"{kind}{at}"))  # noqa: B023 - called at once
        assert os.strerror(number) in said, (kind, at)
        assert str(whole.with_name(f"{kind}{at}")) in said, said
        assert "UNEXPECTED" not in said
        assert is_same(train(*KEYS, name=f"{kind}{at}", resume=True), whole), (kind, at)


@pytest.mark.slow
def test_jumps_of_the_clock(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Back and forth by a year, to 1970, to 2106, and only backwards."""
    whole, now, year = train(*KEYS, name="whole"), time.time(), 3e7
    ticks = count()
    clocks = {
        "back": lambda: now - year, "forth": lambda: now + next(ticks) * year, "1970": lambda: 0.0,
        "2106": lambda: 2.0**32 + 1, "backwards": lambda: now - next(ticks),
    }  # fmt: skip
    for name, clock in clocks.items():
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", clock)
            train(*KEYS, name=name, stop_at=2)
            assert is_same(train(*KEYS, name=name, resume=True), whole), name
