"""The tables and figures of the documents, tools/render_docs.py."""

import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from conftest import ROOT

from scratch_det.errors import UserError
from scratch_det.study.experiments import find
from scratch_det.study.records import FINISHED, Curve, Record, load, save
from scratch_det.study.report import render
from scratch_det.study.report.tables import as_markdown, tables_of

PROJECTS = [f"--project={ROOT}/projects/{name}" for name in ("self_supervised", "timm_backbones")]  # of studies/


def record(ap: float, curves: Mapping[str, Curve] | None = None) -> Record:
    run = find("scratch_mask_rcnn_R_18_FPN_6x_gn")
    return Record(run, FINISHED, 0, run.iterations, {"bbox/AP": ap}, curves or {})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    write(tmp_path, "before\n<!-- results digits/table1 -->\nold\n<!-- end -->\nafter")
    save([record(30.0)], tmp_path / "results/digits")
    return tmp_path


def write(root: Path, text: str) -> None:
    (root / "README.md").write_text(text)


def test_rendered_once_and_for_all(root: Path) -> None:
    (root / "docs/x.md").write_text("no marker")
    stale = [root / "README.md", root / "docs/digits/SOURCE", root / "docs/digits/index.html"]
    assert render(root, check=True) == stale[:2]  # the page has the figures, which are to be drawn
    assert "old" in (root / "README.md").read_text()
    assert not (root / "docs/digits").exists()
    assert render(root) == stale
    assert (root / "docs/digits/SOURCE").exists()
    text = (root / "README.md").read_text()
    (table,) = tables_of("digits/table1", load(root / "results/digits"))
    assert text == f"before\n<!-- results digits/table1 -->\n\n{as_markdown(table)}\n<!-- end -->\nafter"
    assert render(root) == []


def test_new_results_make_it_stale(root: Path) -> None:
    render(root)
    save([record(30.1)], root / "results/digits")
    assert render(root, check=True) == [root / "README.md", root / "docs/digits/SOURCE"]


def test_edited_results_are_rejected(root: Path) -> None:
    shutil.copytree(ROOT / "results/digits", root / "results/digits", dirs_exist_ok=True)
    runs = root / "results/digits/runs.csv"
    runs.write_text(runs.read_text().replace("finished", "failed", 1))
    with pytest.raises(UserError, match=r"README.md:2: .*runs.csv and curves.csv are not those that study.json"):
        render(root)
    assert "old" in (root / "README.md").read_text()


def test_figures_that_are_gone_or_changed_are_stale(root: Path) -> None:
    curves = {"bbox/AP": ((1080, 15.0), (2160, 30.0))}
    save([record(30.0, curves)], root / "results/digits")
    render(root)
    source, figure = root / "docs/digits/SOURCE", root / "docs/digits/figure1.svg"
    assert f"{hashlib.sha256(figure.read_bytes()).hexdigest()}  figure1.svg\n" in source.read_text()
    other = figure.with_name("photo.png")
    other.touch()
    assert render(root, check=True) == []
    figure.write_bytes(figure.read_bytes() + b"0")
    assert render(root, check=True) == [source]
    figure.unlink()
    assert render(root, check=True) == [source]
    assert render(root) == [source]
    assert figure.exists()
    page = source.with_name("index.html")
    page.write_text(page.read_text().replace("1 of 1 runs", "2 of 2 runs"))
    assert render(root, check=True) == [page]
    save([record(30.0)], root / "results/digits")
    render(root)
    left = {path.name for path in source.parent.iterdir()}
    assert left == {"SOURCE", "photo.png", "figure5.svg", "index.html"}  # the bar of 30.0 AP


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "\n<!-- results digits/tabel1 -->\n<!-- end -->\n",
            r"README.md:2: no experiment digits/tabel1; did you mean",
        ),
        ("<!-- results digits/table1 -->\n", r"README.md:1: no <!-- end --> follows"),
        ("<!-- results digits/table1 -->\n" * 2 + "<!-- end -->\n", r"README.md:1: no <!-- end --> follows"),
        ("a\n<!-- end -->\n", r"README.md:2: nothing begins before this end"),
        (
            "<!-- results table1 -->\n<!-- end -->\n",
            r"README.md:1: .*runs.csv is missing|README.md:1: .*curves.csv is missing",
        ),
    ],
)
def test_mistakes(root: Path, text: str, message: str) -> None:
    (root / "docs/a.md").write_text((root / "README.md").read_text())
    write(root, text)
    with pytest.raises(UserError, match=message):
        render(root)
    assert "old" in (root / "docs/a.md").read_text()


def test_those_of_this_repository_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools/render_docs.py", *PROJECTS, "--check"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_published_page_is_small_and_alone() -> None:
    page = (ROOT / "docs/digits/index.html").read_text()
    assert len(page) < 1_000_000
    assert set(re.findall(r'(?:src|href)="(?!data:|#)', page)) == set()
