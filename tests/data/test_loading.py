"""Waiting for a batch ends: with the batch, with a request to stop, or with a message that names the fix."""

import itertools
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import active_children
from threading import Timer
from typing import Any

import pytest
import torch
from toy_data import config, read_toy, same

from scratch_det.data import loading
from scratch_det.data.dataset import SampleSet, TrainingSet
from scratch_det.data.loading import training_batches
from scratch_det.distributed.stop import StopFlag
from scratch_det.errors import UserError


class Faulty(SampleSet):
    """``fault`` is called for the image at position 3, in the second batch."""

    def __init__(self, fault: Callable[[], object]):
        self.fault, self.items = fault, range(99)

    def __getitem__(self, position: int) -> Any:
        if position == 3:
            self.fault()
        return {"image": torch.full((1,), position)}


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``first(fault, stop)``: the batches of a Faulty data set after the first; three images each, from one worker."""

    def begin(fault: Callable[[], object], stop: StopFlag | None = None) -> Iterator[Any]:
        batches = training_batches(Faulty(fault), config(DATALOADER__NUM_WORKERS=1), 0, stop=stop)
        assert [int(sample["image"]) for sample in next(batches)] == [0, 1, 2]
        return batches

    yield begin
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in active_children():
        worker.kill()
    loading.ABANDONED.clear()


def kill(number: int) -> None:
    os.kill(os.getpid(), number)


def bug() -> None:
    raise RuntimeError("a bug")


def test_a_stop_is_obeyed_while_waiting(first) -> None:
    """Which comes while the worker sleeps."""
    stop = StopFlag()
    batches = first(lambda: time.sleep(600), stop)
    Timer(0.2, lambda: setattr(stop, "requested", True)).start()
    assert list(batches) == []


def test_workers_are_forked_where_python_would_not(first) -> None:
    """Python 3.14 starts processes by a server on Linux, which would be the parent that a worker ends with."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        assert len(list(itertools.islice(first(int), 2))) == 2
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_waiting_has_an_end(first, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "MOST_LOOKS", 2)
    with pytest.raises(UserError, match=r"no batch has arrived for .* look whether the disk of the images answers"):
        next(first(lambda: time.sleep(1.2)))


@pytest.mark.parametrize(
    ("fault", "cause"),
    [(partial(kill, signal.SIGKILL), "is killed by signal: Killed"),
     (partial(kill, signal.SIGABRT), "is killed by signal: Aborted"),
     (partial(os._exit, 3), "exited unexpectedly with exit code 3")],
)  # fmt: skip
def test_a_worker_that_dies_is_one_message(fault: Callable[[], object], cause: str, first) -> None:
    with pytest.raises(UserError) as caught:
        next(first(fault))
    assert str(caught.value).startswith("worker (pid")
    assert f"{cause}: it was loading data. The system kills" in str(caught.value)
    assert "lower DATALOADER.NUM_WORKERS" in str(caught.value)


def test_a_worker_that_dies_while_the_main_process_computes(first) -> None:
    batches = first(lambda: time.sleep(0.2) or kill(signal.SIGKILL))
    with pytest.raises(UserError, match="is killed by signal: Killed: it was loading data"):
        time.sleep(60)
    del batches


def test_a_worker_that_python_ends_at_its_own_end_is_no_error(first, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr("atexit.register", lambda *call: calls.append(call))
    first(lambda: None)
    handler = signal.getsignal(signal.SIGCHLD)
    assert (loading._end_workers,) in calls
    loading._end_workers()
    assert [handler, signal.getsignal(signal.SIGCHLD)] == [loading._raise_if_worker_died, signal.SIG_DFL]
    for worker in active_children():
        worker.join(10)
        assert worker.exitcode == -signal.SIGKILL


def test_what_a_workers_code_raises_is_no_death(first) -> None:
    with pytest.raises(RuntimeError, match=r"Caught RuntimeError in DataLoader worker process 0.(?s:.)*a bug"):
        next(first(bug))


def test_no_room_for_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their locks and queues are files in /dev/shm, too."""

    class Full:
        def __init__(self, *_: Any, **__: Any):
            pass

        def __iter__(self) -> Iterator[Any]:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(loading, "DataLoader", Full)
    with pytest.raises(
        UserError, match=r"1 processes .* \(No space left on device\); .*--shm-size.* DATALOADER.NUM_WORKERS 0"
    ):
        next(training_batches(Faulty(bug), config(DATALOADER__NUM_WORKERS=1), 0))


@pytest.mark.parametrize("is_full", [False, True])
def test_a_full_dev_shm_changes_nothing(coco_factory, is_full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of 144 kB go through it where there is room; a limit on the size of files is another way to have none."""

    def without_room(worker: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        follow_parent(worker)

    follow_parent = loading.follow_parent
    if is_full:
        monkeypatch.setattr(loading, "follow_parent", without_room)
    coco_factory(num_images=6)
    keys = {"INPUT__MIN_SIZE_TRAIN": (200,), "INPUT__MAX_SIZE_TRAIN": 300}
    here, elsewhere = (
        list(training_batches(TrainingSet(cfg, [read_toy()]), cfg, 0))
        for cfg in (config(**keys), config(**keys, DATALOADER__NUM_WORKERS=2))
    )
    assert {sample["image"].is_shared() for batch in elsewhere for sample in batch} == {not is_full}
    for batch, other in zip(here, elsewhere, strict=True):
        assert all(same(a, b) for a, b in zip(batch, other, strict=True))
