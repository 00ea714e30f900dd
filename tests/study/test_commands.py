"""scratch-det study run, status and plan: what is rejected, and what is shown."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT
from study.player import BRANCH, PART, TRUNK, play

from scratch_det.commands.study import ARGUMENTS
from scratch_det.study import digits
from scratch_det.study.commands import LAUNCHERS, SLURM, Screen, status, status_text
from scratch_det.study.experiments import jobs_of, of_place
from scratch_det.study.records import BLOCKED, RUNNING, WAITING, survey
from scratch_det.study.study import Study

TORCHVISION = ("--backend", "torchvision")


def test_every_launcher_has_a_name() -> None:
    assert ARGUMENTS["--launcher"]["choices"] == [*LAUNCHERS, SLURM]


class TestBadInput:
    def test_unknown_experiment(self, study_tool: Callable, tmp_path: Path) -> None:
        code, said = study_tool("run", "digits/smok", "--out", tmp_path / "new")
        assert code == 2
        assert "no experiment digits/smok; did you mean 'digits/smoke'?" in said
        assert not (tmp_path / "new").exists()

    def test_folder_of_another_experiment(self, study_tool: Callable, study: Study) -> None:
        code, said = study_tool("run", "digits/norms", "--out", study.out, *TORCHVISION)
        assert code == 2
        assert "holds another study: experiment was digits/smoke, now digits/norms" in said

    @pytest.mark.usefixtures("digits")
    def test_folder_of_something_else(self, study_tool: Callable, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine/thesis.tex").touch()
        code, said = study_tool("run", "digits/smoke", "--out", tmp_path / "mine")
        assert code == 2
        assert "has thesis.tex in it, but no study.json" in said
        assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
        code, said = study_tool("status", "--out", tmp_path)
        assert code == 2
        assert "no study was started there" in said

    def test_nonsense_numbers(self, study_tool: Callable, tmp_path: Path) -> None:
        assert study_tool("run", "digits/smoke", "--out", tmp_path / "x", "--gpus", 0)[0] == 2
        code, said = study_tool("run", "digits/smoke", "--out", tmp_path / "x", "--gpus", 3)
        assert code == 2
        assert "smoke_3x has 4 images an iteration, which 3 processes cannot share evenly" in said
        assert not (tmp_path / "x").exists()
        assert study_tool("plan", "table1", "--seconds-per-iter", -1)[0] == 2

    def test_no_data(self, study_tool: Callable, digits: Path, tmp_path: Path) -> None:
        """Rejected before anything is written."""
        (digits / "train").rmdir()
        code, said = study_tool("run", "digits/smoke", "--out", tmp_path / "x", *TORCHVISION)
        assert code == 2
        assert f"{TRUNK}: data set 'digits_train_120' is not complete under" in said
        assert "make it with: scratch-det data digits" in said
        assert not (tmp_path / "x").exists()

    def test_a_search_that_cannot_be(
        self, study_tool: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its points are checked before the runs that it needs are started."""
        (tmp_path / "grid.yaml").write_text("SOLVER: {GAMA: [0.1, 0.2]}")
        monkeypatch.setattr(digits, "GRID", str(tmp_path / "grid.yaml"))
        monkeypatch.setattr("scratch_det.study.experiments.experiments", digits.runs)
        code, said = study_tool("run", "search_third", "--out", tmp_path / "x", *TORCHVISION)
        assert code == 2
        assert "at the grid point GAMA 0.1: " in said
        assert not (tmp_path / "x").exists()

    @pytest.mark.usefixtures("digits")
    def test_a_name_that_is_too_long(self, study_tool: Callable, tmp_path: Path) -> None:
        code, said = study_tool("run", "digits/smoke", "--out", tmp_path / ("x" * 300), *TORCHVISION)
        assert code == 2
        assert "File name too long" in said

    def test_damaged_study(self, study: Study, study_tool: Callable) -> None:
        path = study.out / "study.json"
        content = json.loads(path.read_text())
        path.write_text(path.read_text().replace('"gpus": 1', '"gpu": 1'))
        code, said = study_tool("status", "--out", study.out)
        assert code == 2
        assert "study.json is damaged: Object contains unknown field `gpu`; restore it from a copy" in said
        (study.out / TRUNK).mkdir()
        path.write_text("")
        said = study_tool("status", "--out", study.out)[1]
        assert "study.json is damaged: Input data was truncated; restore it from a copy" in said
        for key, value, kind in (("experiment", 5, "int"), ("gpus", "2", "str"), ("gpus", True, "bool")):
            path.write_text(json.dumps({**content, key: value}))
            code, said = study_tool("status", "--out", study.out)
            assert (code, said.count("\n")) == (2, 1)
            assert f"got `{kind}` - at `$.{key}`; restore it from a copy" in said
        path.write_text(json.dumps({**content, "out": None}))
        code, said = study_tool("status", "--out", study.out)
        assert (code, said.count("\n")) == (2, 1)
        assert "restore it from a copy, or name another folder" in said
        path.unlink()
        said = study_tool("run", "digits/smoke", "--out", study.out)[1]
        assert f"has {TRUNK} in it, but no study.json; if it is lost, restore it from a copy" in said

    def test_moved_study(self, study: Study, study_tool: Callable, tmp_path: Path) -> None:
        study.out.rename(tmp_path / "elsewhere")
        code, said = study_tool("status", "--out", tmp_path / "elsewhere")
        assert code == 2
        assert "was begun as" in said

    @pytest.mark.usefixtures("digits")
    def test_no_folder_can_be_made(self, study_tool: Callable, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        code, said = study_tool("run", "digits/smoke", "--out", tmp_path / "file", *TORCHVISION)
        assert code == 2
        assert "file: File exists; move away what is there, or name another" in said


class TestDryRun:
    def test_starts_nothing(self, study_tool: Callable, tmp_path: Path) -> None:
        """A line a step: the trunk in two parts, the branch."""
        code, said = study_tool("run", "digits/smoke", "--out", tmp_path / "x", *TORCHVISION, "--dry-run")
        assert code == 0
        assert [line.split("-m scratch_det ")[1].split()[0] for line in said.splitlines()] == ["train"] * 3
        assert [" --stop-at 12 " in line for line in said.splitlines()] == [True, False, False]
        assert not (tmp_path / "x").exists()

    def test_of_a_study_that_has_begun(self, study: Study, study_tool: Callable) -> None:
        """Its number of threads counts, and no other study's commands are printed."""
        words = ("run", "digits/smoke", "--out", study.out, *TORCHVISION, "--dry-run")
        code, said = study_tool(*words, "--max-parallel", 1)
        assert (code, said.count("OMP_NUM_THREADS=1 ")) == (0, 3)
        assert study_tool(*words, "--no-share-prefix")[0] == 2


class TestStatus:
    def test_table(self, study: Study, capsys: pytest.CaptureFixture) -> None:
        assert play(study, names=(TRUNK,)) == 0
        capsys.readouterr()
        status(study.out)
        said = capsys.readouterr().out
        assert f"{TRUNK}  finished  27/27      box 12.5" in said
        assert f"{BRANCH}  ready" in said
        assert "1 finished, 1 ready; 27 of 33 iterations; 0:00:00 of training left" in said

    def test_time_left(self, study: Study) -> None:
        """6 iterations at the pace of 27 in 2,700 seconds."""
        (study.out / TRUNK / "checkpoints").mkdir(parents=True)
        (study.out / TRUNK / "checkpoints/model_0000011.pth").touch()
        (study.out / TRUNK / "result.json").write_text('{"iteration": 27, "seconds": 2700}')
        assert "27 of 33 iterations; 0:10:00 of training left" in status_text(survey(study.jobs, study.out, {}), study)

    def test_default_folder(self, study: Study, study_tool: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same as that of run and report."""
        monkeypatch.setattr("scratch_det.study.commands.STUDIES", study.out.parent)
        study.out.rename(study.out.with_name("digits-smoke"))
        path = study.out.with_name("digits-smoke") / "study.json"
        path.write_text(path.read_text().replace(str(study.out), str(path.parent)))
        code, said = study_tool("status", "digits/smoke")
        assert code == 0
        assert f"{TRUNK}  ready" in said
        code, said = study_tool("status")
        assert code == 2
        assert "give EXPERIMENT or --out DIR" in said

    def test_eta(self, study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        """At the speed of all runs together since the start: 27 iterations in 122 seconds, so the other 6 take 27."""
        now = [50.0]
        monkeypatch.setattr("time.monotonic", lambda: now[0])
        with Screen(study, {job.name for job in study.jobs}, survey(study.jobs, study.out, {})) as screen:
            now[0] += 61
            screen.show(survey(study.jobs, study.out, {}))
            assert capsys.readouterr().out == "digits/smoke: 0/33\n"  # there is no speed yet
            (study.out / TRUNK / "checkpoints").mkdir(parents=True)
            (study.out / TRUNK / "checkpoints/model_0000011.pth").touch()
            (study.out / TRUNK / "result.json").write_text('{"iteration": 27}')
            now[0] += 61
            screen.show(survey(study.jobs, study.out, {}))
        said = capsys.readouterr().out
        assert f"{TRUNK}: finished 27/27" in said
        assert "digits/smoke: 27/33, eta 0:00:27" in said

    def test_eta_without_failed_runs(self, study: Study, capsys: pytest.CaptureFixture) -> None:
        """Nor of those that need them; a run that goes back to its last checkpoint is no progress."""
        trunk, branch = survey(study.jobs, study.out, {})

        def show(done: int, state: str) -> str:
            screen.last_line -= 100
            screen.show([replace(trunk, state=RUNNING, iteration=done), replace(branch, state=state)])
            return capsys.readouterr().out.splitlines()[-1]

        with Screen(study, {TRUNK, BRANCH}, [replace(trunk, iteration=20), branch]) as screen:
            assert show(12, WAITING) == "digits/smoke: 12/33"
            assert screen.eta() == ""
            assert show(18, BLOCKED).startswith("digits/smoke: 18/27, eta ")
            screen.began = time.monotonic() - 60
            assert screen.eta() in ("eta 0:01:30", "eta 0:01:31")


def test_graph(study_tool: Callable, tmp_path: Path) -> None:
    """What another program needs to run a study: commands, needs, outputs."""
    code, said = study_tool("plan", "digits/smoke", "--json", "--gpus", 1, "--out", tmp_path / "x")
    assert code == 0
    steps = {step["name"]: step for step in json.loads(said)}
    assert {name: step["needs"] for name, step in steps.items()} == {PART: [], TRUNK: [PART], BRANCH: [PART]}
    assert steps[PART]["output"] == f"{tmp_path}/x/{TRUNK}/checkpoints/model_0000011.pth"
    assert steps[BRANCH]["output"] == f"{tmp_path}/x/{BRANCH}/result.json"
    assert steps[BRANCH]["command"][1:4] == ["-m", "scratch_det", "train"]
    assert steps[BRANCH]["gpus"] == 0
    status(tmp_path / "x")  # the study is begun there


def test_graph_of_a_search(study_tool: Callable) -> None:
    """Pre-training, the points, the choice, and a run with what it found."""
    name = "scratch_mask_rcnn_R_18_FPN_3x_gn_third"
    code, said = study_tool("plan", name, "--json", "--gpus", 1)
    assert code == 0
    steps = {step["name"]: step for step in json.loads(said)}
    points = [point for point in steps if point.startswith("search_third/trial_")]
    assert len(points) == 4
    assert {tuple(steps[point]["needs"]) for point in points} == {("pretrain_digits_R_18_gn",)}
    assert steps["search_third"]["needs"] == points
    assert "--choose" in steps["search_third"]["command"]
    assert steps[name]["needs"] == ["search_third"]


@pytest.mark.parametrize(("flag", "iterations"), [("--share-prefix", "3,120,000"), ("--no-share-prefix", "7,200,000")])
def test_table1(study_tool: Callable, flag: str, iterations: str) -> None:
    code, said = study_tool("plan", "table1", flag, "--gpus", 8, "--seconds-per-iter", 0.5)
    assert code == 0
    assert f"iterations: {iterations}" in said
    hours = int(iterations.replace(",", "")) / 7200
    assert f"time: {hours:,.0f} h on 8 GPUs one run after the other, {8 * hours:,.0f} GPU hours" in said


@pytest.mark.parametrize(
    "experiment", sorted({place for run in of_place("paper") for place in run.places} | {"digits"})
)
def test_every_experiment(study_tool: Callable, experiment: str) -> None:
    code, said = study_tool("plan", experiment)
    assert code == 0
    assert "GB of checkpoints" in said


def test_order() -> None:
    """Pre-training, trunk, branches, switch, evaluation."""
    for experiment in ("paper", "digits"):
        seen: set[str] = set()
        for job in jobs_of(of_place(experiment)):
            assert seen.issuperset(job.needs), job.name
            seen.add(job.name)


def test_needs_come_along() -> None:
    names = {job.name for job in jobs_of(of_place("scratch_cascade_mask_rcnn_R_50_FPN_9x_gn_train_aug_test_aug"))}
    plain = "scratch_mask_rcnn_R_50_FPN_9x_gn_train_aug"
    cascade = plain.replace("mask_rcnn", "cascade_mask_rcnn")
    assert names == {plain, cascade, f"{cascade}_test_aug"}


def test_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys, runpy; sys.argv = ['study.py', 'plan', 'paper']\n"
        "runpy.run_path('tools/study.py', run_name='__main__')\n"
        "assert not {'torch', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
