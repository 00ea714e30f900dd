"""Batches of samples, read by this process or by workers (DATALOADER.NUM_WORKERS); waiting for one always ends."""

import atexit
import pickle
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from multiprocessing import active_children
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor
from torch._C import _error_if_any_worker_fails
from torch.utils.data import DataLoader

from scratch_det.data.dataset import SampleSet
from scratch_det.data.transforms import Sample
from scratch_det.distributed.group import before_fork
from scratch_det.distributed.launch import ALONE, World
from scratch_det.distributed.stop import SECONDS_BETWEEN_LOOKS, StopFlag, follow_parent
from scratch_det.errors import DataError, UserError

LARGE = 2**16  # bytes; a smaller tensor is sent sooner than it is shared
MOST_LOOKS = 3600  # for a batch, half an hour: as long as the processes of a run wait for each other
ABANDONED: list[object] = []  # iterators of a run that stops: freeing one waits 5 s for each worker that hangs


def training_batches(
    dataset: SampleSet, cfg: CfgNode, start_iteration: int, world: World = ALONE, accumulate: int = 1,
    stop: StopFlag | None = None,
) -> Iterator[list[Sample]]:  # fmt: skip
    """This rank's micro-batches from ``start_iteration`` to MAX_ITER, ``accumulate`` per iteration.

    Iteration i holds the IMS_PER_BATCH positions from i * IMS_PER_BATCH on, for any number of ranks: each rank takes a
    consecutive share of them and splits it into consecutive micro-batches. Ends early when ``stop`` is requested.
    Raises DataError for the first image that cannot be read as the json describes it, UserError when a worker dies.
    """
    batch = cfg.SOLVER.IMS_PER_BATCH
    size = batch // (world.size * accumulate)
    starts = (
        iteration * batch + (world.rank * accumulate + part) * size
        for iteration in range(start_iteration, cfg.SOLVER.MAX_ITER)
        for part in range(accumulate)
    )
    return _load_batches(dataset, cfg, (range(start, start + size) for start in starts), stop or StopFlag())


def evaluation_batches(
    dataset: SampleSet, cfg: CfgNode, world: World = ALONE, size: int = 1, stop: StopFlag | None = None
) -> Iterator[list[Sample]]:
    """This rank's share of the test images in batches of ``size``: image number rank, rank + world size, ...

    Ends early and raises as ``training_batches`` does.
    """
    own = range(world.rank, len(dataset), world.size)
    return _load_batches(dataset, cfg, [own[i : i + size] for i in range(0, len(own), size)], stop or StopFlag())


def _load_batches(dataset: SampleSet, cfg: CfgNode, batches: Iterable[Any], stop: StopFlag) -> Iterator[list[Sample]]:
    workers = cfg.DATALOADER.NUM_WORKERS
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=Message if workers else list,
        worker_init_fn=follow_parent,  # a worker of a fork server, the default from Python 3.14 on, has another parent
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),  # not torch's global generator, which the training uses
        pin_memory=cfg.MODEL.DEVICE.startswith("cuda") and torch.cuda.is_available(),
        timeout=SECONDS_BETWEEN_LOOKS if workers else 0,
    )
    if workers:
        before_fork()
    try:
        iterator = iter(loader)
    except OSError as error:
        raise UserError(
            f"{workers} processes to load data cannot be started ({error.strerror}); make room in memory and in "
            "/dev/shm (docker run --shm-size 1g), or set DATALOADER.NUM_WORKERS 0"
        ) from None
    if workers and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, _raise_if_worker_died)  # in the place of torch's handler
        atexit.register(_end_workers)
    while not stop.requested and (batch := _next_batch(iterator, stop)):
        if isinstance(batch[0], DataError):
            raise batch[0]
        yield batch
    if stop.requested:
        ABANDONED.append(iterator)


def _next_batch(iterator: Iterator[list[Sample]], stop: StopFlag) -> list[Sample] | None:
    """The next batch; None at the end, or when ``stop`` is requested before the workers have it."""
    for _ in range(MOST_LOOKS):
        try:
            return next(iterator, None)
        except RuntimeError as error:
            if "DataLoader timed out" not in str(error):
                raise _explained(error) from None
        if stop.requested:
            return None
    raise UserError(
        f"no batch has arrived for {MOST_LOOKS * SECONDS_BETWEEN_LOOKS / 60:.0f} minutes: look whether the disk of the "
        "images answers; --resume continues from the last checkpoint"
    )


def _raise_if_worker_died(_number: int, _frame: object) -> None:
    """The handler of SIGCHLD: the main thread may be at any place, far from the loader."""
    try:
        _error_if_any_worker_fails()
    except RuntimeError as error:
        raise _explained(error) from None


def _end_workers() -> None:
    """At the end of Python, which would wait for them: one may read from a disk that does not answer."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # that they end is no error from here on
    for worker in active_children():
        worker.kill()


def _explained(error: RuntimeError) -> Exception:
    """A UserError when a worker has died, ``error`` itself otherwise: what a worker's own code has raised."""
    if isinstance(error.__cause__, UserError):  # by the handler of SIGCHLD, while torch was waiting
        return error.__cause__
    found = str(error).split(". ")[0].strip().removeprefix("DataLoader ")
    if not found.startswith("worker (pid"):
        return error
    return UserError(
        f"{found}: it was loading data. The system kills a process when memory runs out (dmesg tells): give the job "
        "more memory, or lower DATALOADER.NUM_WORKERS; --resume continues from the last checkpoint"
    )


class Message:
    """A worker's batch as bytes, which ``pickle.loads`` makes a batch again.

    The queue to the main process would pickle a batch in a thread, where an error is printed and the batch is lost: the
    main process would wait for it for ever.
    """

    def __init__(self, batch: list[Any]):
        self.content = bytes(_Pickler.dumps(batch))

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (self.content,)


class _Pickler(ForkingPickler):
    """Leaves large tensors in /dev/shm, where there is room: Docker gives a container 64 MB. Others become bytes."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        if value.nbytes >= LARGE:
            with suppress(RuntimeError):  # no room, or too many open files
                value.share_memory_()
                return NotImplemented
        return torch.from_numpy, (value.numpy(),)
