"""What is predicted: image files, folders, patterns, videos, streams and cameras, as arrays one after the other."""

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from scratch_det.data.catalog import SUFFIXES
from scratch_det.data.image import read_image
from scratch_det.errors import DataError, UserError, did_you_mean
from scratch_det.log import logger

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
FRAMES_A_SECOND = 25.0  # of a camera that does not say it
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # AV_LOG_QUIET: what cannot be read is named by us
cv2.utils.logging.setLogLevel(0)


@dataclass(frozen=True)
class Video:
    """A video file, a stream's address or a camera's number. frames: None where they do not end. rate: a second."""

    source: str
    frames: int | None
    rate: float

    @classmethod
    def open(cls, source: str) -> "Video":
        """Raises DataError for a file or stream that is no video, and for a camera that is not there."""
        video = _opened(source)
        count = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        return cls(source, count if count > 0 else None, video.get(cv2.CAP_PROP_FPS) or FRAMES_A_SECOND)

    def __iter__(self) -> Iterator[np.ndarray]:
        """The frames, uint8 [H, W, 3], RGB."""
        video = _opened(self.source)
        while (read := video.read())[0]:
            yield np.ascontiguousarray(read[1][..., ::-1])


def _opened(source: str) -> cv2.VideoCapture:
    """OpenCV's reader of a file or a camera, which closes when nothing refers to it. Raises DataError as ``open``."""
    video = cv2.VideoCapture(int(source) if source.isdecimal() else source)
    if not video.isOpened():
        what = f"camera {source} is not there" if source.isdecimal() else f"{source}: no video that can be decoded"
        raise DataError(f"{what}; give another one, or images")
    return video


def find_sources(words: Sequence[str], faults: list[str]) -> tuple[list[Path], list[Video]]:
    """The images and videos that ``words`` name: files, folders' files, patterns (**/*.jpg), streams, cameras (0).

    Each is there once; the messages of video files that cannot be read go to ``faults``. Raises UserError for a word
    that names none, DataError for cameras and streams as ``Video.open`` does.
    """
    images, videos = [], []
    for word in words:
        path = Path(word)
        if "://" in word or (word.isdecimal() and not path.exists()):
            if path.suffix.lower() in SUFFIXES:
                raise UserError(f"{word}: images are read from files; fetch it, and give the file")
            videos.append(Video.open(word))
            continue
        if path.is_dir():
            found = sorted(path.iterdir())
            if below := sum(one.suffix.lower() in SUFFIXES for one in path.glob("*/**/*")):
                logger.warning(
                    f"{path}: {below} images in its subfolders are left out; to take them: '{path}/**/*.jpg'"
                )
        else:
            found = [path] if path.exists() else [Path(one) for one in sorted(glob.glob(word, recursive=True))]
        of_images = [one for one in found if one.suffix.lower() in SUFFIXES]
        of_videos = [one for one in found if one.suffix.lower() in VIDEO_SUFFIXES]
        if not of_images and not of_videos:
            raise UserError(_none(path, found))
        images += of_images
        for one in of_videos:
            try:
                videos.append(Video.open(str(one)))
            except DataError as problem:
                faults.append(str(problem))
    return list(dict.fromkeys(images)), list(dict.fromkeys(videos))


def _none(path: Path, found: Sequence[Path]) -> str:
    """Why a path or pattern names no image."""
    expected = f"expected images ({' '.join(SUFFIXES)}) or videos ({' '.join(VIDEO_SUFFIXES)})"
    if path.is_dir():
        return (
            f"{path} is a folder without images: {len(found)} other files; {expected}, or a pattern: '{path}/**/*.jpg'"
        )
    if found:
        where = f"{path}: {len(found)} files, such as " if found != [path] else ""
        return f"{where}{found[0]} is neither an image nor a video; {expected}"
    beside = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
    return f"there is no {path}{did_you_mean(path.name, beside)}; {expected}, a folder, a pattern or a camera's number"


def readable(paths: Iterable[Path], faults: list[str]) -> Iterator[tuple[Path, np.ndarray]]:
    """Each image, uint8 [H, W, 3] in RGB, that can be read; the messages of the others go to ``faults``."""
    for path in paths:
        try:
            yield path, read_image(path)
        except DataError as problem:
            faults.append(str(problem))
