"""A study of two short runs whose data set seems to be there."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from study.stub_slurm import SUBMITTED, script

from scratch_det.study import local
from scratch_det.study.slurm import PROGRAMS
from scratch_det.study.study import Study


@pytest.fixture
def digits(datasets_root: Path) -> Path:
    """A data set as far as it is looked at before a run is started."""
    for part in ("train", "val"):
        (datasets_root / "digits" / part).mkdir(parents=True)
        (datasets_root / f"digits/annotations/instances_{part}.json").parent.mkdir(exist_ok=True)
        (datasets_root / f"digits/annotations/instances_{part}.json").touch()
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
