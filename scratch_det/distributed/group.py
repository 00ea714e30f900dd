"""What a process learns of the others while it waits for them: that one failed, has to stop, or is gone.

The processes of one run: what they agree on, exchange and how they fail together.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scratch_det.distributed.launch import World
from scratch_det.distributed.stop import SECONDS_BETWEEN_LOOKS, StopFlag, Stopped
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


SECONDS_TO_LEARN = 3.0  # until a launcher has left word that it saw a process die
MEETING_SECONDS = 300.0  # until the last process has to be there; slow file systems delay imports
SECONDS_TO_SETTLE = 0.1  # for gloo's threads to end what they do after an exchange: microseconds on an idle machine
EXCHANGE_SECONDS = 1800.0  # for the others to wait while the main process scores and draws


class Group:
    """All processes of a run; with one process nothing is exchanged and torch.distributed stays untouched.

    gloo carries CPU tensors and Python objects, NCCL those on GPUs. ``stop`` is set, within a second, in all processes
    when one of them is asked to stop.
    """

    def __init__(self, world: World, device: torch.device, stop: StopFlag):
        self.world, self.stop = world, stop
        self.rank, self.size, self.is_main = world.rank, world.size, world.is_main
        self.watch: Watch | None = None
        self.has_waited = False
        if self.size > 1:
            self.watch = Watch(self.rank, stop)
            self.watch.start()
            store = _join(world)
            self.watch.store = store.clone()  # a connection of its own
            _wait_for_all(store, self.size)
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            if device.type == "cuda":
                torch.cuda.set_device(device)
            timeout = timedelta(seconds=EXCHANGE_SECONDS)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=timeout)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes, in every one of them."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in at least one process."""
        return bool(self.mean(torch.tensor(float(flag))) > 0)

    def gather(self, item: Any) -> list[Any]:
        """The items of all processes by rank in the main process, an empty list in the others."""
        if self.size == 1:
            return [item]
        items = [None] * self.size if self.is_main else None
        dist.gather_object(item, items)
        return items or []

    def broadcast(self, item: Any) -> Any:
        """The main process's item, in every process."""
        if self.size > 1:
            box = [item]
            dist.broadcast_object_list(box)
            return box[0]
        return item

    def on_failure(self, record: Callable[[str], None]) -> None:
        """Call ``record(reason)`` in this process before it ends because another one failed."""
        if self.watch:
            self.watch.record = record

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Leave together; after an error tell the others, who end at once, as their errors only follow from this one.

        The process that failed first explains why. None waits for anything of the others, which may never come. A run
        that was asked to stop has not failed.
        """
        if not self.watch or error is None or isinstance(error, Stopped):
            return self.close()
        self.wait_for_cause(error)
        if self.watch.is_first_failure(error):
            print(explanation(error, self.rank, self.size), file=sys.stderr, flush=True)
        os._exit(exit_code(error))

    def wait_for_cause(self, error: BaseException) -> None:
        """After a lost connection: the watch may hear of the failure behind it, and leave with that. Waits once."""
        if self.watch and lost_connection(error) and not self.has_waited:
            self.has_waited = True
            time.sleep(SECONDS_TO_LEARN)

    def broadcast_buffers(self, module: torch.nn.Module) -> None:
        """Give every process the main one's buffers (running statistics)."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def close(self) -> None:
        """Wait for the others, then leave."""
        if self.watch:
            dist.barrier()
            self.watch.end()
            dist.barrier()
            dist.destroy_process_group()
            self.watch = None


def _join(world: World) -> dist.Store:
    """A connection to the store where the processes meet. Raises UserError when the meeting point cannot be opened."""
    opens_it = world.is_main and not world.served
    try:
        store = dist.TCPStore(
            world.address,
            world.port,
            is_master=opens_it,
            wait_for_workers=False,
            timeout=timedelta(seconds=MEETING_SECONDS),
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        doing = "open" if opens_it else "reach"
        raise UserError(
            f"cannot {doing} {world.address}:{world.port}, where the {world.size} processes meet ({reason}); "
            "give a free port: MASTER_PORT, torchrun's --master-port or --dist-url"
        ) from None
    return prefixed(store)


def _wait_for_all(store: dist.Store, size: int) -> None:
    """Raise UserError when not all processes have come within ``MEETING_SECONDS``."""
    here, deadline = store.add("here", 1), time.monotonic() + MEETING_SECONDS
    while here < size:
        if time.monotonic() > deadline:
            raise UserError(
                f"{here} of {size} processes have come within {MEETING_SECONDS:.0f} seconds; "
                "look for what the others said, and end this start everywhere before the next one"
            )
        time.sleep(0.05)
        here = store.add("here", 0)


def before_fork() -> None:
    """Has to be called before this process forks others, such as data loading workers.

    A thread of gloo's that has just ended an exchange holds, for a moment, a lock of Python's (3.11) that a process
    forked in that moment would wait for for ever. Nothing is exchanged meanwhile, so a pause lets the thread end.
    """
    if dist.is_initialized():
        time.sleep(SECONDS_TO_SETTLE)


def prefixed(store: dist.Store) -> dist.Store:
    """A part of the store of its own: torchrun uses the same one, and starts anew in it after a failure."""
    return dist.PrefixStore(f"run{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
