"""The local launcher: order, failures, requests to stop, death of the launcher, GPUs. Runs are played by a script; real
ones are in test_smoke.py."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from study.player import (
    BRANCH,
    MINUTES,
    PART,
    TRUNK,
    Players,
    in_a_process,
    pid_of,
    play,
    starts,
    states,
    until,
)

from scratch_det.config.load import load_config
from scratch_det.errors import UserError
from scratch_det.study import local
from scratch_det.study.local import Local, Torchrun, alone_in, gpus_here, holder_of, require_gpus
from scratch_det.study.records import (
    BLOCKED,
    FAILED,
    FINISHED,
    INTERRUPTED,
    READY,
    RUNNING,
    WAITING,
    Record,
    read_json,
    survey,
)
from scratch_det.study.run import Job, Step
from scratch_det.study.study import LOCK, Study


class TestRunning:
    def test_a_branch_follows_its_trunk(self, study: Study, capsys: pytest.CaptureFixture) -> None:
        """The trunk goes on first when there is room for one."""
        assert states(study) == {TRUNK: READY, BRANCH: WAITING}
        assert play(study, max_parallel=1) == 0
        assert starts(study) == [PART, TRUNK, BRANCH]
        assert states(study) == {TRUNK: FINISHED, BRANCH: FINISHED}
        assert f"{BRANCH}: finished 18/18 box 12.5" in capsys.readouterr().out

    def test_a_branch_need_not_wait_for_the_end(self, study: Study) -> None:
        """The trunk ends only when its branch has."""
        (study.out / f"{TRUNK}.wait").touch()
        process = in_a_process(study)
        until(lambda: (study.out / BRANCH / "result.json").exists())
        until(lambda: states(study)[TRUNK] == RUNNING)  # its second step may begin after the branch
        (study.out / f"{TRUNK}.wait").unlink()
        assert process.wait(MINUTES) == 0

    def test_the_next_part_waits_for_the_end_of_the_one_before(self, study: Study) -> None:
        """Not only for its checkpoint: it would find the folder locked."""
        (evaluates := study.out / f"{PART}.evaluates").touch()
        process = in_a_process(study)
        until(lambda: (study.out / TRUNK / "checkpoints/model_0000011.pth").exists())
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)  # fifty looks
        assert starts(study) == [PART]
        evaluates.unlink()
        assert process.wait(MINUTES) == 0
        assert starts(study)[0] == PART
        assert len(starts(study)) == 3

    def test_finished_runs_are_left_alone(self, study: Study) -> None:
        assert play(study) == play(study) == 0
        assert sorted(starts(study)) == sorted([PART, TRUNK, BRANCH])

    def test_a_part_that_is_done_is_left_alone(self, study: Study) -> None:
        (study.out / f"{TRUNK}.fail").touch()
        assert play(study, names=(TRUNK,)) == 1
        (study.out / f"{TRUNK}.fail").unlink()
        assert play(study, max_parallel=1) == 0
        assert starts(study)[:3] == [PART, TRUNK, TRUNK]

    def test_a_trunk_between_two_steps_is_ready(self, study: Study) -> None:
        """It was neither interrupted nor did it fail."""
        part, *_ = study.steps()
        with alone_in(study.out, LOCK) as lock:
            Players(study.out, lock).run([part], lambda _: None)
        assert read_json(study.out / TRUNK / "status.json")["state"] == "paused"
        assert states(study) == {TRUNK: READY, BRANCH: READY}

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
        assert sorted(starts(study)) == sorted([PART, TRUNK, BRANCH, TRUNK])
        assert "on fire" in (study.out / "jobs" / f"{TRUNK}.log").read_text()

    def test_what_needs_a_failed_one_is_blocked(self, study: Study) -> None:
        (study.out / f"{PART}.fail").touch()
        assert play(study) == 1
        trunk, branch = survey(study.jobs, study.out, {})
        assert (trunk.state, branch.state) == (FAILED, BLOCKED)
        assert branch.error == f"needs {TRUNK}, which failed"
        assert starts(study) == [PART]

    def test_a_killed_run(self, study: Study) -> None:
        (study.out / f"{PART}.wait").touch()
        process = in_a_process(study)
        until(lambda: (study.out / TRUNK / "status.json").exists())
        os.kill(pid_of(study, TRUNK), signal.SIGKILL)
        assert process.wait(MINUTES) == 1
        assert survey(study.jobs, study.out, {})[0].error == "ended by SIGKILL (out of memory?)"

    def test_one_that_ends_without_a_result(self, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
        done = [sys.executable, "-c", "print('done, I think')"]
        monkeypatch.setattr(Players, "command", staticmethod(lambda _step: done))
        assert play(study, names=(TRUNK,)) == 1
        assert survey(study.jobs, study.out, {})[0].error == "exit code 0: done, I think"

    def test_a_run_that_was_preempted_goes_on(self, study: Study) -> None:
        (study.out / f"{TRUNK}.wait").touch()
        process = in_a_process(study)
        until(lambda: (study.out / BRANCH / "result.json").exists())
        until(lambda: TRUNK in starts(study))
        os.kill(pid_of(study, TRUNK), signal.SIGTERM)
        until(lambda: starts(study).count(TRUNK) == 2)
        (study.out / f"{TRUNK}.wait").unlink()
        assert process.wait(MINUTES) == 0
        assert sorted(starts(study)) == sorted([PART, TRUNK, TRUNK, BRANCH])

    def test_a_failure_that_only_the_run_wrote_down(self, study: Study) -> None:
        """It outlived its study.py."""
        (study.out / TRUNK).mkdir()
        (study.out / TRUNK / "status.json").write_text('{"state": "failed", "iteration": 3, "error": "not finite"}')
        trunk, branch = survey(study.jobs, study.out, {})
        assert (trunk.state, trunk.error, branch.state) == (FAILED, "not finite", BLOCKED)
        assert play(study) == 0

    @pytest.mark.parametrize(("facts", "why"), [({}, ""), ({"ended_early": "no higher AP"}, " (no higher AP)")])
    def test_a_checkpoint_that_is_gone(self, facts: dict[str, str], why: str, study: Study) -> None:
        """A trunk that is finished will not leave it any more."""
        (study.out / TRUNK).mkdir()
        (study.out / TRUNK / "result.json").write_text(json.dumps({"iteration": 27, **facts}))
        assert play(study) == 1
        branch = survey(study.jobs, study.out, {})[1]
        assert branch.state == BLOCKED
        assert f"{TRUNK} is finished{why}, but model_0000011.pth is gone; move its folder away" in branch.error

    def test_the_choice_of_a_search(self, study: Study) -> None:
        """Starts when all points have ended, also where one failed."""
        part, trunk, _ = study.steps()
        failing = replace(part, name=f"{TRUNK}@9", outputs=(study.out / "none", *part.outputs[1:]))
        choice = replace(trunk, needs=(PART, failing.name), inputs=(), also_after_failures=True)
        (study.out / f"{failing.name}.fail").touch()
        with alone_in(study.out, LOCK) as lock:
            Players(study.out, lock).run([choice, part, failing], lambda _: None)
        assert starts(study) == [PART, failing.name, TRUNK]
        assert choice.is_done

    def test_a_full_disk(self, study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        """The exit code cannot be written; the branch is trained all the same."""

        def full(path: Path, *_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", f"{path}.partial")

        monkeypatch.setattr(local, "write_atomically", full)
        (study.out / f"{TRUNK}.fail").touch()
        assert play(study) == 1
        assert states(study)[BRANCH] == FINISHED
        said = capsys.readouterr().out
        assert f"{TRUNK}: failed with exit code 1, and {study.out}/jobs/{TRUNK}.exit cannot be written" in said
        assert "make room there" in said

    def test_a_damaged_status(self, study: Study) -> None:
        """Of a run that failed: it counts as failed, not as stopped, and the launcher goes on."""
        first = study.steps()[0]
        with alone_in(study.out, LOCK) as lock:
            launcher = Players(study.out, lock)
            launcher.start(first, [])
            until(lambda: launcher.processes[0].popen.poll() is not None)
            (study.out / TRUNK / "status.json").write_text("[1]")
            assert not launcher.was_stopped(launcher.processes[0])


class TestEnding:
    def test_runs_end_with_the_launcher(self, study: Study) -> None:
        """It is killed; its run leaves a checkpoint, and the next launcher continues it."""
        (study.out / f"{TRUNK}.wait").touch()
        process = in_a_process(study)
        until(lambda: (study.out / BRANCH / "result.json").exists())
        until(lambda: TRUNK in starts(study))
        until(lambda: pid_of(study, TRUNK))
        process.kill()
        process.wait()
        until(lambda: json.loads((study.out / TRUNK / "status.json").read_text())["state"] == "stopped")
        until(lambda: states(study)[TRUNK] == INTERRUPTED)
        (study.out / f"{TRUNK}.wait").unlink()
        assert play(study) == 0
        assert sorted(starts(study)) == sorted([PART, TRUNK, BRANCH, TRUNK])

    def test_one_launcher_at_a_time(self, study: Study) -> None:
        (study.out / f"{PART}.wait").touch()
        process = in_a_process(study)
        until(lambda: (study.out / TRUNK / "status.json").exists())
        with pytest.raises(UserError, match=rf"is in use: process {process.pid} on .* works on it"):
            play(study)
        (study.out / f"{PART}.wait").unlink()
        assert process.wait(MINUTES) == 0

    def test_a_lock_without_a_name(self, study: Study) -> None:
        """Its holder is gone, or writes its name now."""
        with alone_in(study.out, LOCK) as lock:
            lock.truncate(0)
            with pytest.raises(UserError, match="was in use until now, and its runs are ending; give the same command"):
                play(study)

    def test_the_state_at_the_end(self, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
        """Is read before another launcher can go on."""
        holders = []

        def look(*arguments: object) -> list[Record]:
            holders.append(holder_of(study.out / LOCK).get("pid"))
            return survey(*arguments)

        monkeypatch.setattr("scratch_det.study.commands.survey", look)
        assert play(study, names=(TRUNK,)) == 0
        assert set(holders) == {os.getpid()}

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
    def test_a_request_to_stop_is_passed_on(self, study: Study, number: signal.Signals, code: int) -> None:
        """A terminal sends it to the whole group; runs hear of it from the launcher alone, once."""
        (study.out / f"{TRUNK}.wait").touch()
        process = in_a_process(study)
        until(lambda: (study.out / BRANCH / "result.json").exists())
        until(lambda: TRUNK in starts(study))
        until(lambda: json.loads((study.out / TRUNK / "status.json").read_text())["state"] == "training")
        os.killpg(process.pid, number)
        assert process.wait(MINUTES) == code
        assert json.loads((study.out / TRUNK / "status.json").read_text())["state"] == "stopped"
        assert states(study)[TRUNK] == INTERRUPTED
        (study.out / f"{TRUNK}.wait").unlink()
        assert play(study) == 0


def step(name: str, processes: int = 1, on_gpu: bool = True) -> Step:
    return Step(name, name, ("train",), (), (), (Path("none"),), processes, on_gpu)


class TestPlaces:
    def launcher(self, study: Study, places: int, gpus: int) -> Local:
        with alone_in(study.out, LOCK) as lock:
            return Local(study.out, lock, places, gpus)

    def test_a_run_of_two_processes_takes_two(self, study: Study) -> None:
        """One that needs more than all places is let in alone."""
        two, one = step("two", 2, on_gpu=False), step("one", on_gpu=False)
        small, large = self.launcher(study, 1, 1), self.launcher(study, 8, 8)
        assert (small.places_of(two), small.places_of(one), large.places_of(two)) == (1, 1, 1)
        assert self.launcher(study, 8, 1).places_of(two) == 2
        assert small.room_for(two) == []

    def test_two_places_are_waited_for(self, study: Study) -> None:
        (study.out / f"{PART}.wait").touch()
        first, second = (replace(study.steps()[0], name=name, needs=()) for name in (PART, TRUNK))
        with alone_in(study.out, LOCK) as lock:
            launcher = Players(study.out, lock, places=2)
            launcher.start(first, [])
            assert launcher.room_for(second) == []
            assert launcher.room_for(replace(second, processes=2)) is None
            (study.out / f"{PART}.wait").unlink()
            until(lambda: launcher.ended() or not launcher.processes)
            assert launcher.room_for(replace(second, processes=2)) == []

    def test_gpus_are_shared_out(self, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
        """Those that are free, by the names of CUDA_VISIBLE_DEVICES; where too few are free, nothing is started."""
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
        (study.out / f"{PART}.wait").touch()
        with alone_in(study.out, LOCK) as lock:
            launcher = Players(study.out, lock, places=8, gpus=1)
            first = replace(study.steps()[0], on_gpu=True)
            launcher.start(first, launcher.room_for(first))
            assert launcher.processes[0].devices == ["4"]
            assert launcher.room_for(step("two", 2)) == ["5", "6"]
            assert launcher.room_for(step("three", 3)) is None
            (study.out / f"{PART}.wait").unlink()
            until(lambda: launcher.ended() or not launcher.processes)
            assert launcher.room_for(step("three", 3)) == ["4", "5", "6"]

    def test_fewer_at_once_than_asked_for(
        self, study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
        part, trunk, branch = (replace(one, needs=(), inputs=(), on_gpu=True) for one in study.steps())
        for places, number in ((1, 0), (2, 1)):
            with alone_in(study.out, LOCK) as lock:
                Players(study.out, lock, places).run([part, replace(trunk, run=BRANCH), branch], lambda _: None)
            said = capsys.readouterr().out
            assert said.count("fewer runs at once than --max-parallel 2: ") == said.count("\n") == number
            for one in (part, trunk, branch):
                one.outputs[0].unlink()
        assert "waits until enough of the 1 GPUs are free" in said

    def test_a_recipe_for_the_cpu_gets_none(self, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
        launcher = self.launcher(study, 1, 1)
        (first, *_) = study.steps()
        assert (first.on_gpu, launcher.room_for(first)) == (False, [])
        environment = launcher.environment(first, [])
        assert (environment["CUDA_VISIBLE_DEVICES"], environment["OMP_NUM_THREADS"]) == ("", "1")

    def test_torchrun_starts_the_processes(self, study: Study) -> None:
        words = Torchrun.command(replace(study.steps()[0], processes=2))
        assert words[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        assert "--num-gpus" not in words
        assert Torchrun.command(replace(study.steps()[0], processes=0))[1:4] == ["-m", "scratch_det", "train"]


class TestGpus:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("--gpus", 8), "needs 8 GPUs, and CUDA_VISIBLE_DEVICES names 3; change --gpus or --only"),
            (("--gpus", 4), "needs 4 GPUs, and CUDA_VISIBLE_DEVICES names 3; change --gpus or --only"),
        ],
    )
    def test_too_few(
        self, study: Study, study_tool: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple,
        message: str,
    ) -> None:  # fmt: skip
        """Rejected before anything is there."""
        recipe = load_config(study.jobs[0].run.config, ["MODEL.DEVICE", "cuda", "SOLVER.IMS_PER_BATCH", 16]).cfg

        monkeypatch.setattr(Job, "recipe", lambda *_: recipe)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
        code, said = study_tool("run", "digits/smoke", "--out", tmp_path / "x", "--backend", "torchvision", *words)
        assert (code, said.count("\n")) == (2, 1)
        assert message in said
        assert not (tmp_path / "x").exists()

    def test_recipes_for_the_cpu_need_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
        require_gpus([step("one", 8, on_gpu=False), step("other")], "give fewer")
        with pytest.raises(UserError, match="other needs 8 GPUs, and CUDA_VISIBLE_DEVICES names 3; give fewer"):
            require_gpus([step("one", 9, on_gpu=False), step("other", 8)], "give fewer")

    @pytest.mark.parametrize(
        ("visible", "found"),
        [("4,5", ["4", "5"]), ("", []), ("-1", []), ("NoDevFiles", []), ("0,-1,2", ["0"]), ("GPU-8932", ["GPU-8932"])],
    )
    def test_devices_that_are_named(self, monkeypatch: pytest.MonkeyPatch, visible: str, found: list[str]) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert gpus_here() == found

    def test_devices_are_counted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A container with /dev/nvidia5 and /dev/nvidia7 has GPUs 0 and 1."""
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(Path, "glob", lambda *_: iter([Path("/dev/nvidia5"), Path("/dev/nvidia7")]))
        assert gpus_here() == ["0", "1"]
