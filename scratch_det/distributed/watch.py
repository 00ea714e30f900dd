"""What a process learns of the others while it waits for them: that one failed, has to stop, or is gone."""

import json
import os
import threading
import time
import traceback
from collections.abc import Callable

import torch.distributed as dist

from scratch_det.distributed.stop import SECONDS_BETWEEN_LOOKS, StopFlag
from scratch_det.errors import EXIT_CODE, UserError

SECONDS_TO_STOP = 30.0  # for a run that was asked to stop and whose launcher has ended before it


class Watch(threading.Thread):
    """Looks for what a process that waits for the others cannot see: one failed or must stop, or the launcher is gone.

    Nobody waits for orphans, so they end. ``store`` is where the processes leave word, once they have met.
    """

    def __init__(self, rank: int, stop: StopFlag):
        super().__init__(daemon=True, name="watch")
        self.rank, self.stop, self.parent = rank, stop, os.getppid()
        self.store: dist.Store | None = None
        self.record: Callable[[str], None] = lambda reason: None
        self.ended = threading.Event()

    def run(self) -> None:
        """Look until told to end; leave the process when another one failed, or the launcher or the store is gone."""
        stopping_since = float("inf")
        while not self.ended.wait(SECONDS_BETWEEN_LOOKS):
            gone = "the launcher is gone" if os.getppid() != self.parent else ""
            try:
                if self.store:
                    self._look(self.store)
            except RuntimeError:  # with the process or launcher that kept it
                gone = gone or "the process that kept the meeting point is gone"
            if self.stop.requested:
                stopping_since = min(stopping_since, time.monotonic())
            stopping = self.stop.requested and time.monotonic() - stopping_since < SECONDS_TO_STOP
            if gone and not (stopping or self.ended.is_set()):
                self._leave(gone, 1)

    def _look(self, store: dist.Store) -> None:
        if self.stop.requested:
            store.set("stop", "")
        elif store.check(["stop"]):
            self.stop.requested = True
        if store.check(["failure"]):
            failure = json.loads(store.get("failure"))
            if failure["rank"] != self.rank:
                self._leave(failure["reason"], failure["exit_code"])

    def _leave(self, reason: str, code: int) -> None:
        try:
            self.record(reason)
        finally:
            os._exit(code)

    def end(self) -> None:
        """Stop looking."""
        self.ended.set()
        self.join()

    def is_first_failure(self, error: BaseException) -> bool:
        """Announce that this process failed; False when another one did before."""
        assert self.store, "the processes have met"
        reason = f"process {self.rank}: {type(error).__name__}: {error}"
        try:
            if self.store.add("failures", 1) > 1:
                return False
            announce_failure(self.store, self.rank, reason, exit_code(error))
        except RuntimeError:
            return self.rank == 0  # the store is gone: one of those that are left explains
        return True


def lost_connection(error: BaseException) -> bool:
    """Whether the error is that of a process that another one has left alone in an exchange."""
    signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
    of_torch = isinstance(error, dist.DistError) or "gloo" in str(error)
    return isinstance(error, RuntimeError) and of_torch and any(sign in str(error) for sign in signs)


def explanation(error: BaseException, rank: int, size: int) -> str:
    """What the process that failed first prints: a message, or for what nobody foresaw the traceback."""
    if lost_connection(error):
        return (
            f"error: process {rank} of {size} has lost the connection to another one, which was killed or whose "
            f"machine is gone ({str(error).splitlines()[0]})"
        )
    if isinstance(error, UserError):
        return f"error: {error}"
    return f"process {rank} of {size} failed:\n" + "".join(traceback.format_exception(error))


def exit_code(error: BaseException) -> int:
    """What a process ends with: 2 for what the user can mend, else 1."""
    return EXIT_CODE if isinstance(error, UserError) else 1


def announce_failure(store: dist.Store, rank: int | None, reason: str, code: int) -> None:
    """Leave word in the store that a process failed; ``rank`` None when it could not say so itself."""
    store.set("failure", json.dumps({"rank": rank, "reason": reason, "exit_code": code}))
