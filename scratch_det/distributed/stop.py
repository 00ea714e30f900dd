"""Stopping a run: a signal sets a flag, the run ends at the next safe point, a second signal ends it at once."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from scratch_det.log import logger

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
EXIT_PREEMPTED = 75  # sysexits.h's EX_TEMPFAIL: not finished, the same command again will continue
STOPPED = (EXIT_PREEMPTED, 128 + signal.SIGINT)  # exit codes of a run that was asked to stop and can be continued
END = b"\0"  # no signal has this number
SECONDS_BETWEEN_LOOKS = 0.5
SAME_REQUEST = 1.0  # seconds: a launcher and the cluster may both pass on the same signal


class StopFlag:
    """Set by SIGTERM or SIGUSR1 (a cluster wants its machine back), SIGINT (Ctrl-C) and SIGHUP (a closed terminal).

    A thread takes the signals, so that the second one works also while the process is blocked in a collective.
    """

    def __init__(self) -> None:
        self.requested = False
        self.raises = False  # whether a signal raises Stopped in the main thread: while nothing would be lost
        self.signal: signal.Signals | None = None  # None when another process got it
        self.received = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside the block; only possible in the main thread."""
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        # Python writes only signals that have a handler to the wakeup pipe.
        before = {number: signal.signal(number, self._handle) for number in wanted_signals()}
        fd_before = signal.set_wakeup_fd(write_end)
        thread = threading.Thread(target=self._listen, args=(read_end,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(fd_before)
            os.write(write_end, END)
            thread.join()
            os.close(write_end)
            os.close(read_end)

    def _handle(self, number: int, _frame: object) -> None:
        if self.raises:
            self.raises = False  # once: not in what cleans up behind it
            self._take(number)  # the thread may not have seen it yet
            raise Stopped(self)

    def _listen(self, read_end: int) -> None:
        """Read one byte for each signal; it may also be a signal that another library handles."""
        while (byte := os.read(read_end, 1)) != END:
            number = byte[0]
            if number in SIGNALS and self.signal is None:
                self._take(number)
                if not self.raises:
                    logger.info(f"{signal_name(number)}: stopping after this iteration or evaluation; again: at once")
            elif number in SIGNALS and time.monotonic() - self.received > SAME_REQUEST:
                os._exit(128 + number)

    def _take(self, number: int) -> None:
        self.received, self.signal, self.requested = time.monotonic(), signal.Signals(number), True


def wanted_signals() -> list[signal.Signals]:
    """SIGNALS, but not the SIGHUP that ``nohup`` makes a process ignore."""
    return [one for one in SIGNALS if one != signal.SIGHUP or signal.getsignal(one) != signal.SIG_IGN]


class Stopped(BaseException):
    """The run ended because it was asked to, which is no error; ``exit_code`` is 75, or 130 after Ctrl-C."""

    def __init__(self, flag: StopFlag):
        super().__init__(f"stopped by {flag.signal.name}" if flag.signal else "stopped together with another process")
        self.exit_code = 130 if flag.signal == signal.SIGINT else EXIT_PREEMPTED


def follow_parent(_worker: int = 0) -> None:
    """For data loading workers: ignore signals, which the parent acts on, and end with the parent."""
    for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # for ``_end_with_parent`` to take
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End when the parent is gone or sends SIGTERM; a SIGTERM from anyone else is meant for the parent."""
    parent = multiprocessing.parent_process()
    while parent and os.getppid() == parent.pid:
        found = signal.sigtimedwait({signal.SIGTERM}, SECONDS_BETWEEN_LOOKS)
        if found and found.si_pid == parent.pid:
            break
    os._exit(1)


def signal_name(number: int) -> str:
    """``SIGTERM``; for SIGKILL also its usual cause: Linux kills a process when memory runs out."""
    return signal.Signals(number).name + (" (out of memory?)" if number == signal.SIGKILL else "")
