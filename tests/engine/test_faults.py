"""Runs in two processes, as a shell starts them: equal to one another, and what happens when something goes wrong."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from run_folder import NO_TEST, is_same, lines, read, weights

from scratch_det import backends
from scratch_det.errors import UserError

TRAIN_NET = ROOT / "tools/train_net.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
RESULTS = "inference/coco_instances_results.json"
LONG = ("SOLVER.MAX_ITER", 100_000, "SOLVER.CHECKPOINT_PERIOD", 50_000, *NO_TEST)
FAULTS = {
    "nan": "losses['loss_rpn_loc'] = losses['loss_rpn_loc'] * float('nan')",
    "bug": "1 / 0",
    "sigkill": "os.kill(os.getpid(), 9)",
    "pause": "open('asleep', 'w').close(); time.sleep(5)",
    "hang": "open('asleep', 'w').close(); time.sleep(60)",
    "slow prediction": "model.predict = lambda *arguments: time.sleep(3) or predict(*arguments)",
}
DRIVER = """
import os, sys, time
sys.path.insert(0, {root!r})
from scratch_det import backends
model = backends.load(backends.choose("auto"))
calls, original, predict = iter(range(1000)), model.losses, model.predict
def losses_with_fault(*arguments):
    losses = original(*arguments)
    if next(calls) == {call} and os.environ.get("RANK", "0") == {rank!r}:
        {fault}
    return losses
model.losses = losses_with_fault
exec(compile(open({tool!r}).read(), {tool!r}, "exec"), {{"__name__": "__main__", "__doc__": ""}})
"""

Shell = Callable[..., subprocess.Popen]
Train = Callable[..., Path]


@pytest.fixture
def shell(toy_recipe: Path, tmp_path: Path) -> Shell:
    """``shell(*arguments, name="run", program=[...])`` starts the recipe's training in a session of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = []

    def start(*arguments: Any, name: str = "run", program: tuple[Any, ...] = (TRAIN_NET,)) -> subprocess.Popen:
        words = [*program, "--config-file", toy_recipe, *arguments, "OUTPUT_DIR", tmp_path / name]
        process = subprocess.Popen(
            [sys.executable, *map(str, words)], cwd=tmp_path, env=environment, start_new_session=True, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def end(process: subprocess.Popen, code: int = 0) -> str:
    """The standard error of a command that has to end with ``code``."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out[-2000:] + err[-4000:]
    return err


def wait_for(condition: Callable[[], object], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300  # after which something hangs
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def state_of(folder: Path) -> str:
    """What the run's status.json says."""
    return read(folder, "status.json")["state"] if (folder / "status.json").exists() else "not there"


def is_training(folder: Path) -> Callable[[], bool]:
    """Whether the run there has got somewhere: a first line of losses."""
    return lambda: (folder / "metrics.json").exists() and bool((folder / "metrics.json").read_text())


def assert_stopped(folder: Path, iteration: int) -> None:
    status = read(folder, "status.json")
    assert (status["state"], status["iteration"]) == ("stopped", iteration)
    assert (folder / f"checkpoints/model_{iteration - 1:07d}.pth").exists()


def is_asleep(folder: Path) -> Callable[[], bool]:
    """Whether a fault that sleeps has come to it; says so once."""

    def look() -> bool:
        found = (folder / "asleep").exists()
        if found:  # one that comes now is left for the next look
            (folder / "asleep").unlink()
        return found

    return look


@pytest.fixture
def broken(tmp_path: Path) -> Callable[..., tuple[Any, ...]]:
    """``broken(fault, rank=0)``: a program that trains, but process ``rank`` has a fault in its third iteration.

    The slow prediction begins with the second iteration.
    """

    def write(fault: str, rank: int = 0) -> tuple[Any, ...]:
        path = tmp_path / "driver.py"
        call = 1 if fault == "slow prediction" else 2
        words = {"root": str(ROOT), "rank": str(rank), "fault": FAULTS[fault], "tool": str(TRAIN_NET), "call": call}
        path.write_text(DRIVER.format(**words))
        return (path,)

    return write


class TestEquality:
    def test_losses_of_one_and_two_processes(
        self, shell: Shell, train: Train, coco_factory: Callable, tmp_path: Path
    ) -> None:
        """With GN, no padding, and every anchor and proposal used so that nothing is drawn, the first losses agree."""
        coco_factory("square", num_images=6, size=(64, 64))
        keys = ("DATASETS.TRAIN", "('square',)", "SOLVER.IMS_PER_BATCH", 4, "SOLVER.BASE_LR", 0.01, "SOLVER.MAX_ITER",
                1, "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 100_000, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 1000,
                *NO_TEST)  # fmt: skip
        train(*keys, name="one")
        train(*keys, name="parts", accumulate=2)
        end(shell("--num-gpus", 2, *keys, name="two"))
        one, two, parts = (lines(tmp_path / name)[0] for name in ("one", "two", "parts"))
        for key in (key for key in one if "loss" in key):
            assert two[key] == pytest.approx(one[key], rel=1e-3)
            assert parts[key] == pytest.approx(two[key], rel=1e-5)

    def test_weights_that_are_evaluated(self, shell: Shell, train: Train, tmp_path: Path) -> None:
        """Every image once, in the order of the json, as one process does."""
        one = train("SOLVER.MAX_ITER", 1, name="one")
        start = ("MODEL.WEIGHTS", one / "checkpoints/model_final.pth")
        end(shell("--eval-only", "--num-gpus", 2, *start, name="evaluated"))
        assert len({result["image_id"] for result in read(one, RESULTS)}) == 4
        assert read(tmp_path / "evaluated", RESULTS) == read(one, RESULTS)

    @pytest.mark.slow
    def test_weights_to_train_on_from(self, shell: Shell, train: Train, tmp_path: Path) -> None:
        one, trained = train("SOLVER.MAX_ITER", 1, *NO_TEST, name="one"), tmp_path / "trained"
        start = ("MODEL.WEIGHTS", one / "checkpoints/model_final.pth")
        end(shell("--num-gpus", 2, *start, "SOLVER.MAX_ITER", 1, "SOLVER.BASE_LR", 1e-12, *NO_TEST, name="trained"))
        before, after = weights(one), weights(trained)
        assert all(after[key].allclose(before[key]) for key in before)
        assert read(trained, "result.json")["iteration"] == 1


class TestStopping:
    @pytest.mark.parametrize(
        ("number", "code"),
        [
            (signal.SIGINT, 130),
            pytest.param(signal.SIGTERM, 75, marks=pytest.mark.slow),
            pytest.param(signal.SIGUSR1, 75, marks=pytest.mark.slow),
            pytest.param(signal.SIGHUP, 75, marks=pytest.mark.slow),
        ],
    )
    def test_one_process(self, number: int, code: int, shell: Shell, tmp_path: Path) -> None:
        process = shell(*LONG)
        wait_for(is_training(tmp_path / "run"), process)
        process.send_signal(number)
        message = end(process, code)
        assert f"stopped by {signal.Signals(number).name}; the same command with --resume continues" in message
        assert_stopped(tmp_path / "run", read(tmp_path / "run", "status.json")["iteration"])

    @pytest.mark.slow
    @pytest.mark.parametrize("launcher", [(), TORCHRUN])
    def test_two_processes_and_resume(
        self, launcher: tuple[Any, ...], shell: Shell, broken: Callable, tmp_path: Path
    ) -> None:
        """A run whose launcher was asked to stop and that torchrun continues is one that was left alone.

        Its evaluation is, too.
        """
        keys = ("SOLVER.MAX_ITER", 5, "MODEL.FPN.NORM", "SyncBN", "MODEL.ROI_BOX_HEAD.NORM", "SyncBN")
        folder, whole = tmp_path / "run", tmp_path / "whole"
        end(shell("--num-gpus", 2, *keys, name="whole"))

        process = shell(*(() if launcher else ("--num-gpus", 2)), *keys, program=(*launcher, *broken("pause")))
        wait_for(is_asleep(tmp_path), process)
        process.terminate()
        process.communicate(timeout=300)
        assert launcher or process.returncode == 75  # torchrun has codes of its own
        assert_stopped(folder, 3)

        end(shell("--resume", *keys, program=(*TORCHRUN, TRAIN_NET)))
        assert "3 of 5 iterations are done" in (folder / "log.txt").read_text()
        assert is_same(folder, whole)
        assert read(folder, RESULTS) == read(whole, RESULTS)
        assert read(folder, "environment.json")["processes"] == 2

    @pytest.mark.slow
    @pytest.mark.parametrize("processes", [1, 2])
    def test_a_second_signal_ends_a_blocked_process(
        self, processes: int, shell: Shell, broken: Callable, tmp_path: Path
    ) -> None:
        """One that sleeps, or that waits for another one that does."""
        process = shell("--num-gpus", processes, *LONG, program=broken("hang", processes - 1))
        wait_for(is_asleep(tmp_path), process)
        main_process = read(tmp_path / "run", "status.json")["pid"]
        os.kill(main_process, signal.SIGTERM)
        time.sleep(2)  # sooner it would count as the same request
        os.kill(main_process, signal.SIGTERM)
        end(process, 128 + signal.SIGTERM)

    def test_a_signal_to_one_of_two_in_the_evaluation(
        self, shell: Shell, train: Train, broken: Callable, tmp_path: Path
    ) -> None:
        """Both leave the evaluation, whose weights are in a checkpoint; it is made up for after --resume."""
        keys = ("SOLVER.MAX_ITER", 4, "TEST.EVAL_PERIOD", 2)
        process = shell("--num-gpus", 2, *keys, program=broken("slow prediction"))
        folder = tmp_path / "run"
        wait_for(lambda: state_of(folder) == "evaluating", process)
        os.kill(read(folder, "status.json")["pid"], signal.SIGUSR1)
        end(process, 75)
        assert read(folder, "status.json")["iteration"] == 2
        assert not lines(folder)
        train(*keys, resume=True)
        assert [line["iteration"] for line in lines(folder)] == [1, 3, 4]


class TestFaults:
    def test_nan_in_one_process(self, shell: Shell, broken: Callable, tmp_path: Path) -> None:
        message = end(shell("--num-gpus", 2, "SOLVER.MAX_ITER", 9, *NO_TEST, program=broken("nan", 1)), 2)
        assert message.count("error:") == 1
        assert "the loss is not finite at iteration 2" in message
        assert "only process 1 of 2 has a loss that is not finite" in message
        report = read(tmp_path / "run", "nonfinite.json")
        good, bad = report["processes"]
        assert (bad["losses"]["loss_rpn_loc"], bad["losses"]["total_loss"]) == ("nan", "nan")
        assert all(isinstance(value, float) for value in good["losses"].values())
        assert [image["position"] for one in (good, bad) for image in one["images"]] == [4, 5]
        assert len(report["last_losses"]) == 2
        modules = {"torchvision": {"backbone.body", "rpn.head"},
                   "detectron2": {"backbone.bottom_up", "proposal_generator.rpn_head"}}  # fmt: skip
        assert modules[backends.choose("auto")] <= report["gradient_norms"].keys()
        assert read(tmp_path / "run", "status.json")["state"] == "failed"

    @pytest.mark.parametrize(
        ("processes", "rank"),
        [pytest.param(1, 0, marks=pytest.mark.slow), (2, 1), pytest.param(2, 0, marks=pytest.mark.slow)],
    )
    def test_a_bug_is_one_message_and_all_end(
        self, processes: int, rank: int, shell: Shell, broken: Callable, tmp_path: Path
    ) -> None:
        """Those that load the data, too."""
        keys = ("DATALOADER.NUM_WORKERS", 1, *LONG)
        message = end(shell("--num-gpus", processes, *keys, program=broken("bug", rank)), 70)
        assert "Traceback" not in message
        assert message.count("unexpected error") == message.count("ZeroDivisionError") == 1
        assert "ZeroDivisionError" in read(tmp_path / "run", "status.json")["error"]
        assert "in losses_with_fault" in (tmp_path / "run/traceback.txt").read_text()

    @pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
    def test_a_killed_process_takes_the_other_along(self, rank: int, shell: Shell, broken: Callable) -> None:
        message = end(shell("--num-gpus", 2, *LONG, program=broken("sigkill", rank)), 137)
        assert f"process {rank} was ended by SIGKILL (out of memory?)" in message

    @pytest.mark.slow  # one process fails, as by a bug
    def test_an_image_that_vanishes(self, shell: Shell, tmp_path: Path, datasets_root: Path) -> None:
        process = shell("--num-gpus", 2, *LONG)
        wait_for(is_training(tmp_path / "run"), process)
        (datasets_root / "toy_train/images/2.jpg").unlink()
        message = end(process, 2)
        assert message.count("error:") == 1
        assert re.search(r"error: .*images/2\.jpg", message)

    def test_two_runs_in_one_folder(self, shell: Shell, train: Train, tmp_path: Path) -> None:
        first = shell(*LONG)
        wait_for(is_training(tmp_path / "run"), first)
        before = (tmp_path / "run/config.yaml").read_bytes()
        with pytest.raises(UserError, match="another process is training in OUTPUT_DIR"):
            train(*LONG, resume=True)
        assert (tmp_path / "run/config.yaml").read_bytes() == before
        assert first.poll() is None
        first.terminate()
        end(first, 75)

    def test_a_mistake_is_said_once(self, shell: Shell, tmp_path: Path) -> None:
        message = end(shell("--num-gpus", 2, "SOLVER.IMS_PER_BATCH", 3, "SOLVER.BASE_LR", 0.01), 2)
        assert message.count("error:") == 1
        assert "2 processes cannot share" in message
        assert not (tmp_path / "run").exists()


class TestData:
    """Data that do not come, and the workers that should bring them."""

    WORKERS = ("DATALOADER.NUM_WORKERS", 1)

    @pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
    def test_a_stop_while_one_process_waits_for_data(self, processes: int, shell: Shell, tmp_path: Path) -> None:
        """It leaves a checkpoint, from which the run goes on to the last bit."""
        keys = ("--num-gpus", processes, "SOLVER.MAX_ITER", 5, *self.WORKERS, *NO_TEST)
        driver = tmp_path / "driver.py"
        driver.write_text(
            "import sys, time\n"
            "from scratch_det.data.dataset import TrainingSet\n"
            "read = TrainingSet.__getitem__\n"
            "def wait(data, position):\n"
            "    if position == 7:\n        open('asleep', 'w').close()\n        time.sleep(600)\n"
            "    return read(data, position)\n"
            "TrainingSet.__getitem__ = wait\n"
            f"exec(compile(open({str(TRAIN_NET)!r}).read(), {str(TRAIN_NET)!r}, 'exec'))\n"
        )
        process = shell(*keys, program=(driver,))
        wait_for(is_asleep(tmp_path), process)
        wait_for(lambda: state_of(tmp_path / "run") == "training", process)
        process.terminate()
        end(process, 75)
        stopped_after = read(tmp_path / "run", "status.json")["iteration"]
        assert stopped_after <= 3
        assert_stopped(tmp_path / "run", stopped_after)
        end(shell("--resume", *keys))
        end(shell(*keys, name="whole"))
        assert is_same(tmp_path / "run", tmp_path / "whole")

    @pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
    def test_a_killed_worker(self, processes: int, shell: Shell, tmp_path: Path) -> None:
        """One message, and nothing is left behind."""
        process = shell("--num-gpus", processes, *LONG, *self.WORKERS)
        wait_for(is_training(tmp_path / "run"), process)
        worker = children(read(tmp_path / "run", "status.json")["pid"])[0]
        os.kill(worker, signal.SIGKILL)
        message = end(process, 2)
        assert message.count("error:") == len(message.splitlines()) == 1
        assert f"worker (pid {worker}) is killed by signal: Killed: it was loading data" in message
        assert "worker" in read(tmp_path / "run", "status.json")["error"]
        deadline = time.monotonic() + 60
        while left_in_session(process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def left_in_session(leader: int) -> list[str]:
    """Processes of a command that ``shell`` has started, in a session of its own."""
    found = subprocess.run(["ps", "-o", "pid=,stat=", "--sid", str(leader)], capture_output=True, text=True).stdout
    return [line for line in found.splitlines() if "Z" not in line]
