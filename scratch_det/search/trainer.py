"""One point of the grid: tools/train_net.py in a process of its own, always with --resume."""

import json
import subprocess
import sys
from typing import IO, Any

from scratch_det.backends import AUTO
from scratch_det.command_line import project_flags
from scratch_det.config import flatten
from scratch_det.distributed.stop import STOPPED, StopFlag, Stopped, last_word
from scratch_det.engine.run_dir import RunDir
from scratch_det.search.grid import Point
from scratch_det.search.search import Search

SECONDS_BETWEEN_LOOKS = 0.2  # less than stop.SAME_REQUEST, so that Ctrl-C and its passing on count once
SEED = 0  # of all points where the recipe has none: they differ in the grid's keys alone
CONSOLE = "console.txt"  # what the trainer says, in the point's folder


class RunFailed(Exception):
    """A run that ended without a result; the message is its own last word."""


def run_point(search: Search, point: Point, lock: IO[str], stop: StopFlag) -> dict[str, Any]:
    """Start or continue the point's run, wait for it, and return its result.json.

    The trainer holds ``lock`` too, so that nobody takes the point over while it lives, even when this process does not.
    A request to stop is passed on to it. Raises Stopped when it was stopped, RunFailed when it failed.
    """
    folder = search.folder(point)
    with open(folder / CONSOLE, "a+") as console:
        before = console.tell()
        process = subprocess.Popen(
            command(search, point), stdin=subprocess.DEVNULL, stdout=console, stderr=console, pass_fds=[lock.fileno()]
        )
        code = _wait(process, stop)
        console.seek(before)
        said = console.read()
    if code in STOPPED or (code and stop.requested):
        raise Stopped(stop)
    if code:
        raise RunFailed(last_word(said, code))
    return json.loads(RunDir(folder).result.read_text())


def command(search: Search, point: Point) -> list[str]:
    """The command line of the point's run."""
    flags = {
        "--config-file": search.config_file,
        "--backend": search.backend if search.backend != AUTO else None,
        "--num-gpus": search.num_gpus if search.num_gpus != 1 else None,
        "--scale-to-batch": search.scale_to_batch,
        "--accumulate": search.accumulate if search.accumulate != 1 else None,
    }
    given = [str(word) for flag, value in flags.items() if value is not None for word in (flag, value)]
    seed = ["SEED", str(SEED)] if search.recipe().cfg.SEED < 0 else []
    changes = [*seed, *search.overrides, *point.overrides, "OUTPUT_DIR", str(search.folder(point))]
    return [sys.executable, str(search.train_net), *project_flags(), *given, "--resume", *changes]


def metric_of(result: dict[str, Any], metric: str) -> float:
    """A number of result.json by its path, such as bbox/AP. Raises RunFailed when it is missing or null."""
    found = flatten(result["metrics"], "/").get(metric)
    if found is None:
        raise RunFailed(f"its result.json has no number for {metric}")
    return found


def _wait(process: subprocess.Popen, stop: StopFlag) -> int:
    """The exit code. A request to stop is handed on once, as SIGTERM, which a trainer of several processes spreads."""
    handed_on = False
    while True:
        try:
            return process.wait(SECONDS_BETWEEN_LOOKS)
        except subprocess.TimeoutExpired:
            if stop.requested and not handed_on:
                process.terminate()
                handed_on = True
