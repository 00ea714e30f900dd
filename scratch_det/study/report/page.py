"""A study as one HTML page that needs no network: tables, curves, figures, predictions, configs, environments.

It has no times, host names or paths of this machine: a study that was interrupted and continued gives the same page as
one that was not.
"""

import base64
import hashlib
import io
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from scratch_det.config.load import flatten
from scratch_det.engine.run_dir import Facts
from scratch_det.errors import UserError
from scratch_det.evaluation.metrics import COLORS, main_metrics
from scratch_det.evaluation.metrics import METRICS as PLAIN
from scratch_det.files import write_atomically
from scratch_det.reading import read_json, read_yaml
from scratch_det.study.records import FIX, LOSS, Record
from scratch_det.study.report.figures import INITS, own_part
from scratch_det.study.report.tables import BOX, Table
from scratch_det.study.run import PRETRAIN
from scratch_det.visualization.curves import STYLE_SHEET, thin

METRICS = {name: metric.label for name, metric in main_metrics().items() if name in PLAIN}
METRICS |= {"classification/top1": "top-1 of pre-training", LOSS: "training loss"}
MADE_WITH = ("backend", "library", "python", "platform", "threads", "processes", "accumulate", "gpus")
POINTS = 200  # of a curve
PICTURES, PICTURE_WIDTH, PICTURE_BYTES = 6, 1000, 150_000


@dataclass(frozen=True)
class RunPage:
    """What a run's folder adds to its record.

    Attributes:
        link: address of the folder, from the page.
        config: values by key, as text.
        environment: backend, versions and so on by name.
        picture: its predictions as a JPEG's data URI; empty where they are not shown.
    """

    name: str
    link: str
    config: Mapping[str, str]
    environment: Mapping[str, str]
    picture: str


def write_page(
    path: Path, title: str, tables: list[Table], records: Sequence[Record], figures: dict[str, str], runs: list[RunPage]
) -> Path:
    """Write the page atomically.

    ``figures``: SVG documents by name; ``runs`` is empty when the run folders are gone.
    """
    here = Path(__file__).parent
    style, script = (path.read_text(encoding="utf-8") for path in (STYLE_SHEET, here / "page.js"))
    classifiers = {one.run.name for one in records if one.run.kind == PRETRAIN}
    compared = [run for run in runs if run.name not in classifiers] or runs
    compared = [run for run in compared if run.config]
    keys = sorted({key for run in compared for key in run.config})
    values = {key: Counter(run.config.get(key, "") for run in compared) for key in keys}
    environment = Environment(loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined)
    text = environment.get_template("page.html").render(
        title=title,
        states=Counter(one.state for one in records),
        tables=tables,
        runs={run.name: run for run in runs},
        records=records,
        figures={name: _data_uri(svg.encode(), "svg+xml") for name, svg in figures.items()},
        compared=compared,
        usual={key: count.most_common(1)[0][0] for key, count in values.items() if len(count) > 1},
        made_with=made_with(runs),
        data={"metrics": METRICS, "runs": curves(records)},
        style=Markup(style),
        script=Markup(script),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    write_atomically(path, text)
    return path


def curves(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The curves for page.js, of a branch the part after its trunk; a family is all schedules and seeds of a model."""
    family = {one.run.name: re.sub(r", \d+x$", "", one.run.shown) for one in records}
    groups: dict[str, dict[str, str]] = {}  # by place: the initialisation of each family
    for one in records:
        groups.setdefault(one.run.places[0], {})[family[one.run.name]] = one.run.init
    drawn = {metric: {one.run.name for one in records if metric in one.curves} for metric in METRICS}
    first, found = next((one.run.places[0] for one in records if BOX in one.curves), ""), []
    for one in records:
        run, group, name = one.run, one.run.places[0], family[one.run.name]
        parts = {metric: own_part(one, metric, names) for metric, names in drawn.items() if metric in one.curves}
        # the colours of the figures where the group compares one family of each initialisation
        is_pair = len({*groups[group].values()}) == len(groups[group])
        number = [*groups[group]].index(name) % len(COLORS)
        found.append({
            "run": run.name,
            "group": group,
            "family": name,
            "colour": INITS[run.init][1] if is_pair else COLORS[number],
            "label": (f"{run.k}x" if run.k else "run") + (f" seed {run.seed}" if run.seed else ""),
            "on": BOX not in parts or (run.seed is None and group == first),
            "curves": {metric: [(at, round(y, 4)) for at, y in thin(part, POINTS) if math.isfinite(y)]
                       for metric, part in parts.items()},
        })  # fmt: skip
    return [curve for curve in found if curve["curves"]]


def made_with(runs: Sequence[RunPage]) -> dict[str, dict[str, list[str]]]:
    """By entry of the environments, such as "torch": its values, and the runs with each value."""
    known = [run for run in runs if run.environment]
    made: dict[str, dict[str, list[str]]] = {key: {} for run in known for key in run.environment}
    for key, values in made.items():
        for run in known:
            values.setdefault(run.environment.get(key, "-"), []).append(run.name)
    return made


def read_runs(records: Sequence[Record], out: Path, path: Path) -> list[RunPage]:
    """The runs with a folder in ``out``, linked from the page at ``path``; a few that are no branch have a picture.

    Raises DataError for a damaged environment.json.
    """
    there = [one for one in records if (out / one.run.name).is_dir()]
    pictures = [one.run.name for one in there if not one.start and one.run.seed is None]
    pictures = [name for name in pictures if (out / name / "predictions.png").exists()]
    few = {pictures[round(i * (len(pictures) - 1) / (PICTURES - 1))] for i in range(PICTURES)} if pictures else set()
    names = [one.run.name for one in records]
    return [
        RunPage(
            name=name,
            link=quote(Path(os.path.relpath(out / name, path.parent)).as_posix()) + "/",
            config=_read_config(out / name / "config.yaml", names),
            environment=_read_environment(out / name / "environment.json"),
            picture=_read_picture(out / name / "predictions.png") if name in few else "",
        )
        for name in (one.run.name for one in there)
    ]


def _read_config(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Every key but OUTPUT_DIR; a path into a run folder begins with the run's name. Empty without a valid file."""
    try:
        content = read_yaml(path)
    except (OSError, UserError):
        return {}
    flat = flatten(content) if isinstance(content, dict) else {}
    folders = re.compile(rf"^.*?(?<![^/])(?=({'|'.join(map(re.escape, names))})/)")
    return {key: folders.sub("", _text(value)) for key, value in flat.items() if key != "OUTPUT_DIR"}


def _read_environment(path: Path) -> dict[str, str]:
    """What may change numbers; without paths, and without the time and machine of the start."""
    content = load_environment(path)
    git = content["git"]
    found = {key: content.get(key) for key in MADE_WITH} | content["packages"]
    if git:
        is_changed = git.get("changes") or git.get("diff")  # the latter of older versions' runs
        found["git commit"] = f"{git.get('commit', 'unknown')[:12]}{' with changes' if is_changed else ''}"
    return {key: _text(value) for key, value in found.items() if value not in (None, [])}


def load_environment(path: Path) -> dict[str, Any]:
    """An environment.json; what is missing is empty. Raises DataError when a section is damaged."""
    content = read_json(path, Facts, FIX)
    content |= {key: content.get(key) or {} for key in ("git", "packages", "datasets")}
    return content


def _read_picture(png: Path) -> str:
    """A smaller JPEG; empty for a broken file."""
    try:
        with Image.open(png) as picture:
            small = picture.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError):  # PIL reports a broken PNG as SyntaxError
        return ""
    small.thumbnail((PICTURE_WIDTH, 2 * PICTURE_WIDTH))
    for quality in (80, 60, 40, 20):
        jpeg = io.BytesIO()
        small.save(jpeg, "JPEG", quality=quality, optimize=True)
        if jpeg.tell() <= PICTURE_BYTES:
            break
    return _data_uri(jpeg.getvalue(), "jpeg")


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _text(value: Any) -> str:
    return ", ".join(map(_text, value)) if isinstance(value, list) else str(value)
