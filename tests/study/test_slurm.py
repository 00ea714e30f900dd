"""Studies on a cluster: rejections and the graph anywhere, and real jobs where SLURM is installed."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from run_folder import is_same, read
from study.player import BRANCH, PART, SUBSET, TRUNK, states
from study.slurm_cluster import cluster, field, said, skip_without_slurm, start_now, wait_for
from study.stub_slurm import SUBMITTED, queue, script, submitted

from scratch_det.distributed.launch import read_world
from scratch_det.errors import ConfigError, UserError
from scratch_det.study.local import alone_in
from scratch_det.study.records import FAILED, INTERRUPTED, QUEUED, RUNNING, survey
from scratch_det.study.run import Step
from scratch_det.study.slurm import Slurm
from scratch_det.study.study import LOCK, Study

MINUTES = 600.0


class TestRejections:
    def rejected(self, study_tool: Callable, out: Path, *arguments: Any) -> str:
        code, said = study_tool("run", "digits/smoke", "--out", out, *arguments)
        assert (code, out.exists(), said.count("\n")) == (2, False, 1)
        return said

    def test_no_slurm(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, study_tool: Callable) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        assert "there is no sbatch in PATH" in self.rejected(study_tool, tmp_path / "study", "--launcher", "slurm")

    def test_no_answer(self, programs: Path, tmp_path: Path, study_tool: Callable) -> None:
        script(programs, "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
        said = self.rejected(study_tool, tmp_path / "study", "--launcher", "slurm")
        assert "squeue does not answer (slurm_load_jobs error: Unable to contact slurm controller)" in said

    def test_a_template_for_nobody(self, tmp_path: Path, study_tool: Callable) -> None:
        said = self.rejected(study_tool, tmp_path / "study", "--slurm", ROOT / "docs/slurm.sh")
        assert "the launcher is local" in said

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(
            ConfigError, match=r"No such file or directory; expected a job script such as docs/slurm\.sh"
        ):
            Slurm(tmp_path, tmp_path / "none.sh")


class TestGraph:
    def test_dependencies(self, programs: Path, study: Study, study_tool: Callable) -> None:
        """A branch waits for the part of the trunk that it needs; no two jobs of a run go on at once."""
        words = ("run", "digits/smoke", "--out", study.out, "--backend", "torchvision", "--launcher", "slurm")
        code, told = study_tool(*words)
        assert code == 0
        assert "submitted 3 jobs: 1 2 3; see scratch-det study status" in told
        jobs = submitted(programs)
        mark = Slurm(study.out).mark
        assert [jobs[name][1] for name in (PART, TRUNK, BRANCH)] == [
            f"--job-name={TRUNK}.{mark}", f"--job-name={TRUNK}.{mark}", f"--job-name={BRANCH}.{mark}",
        ]  # fmt: skip
        assert [jobs[name][2] for name in (PART, TRUNK, BRANCH)] == [
            "--dependency=singleton", "--dependency=afterok:1,singleton", "--dependency=afterok:1,singleton",
        ]  # fmt: skip
        assert set(jobs[PART]) > {"--parsable", "--requeue", "--kill-on-invalid-dep=yes", "--open-mode=append"}
        assert (study.out / f"jobs/{BRANCH}.sh").read_text().startswith("#!/bin/bash")

    def test_what_is_done_is_not_submitted(self, programs: Path, study: Study) -> None:
        (study.out / TRUNK / "checkpoints").mkdir(parents=True)
        (study.out / TRUNK / "checkpoints/model_0000011.pth").touch()
        assert len(Slurm(study.out).submit(study.steps())) == 2
        assert submitted(programs)[BRANCH][2] == "--dependency=singleton"

    def test_points_of_a_search(self, programs: Path, tmp_path: Path) -> None:
        """At once, under a name each, as they write into folders of their own; then the choice."""
        study = Study("digits/small_data", tmp_path / "study", backend="torchvision", threads=1).begin()
        (job,) = study.picked(["search_third"])
        Slurm(study.out).submit(study.steps([job]))
        jobs = submitted(programs)
        assert len({words[1] for words in jobs.values()}) == 5
        assert jobs["search_third"][2] == "--dependency=afterany:1,afterany:2,afterany:3,afterany:4,singleton"

    def test_sbatch_rejects(self, programs: Path, study: Study) -> None:
        script(programs, "sbatch", "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1")
        with pytest.raises(UserError, match=f"{PART}: sbatch: error: invalid partition specified: gpu; 0 jobs are"):
            Slurm(study.out).submit(study.steps())

    def test_submitted_again(self, programs: Path, study: Study) -> None:
        """What is queued or running is left out, and waited for; also where the first submission broke off."""
        slurm = Slurm(study.out)
        queue(programs, f"41 RUNNING {TRUNK}.{slurm.mark} {PART}", f"42 COMPLETING {BRANCH}.{slurm.mark} {BRANCH}",
              f"43 PENDING other.{slurm.mark}x {TRUNK}")  # fmt: skip
        assert slurm.submit(study.steps()) == ["1", "2"]
        jobs = submitted(programs)
        assert set(jobs) == {TRUNK, BRANCH}
        assert jobs[BRANCH][2] == "--dependency=afterok:41,singleton"
        assert f"--comment={BRANCH}" in jobs[BRANCH]
        queue(programs, *(f"{number} PENDING {name.partition('@')[0]}.{slurm.mark} {name}"
                          for number, name in enumerate((PART, TRUNK, BRANCH))))  # fmt: skip
        assert slurm.submit(study.steps()) == []

    @pytest.mark.parametrize(
        ("said", "message"),
        [
            ("Batch job submission failed: Unable to contact slurm controller (connect failure)", "later if SLURM"),
            ("QOSMaxSubmitJobPerUserLimit", "later if SLURM takes no more jobs now"),
            ("invalid partition specified: gpu", "with another job template, --slurm FILE"),
        ],
    )
    def test_rejected_in_the_middle(self, programs: Path, study: Study, said: str, message: str) -> None:
        """The exit code and the words of an earlier failure stay; the same command submits the rest."""
        slurm, failed = Slurm(study.out), study.out / "jobs" / f"{TRUNK}.exit"
        failed.write_text("1\n")
        count = f"test $(cat {programs}/submitted 2>/dev/null | wc -l) = 0 || {{ echo '{said}' >&2; exit 1; }}\n"
        script(programs, "sbatch", count + SUBMITTED.format(programs))
        with pytest.raises(UserError, match=message) as error:
            slurm.submit(study.steps())
        assert str(error.value).startswith(f"{TRUNK}: ")
        assert said in str(error.value)
        assert "1 jobs are submitted" in str(error.value)
        assert failed.exists()
        queue(programs, f"1 PENDING {TRUNK}.{slurm.mark} {PART}")
        script(programs, "sbatch", SUBMITTED.format(programs))
        assert slurm.submit(study.steps()) == ["2", "3"]
        assert not failed.exists()
        assert submitted(programs)[BRANCH][2] == "--dependency=afterok:1,singleton"

    def test_no_place_for_a_step(self, programs: Path, study: Study, study_tool: Callable, tmp_path: Path) -> None:
        """Rejected before anything is written or submitted."""
        template = tmp_path / "mine.sh"
        template.write_text(
            "#!/bin/bash\n{% if name == 'smoke_2x' %}{{ fail('too small') }}{% endif %}\n{{ command }}\n"
        )
        words = ("run", "digits/smoke", "--out", tmp_path / "x", "--backend", "torchvision", "--launcher", "slurm")
        code, told = study_tool(*words, "--slurm", template)
        assert (code, told.count("\n")) == (2, 1)
        assert f"--slurm {template}: too small" in told
        assert not (tmp_path / "x").exists()

    def test_a_local_launcher_in_the_same_folder(self, programs: Path, study: Study, study_tool: Callable) -> None:
        words = ("run", "digits/smoke", "--out", study.out, "--backend", "torchvision", "--launcher", "slurm")
        with alone_in(study.out, LOCK):
            code, told = study_tool(*words)
        assert code == 2
        assert f"is in use: process {os.getpid()} on" in told
        assert not (programs / "submitted").exists()

    def test_dry_run(self, programs: Path, study: Study, study_tool: Callable) -> None:
        words = ("run", "digits/smoke", "--out", study.out, "--backend", "torchvision", "--launcher", "slurm")
        code, told = study_tool(*words, "--dry-run")
        assert code == 0
        assert f"--dependency=afterok:{PART},singleton" in told
        assert told.count("srun ") == 3
        assert not (programs / "submitted").exists()


class TestStates:
    def test_by_squeue(self, programs: Path, study: Study) -> None:
        """Of this study alone; a run that has ended by itself is what its folder says."""
        (study.out / f"jobs/{TRUNK}.sh").touch()
        mark = Slurm(study.out).mark
        queue(programs, f"1 RUNNING {TRUNK}.{mark} {PART}", f"2 PENDING {TRUNK}.{mark} {TRUNK}",
              f"3 PENDING {BRANCH}.{mark} ", f"4 RUNNING other.{mark}x (null)")  # fmt: skip
        assert states(study) == {TRUNK: RUNNING, BRANCH: QUEUED}
        script(programs, "squeue", "exit 0")
        (study.out / TRUNK).mkdir()
        (study.out / TRUNK / "status.json").write_text('{"state": "training", "iteration": 3}')
        assert states(study)[TRUNK] == INTERRUPTED

    def test_a_silent_squeue(self, programs: Path, study: Study, study_tool: Callable) -> None:
        (study.out / f"jobs/{TRUNK}.sh").touch()
        script(programs, "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
        code, told = study_tool("status", "--out", study.out)
        assert (code, told.count("squeue does not answer; jobs on the cluster are not shown\n")) == (0, 1)
        assert "SLURM no longer has" not in told

    def test_a_job_that_is_gone(self, programs: Path, study: Study, study_tool: Callable) -> None:
        """At its time limit, or with its node: without an exit code."""
        (study.out / f"jobs/{PART}.sh").touch()
        (study.out / TRUNK).mkdir()
        (study.out / TRUNK / "status.json").write_text('{"state": "training", "iteration": 3}')
        gone = f"SLURM no longer has its job, and it left no exit code: see jobs/{PART}.log"
        assert gone in study_tool("status", "--out", study.out)[1]
        queue(programs, f"1 PENDING {TRUNK}.{Slurm(study.out).mark} {PART}")
        assert gone not in study_tool("status", "--out", study.out)[1]

    def test_a_local_run_leaves_them_out(self, programs: Path, study: Study, study_tool: Callable) -> None:
        (study.out / f"jobs/{PART}.sh").touch()
        mark = Slurm(study.out).mark
        queue(programs, f"1 RUNNING {TRUNK}.{mark} {PART}", f"2 PENDING {BRANCH}.{mark} {BRANCH}")
        code, told = study_tool("run", "digits/smoke", "--out", study.out, "--backend", "torchvision")
        assert code == 1
        assert f"left out, as SLURM has them queued or running: {BRANCH}, {TRUNK}" in told
        assert not list(study.out.glob("jobs/*.log"))

    def test_a_point_counts_for_its_search(self, programs: Path, tmp_path: Path) -> None:
        study = Study("digits/small_data", tmp_path / "study", backend="torchvision", threads=1).begin()
        slurm = Slurm(study.out)
        point = next(step for step in study.steps() if step.name.startswith("search_third/"))
        (name,) = (word for word in slurm.options(point, {}) if word.startswith("--job-name="))
        queue(programs, f"7 RUNNING {name.partition('=')[2]} {point.name}")
        assert slurm.states() == {"search_third": RUNNING}


@pytest.fixture(scope="module")
def real_slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    skip_without_slurm()
    with pytest.MonkeyPatch.context() as patch, cluster(tmp_path_factory.mktemp("slurm"), patch):
        yield


QUICK = """
import json, os, pathlib, sys
names = [name for name in os.environ if name.startswith("SLURM_") or name == "OMP_NUM_THREADS"]
out, name = pathlib.Path(sys.argv[1]), sys.argv[2]
(out / (name + "." + os.environ["SLURM_PROCID"])).write_text(json.dumps({name: os.environ[name] for name in names}))
if len(sys.argv) > 3:
    sys.exit("error: of no use")
"""


class Script(Step):
    """A file of Python in the place of a command."""

    def command(self, launches: bool = True) -> list[str]:
        return [sys.executable, *self.words]


@pytest.mark.usefixtures("real_slurm")
def test_two_tasks_and_a_failure(study: Study) -> None:
    """Own ports, SLURM's variables, the last words of what fails, and the end of what needs it."""
    (study.out / "quick.py").write_text(QUICK)

    def step(name: str, run: str, *needs: str, fails: bool = False) -> Step:
        words = (str(study.out / "quick.py"), str(study.out), name, *(["fails"] if fails else []))
        return Script(name, run, words, needs, (), (study.out / "none",), processes=2, threads=1)

    first, second = step("first", TRUNK), step("second", BRANCH)
    bad, never = step(PART, TRUNK, "first", fails=True), step("never", TRUNK, PART)
    Slurm(study.out).submit([first, second, bad, never])
    wait_for(lambda: not said("squeue", "--noheader"), "all jobs")
    worlds = [read_world(read(study.out, f"{name}.{rank}")) for name in ("first", "second") for rank in (0, 1)]
    assert [(world.rank, world.size, world.local_rank, world.local_size) for world in worlds] == [
        (0, 2, 0, 2), (1, 2, 1, 2), (0, 2, 0, 2), (1, 2, 1, 2),
    ]  # fmt: skip
    assert len({world.port for world in worlds}) == 2
    assert read(study.out, "first.0")["OMP_NUM_THREADS"] == "1"
    assert (study.out / f"{PART}.0").exists()
    assert not (study.out / "never.0").exists()
    trunk, _ = survey(study.jobs, study.out, {})
    assert (trunk.state, trunk.error) == (FAILED, "exit code 1: of no use")


class Runs:
    """Starts digits/smoke with a small digits set."""

    def __init__(self, folder: Path, processes: int):
        self.folder, self.processes = folder, processes
        make = [sys.executable, str(ROOT / "tools/prepare_digits.py"), "--out", str(folder / "datasets/digits")]
        subprocess.run([*make, "--train", "60", "--val", "6"], check=True, capture_output=True)
        (folder / "datasets/catalog.yaml").write_text(SUBSET)
        self.environment = {
            **os.environ,
            "DETECTRON2_DATASETS": str(folder / "datasets"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }

    def start(self, launcher: str) -> None:
        out = ["--out", str(self.folder / launcher), "--backend", "torchvision", "--gpus", str(self.processes)]
        command = [sys.executable, "tools/study.py", "run", "digits/smoke", *out, "--launcher", launcher]
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def number(self) -> str:
        """SLURM's, of the job of the trunk that goes on."""
        wait_for(lambda: TRUNK in said("squeue", "--noheader", "--states=RUNNING", "--format=%j"), "the trunk", MINUTES)
        lines = [
            line.split() for line in said("squeue", "--noheader", "--states=RUNNING", "--format=%i %j").splitlines()
        ]
        return next(number for number, name in lines if name.startswith(TRUNK))

    def checkpoint(self, iterations: int) -> None:
        """Wait for it in the trunk's folder."""
        path = self.folder / f"slurm/{TRUNK}/checkpoints/model_{iterations - 1:07d}.pth"
        wait_for(path.exists, path.name, MINUTES)


@pytest.mark.slow
@pytest.mark.usefixtures("real_slurm")
@pytest.mark.parametrize("processes", [1, 2])
def test_requeued_and_preempted(processes: int, tmp_path: Path) -> None:
    """`scontrol requeue`, then submitted once more, then a signal: bitwise what the local launcher makes of it."""
    runs = Runs(tmp_path, processes)
    runs.start("slurm")
    runs.checkpoint(5)
    first = runs.number()
    subprocess.run(["scontrol", "requeue", first], check=True)
    start_now(first)
    runs.start("slurm")
    runs.checkpoint(15)
    second = runs.number()
    assert second != first  # the trunk's second part
    subprocess.run(["scancel", "--signal=USR1", second], check=True)
    wait_for(lambda: field(second, "JobState") == "PENDING", "requeue after exit code 75", MINUTES)
    assert read(tmp_path / f"slurm/{TRUNK}", "status.json")["state"] == "stopped"
    start_now(second)
    wait_for(lambda: not said("squeue", "--noheader"), "all jobs", MINUTES)
    assert [field(number, "Restarts") for number in (first, second)] == ["1", "1"]
    assert not list((tmp_path / "slurm/jobs").glob("*.exit"))
    runs.start("local")
    for name in (TRUNK, BRANCH):
        assert is_same(tmp_path / "slurm" / name, tmp_path / "local" / name)
