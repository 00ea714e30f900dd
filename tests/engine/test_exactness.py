"""The promises about long runs, on real processes: killed and resumed, branched, or split otherwise, a run is the same.

Digits, with sizes and flips drawn, on a model small enough for a tenth of a second an iteration.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SMALL_MODEL
from run_folder import is_same, read

SMALL = {
    **SMALL_MODEL,
    "INPUT.MIN_SIZE_TRAIN": "(48, 64, 80)",
    "INPUT.RANDOM_FLIP": "horizontal",
    "DATALOADER.NUM_WORKERS": "1",
    "SOLVER.IMS_PER_BATCH": "4",
    "SOLVER.CHECKPOINT_PERIOD": "7",
    "SOLVER.WARMUP_ITERS": "10",
    "SEED": "1",
}
KILLS, FEWEST = 20, 15
SECONDS_TO_END = 30


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A datasets root with a small digits set."""
    root = tmp_path_factory.mktemp("datasets")
    make = [sys.executable, str(ROOT / "tools/prepare_digits.py"), "--out", str(root / "digits")]
    subprocess.run([*make, "--train", "60", "--val", "10"], check=True, capture_output=True)
    return root


class Digits:
    """Starts runs below a folder, as a shell would."""

    def __init__(self, root: Path, folder: Path):
        self.folder = folder
        self.environment = {**os.environ, "DETECTRON2_DATASETS": str(root), "OMP_NUM_THREADS": "1"}

    def start(self, name: str, *arguments: Any, **keys: Any) -> subprocess.Popen:
        """Begin ``name``'s command; KEY__PART=value changes the recipe."""
        recipe = {**SMALL, **{key.replace("__", "."): value for key, value in keys.items()}}
        words = [str(word) for pair in recipe.items() for word in pair]
        command = [sys.executable, "tools/train_net.py", "--config-file", "configs/Digits/quickstart.yaml"]
        with open(self.folder / f"{name}.out", "a") as out:
            return subprocess.Popen(
                [*command, *map(str, arguments), *words, "OUTPUT_DIR", str(self.folder / name)],
                cwd=ROOT, env=self.environment, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip

    def train(self, name: str, *arguments: Any, **keys: Any) -> Path:
        """The folder of a run that ended well."""
        code = self.start(name, *arguments, **keys).wait()
        assert code == 0, (self.folder / f"{name}.out").read_text()[-3000:]
        return self.folder / name


@pytest.fixture
def runs(digits: Path, tmp_path: Path) -> Digits:
    return Digits(digits, tmp_path)


def processes_of(group: int) -> list[int]:
    """The processes of a session that are alive, the first one first."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == group and fields[0] != "Z":
                found.append(int(folder.name))
    return sorted(found)


def kill(process: subprocess.Popen, rng: random.Random) -> tuple[int, int]:
    """SIGKILL everything at once, or one process, in which case the others have to end by themselves.

    Returns how many were killed, and of how many.
    """
    alive = processes_of(process.pid)
    victims: Sequence[int] = alive if rng.random() < 0.5 else [rng.choice(alive)] if alive else []
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + SECONDS_TO_END
    while processes_of(process.pid) and time.monotonic() < deadline:
        process.poll()
        time.sleep(0.1)
    left = processes_of(process.pid)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"{len(left)} processes outlived the one that was killed by {SECONDS_TO_END} seconds"
    process.wait()
    return len(victims), len(alive)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_kill_9_at_random_moments(processes: int, runs: Digits) -> None:
    """Every run that was killed once and started again with the same command is the run that was left alone."""
    keys = {"SOLVER__MAX_ITER": 60, "SOLVER__STEPS": "(40, 52)", "TEST__EVAL_PERIOD": 15}
    flags = ("--num-gpus", processes, "--resume")
    began = time.monotonic()
    whole = runs.train("whole", *flags, **keys)
    seconds = time.monotonic() - began
    rng = random.Random(processes)
    same, hits = [], 0
    for number in range(KILLS):
        process, began = runs.start(f"killed{number}", *flags, **keys), time.monotonic()
        moment, killed, alive = rng.uniform(0, 0.9 * seconds), 0, 0
        try:
            process.wait(moment)
            seconds = min(seconds, time.monotonic() - began)  # the machine has less to do than before
        except subprocess.TimeoutExpired:
            killed, alive = kill(process, rng)
        folder = runs.train(f"killed{number}", *flags, **keys)
        hits += killed > 0
        same.append(is_same(folder, whole))
        outcome = "same" if same[-1] else "OTHER"
        print(f"{number}: killed {killed} of {alive} processes after {moment:.1f} s: {outcome}")
    print(f"{hits} of {KILLS} killed, {sum(same)} bitwise equal")
    assert all(same)
    assert hits >= FEWEST


def test_resumed_after_kill_9_in_two_processes(runs: Digits) -> None:
    """The short form of the above, with a pause on the way."""
    keys = {"SOLVER__MAX_ITER": 20, "SOLVER__CHECKPOINT_PERIOD": 3, "DATASETS__TEST": "()", "MODEL_EMA__ENABLED": True}
    whole = runs.train("whole", "--num-gpus", 2, **keys)
    process = runs.start("killed", "--num-gpus", 2, **keys)
    first = runs.folder / "killed/checkpoints/model_0000002.pth"
    deadline = time.monotonic() + 300
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    kill(process, random.Random(0))
    assert first.exists()
    assert not (runs.folder / "killed/result.json").exists()
    paused = runs.train("killed", "--num-gpus", 2, "--resume", "--stop-at", 11, **keys)
    assert (read(paused, "status.json")["state"], read(paused, "status.json")["iteration"]) == ("paused", 11)
    assert not (paused / "result.json").exists()
    assert is_same(runs.train("killed", "--num-gpus", 2, "--resume", **keys), whole)


def digits_schedule(k: int) -> dict[str, Any]:
    """kx in small: 20 * k iterations that drop for the last 13 and again for the last 4, as 90k, 60k and 20k do."""
    length = 20 * k
    return {"SOLVER__MAX_ITER": length, "SOLVER__STEPS": f"({length - 13}, {length - 4})"}


@pytest.mark.slow
def test_branches_are_the_directly_trained_runs(runs: Digits) -> None:
    """2x and 3x from the trunk that is 4x, bit for bit, with 106 iterations instead of 180."""
    trunk = runs.train("4x", "--keep-at", "27,47", "--keep-last", 1, **digits_schedule(4))
    spent = 80
    for k, point in ((2, 27), (3, 47)):
        checkpoint = trunk / f"checkpoints/model_{point - 1:07d}.pth"
        branch = runs.train(f"{k}x_branch", "--branch-from", checkpoint, **digits_schedule(k))
        direct = runs.train(f"{k}x", **digits_schedule(k))
        assert is_same(branch, direct)
        assert read(branch, "parent.json")["completed_iterations"] == point
        spent += 20 * k - point
    print(f"iterations: {spent} with branches, {20 * (2 + 3 + 4)} without")
    assert spent == 106
