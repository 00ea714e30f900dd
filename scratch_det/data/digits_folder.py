"""Generated folders that are whole or absent: built beside their place, moved in when done, replaced only if ours.

A finished folder holds SHA256SUMS (``sha256sum -c SHA256SUMS`` checks it) and manifest.json, which says what it was
made from. Files that others put into the folder are tolerated, and never deleted.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..errors import DataError

GENERATOR = "scratch_det digits"
MANIFEST, SUMS = "manifest.json", "SHA256SUMS"


def needs_building(folder: Path, parameters: dict[str, Any], force: bool) -> bool:
    """Whether to build ``folder``; refuses to touch one that is not ours, or, without ``force``, that differs."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return True
    manifest = _own_manifest(folder)
    differing = _differences(folder, manifest, parameters)
    if not differing and not force:
        return False
    if not force:
        raise DataError(f"{folder} {differing}; --force rebuilds it, another --out keeps both")
    extra = sorted(_files(folder) - set(_read_sums(folder)) - {MANIFEST, SUMS})
    if extra:
        raise DataError(
            f"{folder} holds {len(extra)} file(s) that were not generated, such as {extra[0]}: "
            "move them away, because --force deletes the folder"
        )
    return True


def build(folder: Path, parameters: dict[str, Any], write: Callable[[Path], dict[str, Any]]) -> None:
    """Let ``write`` fill a temporary sibling and return its contents in numbers, then put it in ``folder``'s place."""
    with _writable(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = _beside(folder, "partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            _seal(partial, parameters, write(partial))
            _swap_in(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _swap_in(new: Path, folder: Path) -> None:
    """Move ``new`` to ``folder``; what was there is deleted only once the new one is in place."""
    old = _beside(folder, "old")
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _seal(folder: Path, parameters: dict[str, Any], contents: dict[str, Any]) -> None:
    """Write the checksum of every file, and last of all the manifest."""
    sums = "".join(f"{_hash(folder / name)}  {name}\n" for name in sorted(_files(folder)))
    (folder / SUMS).write_text(sums)
    digest = sha256(sums.encode()).hexdigest()
    manifest = {"generator": GENERATOR, "parameters": parameters, "contents": contents, "sha256": digest}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")


def _own_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that this module made; any other folder is an error."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["generator"] == GENERATOR:
            return manifest
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise DataError(f"{folder} exists but is no digits data set (no {MANIFEST} of ours): choose another --out")


def _differences(folder: Path, manifest: dict[str, Any], parameters: dict[str, Any]) -> str:
    """How the folder differs from what is wanted, in words; empty when it is complete and the same."""
    made = manifest.get("parameters") or {}
    changed = [f"{key} {made.get(key)}, not {value}" for key, value in parameters.items() if made.get(key) != value]
    if changed:
        return f"was made with {', '.join(changed)}"
    if not _holds(folder / SUMS, manifest.get("sha256", "")):
        return f"has a missing or altered {SUMS}"
    broken = [name for name, digest in _read_sums(folder).items() if not _holds(folder / name, digest)]
    return f"has {len(broken)} missing or altered file(s), such as {broken[0]}" if broken else ""


def _read_sums(folder: Path) -> dict[str, str]:
    """File name relative to the folder -> its SHA-256; empty when the list is missing."""
    path = folder / SUMS
    lines = path.read_text().splitlines() if path.is_file() else []
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _holds(path: Path, digest: str) -> bool:
    """Whether the file exists with these very bytes."""
    return path.is_file() and _hash(path) == digest


def _hash(path: Path) -> str:
    """SHA-256 of the file's bytes, in hex."""
    return sha256(path.read_bytes()).hexdigest()


def _files(folder: Path) -> set[str]:
    """Every file below the folder, relative to it, with forward slashes."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def _beside(folder: Path, purpose: str) -> Path:
    """A hidden sibling of the folder that no other process uses."""
    return folder.with_name(f".{folder.name}.{purpose}-{os.getpid()}")


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """Turn the system's refusal to write into a message that names the folder and the way out."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write {folder}: {error.strerror or error}; free space, or choose another --out"
        ) from error
