"""What is written of a study: its report, its results folder, and the tables and figures of the documents."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, load_tool
from run_folder import attempt, damage

from scratch_det.errors import DataError, UserError
from scratch_det.study import commands, report
from scratch_det.study.experiments import find
from scratch_det.study.records import FINISHED, READY, Curve, Record, load, save
from scratch_det.study.report import describe, kept_of, render, with_made, write_report
from scratch_det.study.report.tables import as_markdown, tables_of
from scratch_det.study.study import Study, study_in
from scratch_det.visualization import curves

R18 = "{}_mask_rcnn_R_18_FPN_{}x_gn"


class TestReport:
    @pytest.fixture
    def out(self, tmp_path: Path) -> Path:
        """A study of digits/table1 with a finished trunk and a branch; the branch's seconds count the trunk's."""
        out = tmp_path / "study"
        Study("digits/table1", out, backend="torchvision", threads=1).begin()
        trunk, branch = (out / R18.format("scratch", k) for k in (6, 5))
        for folder, length, seconds in ((trunk, 1080, 540.0), (branch, 900, 600.0)):
            folder.mkdir()
            lines = [
                {"iteration": at - 1, "time": 0.5 if at <= 780 else 1.0, "total_loss": 1.0}
                for at in range(20, length + 1, 20)
            ]
            (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
            result = {"iteration": length, "seconds": seconds, "metrics": {"bbox": {"AP": 30.0, "AP-cat": 1.0}}}
            (folder / "result.json").write_text(json.dumps(result))
            environment = {"python": "3.11", "command": f"{out}/x", "git": {"commit": "c0ffee", "diff": ""}}
            (folder / "environment.json").write_text(json.dumps(environment))
        return out

    def report(self, out: Path, results: Path | None = None) -> None:
        write_report(study_in(out), "digits/table1", results)

    def files(self, out: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (out / "report").iterdir() if path.is_file()}

    def test_files(self, out: Path, tmp_path: Path) -> None:
        self.report(out, tmp_path / "results")
        assert {"index.html", "table1.csv", "table1.md", "table1.tex"} <= self.files(out).keys()
        assert b"30.0\xe2\x80\xa0" in self.files(out)["table1.md"]
        about = json.loads((tmp_path / "results/study.json").read_text())
        trunk, branch = (R18.format("scratch", k) for k in (6, 5))
        assert (about["iterations"], about["iterations_saved_by_sharing"]) == (1080 + 120, 780)
        seconds = {name: made["seconds"] for name, made in about["runs"].items()}
        assert seconds == {trunk: 540.0, branch: 141.2}  # 600 * 120 / 510
        assert about["run_hours"] == 0.19
        assert about["runs"][branch]["command"] == (
            f"python tools/train_net.py --config-file configs/Digits/{branch}.yaml "
            f"--backend torchvision --branch-from DIR/{trunk}/checkpoints/model_0000779.pth "
            f"--resume OUTPUT_DIR DIR/{branch}"
        )
        (environment,) = about["environments"]
        command = "OMP_NUM_THREADS=1 python tools/study.py run digits/table1 --out DIR --backend torchvision --gpus 1"
        assert (environment["study"], environment["python"]) == (command, "3.11")
        assert str(tmp_path) not in json.dumps(about)
        assert [one.run.name for one in load(tmp_path / "results") if one.state == FINISHED] == [trunk, branch]

    def test_a_switch_saves_nothing(self) -> None:
        """It goes on from the other run with --no-share-prefix too."""
        branch, switch = (
            Record(find(name), FINISHED, start, length)
            for name, start, length in [
                (R18.format("scratch", 5), 780, 900),
                ("scratch_cascade_mask_rcnn_R_18_FPN_9x_gn_train_aug", 1080, 1620),
            ]
        )
        about = describe([branch, switch])
        assert (about["iterations"], about["iterations_saved_by_sharing"]) == (120 + 540, 780)

    def test_depends_on_the_numbers_alone(self, out: Path) -> None:
        self.report(out)
        first = self.files(out)
        path = out / R18.format("scratch", 6) / "result.json"
        path.write_text(path.read_text().replace("540.0", "9999.0"))
        self.report(out)
        assert self.files(out) == first

    def test_a_part_leaves_the_whole_alone(self, out: Path) -> None:
        self.report(out)
        first = self.files(out)
        write_report(study_in(out), R18.format("scratch", 6))
        assert self.files(out) == first
        assert (
            f'href="../../{R18.format("scratch", 6)}/"'
            in (out / "report" / R18.format("scratch", 6) / "index.html").read_text()
        )

    def test_what_is_not_written_any_more_is_removed(self, out: Path) -> None:
        (out / "report").mkdir()
        for name in ("table2.md", "figure8.png", "notes.md"):
            (out / "report" / name).touch()
        self.report(out)
        assert {"notes.md", "table1.md"} <= self.files(out).keys()
        assert self.files(out).keys().isdisjoint({"table2.md", "figure8.png"})

    def test_results_of_another_experiment_are_kept(self, out: Path, tmp_path: Path) -> None:
        self.report(out, tmp_path / "results")
        with pytest.raises(UserError, match="holds digits/table1, not "):
            write_report(study_in(out), R18.format("scratch", 6), tmp_path / "results")

    @pytest.fixture
    def elsewhere(self, out: Path, tmp_path: Path) -> Path:
        """The same study in another folder, where its trunk came out otherwise."""
        again = tmp_path / "again"
        shutil.copytree(out, again)
        again.joinpath("study.json").write_text((out / "study.json").read_text().replace(str(out), str(again)))
        result = again / R18.format("scratch", 6) / "result.json"
        result.write_text(json.dumps({"iteration": 1080, "metrics": {"bbox": {"AP": 31.0}}}))
        return again

    def test_made_in_parts(self, out: Path, elsewhere: Path, tmp_path: Path) -> None:
        """What got further in another folder stays, with how it was made; all else is this one's."""
        results, (trunk, branch) = tmp_path / "results", (R18.format("scratch", k) for k in (6, 5))
        self.report(elsewhere, results)
        shutil.rmtree(out / trunk)
        self.report(out, results)
        both = {one.run.name: one for one in load(results)}
        assert (both[trunk].metrics, both[branch].metrics) == ({"bbox/AP": 31.0}, {"bbox/AP": 30.0})
        about = json.loads((results / "study.json").read_text())
        assert list(about["runs"]) == [trunk, branch]
        assert about["iterations"] == 1080 + 120
        shutil.rmtree(out / branch)
        (out / trunk).mkdir()
        (out / trunk / "metrics.json").write_text('{"iteration": 19, "total_loss": 2.0}\n')
        self.report(out, results)
        assert {one.run.name: one for one in load(results)} == both

    def test_a_branch_goes_with_its_trunk(
        self, out: Path, elsewhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        """One that rests on another trunk's iterations is not set beside this one, unless the weights are the same."""
        results, (trunk, branch) = tmp_path / "results", (R18.format("scratch", k) for k in (6, 5))
        self.report(out, results)
        shutil.rmtree(elsewhere / branch)
        self.report(elsewhere, results)
        assert f"{branch} is not kept, as it rests on another {trunk}" in capsys.readouterr().out
        assert {one.run.name for one in load(results) if one.state == FINISHED} == {trunk}

    def test_an_evaluation_goes_with_what_it_evaluates(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        name = "pretrained_cascade_mask_rcnn_R_18_FPN_6x_gn_train_aug"
        trained, evaluated = Record(find(name), FINISHED, 0, 1080), Record(find(f"{name}_test_aug"), FINISHED)
        now = [replace(trained, weights_sha256="b" * 64), replace(evaluated, state=READY)]
        earlier = {one.run.name: one for one in (replace(trained, weights_sha256="a" * 64), evaluated)}
        assert kept_of(now, earlier, tmp_path) == set()
        assert f"{name}_test_aug is not kept, as it rests on another {name} than this one" in capsys.readouterr().out
        assert kept_of([replace(now[0], weights_sha256="a" * 64), now[1]], earlier, tmp_path) == {f"{name}_test_aug"}

    def test_the_command_of_a_study_without_shared_prefixes(self, tmp_path: Path) -> None:
        study = Study("digits/table1", tmp_path / "x", share_prefix=False, backend="torchvision", gpus=2).begin()
        about = with_made(Record(find(R18.format("scratch", 5)), FINISHED, 0, 900), study).made
        words = "digits/table1 --out DIR --backend torchvision --gpus 2 --no-share-prefix"
        assert about["environment"]["study"] == f"python tools/study.py run {words}"
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
        self, out: Path, tmp_path: Path, file: str, content: str | None, error: type[Exception], message: str
    ) -> None:
        results = tmp_path / "results"
        path = results / file
        if file:
            self.report(out, results)
        if content is None:
            path.unlink()
        else:
            path.write_text(content)
        with pytest.raises(error, match=message):
            self.report(out, results)
        assert content is None or path.read_text() == content

    def test_results_in_a_study(self, out: Path) -> None:
        with pytest.raises(UserError, match="is in a study's folder"):
            self.report(out, out)

    @pytest.mark.parametrize("is_here", [True, False])
    def test_other_data(self, out: Path, tmp_path: Path, is_here: bool) -> None:
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
            self.report(tmp_path / "other", tmp_path / "results")
            shutil.rmtree(out / R18.format("scratch", 6))
        with pytest.raises(
            UserError, match=r"made with another digits_train than others: \{'images': 6\}, \{'images': 5\}"
        ):
            self.report(out, tmp_path / "results")
        assert not [*(out / "report").iterdir()]

    @pytest.mark.parametrize("kind", ["noise", "another type", "null keys", "a folder"])
    def test_a_damaged_run_folder(self, out: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A message that names it, or what can be read of the study; also of its state, and of curves."""
        monkeypatch.setattr(report, "draw", lambda *_: [])
        monkeypatch.setattr(curves, "save_figure", lambda *_: tmp_path)
        folder = out / R18.format("scratch", 6)
        (folder / "config.yaml").write_text(Study("digits/table1", out).jobs[0].recipe(out, "torchvision").dump())
        (folder / "status.json").write_text('{"state": "finished", "iteration": 3, "eta": 1.0}')
        good = shutil.copytree(folder, tmp_path / "good")
        wrong = []
        for file in ("config.yaml", "environment.json", "metrics.json", "result.json", "status.json"):
            damage(folder / file, kind)
            for action in (
                lambda: self.report(out),
                lambda: commands.status(out),
                lambda: curves.compare_runs([f"a={folder}"], ["total_loss"], tmp_path / "a.png"),
            ):
                said = attempt(action)
                wrong += [f"{file}: {said}"] * ("UNEXPECTED" in said or (said != "" and str(folder) not in said))
            shutil.rmtree(folder)
            shutil.copytree(good, folder)
        assert wrong == []

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"git": "abc"}, r"Expected `object \| null`, got `str` - at `\$\.git"),
            ({"git": {"commit": 5}}, r"got `int` - at `\$\.git"),
            ({"packages": [1]}, r"got `array` - at `\$\.packages`"),
        ],
    )
    def test_an_edited_environment(self, out: Path, content: dict, message: str) -> None:
        (out / R18.format("scratch", 6) / "environment.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match=message):
            self.report(out)

    def test_nothing_of_the_part_itself(self, tmp_path: Path) -> None:
        """Runs that it needs have something to show."""
        study = Study("digits/figure8", tmp_path / "study").begin()
        folder = study.out / "pretrain_digits_R_18_gn"
        folder.mkdir()
        (folder / "metrics.json").write_text('{"iteration": 19, "total_loss": 2.0}\n')
        with pytest.raises(UserError, match=r"no run of digits/figure8 .* has anything to show yet"):
            write_report(study, "digits/figure8")
        assert not (study.out / "report").exists()

    def test_same_from_results(self, out: Path, tmp_path: Path) -> None:
        self.report(out, tmp_path / "results")
        (again,) = map(as_markdown, tables_of("digits/table1", load(tmp_path / "results")))
        assert self.files(out)["table1.md"].decode() == again

    @pytest.mark.parametrize(
        ("experiment", "message"),
        [
            ("digits/figure4", "holds the study digits/table1, of which digits/figure4 is no part"),
            (R18.format("scratch", 2), "has anything to show yet"),
            ("digits/tabel1", "did you mean 'digits/table1'"),
        ],
    )
    def test_rejected(self, out: Path, experiment: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            write_report(study_in(out), experiment)
        assert not (out / "report").exists()

    def test_tool(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
        monkeypatch.setattr("sys.argv", ["study.py", "report", "table1", "--out", str(tmp_path)])
        with pytest.raises(SystemExit) as end:
            load_tool("study").main()
        assert end.value.code == 2
        assert "no study was started there" in capsys.readouterr().err

    def test_failures_name_no_folders(self, out: Path) -> None:
        (out / f"jobs/{R18.format('scratch', 4)}.exit").write_text("2\n")
        (out / f"jobs/{R18.format('scratch', 4)}.log").write_text(f"--- started now\nerror: {out}/x is broken\n")
        checkpoint = out / R18.format("scratch", 6) / "checkpoints" / "model_0000599.pth"
        checkpoint.parent.mkdir()
        checkpoint.touch()
        self.report(out)
        assert f"{R18.format('scratch', 4)} failed: exit code 2: x is broken".encode() in self.files(out)["table1.md"]


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
    stale = [root / "README.md", root / "docs/digits/SOURCE"]
    assert render(root, check=True) == stale
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
    curves = {"bbox/AP": ((540, 15.0), (1080, 30.0))}
    save([record(30.0, curves)], root / "results/digits")
    render(root)
    source, figure = root / "docs/digits/SOURCE", root / "docs/digits/figure1.png"
    assert f"{hashlib.sha256(figure.read_bytes()).hexdigest()}  figure1.png\n" in source.read_text()
    other = figure.with_name("photo.png")
    other.touch()
    assert render(root, check=True) == []
    figure.write_bytes(figure.read_bytes() + b"0")
    assert render(root, check=True) == [source]
    figure.unlink()
    assert render(root, check=True) == [source]
    assert render(root) == [source]
    assert figure.exists()
    save([record(30.0)], root / "results/digits")
    render(root)
    left = {path.name for path in source.parent.iterdir()}
    assert left == {"SOURCE", "photo.png", "figure5.svg", "figure5.png"}  # the bar of 30.0 AP


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
    done = subprocess.run([sys.executable, ROOT / "tools/render_docs.py", "--check"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
