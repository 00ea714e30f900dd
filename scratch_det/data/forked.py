"""One function for many items, in forked processes that share the memory of this one. Needs no torch."""

import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import chain, pairwise, zip_longest
from multiprocessing import get_context
from tempfile import TemporaryFile
from typing import IO, Any, TypeVar

from scratch_det.distributed.launch import usable_cores

Item = TypeVar("Item")
Result = TypeVar("Result")
MOST = 8  # processes; more would wait for memory


def map_forked(function: Callable[[Item], Result], items: Sequence[Item], least: int) -> Iterator[Result]:
    """``map(function, items)``; each process takes neighbouring items, ``least`` of them or more.

    What another process could not do (no memory, a full disk, an exception) is done here: an exception of ``function``
    is raised as without processes.
    """
    count = max(1, min(usable_cores(), MOST, len(items) // least)) if sys.platform == "linux" else 1
    own, *shares = [items[a:b] for a, b in pairwise(len(items) * k // count for k in range(count + 1))]
    with ExitStack() as stack:
        others: list[tuple[Any, IO[bytes]]] = []
        with suppress(OSError, AssertionError):  # no room for a file or a process, or this one may not start any
            others.extend(_start(function, share, stack) for share in shares)
        results = [list(map(function, own))]
        for share, other in zip_longest(shares, others):
            results.append((other and _fetch(*other)) or list(map(function, share)))
    return chain.from_iterable(results)


def _start(function: Callable[[Any], Any], items: Sequence[Any], stack: ExitStack) -> tuple[Any, IO[bytes]]:
    """A process, and the file for its results: a pipe would copy them twice more."""
    file = TemporaryFile()  # noqa: SIM115 - closed with the stack
    stack.callback(file.close)

    def work() -> None:
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one answers
            pickle.dump(list(map(function, items)), file, pickle.HIGHEST_PROTOCOL)
            file.flush()
            code = 0
        finally:
            os._exit(code)  # without a traceback, and without what the first process does at its end

    process = get_context("fork").Process(target=work, daemon=True)
    process.start()
    stack.callback(process.kill)
    return process, file


def _fetch(process: Any, file: IO[bytes]) -> list[Any] | None:
    process.join()
    file.seek(0)
    return pickle.load(file) if process.exitcode == 0 else None
