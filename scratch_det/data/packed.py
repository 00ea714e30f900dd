"""Arrays that are made once from a json and then mapped: all processes and later runs share the pages of one file.

The file lies in a hidden folder beside the json, or in the user's cache where that folder cannot be written. It is used
again while the json has the same size and time of change, or else the same SHA-256, by the code that made it. Any other
file, and a damaged one, is made anew. Needs no torch.

    line       64 bytes: name and version, length of the header, CRC-32 of all that follows
    header     json with "json_size" and "arrays": name, type and shape of each; padded with spaces
    arrays     one after another, each padded to a multiple of 64 bytes
"""

import ctypes
import json
import mmap
import os
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from scratch_det.errors import DataError, UserError
from scratch_det.files import cache_folder, locked, sha256_of, write_atomically

FOLDER = ".packed"
ALIGNED, READ = 64, 2**22  # bytes
MAKERS = ("packed.py", "coco_json.py", "checks.py", "plausible.py", "rle.py")  # what they write depends on their code
VERSION = sha256(b"".join(Path(__file__).with_name(name).read_bytes() for name in MAKERS)).hexdigest()[:16]


class Packed(NamedTuple):
    """The header's values; the arrays, read-only where they are mapped; why they could not be written, if so."""

    header: dict[str, Any]
    arrays: dict[str, np.ndarray]
    fault: str = ""


Made = tuple[dict[str, Any], dict[str, np.ndarray]]


def load(json_file: Path, make: Callable[[Path], Made]) -> Packed:
    """The packed form of ``json_file``, made by ``make(json_file)`` where there is none: header with "digest", arrays.

    One process makes it while others wait. Where no folder can be written, the arrays stay in memory. A json that was
    changed without another size or time is not noticed.
    """
    key = sha256(os.path.realpath(json_file).encode()).hexdigest()[:16]
    # other code has another file: on a network's file system, a run that maps one ends when another machine replaces it
    name = f"{json_file.name}.{VERSION}.pack"
    places = json_file.parent / FOLDER / name, cache_folder() / "packed" / f"{key}-{name}"
    stat, digest = json_file.stat(), cache(lambda: sha256_of(json_file))

    def find(place: Path) -> Packed | None:
        with suppress(OSError), open(place, "rb") as file:  # what the name stands for may change meanwhile
            found = _map(file)
            if found is None or found.header["json_size"] != stat.st_size:
                return None
            if os.fstat(file.fileno()).st_mtime_ns != stat.st_mtime_ns:
                if found.header["digest"] != digest():
                    return None
                _stamp(file.fileno(), stat)
            return found
        return None

    for place in places:
        if found := find(place):
            return found
    made: Made | None = None
    faults: list[str] = []
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with locked(place.with_name(f"{place.name}.lock")):
                if found := find(place):  # another process has made it meanwhile
                    return found
                made = made or make(json_file)
                _write(place, *made, stat)
                if found := find(place):
                    del made
                    _trim()
                    return found
                faults.append(f"{place} cannot be mapped")
        except DataError:  # of the json
            raise
        except (OSError, UserError) as error:
            faults.append(str(error))
    return Packed(*(made or make(json_file)), "; ".join(faults))


def _map(file: IO[bytes]) -> Packed | None:
    """The content of a sound file of this version; None for any other."""
    try:
        name, version, length, checksum = file.read(ALIGNED).decode().split()
        found = 0
        while part := file.read(READ):  # what is only read does not count as this process's memory
            found = zlib.crc32(part, found)
        if (name, version, found) != ("scratch_det", VERSION, int(checksum)):
            return None
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError):
        return None
    header, arrays, place = json.loads(bytes(view[ALIGNED:][: int(length)])), {}, ALIGNED + int(length)
    for name, kind, shape in header["arrays"]:
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(view, kind, count, place).reshape(shape)
        place += _padded(arrays[name].nbytes)
    return Packed(header, arrays)


def _write(path: Path, header: dict[str, Any], arrays: dict[str, np.ndarray], stat: os.stat_result) -> None:
    for left in path.parent.glob(f"{path.name}.*.partial"):  # by a process that was killed
        left.unlink(missing_ok=True)
    listed = [(name, array.dtype.str, array.shape) for name, array in arrays.items()]
    text = json.dumps({**header, "json_size": stat.st_size, "arrays": listed}).encode()
    parts: list[Any] = [text.ljust(_padded(len(text)))]
    for array in arrays.values():
        parts += [np.ascontiguousarray(array).reshape(-1).view(np.uint8), bytes(_padded(array.nbytes) - array.nbytes)]
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    first = f"scratch_det {VERSION} {len(parts[0])} {checksum}".ljust(ALIGNED - 1) + "\n"
    write_atomically(path, [first.encode(), *parts])
    _stamp(path, stat)


def _stamp(path: Path | int, stat: os.stat_result) -> None:
    """Give the file the json's time of change, by which it is known next time; without leave the digest decides."""
    with suppress(OSError):
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _trim() -> None:
    """Give freed memory back to the system, which glibc does not do by itself: half a GB of COCO's json."""
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _padded(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
