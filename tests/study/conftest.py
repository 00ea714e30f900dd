"""A study of two short runs whose data set seems to be there."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from study.player import SUBSET
from study.stub_slurm import SUBMITTED, script

from scratch_det.study import local
from scratch_det.study.digits import PER_X
from scratch_det.study.slurm import PROGRAMS
from scratch_det.study.study import Study


@pytest.fixture
def digits(datasets_root: Path) -> Path:
    """A data set as far as it is looked at before a run is started."""
    for part in ("train", "val"):
        (datasets_root / "digits" / part).mkdir(parents=True)
        (datasets_root / f"digits/annotations/instances_{part}.json").parent.mkdir(exist_ok=True)
        (datasets_root / f"digits/annotations/instances_{part}.json").touch()
    (datasets_root / "catalog.yaml").write_text(SUBSET)
    return datasets_root / "digits"


@pytest.fixture
def study(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Study]:
    """Of digits/smoke: a trunk and a branch."""
    monkeypatch.setattr(local, "SECONDS_BETWEEN_LOOKS", 0.02)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    yield Study("digits/smoke", tmp_path / "study", backend="torchvision", threads=1).begin()
    for wait in (tmp_path / "study").glob("*.wait"):  # what a test that failed has left goes on, and ends
        wait.unlink()


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front of PATH whose SLURM has an empty queue, and takes every job."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in PROGRAMS:
        script(folder, name, SUBMITTED.format(folder) if name == "sbatch" else "exit 0")
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A study of digits/table1 with a finished trunk and a branch; the branch's seconds count the trunk's."""
    out = tmp_path / "study"
    Study("digits/table1", out, backend="torchvision", threads=1).begin()
    for k, seconds in ((6, 540.0), (5, 600.0)):
        folder, length = out / f"scratch_mask_rcnn_R_18_FPN_{k}x_gn", k * PER_X
        folder.mkdir()
        lines = [
            {"iteration": at - 1, "time": 0.5 if at <= 1560 else 1.0, "total_loss": 1.0}
            for at in range(20, length + 1, 20)
        ]
        (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
        result = {"iteration": length, "seconds": seconds, "metrics": {"bbox": {"AP": 30.0, "AP-cat": 1.0}}}
        (folder / "result.json").write_text(json.dumps(result))
        environment = {"python": "3.11", "command": f"{out}/x", "git": {"commit": "c0ffee", "diff": ""}}
        (folder / "environment.json").write_text(json.dumps(environment))
    return out


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report without figures, which take most of its time."""
    monkeypatch.setattr("scratch_det.study.report.draw", lambda *_: [])
