"""The log, to the console and, once the run folder exists, to log.txt; and the progress of long work."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, Self, TypeVar

from scratch_det.files import Lenient

Item = TypeVar("Item")
logger = logging.getLogger("scratch_det")
CAPACITY = 10_000  # lines kept until the file exists; a start writes a few dozen
say_now = partial(print, flush=True)  # a pipe sees each line when it is written


class ConsoleHandler(logging.StreamHandler):
    """Writes to the current ``sys.stdout``, which rich replaces to print above a live progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        super().emit(record)


def set_up_logging(prints: bool = True) -> None:
    """Log to the console and keep the lines for ``log_to_file``; without ``prints`` nothing is logged."""
    close_logging()
    logger.disabled = not prints
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in (ConsoleHandler(), MemoryHandler(CAPACITY, flushLevel=logging.CRITICAL + 1, flushOnClose=False)):
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)


def log_to_file(path: Path) -> None:
    """Write all lines to ``path``, those that were logged before too."""
    memory = next(handler for handler in logger.handlers if isinstance(handler, MemoryHandler))
    file = logging.FileHandler(path)
    file.stream = Lenient(file.stream)  # type: ignore[assignment, arg-type]
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    memory.setTarget(file)
    memory.flush()
    logger.removeHandler(memory)
    logger.addHandler(file)


def close_logging() -> None:
    """Detach and close every handler."""
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


class Progress:
    """Context manager that shows ``done`` of ``total``: a bar with ETA on a terminal, a line now and then elsewhere.

    Args:
        total, start: steps in all and steps already done.
        say: receives the plain lines where standard output is no terminal; None when the caller logs lines itself.
    """

    seconds_between_lines = 10.0

    def __init__(self, description: str, total: int, start: int = 0, say: Callable[[str], object] | None = say_now):
        self.description, self.total, self.start, self.done, self.say = description, total, start, start, say
        self.bar: Any = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn  # not for --help
            from rich.progress import Progress as RichProgress

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                       TextColumn("{task.fields[eta]}"), TextColumn("{task.fields[note]}"))  # fmt: skip
            self.bar = RichProgress(*columns)
            self.bar.add_task(description, total=total, completed=start, eta="", note="")

    def __enter__(self) -> Self:
        self.began = self.last_line = time.monotonic()
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self, note: str = "", steps: int = 1) -> None:
        """So many more steps are done; ``note`` is shown after the bar."""
        self.done += steps
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=self.done, total=self.total, eta=self.eta(), note=note)
        elif self.say and time.monotonic() - self.last_line > self.seconds_between_lines:
            self.last_line = time.monotonic()
            self.say(f"{self.description}: {self.done}/{self.total}, {self.eta()}".removesuffix(", "))

    @contextmanager
    def paused(self, note: str) -> Iterator[None]:
        """Show ``note``, and count no time for the eta, while other work is done."""
        began = time.monotonic()
        if self.bar:
            self.bar.update(self.bar.task_ids[0], note=note)
        yield
        self.began += time.monotonic() - began

    def eta(self) -> str:
        """``eta h:mm:ss`` at the mean speed so far; empty before the first new step."""
        seconds = (time.monotonic() - self.began) * max(self.total - self.done, 0)
        return f"eta {clock(seconds / (self.done - self.start))}" if self.done > self.start else ""


def track(
    items: Iterable[Item], description: str, total: int, say: Callable[[str], object] | None = say_now
) -> Iterator[Item]:
    """Yield ``items`` and show how many of ``total`` are done."""
    with Progress(description, total, say=say) as progress:
        for item in items:
            yield item
            progress.advance()


def clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
