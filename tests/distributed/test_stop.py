"""Signals that stop a run, and the words for how a process ended."""

import os
import signal
import time
from collections.abc import Callable

import pytest

from scratch_det.distributed import stop
from scratch_det.distributed.stop import StopFlag, Stopped


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class TestStop:
    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130),
                                                  (signal.SIGHUP, 75)])  # fmt: skip
    def test_a_signal_sets_the_flag(self, number: signal.Signals, code: int) -> None:
        before = signal.default_int_handler
        ours = signal.signal(number, before)  # SIGHUP is ignored where nohup runs the tests
        flag = StopFlag()
        with flag.listening():
            assert not flag.requested
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # the same request, passed on by a launcher as well
            wait_for(lambda: flag.requested)
        assert signal.signal(number, ours) == before
        assert Stopped(flag).exit_code == code
        assert number.name in str(Stopped(flag))

    def test_nohup(self) -> None:
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        flag = StopFlag()
        with flag.listening():
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(lambda: flag.requested)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN
        assert flag.signal == signal.SIGTERM

    def test_another_process_was_asked(self) -> None:
        flag = StopFlag()
        flag.requested = True
        assert Stopped(flag).exit_code == 75

    def test_a_second_signal_ends_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ended = []
        monkeypatch.setattr(os, "_exit", ended.append)
        monkeypatch.setattr(stop, "SAME_REQUEST", 0.0)
        flag = StopFlag()
        with flag.listening():
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(lambda: flag.requested)
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_for(lambda: ended)
        assert ended == [128 + signal.SIGUSR1]
