"""The page of a diagnosis, from runs and from results."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from coco_truth import results_of

from scratch_det.diagnosis.command import analyze_errors
from scratch_det.errors import UserError


@pytest.fixture
def results(coco_factory: Callable[..., Path], tmp_path: Path) -> Path:
    """Of ``toy_val``, moved by a few pixels."""
    truth = coco_factory("toy_val")
    path = tmp_path / "some.json"
    path.write_text(json.dumps(results_of(json.loads(truth.read_text()), noise=2)))
    return path


def test_two_models(results: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    shutil.copy(results, other)
    line = analyze_errors([f"scratch={results}", f"pretrained={other}"], "toy_val", "segm", tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    assert line.startswith(str(tmp_path / "out" / "index.html"))
    assert "<h1>scratch and pretrained on toy_val</h1>" in page
    assert "pretrained - scratch" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    rows = list(csv.reader((tmp_path / "out" / "classes.csv").open()))
    assert [row[0] for row in rows] == ["class", "class2", "class5", "class9"]
    numbers = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert numbers["scratch"]["ap"] == numbers["pretrained"]["ap"]
    assert sum(numbers["scratch"]["objects"]) == 6


def test_a_run(train: Callable[..., Path], tmp_path: Path) -> None:
    run = train()
    assert "index.html" in analyze_errors([str(run)], None, "bbox", tmp_path / "out")
    with pytest.raises(UserError, match=r"holds no results of toy_train: expected one of "):  # those are of toy_val
        analyze_errors([str(run)], "toy_train", "bbox", tmp_path / "out")


def test_a_path_may_have_a_sign_of_its_own_and_names_are_escaped(results: Path, tmp_path: Path) -> None:
    path = results.rename(tmp_path / "lr=0.1.json")
    analyze_errors([str(path), f"<b>={path}"], "toy_val", "bbox", tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<h1>lr=0.1.json and &lt;b&gt; on toy_val</h1>" in page
    assert "tr > :first-child" in page  # of the style sheet, which is no text


def test_what_cannot_be_analysed(results: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"does not say on which data set it was predicted: name it, --data NAME"):
        analyze_errors([str(results)], None, "bbox", out)
    with pytest.raises(UserError, match=r"there is no .*gone.json; give a run's folder, or a json of results"):
        analyze_errors([str(tmp_path / "gone.json")], "toy_val", "bbox", out)
    with pytest.raises(UserError, match=r"have the same name: write NAME=FOLDER"):
        analyze_errors([str(results)] * 2, "toy_val", "bbox", out)
    with pytest.raises(UserError, match=r"holds no results of toy_val: expected one of .*; evaluate it"):
        analyze_errors([str(tmp_path)], "toy_val", "bbox", out)
    assert not out.exists()
