"""Files that come with the package, and files that processes share: written in one step, SHA-256, locks, the cache."""

import fcntl
import gc
import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from scratch_det.errors import UserError

PACKAGE = Path(__file__).parent
# What has configs/, projects/, studies/: the clone, or, as setup.py puts them there, an installed package.
ROOT = PACKAGE if (PACKAGE / "configs").is_dir() else PACKAGE.parent


def find_file(path: str | Path) -> Path:
    """``path``, or where it does not exist the file that comes with the package: configs/Digits/quickstart.yaml.

    An absolute path below the current folder counts as the relative one: those of a study's recipes are absolute.
    """
    if Path(path).exists():
        return Path(path)
    full, here = Path(path).absolute(), Path.cwd()
    packaged = ROOT / (full.relative_to(here) if full.is_relative_to(here) else full)
    return packaged if packaged.exists() else Path(path)


class Lenient:
    """A stream of text that may fail: nobody reads it, its terminal is closed or its disk full. Its writer goes on."""

    def __init__(self, stream: IO[str]):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()

    def close(self) -> None:
        with suppress(OSError):
            self.stream.close()


def write_atomically(path: Path, content: str | bytes | list[Any]) -> None:
    """Write to a file beside ``path``, flush it to the disk, then rename it; a failure leaves no partial file.

    ``content`` may be a list of bytes and arrays, which follow each other.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # of its own: others may write this path as well
    try:
        with open(partial, "wb") as file:
            file.writelines(
                content if isinstance(content, list) else [content.encode() if isinstance(content, str) else content]
            )
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # the error of a full disk has no name
        raise
    finally:
        partial.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, as ``sha256sum`` prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def try_lock(path: Path) -> IO[str] | None:
    """The open file that holds the lock, emptied; None when another process has the lock.

    The lock works across machines, and ends with the process, however that ends. Raises UserError on a file system
    without locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack, suppress(BlockingIOError):
        file = stack.enter_context(open(path, "a+"))
        _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        stack.pop_all()  # the lock goes with the file
        return file
    return None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for the lock, then hold it. Raises UserError as ``try_lock``."""
    with open(path, "a") as file:
        _flock(file, fcntl.LOCK_EX)
        yield


def _flock(file: IO[str], how: int) -> None:
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        raise
    except OSError as error:
        raise UserError(
            f"{file.name} cannot be locked ({error.strerror}), but processes that share its folder need locks; name a "
            "folder on another file system: --out DIR, or XDG_CACHE_HOME for the cache"
        ) from error


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/scratch_det``, by default ``~/.cache/scratch_det``."""
    # unlike Path.home, no error where a container's user has no home
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "scratch_det")


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pause the garbage collector: it would visit a json's millions of lists many times, and they have no cycles.

    COCO is read twice as fast.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
