"""Text files that are never seen half written, and lines of JSON of which the last one may be."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """Write a text file beside its place, flush it to the disk, then rename it; nothing is left of one that failed."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk is met without a name
        raise
    finally:
        partial.unlink(missing_ok=True)


def read_lines(path: Path, most: int | None = None) -> Iterator[dict[str, Any]]:
    """The complete lines of a metrics.json, those in its last ``most`` bytes; one that was cut off is none.

    Nothing when there is no file.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        if most is not None:
            file.seek(max(0, path.stat().st_size - most))
        lines = file.read().decode(errors="replace").splitlines()
    for line in lines:
        with suppress(ValueError):
            if isinstance(row := json.loads(line), dict):
                yield row


def completed(line: Mapping[str, Any], last: int) -> int:
    """The iterations behind a line of the metrics.json of a run of ``last`` iterations.

    A line says the iteration, from 0, that it comes after; the evaluation at the end says their number.
    """
    return min(int(line["iteration"]) + 1, last)
