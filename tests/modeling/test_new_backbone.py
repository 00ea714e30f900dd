"""docs/new_backbone.md: every block of it is written or run as it stands, the training shortened by overrides."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from scratch_det import backends

PAGE = (ROOT / "docs/new_backbone.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
FILES = re.findall(r"`(projects/[\w./]+\.(?:py|yaml))`[^`]*```\w+\n(.*?)```", PAGE, re.DOTALL)
SHORTER = {  # appended to a command
    "data digits": ["--train", "12", "--val", "4"],
    "analyze model": [],
    "train": ["SOLVER.MAX_ITER", "3", "SOLVER.STEPS", "()", "SOLVER.WARMUP_ITERS", "1"],
}
INSTALLED = [name for name in backends.BACKENDS if backends.is_installed(name)]


def test_it_is_one_file_of_40_lines_and_one_recipe() -> None:
    (python,) = [text for language, text in BLOCKS if language == "python"]
    assert len(python.splitlines()) <= 40
    assert python.count("BACKBONES[") == 1
    assert sorted(Path(name).suffix for name, _ in FILES) == [".py", ".yaml"]
    assert [language for language, _ in BLOCKS] == ["python", "yaml", "sh"]


@pytest.mark.parametrize("backend", INSTALLED)
def test_from_nothing_to_an_ap(backend: str, tmp_path: Path) -> None:
    for name, text in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    environment = {key: value for key, value in os.environ.items() if key != "DETECTRON2_DATASETS"}
    said = ""
    (commands,) = [text for language, text in BLOCKS if language == "sh"]
    for line in commands.splitlines():
        program, *words = line.split()
        assert program == "scratch-det"
        words += ["--backend", backend] if "--project" in words else []
        shorter = next(more for name, more in SHORTER.items() if f"{line} ".startswith(f"scratch-det {name} "))
        command = [sys.executable, "-m", "scratch_det", *words, *shorter]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        said += done.stdout
    assert re.search(r"^bottom-up .* 5 GroupNorm$", said, re.MULTILINE)
    assert "leaves 0 tensors without a gradient" in said
    assert set(json.loads((tmp_path / "output/plainnet/result.json").read_text())["metrics"]) == {"bbox", "segm"}
