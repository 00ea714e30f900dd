"""What a search leaves behind: a table, the winner's values as a recipe to build on, recipes that do, and a picture."""

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from scratch_det.command_line import project_flags
from scratch_det.config import flatten, plain
from scratch_det.files import write_atomically
from scratch_det.log import clock
from scratch_det.search.board import Board, Record
from scratch_det.search.picture import draw_grid
from scratch_det.search.search import BEST, Search
from scratch_det.tables import markdown


def report(board: Board) -> int:
    """Print the table; write DIR/search.md, search.png, best.yaml and the recipes of --apply-to.

    When no point has failed, result.json comes last, as in a run folder. Returns the number of points that failed.
    """
    search, in_order = board.search, board.records()
    records = ranked(in_order)
    failed = [record for record in records if record.has_failed]
    table = as_table(records, search.metric)
    best = records[0] if records[0].value is not None else None
    files = recipes(search, best, len(failed)) if best else {}
    with board.held():
        write_atomically(search.out / "search.md", table + "\n")
        for name, content in files.items():
            write_atomically(search.out / name, content)
        draw_grid(in_order, search.metric, search.out / "search.png")
        result = search.out / "result.json"
        if best and not failed:
            write_atomically(result, json.dumps(as_result(records, search.metric), indent=2) + "\n")
        else:
            result.unlink(missing_ok=True)
    print(table)
    for record in failed:
        print(f"failed: {record.point} ({search.folder(record.point)}): {record.error}")
    print(f"wrote {search.out}/: {', '.join(['search.md', 'search.png', *files])}")
    return len(failed)


def as_result(records: Sequence[Record], metric: str) -> dict[str, Any]:
    """Of ranked points: the winner's metric and values, and the seconds of all."""
    task, _, score = metric.rpartition("/")
    seconds = sum(record.seconds or 0.0 for record in records)
    best = records[0]
    return {"seconds": seconds, "best": best.point.values, "metrics": {task: {score: best.value}}}


def ranked(records: Sequence[Record]) -> list[Record]:
    """By falling metric, of equal ones the first of the grid first; those without one at the end."""
    return sorted(records, key=lambda record: (record.value is None, -(record.value or 0.0)))


def as_table(records: Sequence[Record], metric: str) -> str:
    """A Markdown table of ranked points, the winner marked."""
    rows = []
    for place, record in enumerate(records):
        time = "-" if record.seconds is None else clock(record.seconds)
        mark = "best" if record.value is not None and not place else ""
        rows.append([mark, *record.point.labels.values(), str(record), time])
    return markdown(["", *records[0].point.labels, metric, "training"], rows)


def recipes(search: Search, best: Record, failed: int) -> dict[str, str]:
    """The winner's keys as best.yaml, and each recipe of --apply-to on top of which they are set, by file name."""
    axes = "".join(f"#   {axis.name}: {', '.join(axis.choices)}\n" for axis in search.axes)
    origin = (
        f"# The best of a grid search: {search.metric} {best.value:.2f} of {search.config_file}\n"
        f"# with {shlex.join(search.overrides) or 'no other changes'}. Its run is {search.folder(best.point)}.\n"
        f"# The grid of {len(search.points)} points, {failed} of which failed:\n{axes}"
    )
    cfg = search.recipe(best.point).cfg
    nested: dict[str, Any] = {}
    for key in best.point.values:
        *sections, name = key.split(".")
        node = nested
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = plain(flatten(cfg)[key])
    files = {BEST: origin + yaml.safe_dump(nested, default_flow_style=None, sort_keys=False)}
    for recipe in search.apply_to:
        name, bases = Path(recipe).name, [os.path.relpath(recipe, search.out), BEST]
        header = f"# {recipe} with what a grid search found, see {BEST}.\n"
        words = [*project_flags(), "--config-file", str(search.out / name), "OUTPUT_DIR", f"output/{Path(name).stem}"]
        command = f"#  python tools/train_net.py {shlex.join(words)}\n"
        files[name] = header + command + yaml.safe_dump({"_BASE_": bases})
    return files
