"""Being asked to stop: a signal sets a flag, the run ends at the next safe point, a second signal ends it at once."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
EXIT_PREEMPTED = 75  # sysexits.h's EX_TEMPFAIL: not finished, the same command again will continue
SECONDS_BETWEEN_LOOKS = 0.5
SAME_REQUEST = 1.0  # seconds: a launcher and the cluster may both hand on one and the same signal


class StopFlag:
    """Set by SIGTERM or SIGUSR1 (a cluster wants its machine back) and by SIGINT (Ctrl-C)."""

    def __init__(self) -> None:
        self.requested = False
        self.signal: signal.Signals | None = None  # None when another process got it
        self.received = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take over the three signals for a while; only possible in the main thread."""
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is None:
            self.requested, self.signal, self.received = True, signal.Signals(number), time.monotonic()
        elif time.monotonic() - self.received > SAME_REQUEST:
            os._exit(128 + number)


class Stopped(Exception):
    """The run ended because it was asked to; ``exit_code`` is 75, or 130 after Ctrl-C."""

    def __init__(self, flag: StopFlag):
        super().__init__(f"stopped by {flag.signal.name}" if flag.signal else "stopped together with another process")
        self.exit_code = 130 if flag.signal == signal.SIGINT else EXIT_PREEMPTED


def follow_parent(_worker: int = 0) -> None:
    """For data loading workers: live and end with the process that they serve, which decides when to stop."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    while parent and os.getppid() == parent.pid:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os._exit(1)
