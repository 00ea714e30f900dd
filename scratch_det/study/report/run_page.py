"""What the page of a study takes from run folders: configurations, environments, pictures; nothing of this machine."""

import base64
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from PIL import Image

from scratch_det.config import flatten
from scratch_det.errors import DataError
from scratch_det.study.records import FIX, Record, read_json

PICTURES, PICTURE_WIDTH, PICTURE_BYTES = 6, 1000, 150_000
MADE_WITH = ("backend", "library", "python", "platform", "threads", "processes", "accumulate", "gpus")


@dataclass(frozen=True)
class RunPage:
    """What a run's folder adds to its outcome.

    Attributes:
        link: address of the folder, from the page.
        config: values by key, as text; no path of this machine.
        environment: what it was made with, by name.
        picture: its predictions as a JPEG's data URI; empty where they are not shown.
    """

    name: str
    link: str
    config: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    picture: str = ""


def read_runs(outcomes: Sequence[Record], out: Path, path: Path) -> list[RunPage]:
    """Of those that have a folder in ``out``, for the page at ``path``; a few have a picture."""
    names = [one.run.name for one in outcomes if (out / one.run.name).is_dir()]
    own = [one.run.name for one in outcomes if one.run.name in names and not one.start and one.run.seed is None]
    pictured = [name for name in own if (out / name / "predictions.png").exists()]
    few = {pictured[round(i * (len(pictured) - 1) / (PICTURES - 1))] for i in range(PICTURES)} if pictured else set()
    return [
        RunPage(
            name=name,
            link=quote(Path(os.path.relpath(out / name, path.parent)).as_posix()) + "/",
            config=read_config(out / name / "config.yaml", [one.run.name for one in outcomes]),
            environment=read_environment(out / name / "environment.json"),
            picture=encode(out / name / "predictions.png") if name in few else "",
        )
        for name in names
    ]


def read_config(path: Path, names: Iterable[str]) -> dict[str, str]:
    """Every key but OUTPUT_DIR. A path into a run's folder is told from that folder on."""
    try:
        content = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, yaml.YAMLError):
        return {}
    flat = flatten(content) if isinstance(content, dict) else {}
    flat.pop("OUTPUT_DIR", None)
    folders = re.compile(rf"^.*?(?<![^/])(?=({'|'.join(map(re.escape, names))})/)")
    return {key: folders.sub("", _text(value)) for key, value in flat.items()}


def read_environment(path: Path) -> dict[str, str]:
    """What may shape numbers, and neither paths nor when and where it was started."""
    content = load_environment(path)
    git = content["git"]
    changed = " with changes" if git.get("diff") else ""
    found = {key: content.get(key) for key in MADE_WITH} | content["packages"]
    found["git commit"] = git.get("commit") and f"{git['commit'][:12]}{changed}"
    return {key: _text(value) for key, value in found.items() if value not in (None, [])}


def load_environment(path: Path) -> dict[str, Any]:
    """An environment.json; what is missing is empty. Raises DataError for an object that is none."""
    content = read_json(path)
    for key in ("git", "packages", "datasets"):
        content[key] = content.get(key) or {}
        if not isinstance(content[key], dict):
            raise DataError(f"{path} has {key} {content[key]!r}, expected an object; {FIX}")
    if content["git"] and not isinstance(content["git"].get("commit"), str):
        raise DataError(f"{path} has git without a commit; {FIX}")
    return content


def encode(png: Path) -> str:
    """A smaller JPEG; empty for a file that is no picture."""
    try:
        with Image.open(png) as picture:
            small = picture.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError):  # PIL finds a broken PNG a matter of syntax
        return ""
    small.thumbnail((PICTURE_WIDTH, 2 * PICTURE_WIDTH))
    for quality in (80, 60, 40, 20):
        jpeg = io.BytesIO()
        small.save(jpeg, "JPEG", quality=quality, optimize=True)
        if jpeg.tell() <= PICTURE_BYTES:
            break
    return data_uri(jpeg.getvalue(), "jpeg")


def data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _text(value: Any) -> str:
    return ", ".join(map(_text, value)) if isinstance(value, list) else str(value)
