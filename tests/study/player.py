"""Runs of a study played by a script that leaves what a run leaves."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

from conftest import ROOT

from scratch_det.study import local
from scratch_det.study.commands import jobs_on_cluster, run_here
from scratch_det.study.local import Local, holder_of
from scratch_det.study.records import RUNNING, survey
from scratch_det.study.run import Step
from scratch_det.study.study import LOCK, Study

TRUNK, BRANCH = "smoke_3x", "smoke_2x"
PART = f"{TRUNK}@12"  # of the trunk, to the checkpoint that the branch starts from
SUBSET = "digits_train_120: {json: digits/annotations/instances_train.json, images: digits/train}"  # for a catalog
MINUTES = 300  # after which something hangs
PLAYER = """
import json, os, signal, sys, time
from pathlib import Path
name, folder, iterations, checkpoint = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
out = folder.parent
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
with open(out / "starts", "a") as starts:
    starts.write(name + "\\n")
def write(name, **content):
    (folder / "partial").write_text(json.dumps(content))
    (folder / "partial").rename(folder / name)
def leave(*_):
    write("status.json", state="stopped", iteration=1)
    sys.exit(75)
signal.signal(signal.SIGTERM, leave)
write("status.json", state="training", iteration=1, eta=5.0, pid=os.getpid())
while (out / f"{name}.wait").exists():
    time.sleep(0.02)
if (out / f"{name}.fail").exists():
    sys.exit("error: the disk is on fire")
if checkpoint:
    Path(checkpoint).touch()
    while (out / f"{name}.evaluates").exists():
        time.sleep(0.02)
    write("status.json", state="paused", iteration=1)
else:
    write("result.json", iteration=iterations, seconds=2.0, metrics={"bbox": {"AP": 12.5, "AP50": None}})
"""


class Players(Local):
    """Runs are the script above. DIR/NAME.wait keeps a step from going on, .evaluates from ending."""

    @staticmethod
    def command(step: Step) -> list[str]:
        folder = step.outputs[-1].parent
        checkpoint = str(step.outputs[0]) if "@" in step.name else ""
        iterations = {TRUNK: "27", BRANCH: "18"}[step.run]
        return [sys.executable, "-c", PLAYER, step.name, str(folder), iterations, checkpoint]


def states(study: Study) -> dict[str, str]:
    now = (jobs_on_cluster(study) or {}) | dict.fromkeys(holder_of(study.out / LOCK).get("running", []), RUNNING)
    return {record.run.name: record.state for record in survey(study.jobs, study.out, now)}


def play(study: Study, max_parallel: int = 2, names: tuple[str, ...] = ()) -> int:
    return run_here(study, study.picked(names), Players, max_parallel)


def in_a_process(study: Study) -> subprocess.Popen:
    """``play`` as its own process and process group, as scratch-det study run is at a terminal."""
    code = (
        "import sys; from pathlib import Path; sys.path[:0] = ['tests', '.']\n"
        "from scratch_det.distributed.stop import Stopped; from scratch_det.study.study import study_in\n"
        "from study.player import local, play; local.SECONDS_BETWEEN_LOOKS = 0.02\n"
        "try: sys.exit(play(study_in(Path(sys.argv[1]))))\n"
        "except Stopped as stopped: sys.exit(stopped.exit_code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(study.out)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)


def starts(study: Study) -> list[str]:
    return (study.out / "starts").read_text().split()


def pid_of(study: Study, name: str) -> int:
    return json.loads((study.out / name / "status.json").read_text())["pid"]


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + MINUTES
    while not true():
        assert time.monotonic() < end, f"waited for {MINUTES} seconds"
        time.sleep(0.02)


__all__ = ["local"]
