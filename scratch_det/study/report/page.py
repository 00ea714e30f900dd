"""A study as one HTML page that needs no network: tables, curves, figures, predictions, what the runs were made with.

It says nothing of clocks, machines' names or starts, so the page of a study that was interrupted and continued is that
of one that was not.
"""

import base64
import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from scratch_det.evaluation.metrics import COLORS, TTA, main_metrics
from scratch_det.files import write_atomically
from scratch_det.study.records import FAILED, LOSS, Record
from scratch_det.study.report.formats import Table
from scratch_det.study.report.panels import INITS, own_part, thin
from scratch_det.study.report.run_page import RunPage, data_uri
from scratch_det.study.run import PRETRAIN

METRICS = {name: metric.label for name, metric in main_metrics().items() if TTA not in name}
METRICS |= {"classification/top1": "top-1 of pre-training", LOSS: "training loss"}
POINTS = 200  # of a curve


def write_page(
    path: Path,
    title: str,
    tables: Sequence[Table],
    outcomes: Sequence[Record],
    figures: Mapping[str, str],
    runs: Sequence[RunPage],
) -> Path:
    """Write the page, whole or not at all.

    ``figures``: SVG documents by name; ``runs`` may be empty where there are no folders any more.
    """
    here = Path(__file__).parent
    classifiers = {one.run.name for one in outcomes if one.run.kind == PRETRAIN}
    environment = Environment(loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined)
    script = (here / "page.js").read_text(encoding="utf-8")
    text = environment.get_template("page.html").render(
        title=title,
        states=Counter(one.state for one in outcomes),
        total=len(outcomes),
        compares={one.run.init for one in outcomes} == set(INITS),
        tables=tables,
        runs={run.name: run for run in runs},
        outcomes=outcomes,
        failed=[(one.run.name, last_line(one.error)) for one in outcomes if one.state == FAILED],
        figures={name: data_uri(svg.encode(), "svg+xml") for name, svg in figures.items()},
        differences=differences([run for run in runs if run.name not in classifiers] or runs),
        made_with=made_with(runs),
        data={"metrics": METRICS, "runs": curves(outcomes)},
        metrics=METRICS,
        style=Markup((here / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
    return path


def curves(outcomes: Sequence[Record]) -> list[dict[str, Any]]:
    """What page.js draws: a branch from its trunk on, a family for all schedules and seeds of a model."""
    colours = _colours(outcomes)
    have = {metric: {one.run.name for one in outcomes if metric in one.curves} for metric in METRICS}
    first = next((one.run.places[0] for one in outcomes if "bbox/AP" in one.curves), "")
    return [
        {
            "run": one.run.name,
            "group": one.run.places[0],
            "family": _family(one),
            "colour": colours[one.run.places[0], _family(one)],
            "label": (f"{one.run.k}x" if one.run.k else "run") + (f" seed {one.run.seed}" if one.run.seed else ""),
            "on": "bbox/AP" not in one.curves or (one.run.seed is None and one.run.places[0] == first),
            "curves": {
                metric: [
                    (i, round(y, 4)) for i, y in thin(own_part(one, metric, have[metric]), POINTS) if math.isfinite(y)
                ]
                for metric in METRICS
                if metric in one.curves
            },
        }
        for one in outcomes
        if any(metric in one.curves for metric in METRICS)
    ]


def _family(one: Record) -> str:
    return re.sub(r", \d+x$", "", one.run.shown)


def _colours(outcomes: Sequence[Record]) -> dict[tuple[str, str], str]:
    """By group and family as in the figures: an initialisation's own where a group has one family of each."""
    groups: dict[str, dict[str, str]] = {}
    for one in outcomes:
        groups.setdefault(one.run.places[0], {})[_family(one)] = one.run.init
    return {
        (group, family): INITS[init][1] if len(set(inits.values())) == len(inits) else COLORS[place % len(COLORS)]
        for group, inits in groups.items()
        for place, (family, init) in enumerate(inits.items())
    }


def differences(runs: Sequence[RunPage]) -> dict[str, Any]:
    """The keys whose values differ: their commonest values, and for each run those that are others."""
    known = [run for run in runs if run.config]
    keys = sorted({key for run in known for key in run.config})
    values = {key: Counter(run.config.get(key, "") for run in known) for key in keys}
    usual = {key: count.most_common(1)[0][0] for key, count in values.items() if len(count) > 1}
    rows = {run.name: [run.config.get(key, "") for key in usual] for run in known}
    return {"usual": usual, "rows": rows}


def made_with(runs: Sequence[RunPage]) -> list[tuple[str, str, str]]:
    """(what, its value, which runs have that value) with "all" where they agree."""
    rows = []
    known = [run for run in runs if run.environment]
    for key in dict.fromkeys(key for run in known for key in run.environment):
        values: dict[str, list[str]] = {}
        for run in known:
            values.setdefault(run.environment.get(key, "-"), []).append(run.name)
        rows += [(key, value, "all" if len(values) == 1 else ", ".join(names)) for value, names in values.items()]
    return rows


def last_line(words: str) -> str:
    return (words.strip().splitlines() or [""])[-1]
