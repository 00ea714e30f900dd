"""Decoding of image files and masks, and a scan that reads every image of a data set. Needs no torch."""

import json
import os
import signal
import struct
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hotcoco import mask as mask_api
from PIL import ExifTags, Image

from scratch_det.data.checks import MEND, Problem, notice
from scratch_det.data.coco import CocoDataset
from scratch_det.distributed.launch import usable_cores
from scratch_det.errors import DataError
from scratch_det.files import cache_folder, write_atomically
from scratch_det.log import track
from scratch_det.reading import regular

# What Pillow raises when it opens a file or reads its tags:
UNREADABLE = OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError
TURNS = {  # EXIF orientation -> how the stored image becomes upright: mirrored in x, then in y, then x and y swapped
    1: (False, False, False), 2: (True, False, False), 3: (True, True, False), 4: (False, True, False),
    5: (False, False, True), 6: (False, True, True), 7: (True, True, True), 8: (True, False, True),
}  # fmt: skip
MOVES = (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE)  # those of TURNS
FORMATS_OF_16_BIT = ("PNG", "PPM")  # whose grey images Pillow may open as 32 bits, in mode I
LOOKED_AT, MOST_OF_12_BITS = 8, 4095  # images; a value
CHUNK = 32  # images that a process takes at a time
State = list[int]  # size of a file in bytes, time of its last change in ns; width and height in the json, pixels


def read_image(path: Path, width: int | None = None, height: int | None = None, order: str = "RGB") -> np.ndarray:
    """Decode one image to uint8 [H, W, 3] with channels in ``order``, RGB or BGR, rotated as its EXIF tag says.

    Of 16 bits the upper 8 are kept, of grey images as Pillow does it of coloured ones. Raises DataError when the file
    is missing, truncated or no image, when its values have no range (floats, 32 bits) or use less than 1 % of 16 bits,
    or when its size is not ``width`` x ``height`` (if these are given).
    """
    try:
        with Image.open(regular(path)) as opened:
            stored, upright = opened.size, upright_rgb(opened, str(path))
            data = bytearray(upright.tobytes("raw", order))  # writable
            image = np.frombuffer(data, np.uint8).reshape(upright.height, upright.width, 3)
    except FileNotFoundError:
        raise DataError(f"{path}: image file is missing") from None
    except (DataError, MemoryError):
        raise
    except Exception as error:  # a damaged file can make a decoder fail in any way
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: cannot be decoded ({reason}); fetch the file again or leave the image out") from None
    if (width or height) and image.shape[:2] != (height, width):
        fix = "correct width and height in the json, or replace the file"
        if stored == (width, height):
            fix = "stored like that, its EXIF tag turns it: on which were the boxes drawn? " + MEND.format(
                "NAME --exif turned (or stored)"
            )
        found = f"{image.shape[1]} x {image.shape[0]}"
        raise DataError(f"{path}: image is {found} px, the json says {width} x {height}; {fix}")
    return image


def _has_16_bits(opened: Image.Image) -> bool:
    return opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format in FORMATS_OF_16_BIT)


def turn_of(opened: Image.Image) -> tuple[bool, bool, bool]:
    """The entry of TURNS for its EXIF tag; of a TIFF, which Pillow opens in its upright size, none."""
    if opened.format == "TIFF":
        opened.load()  # takes the tag away
    return TURNS.get(opened.getexif().get(ExifTags.Base.Orientation, 1), TURNS[1])


def upright_rgb(opened: Image.Image, name: str) -> Image.Image:
    """Turned as its EXIF tag says, in RGB of 8 bits. Raises DataError, about ``name``, as ``read_image`` does."""
    if _has_16_bits(opened):
        values = np.asarray(opened)
        if 0 < values.max() < 256:
            raise DataError(f"{name}: 16 bits a pixel, but none above 255 of 65535, so all is black; save it with 8")
        image = Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    elif opened.mode in ("I", "F"):
        what = f"floats or 32 bits a pixel (mode {opened.mode}): which values are black and white is not known"
        raise DataError(f"{name}: {what}; save it with 8 or 16 bits")
    else:
        opened.load()
        image = opened if opened.mode == "RGB" else opened.convert("RGB")
    for is_needed, move in zip(turn_of(opened), MOVES, strict=True):  # exif_transpose fails where any tag is odd
        image = image.transpose(move) if is_needed else image
    return image


def find_dark_images(data: CocoDataset) -> list[Problem]:
    """A notice where the first images have 16 bits a pixel and are read nearly black, as their values fill 12 or fewer.

    One such image may be dark: there is no notice where another one is brighter, or of 8 bits.
    """
    dark = notice("of the first images have 16 bits a pixel, none above 4095 of 65535: they are read nearly black",
                  "if they are of 12 bits, multiply them by 16, or save them with 8", "{id} ({file_name})")  # fmt: skip
    for image in data.images[:LOOKED_AT]:
        path = data.entry.image_root / image["file_name"]
        with suppress(Exception), Image.open(regular(path)) as opened:  # a scan tells what is wrong with it
            if not _has_16_bits(opened) or np.asarray(opened).max() > MOST_OF_12_BITS:
                return []
            dark.add(image)
    return [dark] if dark.count else []


def decode_masks(segmentations: list[Any], height: int, width: int) -> np.ndarray:
    """Rasterise COCO's three kinds of masks (polygons, uncompressed and compressed RLE) to uint8 [N, H, W], 0 and 1."""
    if not segmentations:
        return np.zeros((0, height, width), dtype=np.uint8)
    rles = [mask_api.merge(mask_api.frPyObjects(mask, height, width)) if isinstance(mask, list) else mask
            for mask in segmentations]  # an object's polygons are one mask  # fmt: skip
    return np.ascontiguousarray(mask_api.decode(rles).transpose(2, 0, 1))


def encode_masks(masks: np.ndarray) -> list[dict[str, Any]]:
    """Compress uint8 [N, H, W] masks to COCO RLE with text counts (json-ready)."""
    rles = mask_api.encode(np.asfortranarray(masks.transpose(1, 2, 0)))
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode()} for rle in rles]


class Scan(NamedTuple):
    """How many images were read, how many an earlier scan knows to be sound, and what is wrong with each faulty one."""

    read: int
    known: int
    faults: list[str]


def scan_images(data: CocoDataset) -> Scan:
    """Read every image file: it exists, can be decoded to its end, and has the json's width and height when upright.

    A file in ``cache_folder()`` for each image folder lists the sound images by name, size and time of change, so that
    the next scan reads only new or changed ones. If it cannot be written, the next scan reads all images again.
    """
    root = data.entry.image_root
    known: dict[str, State] = {}
    cache = cache_folder() / f"images-{sha256(os.path.realpath(root).encode()).hexdigest()[:16]}.json"
    with suppress(OSError, ValueError):
        content = json.loads(cache.read_text())
        known = content if isinstance(content, dict) else {}
    states = [_state(root, image) for image in data.images]  # before reading, so that a change meanwhile is noticed
    pairs = zip(data.images, states, strict=True)
    todo = [(image, state) for image, state in pairs if state is None or known.get(image["file_name"]) != state]
    jobs = [(root / image["file_name"], image["width"], image["height"]) for image, _ in todo]
    faults: list[str] = []
    ignore_interrupts = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; only this one handles it
    with ProcessPoolExecutor(usable_cores(), initializer=signal.signal, initargs=ignore_interrupts) as pool:
        try:
            results = track(pool.map(_fault_of, jobs, chunksize=CHUNK), f"images of {data.entry.name}", len(jobs))
            for (image, state), fault in zip(todo, results, strict=True):
                if fault:
                    faults.append(f"id {image['id']}, {fault}")
                elif state:
                    known[image["file_name"]] = state
        finally:  # an interrupted scan remembers what it has read
            pool.shutdown(cancel_futures=True)
            with suppress(OSError):
                cache.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(cache, json.dumps(known))
    return Scan(len(todo), len(states) - len(todo), faults)


def _state(root: Path, image: dict[str, Any]) -> State | None:
    with suppress(OSError):
        found = os.stat(root / image["file_name"])
        return [found.st_size, found.st_mtime_ns, image["width"], image["height"]]
    return None


def _fault_of(job: tuple[Path, int, int]) -> str | None:
    """What is wrong with the image file of (path, width, height), in words; None for a sound one."""
    try:
        read_image(*job)
    except DataError as problem:
        return str(problem)
    return None
