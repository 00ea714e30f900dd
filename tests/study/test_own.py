"""A study of one's own runs: what its YAML file says, what is rejected, and the report of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, load_command

from scratch_det.command_line import load_project
from scratch_det.errors import ConfigError, UserError
from scratch_det.evaluation.metrics import PRETRAINED, SCRATCH
from scratch_det.study import own
from scratch_det.study.commands import folder_of, plan_text
from scratch_det.study.experiments import of_place
from scratch_det.study.records import load
from scratch_det.study.report import write_report
from scratch_det.study.run import PRETRAIN, TRAIN
from scratch_det.study.study import Study, disagreements, study_in

STUDY = """
scratch: {recipe: scratch.yaml, seeds: [1, 2], changes: {SOLVER.GAMMA: 0.02}}
pretrained: {recipe: ../elsewhere/pretrained.yaml}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder my/ with a study of two recipes; it is named from the folder that it is in."""
    for name, text in {
        "my/study.yaml": STUDY,
        "my/scratch.yaml": "SOLVER:\n  MAX_ITER: 40\n",
        "elsewhere/pretrained.yaml": "_BASE_: ../my/scratch.yaml\nMODEL:\n  WEIGHTS: some.pkl\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "my"


@pytest.fixture
def begun(folder: Path) -> Study:
    return Study("my/study.yaml", Path("out"), backend="torchvision", threads=1).begin()


def finish(study: Study, name: str, ap: float) -> None:
    """Leave what a finished run of 40 iterations leaves, as far as a report needs it."""
    run = study.out / name
    run.mkdir()
    lines = [{"iteration": at - 1, "bbox/AP": ap * at / 40, "total_loss": 1.0, "time": 1.0} for at in (20, 40)]
    (run / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "result.json").write_text(
        json.dumps({"iteration": 40, "seconds": 40.0, "metrics": {"bbox": {"AP": ap, "AP50": 2 * ap}}})
    )


class TestRuns:
    def test_what_a_recipe_says(self, folder: Path) -> None:
        first, second, pretrained = own.runs(Path("my/study.yaml"))
        assert (first.name, second.name, pretrained.name) == ("scratch", "scratch_seed2", "pretrained")
        assert first.config == second.config == folder / "scratch.yaml"
        assert pretrained.config.resolve() == folder.parent / "elsewhere/pretrained.yaml"
        assert (first.init, second.init, pretrained.init) == (SCRATCH, SCRATCH, PRETRAINED)
        assert {run.iterations for run in (first, second, pretrained)} == {40}
        assert {run.kind for run in (first, second, pretrained)} == {TRAIN}

    def test_commands(self, begun: Study) -> None:
        first, second, pretrained = ([*job.run.flags, *job.overrides(begun.out)] for job in begun.jobs)
        assert first == ["SOLVER.GAMMA", "0.02", "SEED", "1", "OUTPUT_DIR", "out/scratch"]
        assert second == ["SOLVER.GAMMA", "0.02", "SEED", "2", "OUTPUT_DIR", "out/scratch_seed2"]
        assert pretrained == ["OUTPUT_DIR", "out/pretrained"]

    def test_changes_count(self, folder: Path) -> None:
        (folder / "study.yaml").write_text("short: {recipe: scratch.yaml, changes: {SOLVER: {MAX_ITER: 3}}}")
        (run,) = own.runs(folder / "study.yaml")
        assert (run.iterations, run.changes) == (3, ("SOLVER.MAX_ITER", "3"))

    def test_a_recipe_of_a_project(self, folder: Path) -> None:
        """The command line loads it, for the recipe's keys; its run is told."""
        recipe = ROOT / "projects/lsj/configs/digits_mask_rcnn_R_18_FPN_2ep_lsj.yaml"
        line = {"recipe": str(recipe), "project": str(ROOT / "projects/lsj")}
        (folder / "study.yaml").write_text(yaml.safe_dump({"jitter": line}))
        load_project(ROOT / "projects/lsj")
        (run,) = own.runs(folder / "study.yaml")
        assert (run.iterations, run.flags) == (500, ("--project", str(ROOT / "projects/lsj")))

    def test_weights_of_ones_own(self, folder: Path) -> None:
        (folder / "study.yaml").write_text(
            "tuned: {recipe: scratch.yaml, pretraining: crops}\ncrops: {recipe: scratch.yaml}\n"
        )
        study = Study("my/study.yaml", Path("out"), backend="torchvision")
        crops, tuned = study.jobs
        assert (crops.run.kind, tuned.run.kind, tuned.run.init) == (PRETRAIN, TRAIN, PRETRAINED)
        assert tuned.needs == ("crops",)
        assert tuned.overrides(Path("out"))[:2] == ["MODEL.WEIGHTS", "out/crops/backbone.pth"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("scratch: scratch.yaml", ":1: scratch is 'scratch.yaml': write scratch: {recipe: FILE.yaml}"),
            ("a: {seeds: [1]}", ":1: a has no recipe: write a: {recipe: FILE.yaml}"),
            ("\na: {recipes: b.yaml}", ":2: a has no recipes; did you mean 'recipe'?; it may have recipe, seeds, "),
            ("a: {recipe: b.json}", ":1: a.recipe is 'b.json', expected a file, NAME.yaml"),
            ("a: {recipe: scratch.yaml, seeds: 3}", ":1: a.seeds is 3, expected a list of different numbers, such as"),
            ("a: {recipe: scratch.yaml, seeds: [1, 1]}", ":1: a.seeds is [1, 1], expected a list of different"),
            ("a: {recipe: scratch.yaml, changes: 5}", ":1: a.changes is 5, expected {KEY: VALUE}"),
            ("jobs: {recipe: scratch.yaml}", ":1: a run cannot be called jobs: take another name"),
            ("a_seed2: {recipe: scratch.yaml}", ":1: a run cannot be called a_seed2: take another name"),
            ("3.5k: {recipe: scratch.yaml}", ":1: a run cannot be called 3.5k: take another name, of letters"),
            ("_BASE_: other.yaml\na: {recipe: scratch.yaml}", ":1: a file of runs has no _BASE_: list all runs in it"),
            ("a: {recipe: scratch.yaml}\nb: {}", ": b has no recipe: write b: {recipe: FILE.yaml}"),
            ("a: {recipe: scratch.yaml}\nA: {recipe: scratch.yaml}", ": a and A would be one folder on some disks"),
            (
                "a: {recipe: scratch.yaml, seeds: [1, 2], changes: {SEED: 7}}",
                ":1: a changes SEED, which seeds sets: leave one of them out",
            ),
            (
                "a: {recipe: scratch.yaml, changes: {OUTPUT_DIR: elsewhere}}",
                ":1: a changes OUTPUT_DIR, which its name sets",
            ),
            (
                "a: {recipe: scratch.yaml, pretraining: b, changes: {MODEL.WEIGHTS: x.pth}}\nb: {recipe: scratch.yaml}",
                ":1: a changes MODEL.WEIGHTS, which pretraining sets",
            ),
            ("a: {recipe: scratch.yaml, project: none}", ": a needs a project: if you trust it, give --project /"),
            ("a: {recipe: scratch.yaml, pretraining: a}", ":1: a starts from a, expected a run of this file that"),
            ("a: {recipe: none.yaml}", "/none.yaml does not exist"),
            (
                "a:\n  recipe: scratch.yaml\n  changes: {SOLVER.MAX_ITR: 3}",
                ":2: a: unknown key SOLVER.MAX_ITR; did you mean 'SOLVER.MAX_ITER'?",
            ),
            (
                "a: {recipe: scratch.yaml, changes: {DATASETS.TEST: [one, two]}}",
                ":1: a has DATASETS.TEST ('one', 'two'), but a study takes one: name it",
            ),
            ("a: {recipe: scratch.yaml", ": not valid YAML"),
            ("a: {recipe: scratch.yaml}\na: {recipe: scratch.yaml}", ":2: a is already in line 1"),
            ("", ": expected lines such as"),
        ],
    )
    def test_mistakes(self, folder: Path, text: str, message: str) -> None:
        (folder / "study.yaml").write_text(text)
        with pytest.raises(ConfigError) as raised:
            of_place("my/study.yaml")
        said = str(raised.value)
        assert said.startswith("my/study.yaml")
        assert message in said
        assert "\n" not in said

    def test_no_file(self, folder: Path) -> None:
        with pytest.raises(UserError, match=r"my/none\.yaml does not exist"):
            of_place("my/none.yaml")


class TestStudy:
    def test_begun_again(self, begun: Study) -> None:
        assert study_in(Path("out")) == begun
        assert [job.name for job in study_in(Path("out")).jobs] == ["scratch", "scratch_seed2", "pretrained"]
        assert [job.name for job in begun.picked(["pretrained"])] == ["pretrained"]
        with pytest.raises(UserError, match=r"my/study\.yaml has no run pretraind; did you mean 'pretrained'"):
            begun.picked(["pretraind"])

    def test_an_edited_recipe(self, begun: Study, folder: Path) -> None:
        """Runs may be added to the file; one that has begun keeps its recipe."""
        (begun.out / "scratch/checkpoints").mkdir(parents=True)
        (begun.out / "scratch/checkpoints/model_0000019.pth").touch()
        (begun.out / "scratch/config.yaml").write_text("SOLVER:\n  GAMMA: 0.02\n  MAX_ITER: 40\nSEED: 1\n")
        assert list(disagreements(begun.jobs[0], begun.out, begun.backend)) == []
        (folder / "study.yaml").write_text(STUDY.replace("0.02", "0.1") + "more: {recipe: scratch.yaml}\n")
        later = study_in(begun.out)
        assert [job.name for job in later.jobs][-1] == "more"
        assert any(
            "SOLVER.GAMMA 0.02, its recipe 0.1" in line
            for line in disagreements(later.jobs[0], later.out, later.backend)
        )

    @pytest.mark.parametrize("command", ["status", "report my/study.yaml", "run my/study.yaml", "plan my/study.yaml"])
    def test_runs_no_code_that_a_file_names(
        self, command: str, begun: Study, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        """Whoever looks at a study that somebody else made has not agreed to run its project."""
        (folder / "their_code").mkdir()
        (folder / "their_code/__init__.py").write_text(
            "from pathlib import Path\nPath('ran').touch()\ndef add(): pass\n"
        )
        (folder / "study.yaml").write_text("scratch: {recipe: scratch.yaml, project: their_code}")
        out = [] if command.startswith("plan") else ["--out", "out"]
        monkeypatch.setattr("sys.argv", ["study.py", *command.split(), *out])
        with pytest.raises(SystemExit, match="2"):
            load_command("study").main()
        assert "scratch needs a project: if you trust it, give --project" in capsys.readouterr().err
        assert not Path("ran").exists()
        if command == "status":
            monkeypatch.setattr("sys.argv", ["study.py", "status", "--out", "out", "--project", "my/their_code"])
            load_command("study").main()
            assert Path("ran").exists()
            assert "1 ready" in capsys.readouterr().out

    def test_names(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        """A path may be written in several ways, and a folder is called after the file."""
        assert str(folder_of("my/study.yaml")) == "output/studies/study"
        monkeypatch.setattr("sys.argv", ["study.py", "run", "./my//study.yaml", "--dry-run", "--out", "out"])
        load_command("study").main()
        assert capsys.readouterr().out.count(f"--config-file {folder}/scratch.yaml") == 2
        assert not Path("out").exists()

    def test_plan(self, folder: Path) -> None:
        said = plan_text("my/study.yaml", share_prefix=True, gpus=1, seconds_per_iter=None)
        assert "iterations: 120, every run on its own" in said
        assert "disk: not known for 3 runs, whose model results/models.csv does not have" in said
        base = ROOT / "configs/_base_/model/mask_rcnn_R_50_FPN_gn.yaml"
        (folder / "scratch.yaml").write_text(f"_BASE_: {base}\nSOLVER:\n  MAX_ITER: 40\n")
        said = plan_text("my/study.yaml", share_prefix=True, gpus=1, seconds_per_iter=None)
        assert "GB of checkpoints" in said
        assert "not known" not in said
        (folder / "../elsewhere/pretrained.yaml").write_text("SOLVER:\n  MAX_ITER: 40\n")
        said = plan_text("my/study.yaml", share_prefix=True, gpus=1, seconds_per_iter=None)
        assert "GB of checkpoints for the others, not known for 1 run, whose model" in said


class TestReport:
    def table(self, study: Study) -> list[str]:
        return (study.out / "report/runs.csv").read_text().splitlines()

    def test_both_rows_and_curves(self, begun: Study) -> None:
        for name, ap in {"scratch": 20.0, "scratch_seed2": 22.0, "pretrained": 30.0}.items():
            finish(begun, name, ap)
        written = {path.name for path in write_report(begun, "my/study.yaml", Path("results"))}
        assert written == {"index.html", "runs.csv", "runs.md", "runs.tex", "runs.svg", "runs.png",
                           "curves.csv", "study.json"}  # fmt: skip
        header, scratch, pretrained, gap = self.table(begun)
        assert header == ",box AP,box AP50"
        assert scratch.startswith("scratch,21.0 ± 1.4")
        assert pretrained == "pretrained,30.0,60.0"
        assert gap == "scratch - pretrained,-9.0,-18.0"
        figure = (begun.out / "report/runs.svg").read_text()
        assert "scratch: 21.0" in figure
        assert "pretrained: 30.0" in figure
        page = (begun.out / "report/index.html").read_text()
        assert "my/study.yaml: report" in page
        assert "data:image/svg+xml" in page

    def test_partial(self, begun: Study) -> None:
        """No run says anything yet; then one does."""
        with pytest.raises(UserError, match="has anything to show yet"):
            write_report(begun, "my/study.yaml")
        finish(begun, "pretrained", 30.0)
        write_report(begun, "my/study.yaml")
        assert self.table(begun)[1:] == ["scratch,-,-", "pretrained,30.0,60.0", "scratch - pretrained,-,-"]

    def test_data(self, begun: Study, folder: Path) -> None:
        """As in results/: read again, and what was finished elsewhere is kept."""
        finish(begun, "pretrained", 30.0)
        write_report(begun, "my/study.yaml", Path("results"))
        about: dict[str, Any] = json.loads(Path("results/study.json").read_text())
        assert about["experiment"] == "my/study.yaml"
        assert str(folder) not in json.dumps(about)
        other = Study("my/study.yaml", Path("other"), backend="torchvision", threads=1).begin()
        finish(other, "scratch", 20.0)
        write_report(other, "my/study.yaml", Path("results"))
        kept = {one.run.name: one.metrics.get("bbox/AP") for one in load(Path("results"), of_place("my/study.yaml"))}
        assert kept == {"scratch": 20.0, "scratch_seed2": None, "pretrained": 30.0}


@pytest.mark.parametrize(("rows", "has_gap"), [(2, True), (3, False)])
def test_a_difference_is_of_two(folder: Path, begun: Study, rows: int, has_gap: bool) -> None:
    if rows == 3:
        (folder / "study.yaml").write_text(STUDY + "third: {recipe: scratch.yaml}\n")
    finish(begun, "scratch", 20.0)
    write_report(study_in(begun.out), "my/study.yaml")
    text = (begun.out / "report/runs.csv").read_text()
    assert ("scratch - pretrained" in text) == has_gap
