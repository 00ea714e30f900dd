"""The processes of one run: what they agree on, exchange and how they fail together."""

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scratch_det.distributed.stop import StopFlag, Stopped
from scratch_det.distributed.watch import Watch, exit_code, explanation, lost_connection
from scratch_det.distributed.world import World
from scratch_det.errors import UserError

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
