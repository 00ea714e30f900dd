"""scratch-det study on real runs: digits/smoke, a trunk and a branch, from nothing to the report."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from run_folder import is_same
from study.player import SUBSET

from scratch_det.data.digits import make_digits
from scratch_det.files import try_lock
from scratch_det.study.report import write_report
from scratch_det.study.study import LOCK, study_in


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of processes that find a small digits data set."""
    root = tmp_path_factory.mktemp("datasets")
    make_digits(root / "digits", seed=0, train=24, val=4)
    (root / "catalog.yaml").write_text(SUBSET)
    threads = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, "DETECTRON2_DATASETS": str(root), "PYTHONPATH": str(ROOT), **threads}


def smoke(out: Path, environment: dict[str, str]) -> subprocess.Popen:
    words = ("run", "digits/smoke", "--out", out, "--backend", "torchvision", "--max-parallel", 2)
    return subprocess.Popen([sys.executable, "tools/study.py", *map(str, words)], cwd=ROOT, env=environment)


def report(out: Path) -> dict[str, bytes]:
    """The report's files by name."""
    write_report(study_in(out), "digits/smoke")
    return {str(path.relative_to(out)): path.read_bytes() for path in (out / "report").rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    out = tmp_path_factory.mktemp("smoke") / "study"
    assert smoke(out, environment).wait(300) == 0
    return out


def test_from_nothing_to_the_report(finished: Path) -> None:
    files = report(finished)
    assert {"report/smoke.md", "report/smoke.csv", "report/smoke.tex"} <= files.keys()
    assert "scratch, 2x" in files["report/smoke.md"].decode()
    assert (finished / "smoke_2x" / "parent.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again(finished: Path, environment: dict[str, str], tmp_path: Path, seed: int) -> None:
    """study.py, one of its runs, or both are killed at random moments; the report is the same, byte for byte."""
    out, draw = tmp_path / "study", random.Random(seed)
    for _ in range(4):
        process = smoke(out, environment)
        time.sleep(draw.uniform(2, 25))
        runs = trainers(out)
        if victim := draw.choice([None, *runs]):
            os.kill(victim, signal.SIGKILL)
        if victim is None or draw.random() < 0.5:
            process.kill()
        process.wait(300)
        while (lock := try_lock(out / LOCK)) is None:  # runs end with study.py, each with a checkpoint
            time.sleep(0.2)
        lock.close()
    assert smoke(out, environment).wait(300) == 0
    assert all(is_same(out / name, finished / name) for name in ("smoke_3x", "smoke_2x"))
    assert report(out) == report(finished)


def trainers(out: Path) -> list[int]:
    """The processes of train_net.py in this study."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"scratch_det" in words and any(str(out).encode() in word for word in words):
            found.append(int(path.parent.name))
    return found
