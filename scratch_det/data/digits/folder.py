"""Generated folders that are whole or absent: built in a temporary sibling, renamed into place, replaced only if ours.

manifest.json says what a folder was made from and holds one digest of all generated files. Other files may lie between
them (but no jpg, which a training might pick up); --force replaces the whole folder, them included.
"""

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from scratch_det.errors import DataError

GENERATOR = "scratch_det digits"
MANIFEST = "manifest.json"
GENERATED = ("annotations/instances_train.json", "annotations/instances_val.json", "preview.png", "**/*.jpg")


def needs_building(folder: Path, parameters: dict[str, Any], force: bool) -> bool:
    """Whether to build ``folder``; refuses to touch one that is not ours, or, without ``force``, that differs."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return True
    manifest = _own_manifest(folder)
    if force:
        return True
    made, remedy = manifest.get("parameters") or {}, "--force replaces the whole folder, another --out keeps both"
    changed = [f"{key} {made.get(key)}, not {value}" for key, value in parameters.items() if made.get(key) != value]
    if changed:
        raise DataError(f"{folder} was made with {', '.join(changed)}; {remedy}")
    if manifest.get("sha256") != digest(folder):
        raise DataError(f"{folder} has missing, altered or added files; {remedy}")
    return False


def build(folder: Path, parameters: dict[str, Any], write: Callable[[Path, dict[str, Any]], dict[str, Any]]) -> None:
    """Let ``write`` fill a temporary sibling and return its contents in numbers, then put it in ``folder``'s place."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True) as temporary:
            new = Path(temporary, "new")
            new.mkdir()
            manifest = {"generator": GENERATOR, "parameters": parameters, "contents": write(new, parameters)}
            text = json.dumps(manifest | {"sha256": digest(new)}, indent=2, sort_keys=True)
            (new / MANIFEST).write_text(text + "\n")
            if folder.exists():
                folder.rename(Path(temporary, "old"))
            new.rename(folder)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"cannot write {folder}: {reason}; free space, or choose another --out") from error


def digest(folder: Path) -> str:
    """SHA-256 of the lines that ``sha256sum`` prints for all generated files in the order of their names."""
    paths = {path.relative_to(folder).as_posix(): path for pattern in GENERATED for path in folder.glob(pattern)}
    lines = [f"{sha256(paths[name].read_bytes()).hexdigest()}  {name}\n" for name in sorted(paths)]
    return sha256("".join(lines).encode()).hexdigest()


def _own_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that this module made; any other folder is an error."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["generator"] == GENERATOR:
            return manifest
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise DataError(f"{folder} exists but is no digits data set (no {MANIFEST} of ours): choose another --out")
