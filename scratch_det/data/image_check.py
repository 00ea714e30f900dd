"""Decode every image file of a data set once, in parallel; a second scan reads only what is new or has changed."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from scratch_det.data.coco import CocoDataset
from scratch_det.data.coco_checks import NUM_SHOWN
from scratch_det.errors import DataError
from scratch_det.files import cache_folder
from scratch_det.log import say_now, track

CHUNK = 32  # images that a process takes at a time
State = list[int]  # of a file: bytes, time of its last change in ns; width and height in pixels as the json has them


@dataclass(frozen=True)
class Scan:
    """How many images were read now, how many were known to be sound, and what is wrong with the first faulty ones."""

    read: int
    known: int
    num_faulty: int
    first_faults: list[str]


def scan_images(data: CocoDataset, say: Callable[[str], object] | None = say_now) -> Scan:
    """Whether every image is there, can be decoded to its end, and has the json's width and height once upright.

    Sound files are remembered below ``cache_folder()``, a file for each image folder, by name, size and time of change.
    When nothing can be written there, the next scan reads all of them again. ``say``: see ``progress.track``.
    """
    root = data.entry.image_root
    cache = cache_folder() / f"images-{sha256(os.path.realpath(root).encode()).hexdigest()[:16]}.json"
    known = _read_cache(cache)
    states = [_state(root, image) for image in data.images]  # before reading: a change in between is not missed
    todo = [
        (image, state)
        for image, state in zip(data.images, states, strict=True)
        if state is None or known.get(image["file_name"]) != state
    ]
    faults: list[str] = []
    try:
        found = _faults(root, [image for image, _ in todo], f"images of {data.entry.name}", say)
        for (image, state), fault in zip(todo, found, strict=True):
            if fault:
                faults.append(f"id {image['id']}, {fault}")
            elif state:
                known[image["file_name"]] = state
    finally:
        _write_cache(cache, known)
    return Scan(len(todo), len(states) - len(todo), len(faults), faults[:NUM_SHOWN])


def fault_of(job: tuple[Path, int, int]) -> str | None:
    """What is wrong with the image file of (path, width, height), in words; None for a sound one."""
    from scratch_det.data.image import read_image  # imports torch

    try:
        read_image(*job)
    except DataError as problem:
        return str(problem)
    except Exception as problem:  # a damaged file can make a decoder fail in any way
        return f"{job[0]}: cannot be decoded ({type(problem).__name__}: {problem})"
    return None


def _faults(
    root: Path, images: list[dict[str, Any]], description: str, say: Callable[[str], object] | None
) -> Iterator[str | None]:
    """The fault of each image, in their order."""
    if not images:
        return
    import scratch_det.data.image  # noqa: F401 - once, before the processes are forked

    jobs = [(root / image["file_name"], image["width"], image["height"]) for image in images]
    ignore_interrupts = (signal.SIGINT, signal.SIG_IGN)  # this process decides what Ctrl-C means
    with ProcessPoolExecutor(_cores(), initializer=signal.signal, initargs=ignore_interrupts) as pool:
        try:
            yield from track(pool.map(fault_of, jobs, chunksize=CHUNK), description, len(jobs), say)
        finally:
            pool.shutdown(cancel_futures=True)


def _cores() -> int:
    """Processor cores that this process may use; not every system tells them from those that there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _state(root: Path, image: dict[str, Any]) -> State | None:
    try:
        found = os.stat(root / image["file_name"])
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns, image["width"], image["height"]]


def _read_cache(path: Path) -> dict[str, State]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_cache(path: Path, known: dict[str, State]) -> None:
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(known))
        os.replace(partial, path)
