"""A study as one HTML page that needs no network: figures beside tables, curves, predictions, runs, environments.

It has no host names or paths of this machine, and no times but how long each run took: a study that was interrupted
and continued gives else the same page as one that was not.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup
from PIL import Image

from scratch_det.config.load import flatten
from scratch_det.errors import UserError
from scratch_det.evaluation.metrics import INK, METRICS, TTA, main_metrics
from scratch_det.reading import read_yaml
from scratch_det.study import own
from scratch_det.study.records import DIVERGED, FAILED, FINISHED, LOSS, Record
from scratch_det.study.report.results import MADE_WITH
from scratch_det.study.report.seeds import Band, bands_of, headlines, line_colors, model_of
from scratch_det.study.report.tables import DIGITS, SHOWN_IN, Table, label_of_norm, title_of
from scratch_det.study.run import EVALUATE, PRETRAIN, Run
from scratch_det.visualization.curves import thin
from scratch_det.visualization.page import Section, as_jpeg, of_svg, page_text

MAIN = {name: metric.label for name, metric in main_metrics().items() if name in METRICS}
MAIN |= {"classification/top1": "top-1 of pre-training"}
AXES = {name: METRICS[name].axis for name in MAIN} | {LOSS: "training loss"}
POINTS = 200  # of a curve
PICTURES, PICTURE_WIDTH = 6, 1000


class Folders(NamedTuple):
    """What run folders add to the records, each by the run's name: addresses, from the page, of the folders; values of
    the config as text, by key; predictions of a few runs, as data URIs."""

    links: Mapping[str, str] = {}
    configs: Mapping[str, Mapping[str, str]] = {}
    pictures: Mapping[str, str] = {}


def study_page(
    title: str, tables: Sequence[Table], records: Sequence[Record], figures: Mapping[str, str], folders: Folders
) -> str:
    """The page; ``figures``: SVG documents by name."""
    script, plot = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("curves.js", "curves.html"))
    states = Counter(one.status for one in records)
    finished = f"{states.pop(FINISHED, 0)} of {len(records)} runs are finished"
    summary = ", ".join([finished, *(f"{number} {state}" for state, number in states.items())])
    data = {"metrics": AXES, "groups": curves(records)}
    sections = [
        Section("Failed", rows=_reasons(records, FAILED), table="words"),
        *_tables(sorted(tables, key=lambda table: table.name == own.PRETRAINING), figures),
        Section(DIVERGED.capitalize(), rows=_reasons(records, DIVERGED), table="words"),
        Section("Curves", body=Markup(plot).format(htmlsafe_json_dumps(data)) if data["groups"] else ""),
        Section("Predictions", "Truth beside prediction.", pictures=[*folders.pictures.items()]),
        Section("Runs", rows=[*run_rows(records, folders.links)], table="words"),
        Section("Config keys that differ", "Of detectors. The first row has the most frequent value of each key, the "
                "others what differs from it.", rows=config_rows(records, folders.configs), table="words"),
        Section("Environment", rows=[*made_with(records)], table="words"),
    ]  # fmt: skip
    return page_text(title, [*headlines(records), f"{summary}. AP is in percent."], sections, script)


def _reasons(records: Sequence[Record], status: str) -> list[tuple[str, str]]:
    found = [(one.run.name, (one.error.strip().splitlines() or [""])[-1]) for one in records if one.status == status]
    return [("run", "error"), *found] if found else []


def _tables(tables: Sequence[Table], figures: Mapping[str, str]) -> Iterator[Section]:
    """Each table below its figures; figures without a table are with the first one."""
    homes = {place.removeprefix(DIGITS): home.removeprefix(DIGITS) for place, home in SHOWN_IN.items()}
    names = [table.name for table in tables]
    home_of = {name: next(one for one in (name, homes.get(name), *names) if one in names) for name in figures}
    for table in tables:
        pictures = [of_svg(svg) for name, svg in figures.items() if home_of[name] == table.name]
        rows = [(table.header[0] or "run", *table.header[1:]), *table.rows]
        yield Section(table.title, rows=rows, pictures=pictures, notes=table.notes, layout="grid figures")


def run_rows(records: Sequence[Record], links: Mapping[str, str]) -> Iterator[Sequence[str]]:
    """State, results and seconds of each run, which is a link where its folder is there."""
    shown = [name for name in MAIN if any(name in one.metrics for one in records)]
    seconds = {one.run.name: one.made["seconds"] for one in records if one.made.get("seconds")}
    unit, name = (3600, "h") if max(seconds.values(), default=0) > 24 * 3600 else (60, "min")
    scores = [f"{MAIN[name]} (%)" for name in shown]
    yield ("run", "status", "iterations", *scores, f"time ({name})", "row or curve", "in")
    for one in records:
        run, link = one.run, links.get(one.run.name)
        label = Markup('<a href="{}">{}</a>').format(link, run.name) if link else run.name
        iterations = f"{one.iteration:,}" + f" (a branch at {one.start:,})" * bool(one.start)
        names = [name.replace("/", f"{TTA}/") if run.kind == EVALUATE else name for name in shown]  # as in the tables
        scores = [f"{one.metrics.get(name, math.nan):.1f}".replace("nan", "-") for name in names]
        time = f"{seconds[run.name] / unit:.1f}" if run.name in seconds else "-"
        yield (label, one.status, iterations, *scores, time, run.shown, ", ".join(run.places))


def config_rows(records: Sequence[Record], configs: Mapping[str, Mapping[str, str]]) -> list[Sequence[str]]:
    """What differs between the recipes of detectors, or of classifiers where there is nothing else."""
    detectors = {one.run.name for one in records if one.run.kind != PRETRAIN}
    compared = {name: config for name, config in configs.items() if name in detectors} or configs
    values = {key: Counter(one.get(key, "") for one in compared.values()) for one in compared.values() for key in one}
    usual = {key: count.most_common(1)[0][0] for key, count in sorted(values.items()) if len(count) > 1}
    rows = [(name, *("" if config.get(key, "") == most else config.get(key) or "(empty)"
                     for key, most in usual.items())) for name, config in compared.items()]  # fmt: skip
    return [("run", *usual), ("most frequent", *usual.values()), *rows] if usual else []


def curves(records: Sequence[Record]) -> dict[str, list[dict[str, Any]]]:
    """The curves for curves.js by table or figure, each with runs that those before it do not have.

    Their points are of an iteration, the mean, and where there are several seeds the lowest and the highest of them.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    known: set[str] = set()
    begun = [one for one in records if one.curves.keys() & AXES.keys()]
    places = [(place, _part(one.run)) for one in begun for place in one.run.places if place not in SHOWN_IN]
    for place, part in dict.fromkeys(places):
        shown = [one for one in begun if place in one.run.places and _part(one.run) == part]
        if {one.run.name for one in shown} <= known:
            continue
        family_of = partial(_family, place)
        # The columns of a matrix have the same rows, and so the same colours.
        whole = [one for one in (begun if place == own.MATRIX else shown) if place in one.run.places]
        colors = line_colors(whole, family_of)
        lines: dict[str, dict[str, Any]] = {}
        for metric, band in ((name, band) for name in AXES for band in bands_of(shown, name, family_of)):
            family, k = family_of(band.run), f", {band.run.k}x" * bool(band.run.k)
            line = {"run": family + k, "family": family, "colour": colors[family].replace(INK, "currentColor")}
            lines.setdefault(family + k, line | {"curves": {}})["curves"][metric] = _points(band)
        is_one_of = len({other for where, other in places if where == place}) > 1
        groups[title_of(place) + f", {part}" * is_one_of] = list(lines.values())
        known |= {one.run.name for one in shown}
    return groups


def _part(run: Run) -> str:
    """The column of a matrix, else the model: what one plot is of."""
    return run.shown.split(", ")[1] if own.MATRIX in run.places else model_of(run.name)


def _family(place: str, run: Run) -> str:
    """All schedules of an initialisation, or whatever else a plot compares."""
    name = label_of_norm(run) if "norms" in place else run.shown
    return re.sub(r", \d+x$", "", name).removesuffix(f", {_part(run)}")


def _points(band: Band) -> list[tuple[float, ...]]:
    curves = [thin(curve, POINTS) for curve in (band.mean, band.low, band.high)[: 3 if band.seeds > 1 else 1]]
    rows = [(row[0][0], *(round(y, 4) for _, y in row)) for row in zip(*curves, strict=True)]
    return [row for row in rows if all(map(math.isfinite, row))]


def made_with(records: Sequence[Record]) -> Iterator[Sequence[str]]:
    """Each entry of the environments, such as "torch", with its values, and the runs with each value."""
    made: dict[str, dict[str, list[str]]] = {}
    known = {one.run.name: one.made["environment"] for one in records if one.made}
    for name, about in known.items():
        commit = f"{_text(about['commit'])}{' with changes' * bool(about['changed'])}" if about["commit"] else None
        packages = about["packages"] if isinstance(about["packages"], dict) else {"packages": about["packages"]}
        entries = {key: about.get(key) for key in MADE_WITH} | packages | {"git commit": commit}
        for key, value in entries.items():
            if value not in (None, []):
                made.setdefault(key, {}).setdefault(_text(value), []).append(name)
    if made:
        yield ("what", "value", "runs")
    for key, values in made.items():
        for value, names in values.items():
            rest = "the others" if names == max(values.values(), key=len) else ", ".join(names)
            yield (key, value, "all" if len(values) == 1 else rest)


def read_folders(records: Sequence[Record], out: Path, path: Path) -> Folders:
    """Of the runs in ``out``, for the page at ``path``; runs that are no branch have pictures."""
    names = [one.run.name for one in records]
    there = {name: out / name for name in names if (out / name).is_dir()}
    links = {name: quote(Path(os.path.relpath(folder, path.parent)).as_posix()) + "/" for name, folder in there.items()}
    configs = {name: _read_config(folder / "config.yaml", names) for name, folder in there.items()}
    trunks = [one.run.name for one in records if not one.start and one.run.seed is None and one.run.name in there]
    pictures = {name: picture for name in trunks if (picture := _read_picture(there[name] / "predictions.png"))}
    return Folders(links, {name: one for name, one in configs.items() if one}, dict([*pictures.items()][:PICTURES]))


def _read_config(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Every key but OUTPUT_DIR; a path into a run folder begins with the run's name. Empty without a valid file."""
    try:
        content = read_yaml(path)
    except (OSError, UserError):
        return {}
    flat = flatten(content) if isinstance(content, dict) else {}
    folders = re.compile(rf"^.*?(?<![^/])(?=({'|'.join(map(re.escape, names))})/)")
    return {key: folders.sub("", _text(value)) for key, value in flat.items() if key != "OUTPUT_DIR"}


def _read_picture(png: Path) -> str:
    """A smaller JPEG; empty for a broken file."""
    try:
        with Image.open(png) as picture:
            small = picture.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError):  # PIL reports a broken PNG as SyntaxError
        return ""
    small.thumbnail((PICTURE_WIDTH, 2 * PICTURE_WIDTH))
    return as_jpeg(small)


def _text(value: Any) -> str:
    return ", ".join(map(_text, value)) if isinstance(value, list) else str(value)
