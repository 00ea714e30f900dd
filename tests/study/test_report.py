"""A study's report: what is written, from what, and what is rejected."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import load_command
from run_folder import attempt, damage

from scratch_det.errors import DataError, UserError
from scratch_det.study import commands
from scratch_det.study.report import write_report
from scratch_det.study.study import Study, study_in
from scratch_det.visualization import curves

R18 = "{}_mask_rcnn_R_18_FPN_{}x_gn"


def report(out: Path, results: Path | None = None) -> None:
    write_report(study_in(out), "digits/table1", results)


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "report").iterdir() if path.is_file()}


def test_depends_on_the_numbers_alone(out: Path) -> None:
    report(out)
    first = files(out)
    path = out / R18.format("scratch", 6) / "result.json"
    path.write_text(path.read_text().replace("540.0", "9999.0"))
    report(out)
    again = files(out)
    assert [name for name, content in first.items() if again.pop(name) != content] == ["index.html"]  # says how long
    assert again == {}


@pytest.mark.usefixtures("no_figures")
def test_a_part_leaves_the_whole_alone(out: Path) -> None:
    report(out)
    first = files(out)
    write_report(study_in(out), R18.format("scratch", 6))
    assert files(out) == first
    assert (
        f'href="../../{R18.format("scratch", 6)}/"'
        in (out / "report" / R18.format("scratch", 6) / "index.html").read_text()
    )


@pytest.mark.usefixtures("no_figures")
def test_what_is_not_written_any_more_is_removed(out: Path) -> None:
    (out / "report").mkdir()
    for name in ("table2.md", "figure8.png", "notes.md"):
        (out / "report" / name).touch()
    report(out)
    assert {"notes.md", "table1.md"} <= files(out).keys()
    assert files(out).keys().isdisjoint({"table2.md", "figure8.png"})


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("kind", ["noise", "another type", "null keys", "a folder"])
def test_a_damaged_run_folder(out: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message that names it, or what can be read of the study; also of its state, and of curves."""
    monkeypatch.setattr(curves, "save_figure", lambda *_: tmp_path)
    folder = out / R18.format("scratch", 6)
    (folder / "config.yaml").write_text(Study("digits/table1", out).jobs[0].recipe(out, "torchvision").dump())
    (folder / "status.json").write_text('{"state": "finished", "iteration": 3, "eta": 1.0}')
    good = shutil.copytree(folder, tmp_path / "good")
    wrong = []
    for file in ("config.yaml", "environment.json", "metrics.json", "result.json", "status.json"):
        damage(folder / file, kind)
        for action in (
            lambda: report(out),
            lambda: commands.status(out),
            lambda: curves.compare_runs([f"a={folder}"], ["total_loss"], tmp_path / "a.png"),
        ):
            said = attempt(action)
            wrong += [f"{file}: {said}"] * ("UNEXPECTED" in said or (said != "" and str(folder) not in said))
        shutil.rmtree(folder)
        shutil.copytree(good, folder)
    assert wrong == []


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"git": "abc"}, r"Expected `object \| null`, got `str` - at `\$\.git"),
        ({"git": {"commit": 5}}, r"got `int` - at `\$\.git"),
        ({"packages": [1]}, r"got `array` - at `\$\.packages`"),
    ],
)
def test_an_edited_environment(out: Path, content: dict, message: str) -> None:
    (out / R18.format("scratch", 6) / "environment.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        report(out)


@pytest.mark.usefixtures("no_figures")
def test_nothing_of_the_part_itself(tmp_path: Path) -> None:
    """Runs that it needs have something to show."""
    study = Study("digits/figure8", tmp_path / "study").begin()
    folder = study.out / "pretrain_digits_R_18_gn"
    folder.mkdir()
    (folder / "metrics.json").write_text('{"iteration": 19, "total_loss": 2.0}\n')
    with pytest.raises(UserError, match=r"no run of digits/figure8 .* has anything to show yet"):
        write_report(study, "digits/figure8")
    assert not (study.out / "report").exists()


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("experiment", "message"),
    [
        ("digits/figure4", "holds the study digits/table1, of which digits/figure4 is no part"),
        (R18.format("scratch", 2), "has anything to show yet"),
        ("digits/tabel1", "did you mean 'digits/table1'"),
    ],
)
def test_rejected(out: Path, experiment: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_report(study_in(out), experiment)
    assert not (out / "report").exists()


@pytest.mark.usefixtures("no_figures")
def test_tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["study.py", "report", "table1", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        load_command("study").main()
    assert end.value.code == 2
    assert "no study was started there" in capsys.readouterr().err


@pytest.mark.usefixtures("no_figures")
def test_failures_name_no_folders(out: Path) -> None:
    (out / f"jobs/{R18.format('scratch', 4)}.exit").write_text("2\n")
    (out / f"jobs/{R18.format('scratch', 4)}.log").write_text(f"--- started now\nerror: {out}/x is broken\n")
    checkpoint = out / R18.format("scratch", 6) / "checkpoints" / "model_0001199.pth"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    report(out)
    assert f"{R18.format('scratch', 4)} failed: exit code 2: x is broken".encode() in files(out)["table1.md"]
