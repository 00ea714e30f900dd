"""The end of a search: a table and a picture of its points, and the best values as a recipe and in others."""

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from scratch_det.command_line import project_flags
from scratch_det.config import flatten, plain
from scratch_det.evaluation.metrics import VERMILION
from scratch_det.files import write_atomically
from scratch_det.log import Progress, clock, say_now
from scratch_det.study.local import Local, alone_in, require_gpus
from scratch_det.study.records import failure_of, jobs_folder, read_json
from scratch_det.study.search import BEST, Point, Search
from scratch_det.tables import markdown
from scratch_det.visualization.curves import save_figure

EXIT_SOME_FAILED = 1


@dataclass(frozen=True)
class Trial:
    """The result of a point: its metric and seconds, or the error of a failed point; empty while it is not finished."""

    point: Point
    value: float | None = None
    seconds: float | None = None
    error: str = ""

    def __str__(self) -> str:
        return f"{self.value:.2f}" if self.value is not None else "failed"


def search_grid(search: Search) -> int:
    """Train all points on this machine, one after the other, then ``choose``; the exit code: 1 when points failed.

    ``search.check`` has passed. Raises UserError when this machine has too few GPUs, and Stopped after a signal.
    """
    steps = search.steps()
    needed = {step.name: step.processes for step in steps if step.on_gpu}
    require_gpus(needed, search.processes, max_parallel=1, fix="give a smaller --num-gpus")
    search.out.mkdir(parents=True, exist_ok=True)
    points = {point.name: point for point in search.points}
    running: set[str] = set()

    def look(now: set[str]) -> None:
        for name in running - now:
            trial = _read(search, points[name])
            if trial.value is not None or trial.error:
                progress.advance()
                what = f"{search.metric} {trial}; {progress.done} of {progress.total}"
                say_now(f"{points[name]}: {what}, eta {clock(progress.eta_seconds())}")
        for name in now - running:
            say_now(f"training {points[name]}: see {jobs_folder(search.out) / name}.log")
        running.clear()
        running.update(now)

    done = sum(step.is_done for step in steps)
    with (
        alone_in(search.out, "search.lock") as lock,
        Progress("search", len(steps), start=done, say=None) as progress,
    ):
        Local(search.out, lock, gpus=search.processes).run(steps, look)
        return EXIT_SOME_FAILED if choose(search) else 0


def choose(search: Search) -> int:
    """Print the table; write search.md, search.png, best.yaml and the recipes of --apply-to into the search's folder.

    When no point has failed, result.json comes last, as in a run folder. Returns the number of points that failed.
    """
    trials = [_read(search, point) for point in search.points]
    ranked = sorted(trials, key=lambda trial: (trial.value is None, -(trial.value or 0.0)))  # the first of equal ones
    failed = [trial for trial in ranked if trial.value is None]
    best = ranked[0] if ranked[0].value is not None else None
    rows = [
        ["best" if trial is best else "", *trial.point.labels.values(), str(trial),
         "-" if trial.seconds is None else clock(trial.seconds)]
        for trial in ranked
    ]  # fmt: skip
    table = markdown(["", *ranked[0].point.labels, search.metric, "training"], rows)
    files = {"search.md": table + "\n", **(_recipes(search, best, len(failed)) if best else {})}
    for name, content in files.items():
        write_atomically(search.out / name, content)
    draw_grid(trials, search.metric, search.out / "search.png")
    (search.out / "result.json").unlink(missing_ok=True)
    if best and not failed:
        task, _, score = search.metric.rpartition("/")
        seconds = sum(trial.seconds or 0.0 for trial in trials)
        result = {"seconds": seconds, "best": best.point.values, "metrics": {task: {score: best.value}}}
        write_atomically(search.out / "result.json", json.dumps(result, indent=2) + "\n")
    print(table)
    for trial in failed:
        print(f"failed: {trial.point} ({search.out / trial.point.name}): {trial.error or 'it is not finished'}")
    print(f"wrote {search.out}/: {', '.join([*files, 'search.png'])}")
    return len(failed)


def _read(search: Search, point: Point) -> Trial:
    result = read_json(search.out / point.name / "result.json")
    if not result:
        return Trial(point, error=failure_of(jobs_folder(search.out), point.name))
    value = flatten(result.get("metrics") or {}, "/").get(search.metric)
    missing = "" if value is not None else f"its result.json has no number for {search.metric}"
    return Trial(point, value, result.get("seconds"), missing)


def _recipes(search: Search, best: Trial, failed: int) -> dict[str, str]:
    """The best point's keys as best.yaml, and each recipe of --apply-to with them, by file name."""
    axes = "".join(f"#   {axis}: {', '.join(choices)}\n" for axis, choices in search.axes.items())
    origin = (
        f"# The best of a grid search: {search.metric} {best.value:.2f} of {search.config_file}\n"
        f"# with {shlex.join(search.overrides) or 'no other changes'}. Its run is {search.out / best.point.name}.\n"
        f"# The grid of {len(search.points)} points, {failed} of which failed:\n{axes}"
    )
    cfg = flatten(search.recipe(best.point).cfg)
    nested: dict[str, Any] = {}
    for key in best.point.values:
        *sections, name = key.split(".")
        reduce(lambda node, section: node.setdefault(section, {}), sections, nested)[name] = plain(cfg[key])
    files = {BEST: origin + yaml.safe_dump(nested, default_flow_style=None, sort_keys=False)}
    for recipe in search.apply_to:
        name, bases = Path(recipe).name, [os.path.relpath(recipe, search.out), BEST]
        words = [*project_flags(), "--config-file", str(search.out / name), "OUTPUT_DIR", f"output/{Path(name).stem}"]
        header = f"# {recipe} with what a grid search found, see {BEST}.\n#  python tools/train_net.py "
        files[name] = f"{header}{shlex.join(words)}\n{yaml.safe_dump({'_BASE_': bases})}"
    return files


def draw_grid(trials: Sequence[Trial], metric: str, out_png: Path) -> None:
    """The grid as a picture: its longest axis from left to right, every combination of the others a row.

    The best point is framed, failed ones are grey.
    """
    labels = [trial.point.labels for trial in trials]
    across = max(labels[0], key=lambda axis: len({one[axis] for one in labels}))
    names = [", ".join(f"{axis} {label}" for axis, label in one.items() if axis != across) for one in labels]
    rows, columns = list(dict.fromkeys(names)), list(dict.fromkeys(one[across] for one in labels))
    places = {
        (rows.index(name), columns.index(one[across])): trial
        for name, one, trial in zip(names, labels, trials, strict=True)
    }
    values = np.full((len(rows), len(columns)), np.nan)
    for place, trial in places.items():
        values[place] = np.nan if trial.value is None else trial.value

    figure = Figure(figsize=(3 + 1.2 * len(columns), 1.8 + 0.55 * len(rows)), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.set_title(metric, loc="left", fontsize=11, fontweight="bold")
    axes.set_facecolor("#dddddd")  # shows where there is no value
    axes.imshow(np.ma.masked_invalid(values), cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(across)
    for (row, column), trial in places.items():
        is_dark = trial.value is not None and trial.value < np.nanmin(values) + 0.6 * np.ptp(values[~np.isnan(values)])
        axes.text(column, row, str(trial), ha="center", va="center", color="white" if is_dark else "black")
    if np.isfinite(values).any():
        row, column = divmod(int(np.nanargmax(values)), len(columns))
        frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, lw=3, edgecolor=VERMILION, clip_on=False)
        axes.add_patch(frame)
    save_figure(figure, out_png)
