"""What this machine has left: memory, and the shared memory through which workers hand over their images."""

import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")
SHARED = Path("/dev/shm")


def available_memory() -> int | None:
    """Bytes that new processes can take: of the machine and of every cgroup (container, job) around this process.

    None where the system does not tell. Memory that only caches files is available.
    """
    known = [*_machine(), *_cgroups()]
    return min(known) if known else None


def free_shared_memory() -> int | None:
    """Free bytes in /dev/shm; None where there is none."""
    return shutil.disk_usage(SHARED).free if SHARED.is_dir() else None


def peak_memory() -> int:
    """The most bytes of memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _machine() -> Iterator[int]:
    if MEMINFO.exists():
        values = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        yield int(values["MemAvailable"].removesuffix("kB")) * 1024


def _cgroups() -> Iterator[int]:
    """What each limited cgroup (version 2) from this process's own up to the root has left."""
    own = [line.removeprefix("0::/") for line in _lines(CGROUP) if line.startswith("0::/")]
    for name in own:
        for folder in (CGROUPS / name, *(CGROUPS / name).parents):
            limit, current = _lines(folder / "memory.max"), _lines(folder / "memory.current")
            if limit and current and limit != ["max"]:
                statistics = dict(line.split() for line in _lines(folder / "memory.stat"))
                yield int(limit[0]) - int(current[0]) + int(statistics.get("inactive_file", 0))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
