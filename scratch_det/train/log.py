"""The project's log: to the console at once, to log.txt as soon as the run folder exists."""

import logging
from logging.handlers import MemoryHandler
from pathlib import Path

from scratch_det.progress import ConsoleHandler

logger = logging.getLogger("scratch_det")
CAPACITY = 10_000  # lines kept until the file exists; a start writes a few dozen


def set_up_logging(speaks: bool = True) -> None:
    """Log to the console and keep the lines for ``log_to_file``; without ``speaks`` this process stays silent."""
    close_logging()
    logger.disabled = not speaks
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in (ConsoleHandler(), MemoryHandler(CAPACITY, flushLevel=logging.CRITICAL + 1, flushOnClose=False)):
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)


def log_to_file(path: Path) -> None:
    """Write what was logged so far, and from now on, to ``path``."""
    memory = next(handler for handler in logger.handlers if isinstance(handler, MemoryHandler))
    file = logging.FileHandler(path)
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
