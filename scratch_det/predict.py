"""Predicting images and videos with a trained detector: pictures, videos and COCO's results in a folder."""

import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import msgspec
import numpy as np

from scratch_det.detector import Detector, Found
from scratch_det.errors import DataError, UserError, listed
from scratch_det.files import write_atomically
from scratch_det.log import track
from scratch_det.reading import read_json
from scratch_det.sources import Video, find_sources, readable

RESULTS = "results.json"
QUALITY = 92  # of a JPEG, where text and thin lines stay clear


class Named(msgspec.Struct):
    """An image or a category of a COCO json."""

    id: int | str
    file_name: str = ""
    name: str = ""


class Like(msgspec.Struct):
    """What is read of a COCO json whose ids the results shall have."""

    images: list[Named]
    categories: list[Named]


class Settings(NamedTuple):
    """How to predict: see ``Detector.predict_each``. like: a COCO json, for the ids of images and categories."""

    score: float
    batch_size: int = 1
    augment: bool = False
    like: Path | None = None


def predict_sources(model: Detector, words: Sequence[str], out: Path, settings: Settings) -> list[str]:
    """Predict everything that ``words`` name, see ``find_sources``, into ``out``; returns what could not be read.

    Images become pictures of their own names, videos .mp4, and the objects of all images ``results.json``. Raises
    UserError, before anything is written, for words that name nothing and settings that do not fit.
    """
    model.check_options(settings.score, settings.batch_size, settings.augment)
    unreadable, faults = list[str](), list[str]()  # videos, images
    images, videos = find_sources(words, unreadable)
    if out.resolve() in {path.resolve().parent for path in (*images, *(Path(video.source) for video in videos))}:
        raise UserError(f"--out {out} is a folder of what is predicted, whose files would be replaced; name another")
    ids: Mapping[Path, int | str] = own_names(images)
    category_ids: Sequence[int | str] = range(1, len(model.classes) + 1)
    if settings.like:
        ids, category_ids = read_ids(settings.like, model.classes, images)
    pictures = own_names(images, ".jpg")
    films = own_names([Path(video.source) for video in videos], ".mp4")
    out.mkdir(parents=True, exist_ok=True)
    rows = list[dict[str, Any]]()
    begun = time.perf_counter()
    for path, found in predict_files(model, images, settings, faults):
        found.draw(settings.score).save(out / pictures[path], quality=QUALITY)
        rows += found.to_coco(ids[path], category_ids)
    if images:
        write_atomically(out / RESULTS, msgspec.json.encode(rows))
        read, seconds = len(images) - len(faults), time.perf_counter() - begun
        rate = f"{read / seconds:.1f} images a second, drawing included"
        print(
            f"{read} of {len(images)} images, {len(rows)} objects with a score from {settings.score:g}, {rate}: {out}"
        )
    for video in videos:
        try:
            print(predict_video(model, video, out / films[Path(video.source)], settings))
        except DataError as problem:
            unreadable.append(str(problem))
    return faults + unreadable


def own_names(paths: Sequence[Path], suffix: str = "") -> dict[Path, str]:
    """Their names, or the whole paths of those that share a name; with ``suffix`` as files of one folder."""
    shared = Counter(path.name for path in paths)
    names = {path: path.name if shared[path.name] == 1 else str(path) for path in paths}
    if not suffix:
        return names
    flat = {path: re.sub(r"^\.", "_", name.replace("../", "up_")).replace("/", "_") for path, name in names.items()}
    return {path: name.removesuffix(suffix) + suffix for path, name in flat.items()}


def predict_files(
    model: Detector, images: Sequence[Path], settings: Settings, faults: list[str]
) -> Iterator[tuple[Path, Found]]:
    """Each image that can be read, with what is found in it; the messages of the others go to ``faults``."""
    paths: list[Path] = []  # read, and not yet predicted

    def arrays() -> Iterator[np.ndarray]:
        for path, image in readable(track(images, "predicting", len(images)), faults):
            paths.append(path)
            yield image

    for found in model.predict_each(arrays(), settings.score, settings.batch_size, settings.augment):
        yield paths.pop(0), found


def predict_video(model: Detector, video: Video, path: Path, settings: Settings) -> str:
    """Write a video with the objects drawn into it; returns a line about it. Ctrl-C ends a camera's."""
    writer, begun, count = None, time.perf_counter(), 0
    frames = track(video, f"predicting {video.source}", video.frames) if video.frames else video
    try:
        for found in model.predict_each(frames, settings.score, settings.batch_size, settings.augment):
            frame = np.asarray(found.draw(settings.score))
            if writer is None:
                size = frame.shape[1::-1]
                writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), video.rate, size)
            writer.write(np.ascontiguousarray(frame[..., ::-1]))
            count += 1
    except KeyboardInterrupt:
        if video.frames:
            raise
    finally:
        if writer is not None:
            writer.release()
    if not count:
        raise DataError(f"{video.source}: no frame can be decoded; give another video, or images")
    return f"{count} frames, {count / (time.perf_counter() - begun):.1f} a second, drawing included: {path}"


def read_ids(
    like: Path, classes: Sequence[str], images: Sequence[Path]
) -> tuple[dict[Path, int | str], list[int | str]]:
    """From a COCO json: the ids of images, and of the categories in the order of classes.

    An image is the one of the json with which its path has most in common from the end on, at least the name. Raises
    UserError for images that the json does not have, or has more than once, and for classes that it does not have.
    """
    if not like.is_file():
        raise UserError(f"--like {like} is missing; give a COCO json that is there")
    content: Any = read_json(like, Like | list, "give another COCO json")
    if isinstance(content, list):
        raise UserError(
            f"--like {like} is a list, as results are; give the data's json, with its images and categories"
        )
    endings: dict[str, list[int | str]] = {}
    for image in content["images"]:
        for ending in _endings(Path(image["file_name"])):
            endings.setdefault(ending, []).append(image["id"])
    ids = {path: next((endings[one] for one in _endings(path) if one in endings), []) for path in images}
    categories = {category["name"]: category["id"] for category in content["categories"]}
    images_lacking = [path.name for path, found in ids.items() if not found]
    classes_lacking = [name for name in classes if name not in categories]
    for what, lacking in (("file_name", images_lacking), ("category with the name", classes_lacking)):
        if lacking:
            raise UserError(f"--like {like} has no {what} {listed(lacking)}; give a json of all images and classes")
    times = Counter(one for found in ids.values() for one in found)
    if shared := [path for path, found in ids.items() if len(found) > 1 or times[found[0]] > 1]:
        raise UserError(f"which image of --like {like} is {shared[0]}? others have its name; give paths as in the json")
    return {path: found for path, [found] in ids.items()}, [categories[name] for name in classes]


def _endings(path: Path) -> list[str]:
    """``a/b/c``, ``b/c`` and ``c``."""
    return ["/".join(path.parts[start:]) for start in range(len(path.parts))]
