"""The page of a diagnosis, from runs and from results."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_truth import results_of
from PIL import Image

from scratch_det.diagnosis.command import analyze_errors, view_results
from scratch_det.diagnosis.data import Filter
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
    command = r"; evaluate it: scratch-det eval --config-file .* DATASETS.TEST \"\('toy_train',\)\" OUTPUT_DIR .*run$"
    with pytest.raises(UserError, match=command):  # those are of toy_val
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
    with pytest.raises(UserError, match=r" is no run's folder; give one, or a json of results and its --data NAME"):
        analyze_errors([str(tmp_path)], None, "bbox", out)
    with pytest.raises(UserError, match=r"there is no .*gone.json; give a run's folder, or a json of results"):
        analyze_errors([str(tmp_path / "gone.json")], "toy_val", "bbox", out)
    with pytest.raises(UserError, match=r"have the same name: write NAME=FOLDER"):
        analyze_errors([str(results)] * 2, "toy_val", "bbox", out)
    with pytest.raises(UserError, match=r"holds no results of toy_val: expected one of .*; give a run's folder"):
        analyze_errors([str(tmp_path)], "toy_val", "bbox", out)
    assert not out.exists()


class TestViewResults:
    def captions(self, page: str) -> list[str]:
        return re.findall("<figcaption>(.*?) <a ", Path(page).read_text())

    def test_the_worst_come_first_truth_beside_results(self, results: Path, tmp_path: Path) -> None:
        rows = [row for row in json.loads(results.read_text()) if row["image_id"] != 2]
        results.write_text(json.dumps([row | {"score": 0.9} for row in rows]))
        found = self.captions(view_results(results, "toy_val", "segm", Filter(count=2), tmp_path / "out"))
        assert found[:2] == ["2.jpg, id 2, 64 x 96: 2 objects", "2.jpg: 0 right, 0 wrong, 2 missed"]
        assert len(found) == 4
        page = view_results(results, "toy_val", "bbox", Filter(ids=["1", "3"]), tmp_path / "out")
        assert {caption.split(".")[0] for caption in self.captions(page)} == {"1", "3"}

    def test_the_page_says_what_it_shows(self, results: Path, tmp_path: Path) -> None:
        results.write_text("[]")
        page = view_results(results, "toy_val", "segm", Filter(["class2"], ids=["1", "2"]), tmp_path / "out")
        assert "0 detections with a score from 0.5, matched by their masks." in Path(page).read_text()
        assert "6 objects (and crowds or ignored ones, which do not count: 1)" in Path(page).read_text()
        assert "Chosen: class class2; image 1, 2. The worst first, by F1 of these classes." in Path(page).read_text()
        assert self.captions(page)[1::2] == ["2.jpg: 0 right, 0 wrong, 1 missed", "1.jpg: 0 right, 0 wrong, 0 missed"]

    @pytest.mark.parametrize(("task", "has_masks"), [("bbox", False), ("segm", True)])
    def test_masks_are_drawn_for_segm_alone(
        self, task: str, has_masks: bool, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        drawn: list[bool] = []
        for module in ("data", "page"):

            def draw(pixels: np.ndarray, items: dict[str, Any], *_: object, **__: object) -> Image.Image:
                drawn.append("masks" in items)
                return Image.fromarray(pixels)

            monkeypatch.setattr(f"scratch_det.diagnosis.{module}.draw_objects", draw)
        results.write_text(json.dumps([row for row in json.loads(results.read_text()) if row["image_id"] != 2]))
        view_results(results, "toy_val", task, Filter(ids=["1", "2"]), tmp_path / "out")
        assert drawn == [has_masks] * 4

    def test_a_run_and_what_is_asked_in_vain(self, train: Callable[..., Path], tmp_path: Path) -> None:
        run, out = train(), tmp_path / "out"
        with pytest.raises(UserError, match=r"toy_val has no class cat; it has class2, class5, class9"):
            view_results(run, None, "bbox", Filter(classes=["cat"]), out)
        with pytest.raises(UserError, match=r"no image of toy_val has all of this: class class2; size large; ask"):
            view_results(run, None, "bbox", Filter(classes=["class2"], size="large"), out)
        assert not out.exists()
        assert "<h1>run on toy_val</h1>" in Path(view_results(run, None, "bbox", Filter(), out)).read_text()
