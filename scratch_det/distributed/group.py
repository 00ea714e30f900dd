"""The processes (ranks) of one run: their collectives, and how they end together when one of them fails.

A process that is blocked in a collective notices nothing else. So each process has a thread, ``Watch``, that notices
for it that another process has failed or was asked to stop, or that the launcher is gone.
"""

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from scratch_det.command_line import explained, unexpected
from scratch_det.distributed.devices import SHARE_GPUS, check_devices, identity, pick_device
from scratch_det.distributed.launch import MEETING_SECONDS, World, announce_failure, open_store
from scratch_det.distributed.stop import SECONDS_BETWEEN_LOOKS, StopFlag, Stopped
from scratch_det.errors import EXIT_CODE, EXIT_UNEXPECTED, UserError

SECONDS_TO_STOP = 30.0  # for a run that was asked to stop, and whose launcher is gone, to write its checkpoint
SECONDS_TO_LEARN = 3.0  # for a launcher to see that a process died, and to write it into the store
SECONDS_TO_SETTLE = 0.1  # for gloo's threads to finish after a collective: microseconds on an idle machine
COLLECTIVE_SECONDS = 1800.0  # the others wait as long while rank 0 scores and draws
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


class Watch(threading.Thread):
    """Ends this process when another one has failed or when the launcher is gone; passes on requests to stop.

    ``store`` is the key-value store in which the processes leave messages for each other; None until they have met.
    ``record(reason)`` is called before this process ends because another one failed.
    """

    def __init__(self, rank: int, stop: StopFlag):
        super().__init__(daemon=True, name="watch")
        self.rank, self.stop, self.parent = rank, stop, os.getppid()
        self.store: dist.Store | None = None
        self.record: Callable[[str], object] = lambda reason: None
        self.ended = threading.Event()

    def run(self) -> None:
        """Watch until ``ended`` is set; end the process when another one failed, or the launcher or store is gone."""
        give_up = float("inf")
        while not self.ended.wait(SECONDS_BETWEEN_LOOKS):
            # The parent changes when the launcher ends. Then nobody reads the exit code or starts the run again.
            gone = "the launcher is gone" if os.getppid() != self.parent else ""
            try:
                if self.store:
                    self.read_messages(self.store)
            except RuntimeError:  # the store ends with the rank 0 or launcher that serves it
                gone = gone or "the process that served the meeting point is gone"
            # A cluster that wants its machine back may end the launcher first. A run that was asked to stop still gets
            # the time to write its checkpoint.
            if self.stop.requested and give_up == float("inf"):
                give_up = time.monotonic() + SECONDS_TO_STOP
            is_stopping = self.stop.requested and time.monotonic() < give_up
            if gone and not is_stopping and not self.ended.is_set():
                self.leave(gone, 1)

    def read_messages(self, store: dist.Store) -> None:
        """Pass a request to stop on to the others, take over theirs, and leave when one of them has failed."""
        if self.stop.requested:
            store.set("stop", "")
        elif store.check(["stop"]):
            self.stop.requested = True
        if store.check(["failure"]):
            failure = json.loads(store.get("failure"))
            if failure["rank"] != self.rank:
                self.leave(failure["reason"], failure["exit_code"])

    def leave(self, reason: str, code: int) -> None:
        """End the process at once: its main thread may be blocked in a collective that will never complete."""
        try:
            self.record(reason)
        finally:
            os._exit(code)


class Group:
    """All processes of a run; with one process every collective is a no-op and torch.distributed is not initialised.

    gloo carries tensors on the CPU and Python objects, NCCL tensors on GPUs. ``stop`` is set, within a second, in all
    processes when one of them is asked to stop. As a context manager it ends the processes together.

    ``device`` is that of this process. When the devices of all do not fit together (``check_devices``), the processes
    end with one message.

    Args:
        name: MODEL.DEVICE.

    Raises UserError when the others do not come, and in a single process that has no such device; Stopped when one is
    asked to stop before all have met.
    """

    def __init__(self, world: World, name: str, stop: StopFlag):
        self.world, self.stop = world, stop
        self.rank, self.size, self.is_main = world.rank, world.size, world.is_main
        self.watch: Watch | None = None
        self.has_waited = False
        if self.size == 1:
            self.device = pick_device(name)
            return
        try:
            self.device = pick_device(name, world)
            own = identity(self.device)
        except UserError as error:  # the others have to hear of it: they would wait
            own = str(error)
        self.watch = Watch(self.rank, stop)
        self.watch.start()
        store, _ = open_store(world.address, world.port, world.is_main and not world.served, stop)
        # a connection of its own: a collective may block the other one
        self.watch.store, _ = open_store(world.address, world.port, False, stop)
        store.set(f"device {self.rank}", json.dumps((platform.node(), own)))
        here, deadline = store.add("here", 1), time.monotonic() + MEETING_SECONDS
        while here < self.size:
            if stop.requested:
                store.set("stop", "")  # now: the watch looks less often
                self.watch.ended.set()
                raise Stopped(stop)
            if time.monotonic() > deadline:
                raise UserError(
                    f"only {here} of {self.size} processes started within {MEETING_SECONDS:.0f} seconds; "
                    "look for the errors of the others, and end all processes of this start before the next one"
                )
            time.sleep(0.05)
            here = store.add("here", 0)
        try:
            check_devices([json.loads(store.get(f"device {rank}")) for rank in range(self.size)])
        except UserError as error:
            store.add("heard", 1)
            while self.is_main and store.add("heard", 0) < self.size and time.monotonic() < deadline:
                time.sleep(0.05)  # this process may serve the store
            self.fail(error)
        backend, timeout = "gloo", timedelta(seconds=COLLECTIVE_SECONDS)
        if self.device.type == "cuda":
            backend = "cpu:gloo,cuda:gloo" if os.environ.get(SHARE_GPUS) else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=timeout)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the ranks, in every one of them; changes ``values``."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set on at least one rank."""
        return bool(self.mean(torch.tensor(float(flag))) > 0)

    def gather(self, item: Any) -> list[Any]:
        """The items of all ranks, in their order, on rank 0; an empty list on the others."""
        if self.size == 1:
            return [item]
        items = [None] * self.size if self.is_main else None
        dist.gather_object(item, items)
        return items or []

    def broadcast(self, item: Any) -> Any:
        """Rank 0's item, on every rank."""
        box = [item]
        if self.size > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def broadcast_buffers(self, module: torch.nn.Module) -> None:
        """Give every rank the buffers (running statistics) of rank 0."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def wait_for_cause(self, error: BaseException) -> None:
        """After a lost connection, wait once for the watch to learn which failure caused it, and to leave with that."""
        if self.watch and is_lost_connection(error) and not self.has_waited:
            self.has_waited = True
            time.sleep(SECONDS_TO_LEARN)

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """End together, after an error as ``fail`` describes it; a run that was asked to stop has not failed."""
        if not self.watch:
            return
        if error is None or isinstance(error, Stopped):
            dist.barrier()  # from here on no rank is in a collective that an ended process would break
            self.watch.ended.set()
            self.watch.join()
            dist.barrier()  # from here on no watch reads the store, which ends with one of the processes
            dist.destroy_process_group()
        else:
            self.fail(error)

    def fail(self, error: BaseException) -> NoReturn:
        """Tell the others of ``error`` and end; they end at once too, as their errors only follow from this one.

        Only the process that failed first prints its error. No process waits for another one, which may never answer.
        """
        self.wait_for_cause(error)
        assert self.watch
        told, is_lost, store = explained(error), is_lost_connection(error), self.watch.store
        code = EXIT_CODE if told else 1 if is_lost else EXIT_UNEXPECTED
        assert store, "the processes have met"
        is_first = self.is_main  # unless the store, which may be gone, knows better
        with suppress(RuntimeError):
            if is_first := store.add("failures", 1) == 1:
                reason = f"process {self.rank}: {type(error).__name__}: {error}"
                announce_failure(store, self.rank, reason, code)
        who = f"process {self.rank} of {self.size}"
        if is_lost:
            told = (
                f"{who} lost the connection to another one, which was killed or whose machine is gone "
                f"({str(error).splitlines()[0]})"
            )
        if is_first:
            print(f"error: {told or f'{who}: {unexpected(error)}'}", file=sys.stderr, flush=True)
        os._exit(code)


def is_lost_connection(error: BaseException) -> bool:
    """Whether another process ended during a collective."""
    of_torch = isinstance(error, dist.DistError) or "gloo" in str(error)
    return isinstance(error, RuntimeError) and of_torch and any(sign in str(error) for sign in LOST)


def before_fork() -> None:
    """Call this before the process forks others, such as data loading workers.

    A thread of gloo that has just finished a collective holds, for a moment, a lock of Python's (3.11). A process that
    is forked in that moment would wait for the lock forever. No collective runs meanwhile, so a pause is enough.
    """
    if dist.is_initialized():
        time.sleep(SECONDS_TO_SETTLE)
