"""A study as data, --results FOLDER: how each run was made, parts that are put together, folders that were edited."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from scratch_det.errors import DataError, UserError
from scratch_det.study.experiments import find
from scratch_det.study.records import FINISHED, READY, Record, load
from scratch_det.study.report import tables_from, write_report
from scratch_det.study.report.results import describe, kept_of, with_made
from scratch_det.study.report.tables import as_markdown, tables_of
from scratch_det.study.study import Study, study_in

R18 = "{}_mask_rcnn_R_18_FPN_{}x_gn"
pytestmark = pytest.mark.usefixtures("no_figures")


def report(out: Path, results: Path | None = None) -> None:
    write_report(study_in(out), "digits/table1", results)


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "report").iterdir() if path.is_file()}


def test_files(out: Path, tmp_path: Path) -> None:
    report(out, tmp_path / "results")
    assert {"index.html", "table1.csv", "table1.md", "table1.tex"} <= files(out).keys()
    assert b"30.0\xe2\x80\xa0" in files(out)["table1.md"]
    about = json.loads((tmp_path / "results/study.json").read_text())
    trunk, branch = (R18.format("scratch", k) for k in (6, 5))
    assert (about["iterations"], about["iterations_saved_by_sharing"]) == (2160 + 240, 1560)
    seconds = {name: made["seconds"] for name, made in about["runs"].items()}
    assert seconds == {trunk: 540.0, branch: 141.2}  # 600 * 240 / 1020
    assert about["run_hours"] == 0.19
    assert about["runs"][branch]["command"] == (
        f"scratch-det train --config-file configs/Digits/{branch}.yaml "
        f"--backend torchvision --branch-from DIR/{trunk}/checkpoints/model_0001559.pth "
        f"--resume OUTPUT_DIR DIR/{branch}"
    )
    (environment,) = about["environments"]
    command = "OMP_NUM_THREADS=1 scratch-det study run digits/table1 --out DIR --backend torchvision --gpus 1"
    assert (environment["study"], environment["python"]) == (command, "3.11")
    assert str(tmp_path) not in json.dumps(about)
    assert [one.run.name for one in load(tmp_path / "results") if one.state == FINISHED] == [trunk, branch]


def test_a_switch_saves_nothing() -> None:
    """It goes on from the other run with --no-share-prefix too."""
    branch, switch = (
        Record(find(name), FINISHED, start, length)
        for name, start, length in [
            (R18.format("scratch", 5), 1560, 1800),
            ("scratch_cascade_mask_rcnn_R_18_FPN_9x_gn_train_aug", 2160, 3240),
        ]
    )
    about = describe([branch, switch])
    assert (about["iterations"], about["iterations_saved_by_sharing"]) == (240 + 1080, 1560)


def test_tables_of_kept_results(out: Path, tmp_path: Path) -> None:
    report(out, tmp_path / "results")
    (expected,) = tables_of("digits/table1", load(tmp_path / "results"))
    assert tables_from(tmp_path / "results", "digits/table1") == as_markdown(expected)
    with pytest.raises(UserError, match=r"elsewhere has no results of digits; name their folder, --results FOLDER"):
        tables_from(tmp_path / "elsewhere", "digits/table1")
    with pytest.raises(UserError, match=r"results has the results of digits/\w+, not of table1; name another"):
        tables_from(tmp_path / "results", "table1")


def test_results_of_another_experiment_are_kept(out: Path, tmp_path: Path) -> None:
    report(out, tmp_path / "results")
    with pytest.raises(UserError, match="holds digits/table1, not "):
        write_report(study_in(out), R18.format("scratch", 6), tmp_path / "results")


@pytest.fixture
def elsewhere(out: Path, tmp_path: Path) -> Path:
    """The same study in another folder, where its trunk came out otherwise."""
    again = tmp_path / "again"
    shutil.copytree(out, again)
    again.joinpath("study.json").write_text((out / "study.json").read_text().replace(str(out), str(again)))
    result = again / R18.format("scratch", 6) / "result.json"
    result.write_text(json.dumps({"iteration": 2160, "metrics": {"bbox": {"AP": 31.0}}}))
    return again


def test_made_in_parts(out: Path, elsewhere: Path, tmp_path: Path) -> None:
    """What got further in another folder stays, with how it was made; all else is this one's."""
    results, (trunk, branch) = tmp_path / "results", (R18.format("scratch", k) for k in (6, 5))
    report(elsewhere, results)
    shutil.rmtree(out / trunk)
    report(out, results)
    both = {one.run.name: one for one in load(results)}
    assert (both[trunk].metrics, both[branch].metrics) == ({"bbox/AP": 31.0}, {"bbox/AP": 30.0})
    about = json.loads((results / "study.json").read_text())
    assert list(about["runs"]) == [trunk, branch]
    assert about["iterations"] == 2160 + 240
    shutil.rmtree(out / branch)
    (out / trunk).mkdir()
    (out / trunk / "metrics.json").write_text('{"iteration": 19, "total_loss": 2.0}\n')
    report(out, results)
    assert {one.run.name: one for one in load(results)} == both


def test_a_branch_goes_with_its_trunk(
    out: Path, elsewhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """One that rests on another trunk's iterations is not set beside this one, unless the weights are the same."""
    results, (trunk, branch) = tmp_path / "results", (R18.format("scratch", k) for k in (6, 5))
    report(out, results)
    shutil.rmtree(elsewhere / branch)
    report(elsewhere, results)
    assert f"{branch} is not kept, as it rests on another {trunk}" in capsys.readouterr().out
    assert {one.run.name for one in load(results) if one.state == FINISHED} == {trunk}


def test_an_evaluation_goes_with_what_it_evaluates(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    name = "pretrained_cascade_mask_rcnn_R_18_FPN_6x_gn_train_aug"
    trained, evaluated = Record(find(name), FINISHED, 0, 2160), Record(find(f"{name}_test_aug"), FINISHED)
    now = [replace(trained, weights_sha256="b" * 64), replace(evaluated, state=READY)]
    earlier = {one.run.name: one for one in (replace(trained, weights_sha256="a" * 64), evaluated)}
    assert kept_of(now, earlier, tmp_path) == set()
    assert f"{name}_test_aug is not kept, as it rests on another {name} than this one" in capsys.readouterr().out
    assert kept_of([replace(now[0], weights_sha256="a" * 64), now[1]], earlier, tmp_path) == {f"{name}_test_aug"}


def test_the_command_of_a_study_without_shared_prefixes(tmp_path: Path) -> None:
    study = Study("digits/table1", tmp_path / "x", share_prefix=False, backend="torchvision", gpus=2).begin()
    about = with_made(Record(find(R18.format("scratch", 5)), FINISHED, 0, 1800), study).made
    words = "digits/table1 --out DIR --backend torchvision --gpus 2 --no-share-prefix"
    assert about["environment"]["study"] == f"scratch-det study run {words}"
    assert "--num-gpus 2" in about["command"]


@pytest.mark.parametrize(
    ("file", "content", "error", "message"),
    [
        ("study.json", '{"experiment": "digits/table1"}', DataError, "does not say how each run was made; restore"),
        (
            "study.json",
            '{"experiment": "digits/table1", "environments": [], "runs": {}}',
            DataError,
            "does not say how [a-z]+_mask_rcnn_R_18_FPN_[2-6]x_gn was made; restore",
        ),
        ("study.json", "{", DataError, "truncated; restore the folder"),
        ("study.json", None, DataError, "study.json is missing beside runs.csv; restore"),
        ("runs.csv", "run\n", DataError, "there is no column state; restore"),
        ("curves.csv", "run,metric,iterations,value\n", DataError, "are not those that study.json describes"),
        ("", "", UserError, "is a file; name a folder"),
    ],
)
def test_results_that_were_edited(
    out: Path, tmp_path: Path, file: str, content: str | None, error: type[Exception], message: str
) -> None:
    results = tmp_path / "results"
    path = results / file
    if file:
        report(out, results)
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(error, match=message):
        report(out, results)
    assert content is None or path.read_text() == content


def test_results_in_a_study(out: Path) -> None:
    with pytest.raises(UserError, match="is in a study's folder"):
        report(out, out)


def test_other_recipes_may_use_other_images_of_the_same_data(out: Path, tmp_path: Path) -> None:
    for k in (6, 5):
        path = out / R18.format("scratch", k) / "environment.json"
        about = {"images": 9, "used_images_sha256": f"{k}"}
        path.write_text(json.dumps({**json.loads(path.read_text()), "datasets": {"digits_train": about}}))
    report(out, tmp_path / "results")


@pytest.mark.parametrize("is_here", [True, False])
def test_other_data(out: Path, tmp_path: Path, is_here: bool) -> None:
    """In one folder, or here and in another."""
    for k in (6, 5):
        path = out / R18.format("scratch", k) / "environment.json"
        about = json.loads(path.read_text())
        path.write_text(json.dumps({**about, "datasets": {"digits_train": {"images": k}}}))
    if not is_here:
        shutil.copytree(out, tmp_path / "other")
        text = (out / "study.json").read_text().replace(str(out), str(tmp_path / "other"))
        (tmp_path / "other/study.json").write_text(text)
        shutil.rmtree(tmp_path / "other" / R18.format("scratch", 5))
        report(tmp_path / "other", tmp_path / "results")
        shutil.rmtree(out / R18.format("scratch", 6))
    with pytest.raises(
        UserError, match=r"made with another digits_train than others: \{'images': 6\}, \{'images': 5\}"
    ):
        report(out, tmp_path / "results")
    assert not [*(out / "report").iterdir()]


def test_same_from_results(out: Path, tmp_path: Path) -> None:
    report(out, tmp_path / "results")
    (again,) = map(as_markdown, tables_of("digits/table1", load(tmp_path / "results")))
    assert files(out)["table1.md"].decode() == again
