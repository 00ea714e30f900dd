"""study.py plan, run and status: order, failures, death of the runner, other people's folders. Runs are played by a
script that leaves what a run leaves; real ones are in tests/test_study_smoke.py."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

from scratch_det.config import load_config
from scratch_det.errors import UserError
from scratch_det.files import try_lock
from scratch_det.study import loop
from scratch_det.study.board import Board, as_text, eta_seconds
from scratch_det.study.commands import status
from scratch_det.study.experiments import of_place
from scratch_det.study.job import Job, jobs_of
from scratch_det.study.launch.devices import gpus_needed, require_gpus
from scratch_det.study.launch.local import Local, Torchrun
from scratch_det.study.loop import fitting, run_study
from scratch_det.study.records import (
    BLOCKED,
    FAILED,
    FINISHED,
    INTERRUPTED,
    READY,
    RUNNING,
    WAITING,
    survey,
    write_failure,
)
from scratch_det.study.study import Study

TRUNK, BRANCH = "smoke_3x", "smoke_2x"
MINUTES = 300  # after which something hangs
PLAYER = """
import json, os, signal, sys, time
from pathlib import Path
folder, iterations, keep_at = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
out = folder.parent
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
with open(out / "starts", "a") as starts:
    starts.write(folder.name + "\\n")
def write(name, **content):
    (folder / "partial").write_text(json.dumps(content))
    (folder / "partial").rename(folder / name)
def leave(*_):
    write("status.json", state="stopped", iteration=1)
    sys.exit(75)
signal.signal(signal.SIGTERM, leave)
write("status.json", state="training", iteration=1, eta=5.0, pid=os.getpid())
for number in keep_at:
    (folder / "checkpoints" / f"model_{number - 1:07d}.pth").touch()
while (out / f"{folder.name}.wait").exists():
    time.sleep(0.02)
if (out / f"{folder.name}.fail").exists():
    sys.exit("error: the disk is on fire")
write("result.json", iteration=iterations, seconds=2.0, metrics={"bbox": {"AP": 12.5, "AP50": None}})
"""


class Players(Local):
    """Runs are the script above; DIR/NAME.wait keeps one from going on, DIR/NAME.fail makes it fail.

    Each look of a launcher is a line in DIR/looks: its process.
    """

    def running(self) -> set[str]:
        found = super().running()
        with open(self.study.out / "looks", "a") as looks:
            looks.write(f"{os.getpid()}\n")
        return found

    def command(self, job: Job) -> list[str]:
        words = [str(self.study.out / job.name), str(job.run.iterations), json.dumps(job.keep_at)]
        return [sys.executable, "-c", PLAYER, *words]


@pytest.fixture(autouse=True)
def digits(datasets_root: Path) -> Path:
    """A data set as far as it is looked at before a run is started."""
    for part in ("train", "val"):
        (datasets_root / "digits" / part).mkdir(parents=True)
        (datasets_root / f"digits/annotations/instances_{part}.json").parent.mkdir(exist_ok=True)
        (datasets_root / f"digits/annotations/instances_{part}.json").touch()
    return datasets_root / "digits"


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Study]:
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_LOOKS", 0.02)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    yield Study("digits/smoke", tmp_path / "study", backend="torchvision", threads=1).begin()
    for wait in (tmp_path / "study").glob("*.wait"):  # what a test that failed has left goes on, and ends
        wait.unlink()


def states(study: Study, launcher: Local | None = None) -> dict[str, str]:
    running = (launcher or Local(study)).running()
    return {standing.run.name: standing.state for standing in survey(study.jobs, study.out, running)}


def play(study: Study, max_parallel: int = 2, names: tuple[str, ...] = ()) -> int:
    return run_study(study, study.picked(names), Players(study), max_parallel)


def starts(study: Study) -> list[str]:
    return (study.out / "starts").read_text().split()


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + MINUTES
    while not true():
        assert time.monotonic() < end, f"waited for {MINUTES} seconds"
        time.sleep(0.02)


class TestRunning:
    def test_a_branch_follows_its_trunk(self, study: Study, capsys: pytest.CaptureFixture) -> None:
        assert states(study) == {TRUNK: READY, BRANCH: WAITING}
        assert play(study, max_parallel=1) == 0
        assert starts(study) == [TRUNK, BRANCH]
        assert states(study) == {TRUNK: FINISHED, BRANCH: FINISHED}
        assert f"{BRANCH}: finished 18/18 box 12.5" in capsys.readouterr().out

    def test_a_branch_need_not_wait_for_the_end(self, study: Study) -> None:
        """The trunk ends only when its branch has."""
        (study.out / f"{TRUNK}.wait").touch()
        process = in_a_process(study)
        until(lambda: (study.out / BRANCH / "result.json").exists())
        assert states(study)[TRUNK] == RUNNING
        (study.out / f"{TRUNK}.wait").unlink()
        assert process.wait(MINUTES) == 0

    def test_finished_runs_are_left_alone(self, study: Study) -> None:
        assert play(study) == play(study) == 0
        assert starts(study) == [TRUNK, BRANCH]

    def test_only_some(self, study: Study) -> None:
        assert play(study, names=(TRUNK,)) == 0
        assert states(study) == {TRUNK: FINISHED, BRANCH: READY}
        with pytest.raises(UserError, match=f"no run smoke_4x; did you mean '({TRUNK}|{BRANCH})'"):
            study.picked(["smoke_4x"])

    def test_one_that_waits_for_what_is_not_asked_for(self, study: Study, capsys: pytest.CaptureFixture) -> None:
        assert play(study, names=(BRANCH,)) == 1
        assert f"{BRANCH}: waiting: waits for {TRUNK}/checkpoints/model_0000011.pth" in capsys.readouterr().out


class TestFailures:
    def test_others_go_on(self, study: Study, capsys: pytest.CaptureFixture) -> None:
        """The trunk has left what its branch needs; its own failure is told with its last words, and tried again."""
        (study.out / f"{TRUNK}.fail").touch()
        assert play(study) == 1
        assert states(study) == {TRUNK: FAILED, BRANCH: FINISHED}
        assert f"{TRUNK}: failed: exit code 1: the disk is on fire" in capsys.readouterr().out
        (study.out / f"{TRUNK}.fail").unlink()
        assert play(study) == 0
        assert starts(study) == [TRUNK, BRANCH, TRUNK]
        assert "on fire" in (study.out / "jobs" / f"{TRUNK}.log").read_text()

    def test_one_that_could_not_be_started_gets_its_trial(self, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
        """It has failed before, and the first time its lock is held by somebody who looks."""
        (study.out / f"jobs/{TRUNK}.failed").write_text("out of memory\n")
        locks = iter([None])
        monkeypatch.setattr(
            "scratch_det.study.launch.local.try_lock",
            lambda path: next(locks) if locks.__length_hint__() else try_lock(path),
        )
        assert play(study) == 0

    def test_what_needs_a_failed_one_is_blocked(self, study: Study) -> None:
        (study.out / "jobs" / f"{TRUNK}.failed").write_text("exit code 2: no data\n")
        trunk, branch = survey(study.jobs, study.out, set())
        assert (trunk.state, branch.state) == (FAILED, BLOCKED)
        assert branch.error == f"needs {TRUNK}, which failed"

    def test_a_killed_run(self, study: Study) -> None:
        (study.out / f"{TRUNK}.wait").touch()
        launcher = Players(study)
        launcher.start([study.jobs[0]])
        until(lambda: (study.out / TRUNK / "status.json").exists())
        launcher.processes[TRUNK].popen.kill()
        until(lambda: not launcher.running())
        assert survey(study.jobs, study.out, set())[0].error == "ended by SIGKILL (out of memory?)"

    def test_one_that_ends_without_a_result(self, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            Players, "command", lambda _launcher, _job: [sys.executable, "-c", "print('done, I think')"]
        )
        assert play(study, names=(TRUNK,)) == 1
        assert survey(study.jobs, study.out, set())[0].error == "exit code 0: done, I think"

    def test_a_run_that_was_preempted_goes_on(self, study: Study) -> None:
        (study.out / f"{TRUNK}.wait").touch()
        process = in_a_process(study)
        until(lambda: (study.out / BRANCH / "result.json").exists())
        os.kill(json.loads((study.out / TRUNK / "status.json").read_text())["pid"], signal.SIGTERM)
        until(lambda: starts(study).count(TRUNK) == 2)
        (study.out / f"{TRUNK}.wait").unlink()
        assert process.wait(MINUTES) == 0
        assert sorted(starts(study)) == sorted([TRUNK, TRUNK, BRANCH])


def in_a_process(study: Study) -> subprocess.Popen:
    """``play`` as its own process and process group, as study.py run is at a terminal."""
    code = (
        "import sys; from pathlib import Path; sys.path[:0] = ['tests', '.']\n"
        "from scratch_det.distributed.stop import Stopped; from scratch_det.study import loop, study\n"
        "from test_study_run import play; loop.SECONDS_BETWEEN_LOOKS = 0.02\n"
        "try: sys.exit(play(study.study_in(Path(sys.argv[1]))))\n"
        "except Stopped as stopped: sys.exit(stopped.exit_code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(study.out)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)


def looks(study: Study, process: subprocess.Popen) -> int:
    """How often it has looked where its runs stand."""
    return (study.out / "looks").read_text().split().count(str(process.pid))


def killed(study: Study) -> None:
    """A runner is gone and its trunk still runs."""
    (study.out / f"{TRUNK}.wait").touch()
    runner = in_a_process(study)
    until(lambda: (study.out / BRANCH / "result.json").exists())
    until(lambda: json.loads((study.out / f"jobs/{TRUNK}.lock").read_text() or "{}").get("pid"))
    runner.kill()
    runner.wait()
    assert states(study)[TRUNK] == RUNNING


class TestEnding:
    def test_the_runner_is_killed_and_its_run_lives(self, study: Study) -> None:
        """Nobody starts it twice: the next runner waits for it."""
        killed(study)
        second = in_a_process(study)
        until(lambda: looks(study, second) > 2)
        assert starts(study).count(TRUNK) == 1
        (study.out / f"{TRUNK}.wait").unlink()
        assert second.wait(MINUTES) == 0
        assert sorted(starts(study)) == sorted([TRUNK, BRANCH])

    def test_the_runner_is_killed_and_the_next_one_stops_its_run(self, study: Study) -> None:
        killed(study)
        second = in_a_process(study)
        until(lambda: looks(study, second) > 2)
        second.send_signal(signal.SIGTERM)
        assert second.wait(MINUTES) == 75
        assert json.loads((study.out / TRUNK / "status.json").read_text())["state"] == "stopped"
        assert states(study)[TRUNK] == INTERRUPTED

    def test_a_run_of_a_runner_that_lives_is_not_stopped_by_another(self, study: Study) -> None:
        (study.out / f"{TRUNK}.wait").touch()
        mine, other = in_a_process(study), Players(study)
        until(lambda: (study.out / BRANCH / "result.json").exists())
        assert other.stop() == set()
        before = looks(study, mine)
        until(lambda: looks(study, mine) > before + 2)
        assert starts(study).count(TRUNK) == 1
        (study.out / f"{TRUNK}.wait").unlink()
        assert mine.wait(MINUTES) == 0

    def test_stopping_does_not_wait_for_others(self, study: Study) -> None:
        """What this one has stopped, another may have continued: it is that one's."""
        (study.out / f"{TRUNK}.wait").touch()
        mine, other = Players(study), Players(study)
        mine.start([study.jobs[0]])
        until(lambda: (study.out / TRUNK / "status.json").exists())
        assert mine.stop() == {TRUNK}
        until(lambda: TRUNK not in mine.running())
        assert mine.stop() == set()
        assert other.start([study.jobs[0]]) == {TRUNK}
        assert mine.running() == {TRUNK}
        assert mine.stop() == set()
        (study.out / f"{TRUNK}.wait").unlink()
        until(lambda: not other.running())

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
    def test_a_request_to_stop_is_handed_on(self, study: Study, number: signal.Signals, code: int) -> None:
        """A terminal sends it to the whole group; runs hear of it from the runner alone, once."""
        (study.out / f"{TRUNK}.wait").touch()
        process = in_a_process(study)
        until(lambda: (study.out / BRANCH / "result.json").exists())
        os.killpg(process.pid, number)
        assert process.wait(MINUTES) == code
        assert json.loads((study.out / TRUNK / "status.json").read_text())["state"] == "stopped"
        assert states(study)[TRUNK] == INTERRUPTED
        (study.out / f"{TRUNK}.wait").unlink()
        assert play(study) == 0


@pytest.fixture
def on_gpus(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three, and recipes that want them."""
    recipe = load_config(study.jobs[0].run.config, ["MODEL.DEVICE", "cuda", "SOLVER.IMS_PER_BATCH", 16]).cfg
    monkeypatch.setattr("scratch_det.study.launch.devices.recipe_of", lambda *_: recipe)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")


class TestPlaces:
    def test_a_run_of_two_processes_takes_two(self) -> None:
        jobs = {job.name: job for job in jobs_of(of_place("digits/norms"), share_prefix=False)}
        bn, gn = (jobs[f"scratch_mask_rcnn_R_18_FPN_3x_{norm}"] for norm in ("bn", "gn"))
        assert (bn.weight(gpus=1), gn.weight(gpus=1), bn.weight(gpus=8), gn.weight(gpus=8)) == (2, 1, 1, 1)
        assert fitting([gn, bn, gn], free=2, max_parallel=2, gpus=1) == [gn]
        assert fitting([bn, gn], free=1, max_parallel=1, gpus=1) == [bn]
        assert fitting([bn, gn], free=0, max_parallel=1, gpus=1) == []

    @pytest.mark.usefixtures("on_gpus")
    def test_gpus_are_shared_out(self, study: Study) -> None:
        """A run of another launcher keeps its own; where too few are free, nothing is started."""
        (study.out / f"{TRUNK}.wait").touch()
        first, second = Players(study), Players(replace(study, gpus=2))
        first.start([study.jobs[0]])
        assert first.processes[TRUNK].devices == ["4"]
        Players(replace(study, gpus=3)).start([study.jobs[1]])
        assert second.running() == {TRUNK}
        second.start([study.jobs[1]])
        assert second.processes[BRANCH].devices == ["5", "6"]
        (study.out / f"{TRUNK}.wait").unlink()
        until(lambda: not first.running() | second.running())

    def test_a_recipe_for_the_cpu_gets_none(self, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
        launcher, job = Local(study), study.jobs[0]
        assert (gpus_needed(job, study), launcher._free_devices(job)) == (0, [])
        environment = launcher._environment([])
        assert (environment["CUDA_VISIBLE_DEVICES"], environment["OMP_NUM_THREADS"]) == ("", "1")
        require_gpus(study.jobs, replace(study, gpus=8), max_parallel=8)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (
                ("--gpus", 2, "--max-parallel", 2),
                "needs 4 GPUs, and CUDA_VISIBLE_DEVICES names 3; give --max-parallel 1",
            ),
            (("--gpus", 4), "needs 4 GPUs, and CUDA_VISIBLE_DEVICES names 3; change --gpus or --only"),
        ],
    )
    @pytest.mark.usefixtures("on_gpus")
    def test_too_few_gpus(self, study_tool: Callable, tmp_path: Path, words: tuple, message: str) -> None:
        """Refused before anything is there, also where a single run would fit."""
        code, said = study_tool("run", "digits/smoke", "--out", tmp_path / "x", "--backend", "torchvision", *words)
        assert (code, said.count("\n")) == (2, 1)
        assert message in said
        assert not (tmp_path / "x").exists()

    def test_torchrun_starts_the_processes(self, study: Study) -> None:
        words = Torchrun(study).command(study.jobs[0])
        assert words[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
        assert "--num-gpus" not in words


class TestBadInput:
    def test_unknown_experiment(self, study_tool: Callable, tmp_path: Path) -> None:
        code, said = study_tool("run", "digits/smok", "--out", tmp_path / "new")
        assert code == 2
        assert "no experiment digits/smok; did you mean 'digits/smoke'?" in said
        assert not (tmp_path / "new").exists()

    def test_folder_of_another_experiment(self, study_tool: Callable, study: Study) -> None:
        code, said = study_tool("run", "digits/norms", "--out", study.out, "--backend", "torchvision")
        assert code == 2
        assert "holds another study: experiment was digits/smoke, now digits/norms" in said

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
        """Refused before anything is there."""
        (digits / "train").rmdir()
        code, said = study_tool("run", "digits/smoke", "--out", tmp_path / "x", "--backend", "torchvision")
        assert code == 2
        assert f"{TRUNK}: data set 'digits_train' is not complete under" in said
        assert "make it with: python tools/prepare_digits.py" in said
        assert not (tmp_path / "x").exists()

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("result.json", '{"iteration": "many"}', "result.json has iteration 'many', expected a number"),
            ("result.json", '{"iteration": Infinity}', "result.json has iteration inf, expected a number"),
            ("metrics.json", '{"iteration": "x"}', "metrics.json has iteration 'x', expected a number"),
            ("status.json", "[1]", "status.json holds list, expected an object"),
            ("status.json", '{"iter', "status.json is no JSON"),
        ],
    )
    def test_damaged_folders(self, study: Study, study_tool: Callable, name: str, text: str, message: str) -> None:
        """It counts as failed, and keeps no other run from going on."""
        (study.out / TRUNK).mkdir()
        (study.out / TRUNK / name).write_text(text)
        code, said = study_tool("status", "--out", study.out)
        assert code == 0
        assert f"{TRUNK}  failed" in said
        assert message in said
        assert ("remove this file" if name == "status.json" else "move the folder away") in said

    def test_a_damaged_status_of_a_finished_run(self, study: Study) -> None:
        assert play(study) == 0
        (study.out / TRUNK / "status.json").write_text("[1]")
        assert states(study) == {TRUNK: FINISHED, BRANCH: FINISHED}

    def test_a_failure_that_only_the_run_wrote_down(self, study: Study) -> None:
        """It outlived its study.py."""
        (study.out / TRUNK).mkdir()
        (study.out / TRUNK / "status.json").write_text('{"state": "failed", "iteration": 3, "error": "not finite"}')
        trunk, branch = survey(study.jobs, study.out, set())
        assert (trunk.state, trunk.error, branch.state) == (FAILED, "not finite", BLOCKED)
        assert play(study) == 0

    def test_a_dry_run_of_a_study_that_has_begun(self, study: Study, study_tool: Callable) -> None:
        """Its number of threads counts, and no other study's commands are printed."""
        words = ("run", "digits/smoke", "--out", study.out, "--backend", "torchvision", "--dry-run")
        code, said = study_tool(*words, "--max-parallel", 1)
        assert (code, said.count("OMP_NUM_THREADS=1 ")) == (0, 2)
        assert study_tool(*words, "--no-share-prefix")[0] == 2

    def test_a_name_that_is_too_long(self, study_tool: Callable, tmp_path: Path) -> None:
        code, said = study_tool("run", "digits/smoke", "--out", tmp_path / ("x" * 300), "--backend", "torchvision")
        assert code == 2
        assert "File name too long" in said

    def test_damaged_study(self, study: Study, study_tool: Callable) -> None:
        path = study.out / "study.json"
        path.write_text(path.read_text().replace('"gpus": 1', '"gpus": "one"'))
        code, said = study_tool("status", "--out", study.out)
        assert code == 2
        assert "study.json is not as study.py run wrote it" in said
        (study.out / TRUNK).mkdir()
        path.write_text("")
        said = study_tool("status", "--out", study.out)[1]
        assert "study.json is no JSON" in said
        assert "restore it, or begin the study in another folder" in said
        path.unlink()
        said = study_tool("run", "digits/smoke", "--out", study.out)[1]
        assert "has runs of digits/smoke, but no study.json: restore it" in said

    def test_moved_study(self, study: Study, study_tool: Callable, tmp_path: Path) -> None:
        study.out.rename(tmp_path / "elsewhere")
        code, said = study_tool("status", "--out", tmp_path / "elsewhere")
        assert code == 2
        assert "was begun as" in said

    def test_no_folder_can_be_made(self, study_tool: Callable, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        code, said = study_tool("run", "digits/smoke", "--out", tmp_path / "file", "--backend", "torchvision")
        assert code == 2
        assert "cannot be used: File exists; name another folder" in said

    def test_checkpoint_that_is_gone(self, study: Study) -> None:
        """A trunk that is finished will not leave it any more."""
        (study.out / TRUNK).mkdir()
        (study.out / TRUNK / "result.json").write_text('{"iteration": 27}')
        branch = survey(study.jobs, study.out, set())[1]
        assert branch.state == BLOCKED
        assert f"{TRUNK} is finished, but model_0000011.pth is gone; move its folder away" in branch.error


def test_dry_run_starts_nothing(study_tool: Callable, tmp_path: Path) -> None:
    code, said = study_tool("run", "digits/smoke", "--out", tmp_path / "x", "--backend", "torchvision", "--dry-run")
    assert code == 0
    assert said.count("tools/train_net.py") == 2
    assert not (tmp_path / "x").exists()


def test_status(study: Study, capsys: pytest.CaptureFixture) -> None:
    assert play(study, names=(TRUNK,)) == 0
    capsys.readouterr()
    status(study.out)
    said = capsys.readouterr().out
    assert f"{TRUNK}  finished  27/27      box 12.5" in said
    assert f"{BRANCH}  ready" in said
    standings = survey(study.jobs, study.out, set())
    assert eta_seconds(standings) == pytest.approx(6 * 2.0 / 27)
    assert "1 finished, 1 ready; 27 of 33 iterations; 0:00:00 of training left" in as_text(standings, study)


def touch_inputs(job: Job, out: Path) -> None:
    for path in job.inputs(out):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_a_branch_that_failed_waits_for_a_trunk_that_is_gone(study: Study) -> None:
    """It would only fail again, and get no other trial."""
    trunk, branch = study.jobs
    write_failure(branch, study.out, "its checkpoint is damaged")
    assert states(study)[BRANCH] == WAITING
    touch_inputs(branch, study.out)
    assert states(study)[BRANCH] == FAILED
    (study.out / trunk.name / "result.json").write_text('{"iteration": 27}')
    for path in branch.inputs(study.out):
        path.unlink()
    assert states(study)[BRANCH] == BLOCKED


def test_a_reason_that_cannot_be_written_is_said(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("scratch_det.study.records.write_atomically", full)
    with pytest.raises(
        UserError, match=r"cannot be written \(No space left on device\): .* failed: out of memory; make"
    ):
        write_failure(study.jobs[0], study.out, "out of memory")


def test_eta(study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """At the speed of all runs together since the start: 27 iterations in 100 seconds leave 6, of which 22 take."""
    now = [50.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Board(study, {job.name for job in study.jobs}) as board:
        board.show(survey(study.jobs, study.out, set()))
        (study.out / TRUNK).mkdir()
        (study.out / TRUNK / "result.json").write_text('{"iteration": 27}')
        touch_inputs(study.jobs[1], study.out)
        now[0] += 100
        board.show(survey(study.jobs, study.out, set()))
    assert "27 of 33 iterations; eta 0:00:22" in capsys.readouterr().out
