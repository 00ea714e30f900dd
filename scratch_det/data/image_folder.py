"""Classified images in ImageNet's layout, ``<root>/<class>/**/<image>``, which torchvision's ImageFolder reads too."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

from scratch_det.data.catalog import FolderEntry
from scratch_det.errors import DataError, listed
from scratch_det.log import track

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's IMG_EXTENSIONS


@dataclass(frozen=True)
class ImageFolder:
    """One data set.

    classes: the folders' names in alphabetical order; the place of a name is its label. images: path below the root
    and label, in the order of classes and paths. digest: SHA-256 of the paths; the images themselves are not read.
    """

    described_by: ClassVar[str] = "files"  # what ``digest`` is of
    entry: FolderEntry
    classes: list[str]
    images: list[tuple[str, int]]
    digest: str


def read_image_folder(entry: FolderEntry) -> ImageFolder:
    """List the images. Raises DataError without two classes or more, and for a class without an image."""
    root = entry.root
    children = sorted(child.name for child in os.scandir(root) if not child.name.startswith("."))
    classes = [name for name in children if (root / name).is_dir()]
    if len(classes) < 2:
        raise DataError(
            f"{root} has {f'one folder, {classes[0]}' if classes else 'no folders'}; expected a folder for each of two "
            f"or more classes, {root}/<class>/<image>\n  it holds: {listed(children) or 'nothing'}"
        )
    images, empty = [], []
    for label, name in enumerate(track(classes, f"listing {entry.name} (classes)", len(classes))):
        found = sorted(_images(root, name))
        images += [(path, label) for path in found]
        empty += [] if found else [name]
    if empty:
        raise DataError(
            f"{root}: {len(empty)} of {len(classes)} class folders have no image, {listed(empty)}\n"
            f"  expected files ending in {' '.join(SUFFIXES)}; delete the folders, or fill them"
        )
    digest = sha256("\n".join(path for path, _ in images).encode(errors="surrogateescape")).hexdigest()
    return ImageFolder(entry, classes, images, digest)


def class_mismatch(first: ImageFolder, other: ImageFolder) -> str | None:
    """Which classes only one of the two has, as a message; None when both have the same."""
    only = [
        f"only {one.entry.root} has {len(names)} classes, {listed(names)}"
        for one, another in ((first, other), (other, first))
        if (names := [name for name in one.classes if name not in set(another.classes)])
    ]
    return "; ".join([*only, "training and test data need the same class folders"]) if only else None


def _images(root: Path, name: str) -> Iterator[str]:
    """Paths below ``root`` of every image of class ``name``, in folders within its folder too."""
    for folder, _, files in os.walk(root / name, followlinks=True):
        within = os.path.relpath(folder, root)
        yield from (f"{within}/{file}" for file in files if file.lower().endswith(SUFFIXES))
