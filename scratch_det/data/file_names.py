"""Names of image files that a json spells in another way than the disk does, or that lead elsewhere. Needs no torch."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from unicodedata import normalize
from urllib.parse import unquote


def other_spellings(root: Path, names: Iterable[str]) -> dict[str, str]:
    """Of the names without a file: each with the path below ``root`` of the only file that it can stand for.

    The two may differ in slashes, %20, Unicode form, case and spaces at the ends, and one may have more folders in
    front. Names that fit several files are left out, and files that fit several names or have their own exactly.
    """
    names = set(names)
    exact = {
        name for name in names if not is_outside(root, name) and os.path.isfile(root / name)
    }  # False for one that is too long
    wanted = {name: _parts(name) for name in names - exact}
    depth = max(map(len, wanted.values()), default=0) + 1  # no deeper: links may lead round in a circle
    on_disk = defaultdict(list)
    for file in chain.from_iterable(root.glob("/".join("*" * count)) for count in range(1, depth + 1)):
        if (path := str(file.relative_to(root))) not in exact and file.is_file():
            on_disk[_parts(path)[-1:]].append(path)
    found = {}
    for name, parts in wanted.items():
        others = [(_parts(path), path) for path in on_disk[parts[-1:]]]
        fitting = [(abs(len(parts) - len(other)), path) for other, path in others
                   if parts[-len(other) :] == other[-len(parts) :]]  # fmt: skip
        nearest, path = min(fitting, default=(0, ""))
        if [distance for distance, _ in fitting].count(nearest) == 1:
            found[name] = path
    claims = Counter(found.values())
    return {name: path for name, path in found.items() if claims[path] == 1}


def is_outside(root: Path, name: str) -> bool:
    """Whether a name, absolute or with "..", leads out of ``root``. Links are not followed."""
    if not name.startswith("/") and ".." not in name:  # nearly all, quickly
        return False
    return not Path(os.path.abspath(root / name)).is_relative_to(os.path.abspath(root))


def _parts(name: str) -> tuple[str, ...]:
    """Folders and file, the same for all spellings of a name."""
    plain = normalize("NFC", unquote(name.strip()).replace("\\", "/")).casefold()
    return tuple(part for part in plain.split("/") if part not in ("", "."))
