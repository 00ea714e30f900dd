"""The folder checkpoints/ of a run: every file in it is complete, and a damaged file is found before it is used.

model_0000499.pth  after 500 completed iterations: the last ``keep_last`` (0: all) and the iterations ``keep_at``
model_final.pth    after the last iteration
model_best.pth     the checkpoint with the best AP; a hard link where the file system supports it
last_checkpoint    the name of the newest checkpoint, for detectron2; not read here
index.json         SHA-256 of the files, ``keep_at`` of every start of the run, and the best AP
"""

import hashlib
import io
import json
import math
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from scratch_det.engine.run_dir import DISK_FULL, Index, check_free_space, free_bytes, most_checkpoints, size
from scratch_det.errors import DataError, UserError
from scratch_det.files import sha256_of, write_atomically
from scratch_det.log import logger
from scratch_det.reading import read_json, regular
from scratch_det.weights.read import read_checkpoint

FINAL, BEST, LAST = "model_final.pth", "model_best.pth", "last_checkpoint"
REGULAR = re.compile(r"model_(\d{7})\.pth")


def checkpoint_name(iteration: int) -> str:
    """detectron2's file name for the state after iteration ``iteration`` (0-based): 499 -> model_0000499.pth."""
    return f"model_{iteration:07d}.pth"


class Checkpointer:
    """Writes and finds the checkpoints of one run; one process at a time may write them.

    A checkpoint is written to a temporary file, flushed to the disk, entered into index.json with its SHA-256, and only
    then renamed; older checkpoints are deleted last. So whenever the process is killed, the newest file with a name is
    complete.

    Args:
        keep_last: number of regular checkpoints to keep; 0 keeps all.
        keep_at: completed iterations whose checkpoints are kept too; index.json adds the ``keep_at`` of earlier starts.
    """

    def __init__(self, folder: Path, keep_last: int = 3, keep_at: Collection[int] = ()):
        self.folder, self.keep_last, self.index = folder, keep_last, folder / "index.json"
        self.bytes_each = 0
        self.keep_at = frozenset(keep_at).union(self._read_index().get("keep_at", ()))
        self._last_written: tuple[int, Path, str] | None = None  # completed iterations, file, SHA-256

    def check_space(self, bytes_each: int, max_iter: int, period: int) -> None:
        """Raise UserError unless all checkpoints of the run fit on the disk."""
        self.bytes_each = bytes_each
        check_free_space(self.folder, bytes_each, most_checkpoints(max_iter, period, self.keep_last, self.keep_at))

    def save(self, state: dict[str, Any], completed: int, final: bool = False) -> Path:
        """Write the state after ``completed`` iterations, then delete checkpoints that need not be kept.

        Regular checkpoints of later iterations are deleted too: they were damaged, so the run continued from an earlier
        one, and will write them again. Raises UserError when the disk is full; earlier checkpoints stay.
        """
        regular = self.folder / checkpoint_name(completed - 1)
        path = self.folder / FINAL if final else regular
        with self._writing(path):
            self._last_written = None
            self._put(path, state, completed)
            if final and completed in self.keep_at:
                self._put(regular, state, completed)
            write_atomically(self.folder / LAST, path.name)
        files = self._regular()
        past = [number for number in files if number <= completed]
        for number in files.keys() - past[-self.keep_last :] - self.keep_at.intersection(past):  # [-0:] is all of them
            files[number].unlink(missing_ok=True)
        return path

    def save_best(self, state: dict[str, Any], ap: float, completed: int) -> None:
        """Write the state after ``completed`` iterations as model_best.pth, with its AP. Raises as ``save`` does."""
        with self._writing(self.folder / BEST):
            self._put(self.folder / BEST, state, completed)
            digests = self._read_index()["sha256"]  # only the newest digest of model_best.pth is needed
            self._write_index(sha256={**digests, BEST: digests[BEST][:1]}, best={"completed": completed, "ap": ap})

    def keep(self, completed: int) -> None:
        """Add ``completed`` to ``keep_at``; its checkpoint exists already."""
        self.keep_at |= {completed}
        self._write_index(keep_at=sorted(self.keep_at))

    def best_ap(self) -> float:
        """AP of model_best.pth, of this and earlier starts of the run; -inf when there is none or it is damaged."""
        best = self._read_index().get("best")
        return best.get("ap", -math.inf) if best and not self.damage(BEST) else -math.inf

    def holds(self, completed: int) -> bool:
        """Whether an undamaged checkpoint of exactly ``completed`` iterations exists, except model_best.pth."""
        paths = [self.folder / name for name in (checkpoint_name(completed - 1), FINAL)]
        return any(p.is_file() and completed_iterations(p) == completed and not self.damage(p.name) for p in paths)

    def newest_valid(self) -> Path | None:
        """The undamaged checkpoint with the most completed iterations; None when there is no checkpoint.

        Logs each damaged checkpoint that it skips. Raises UserError when all of them are damaged.
        """
        candidates = self._newest_first()
        for place, path in enumerate(candidates):
            if reason := self.damage(path.name):
                logger.warning(f"checkpoint {path} is damaged ({reason})")
                continue
            if place:
                logger.warning(f"using {path} instead, the newest checkpoint that is not damaged")
            return path
        if candidates:
            raise UserError(
                f"all checkpoints in {self.folder} are damaged: {', '.join(path.name for path in candidates)}\n"
                "  restore one from a copy, or delete them to start this run from its beginning, "
                "or name another folder: OUTPUT_DIR PATH"
            )
        return None

    def damage(self, name: str) -> str | None:
        """Why the file ``name`` is not a complete, unchanged checkpoint; None when it is one."""
        return damage(self.folder / name, self._read_index().get("sha256", {}).get(name, ()))

    def _put(self, path: Path, state: dict[str, Any], completed: int) -> None:
        """Write ``state``, or link to the file of the same iterations that was written last, and name it ``path``."""
        partial = path.with_name(path.name + ".partial")
        last = self._last_written
        if not (last and last[0] == completed and _link(last[1], partial)):
            last = self._last_written = completed, path, write_synced(partial, state)
        # Until the rename, the old file is valid too: after a crash either file may be there.
        digests = self._read_index().get("sha256", {})
        known = {name: found for name, found in digests.items() if (self.folder / name).exists()}
        known[path.name] = list(dict.fromkeys([last[2], *known.get(path.name, [])]))
        self._write_index(keep_at=sorted(self.keep_at), sha256=known)
        rename_synced(partial, path)
        partial.unlink(missing_ok=True)  # it remains if both names were hard links to one file

    def _regular(self) -> dict[int, Path]:
        """Completed iterations -> file, oldest first."""
        matches = [(REGULAR.fullmatch(path.name), path) for path in sorted(self.folder.glob("model_*.pth"))]
        return {int(match[1]) + 1: path for match, path in matches if match}

    def _newest_first(self) -> list[Path]:
        """Every checkpoint, newest first.

        If its iterations cannot be read, model_final.pth counts as the newest and model_best.pth as the oldest. For
        equal iterations model_best.pth comes last: it may be the same file.
        """
        places = [(float(completed), 1, path) for completed, path in self._regular().items()]
        for path, rank, unknown in ((self.folder / FINAL, 2, math.inf), (self.folder / BEST, 0, 0.0)):
            if path.is_file():
                places.append((completed_iterations(path) or unknown, rank, path))
        return [path for _, _, path in sorted(places, reverse=True)]

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Remove unfinished files before, and after an error; explain a full disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_unfinished()
        try:
            yield
        except (OSError, RuntimeError) as error:
            self._remove_unfinished()
            cause = error if isinstance(error, OSError) else error.__context__  # torch's writer hides the first error
            if not isinstance(cause, OSError):
                raise
            if cause.errno not in DISK_FULL:
                cause.filename = cause.filename or str(path)
                raise cause from None
            last = next(iter(self._newest_first()), "none")
            raise UserError(
                f"disk full at {path} ({cause.strerror}): it needs about {size(self.bytes_each)}, "
                f"{size(free_bytes(self.folder))} are free; the last complete checkpoint is {last}\n"
                "  free space and continue with --resume"
            ) from None

    def _remove_unfinished(self) -> None:
        for path in self.folder.glob("*.partial"):
            path.unlink(missing_ok=True)

    def _read_index(self) -> dict[str, Any]:
        try:
            return read_json(self.index, Index, "best AP and checksums are lost; repeat --keep-at, if there was one")
        except DataError as error:
            logger.warning(error)
            return {}

    def _write_index(self, **changes: Any) -> None:
        write_atomically(self.index, json.dumps({**self._read_index(), **changes}, indent=2) + "\n")


def damage(path: Path, digests: Collection[str] = ()) -> str | None:
    """Why ``path`` is no complete, unchanged checkpoint; None when it is one.

    Its SHA-256 has to be one of ``digests``; without digests ``read_checkpoint`` has to accept it.
    """
    try:
        if digests:
            return None if sha256_of(regular(path)) in digests else "its SHA-256 is not the recorded one"
        read_checkpoint(path)
    except (OSError, UserError) as error:
        return str(error)
    return None


def completed_iterations(path: Path) -> int | None:
    """Completed iterations of a checkpoint: from its name, else from its content; None when it cannot be read."""
    if match := REGULAR.fullmatch(path.name):
        return int(match[1]) + 1
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["iteration"] + 1
    except Exception:  # a damaged file may raise anything
        return None


class _HashingFile(io.BufferedWriter):
    """Computes the SHA-256 of the bytes that are written. On a faulty disk, the bytes read back would differ."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path, "w"))
        self.sha256 = hashlib.sha256()

    def write(self, content: Any) -> int:  # torch.save writes in order
        self.sha256.update(content)
        return super().write(content)


def write_synced(path: Path, state: dict[str, Any]) -> str:
    """Write ``state`` to a file and flush it to the disk; returns the SHA-256 of what was written."""
    with _HashingFile(path) as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
        return file.sha256.hexdigest()


def rename_synced(path: Path, new: Path) -> None:
    """Rename within a folder, and flush the folder's entry to the disk too, on file systems that support it."""
    os.replace(path, new)
    folder = os.open(new.parent, os.O_RDONLY)
    with suppress(OSError):
        os.fsync(folder)
    os.close(folder)


def _link(source: Path, path: Path) -> bool:
    """Make ``path`` a second name of ``source``; False where the file system does not support it."""
    try:
        os.link(source, path)
    except OSError:
        return False
    return True
