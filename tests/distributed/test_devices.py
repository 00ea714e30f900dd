"""Devices: which one a process takes, and what the processes say to each other when they meet."""

import multiprocessing
import os
import platform
import socket
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from scratch_det.distributed import devices, group
from scratch_det.distributed.devices import SHARE_GPUS, check_devices, check_machine, pick_device
from scratch_det.distributed.group import Group
from scratch_det.distributed.launch import World
from scratch_det.distributed.stop import StopFlag
from scratch_det.errors import ConfigError, UserError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[torch.device]]:
    """``gpus("a", "b")`` makes GPUs with these UUIDs visible; the list holds what becomes the current device."""

    def show(*uuids: str) -> list[torch.device]:
        current: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(uuids))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids))
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        found = [SimpleNamespace(uuid=uuid) for uuid in uuids]
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found[device.index])
        monkeypatch.setattr(torch, "zeros", lambda *_, device: SimpleNamespace(device=torch.device(device)))
        return current

    return show


class TestOwnDevice:
    def test_one_process_trains_on_the_cpu(self, gpus: Callable, caplog: pytest.LogCaptureFixture,
                                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
        gpus()
        monkeypatch.setattr(devices.logger, "propagate", True)
        monkeypatch.setattr(devices.logger, "disabled", False)
        assert pick_device("cuda").type == "cpu"
        assert "no GPU is visible: using the CPU" in caplog.text

    @pytest.mark.parametrize(
        ("name", "processes", "asked"),
        [
            ("cuda:1", 1, "MODEL.DEVICE is cuda:1"),
            ("cuda", 2, "MODEL.DEVICE is cuda in 2 processes"),
            ("cuda:0", 2, "MODEL.DEVICE is cuda:0 in 2 processes"),
        ],
    )
    def test_what_was_asked_for_by_name_or_number_is_an_error(
        self, gpus: Callable, name: str, processes: int, asked: str
    ) -> None:
        gpus()
        with pytest.raises(ConfigError, match=f"^{asked}, but no GPU is visible; the CPU is MODEL.DEVICE cpu"):
            pick_device(name, World(size=processes, local_size=processes))

    @pytest.mark.parametrize(
        ("name", "local_rank", "visible", "index"),
        [
            ("cuda", 0, "ab", 0),
            ("cuda", 1, "ab", 1),  # torchrun and --num-gpus show all of them
            ("cuda", 1, "b", 0),  # srun --gpus-per-task, and what sets CUDA_VISIBLE_DEVICES for each process
            ("cuda", 2, "cd", 0),
            ("cuda:1", 0, "ab", 1),
        ],
    )
    def test_a_visible_gpu_in_turn(self, gpus: Callable, name: str, local_rank: int, visible: str, index: int) -> None:
        current = gpus(*visible)
        assert pick_device(name, World(local_rank, 4, local_rank, 4)) == torch.device("cuda", index)
        assert current == [torch.device("cuda", index)]

    def test_a_device_that_is_no_device(self) -> None:
        with pytest.raises(ConfigError, match="is gpu, which this machine does not have"):
            pick_device("gpu")


class TestTogether:
    @pytest.mark.parametrize("found", [["cpu", "cpu"], ["GPU a", "GPU b"]])
    def test_what_fits(self, found: list[str]) -> None:
        check_devices([("host", device) for device in found])

    @pytest.mark.parametrize(
        ("found", "wrong"),
        [
            ([("a", "GPU 1"), ("b", "no GPU")], ["process 1 on b: no GPU"]),
            ([("a", "no GPU"), ("a", "no GPU")], ["process 0 on a: no GPU", "process 1 on a: no GPU"]),
            ([("a", "GPU 1"), ("b", "cpu")], ["process 1 on b: cpu"]),
            ([("a", "cpu"), ("b", "no GPU")], ["process 0 on a: cpu", "process 1 on b: no GPU"]),
            ([("a", "GPU 1"), ("a", "GPU 2"), ("a", "GPU 1")], ["process 0 on a: GPU 1", "process 2 on a: GPU 1"]),
        ],
    )
    def test_what_does_not(self, found: list[tuple[str, str]], wrong: list[str]) -> None:
        with pytest.raises(UserError) as caught:
            check_devices(found)
        first, *lines = str(caught.value).split("\n  ")
        assert first == f"{len(found)} processes need a GPU each, or MODEL.DEVICE cpu:"
        assert lines == wrong

    def test_a_gpu_is_shared_where_the_user_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(SHARE_GPUS, "1")
        check_devices([("a", "GPU 1"), ("a", "GPU 1")])
        with pytest.raises(UserError, match="process 1 on a: cpu"):
            check_devices([("a", "GPU 1"), ("a", "cpu")])

    def test_the_processes_of_a_machine(self, gpus: Callable) -> None:
        gpus("a", "b")
        assert check_machine("cuda", World(size=4, local_size=2)) == torch.device("cuda", 0)
        with pytest.raises(UserError, match=r"3 processes need a GPU each.*\n  process 0 on .*: GPU a\n  process 2 "):
            check_machine("cuda", World(size=3, local_size=3))


def meet(world: World, found: str) -> None:
    """One of two processes; ``found`` is its device's identity, or why it has none. Ends as a tool would."""

    def pick(*_: object) -> torch.device:
        if found.startswith("no"):
            raise ConfigError(found)
        return torch.device("cpu")

    group.pick_device, group.identity = pick, lambda _: found  # type: ignore[assignment]
    with Group(world, "cuda", StopFlag()) as together:
        assert together.any(world.is_main)
    os._exit(0)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (("cpu", "cpu"), ""),
        (("GPU a", "GPU b"), ""),
        (("GPU a", "GPU a"), "process 1 on HOST: GPU a"),
        (("GPU a", "cpu"), "process 1 on HOST: cpu"),
        (("cpu", "no GPU is visible"), "process 1 on HOST: no GPU is visible"),
        (("no GPU is visible", "no GPU is visible"), "process 0 on HOST: no GPU is visible"),
    ],
)
def test_two_processes_end_at_once(found: tuple[str, str], said: str, capfd: pytest.CaptureFixture) -> None:
    """With one message and exit code 2, also when rank 0 serves the meeting point itself, as under srun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = World(0, 2, 0, 2, port=free.getsockname()[1])
    worlds = [replace(world, rank=rank, local_rank=rank) for rank in range(2)]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=meet, args=pair) for pair in zip(worlds, found, strict=True)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == ([2, 2] if said else [0, 0])
    error = capfd.readouterr().err
    assert error.count("error: ") == bool(said)
    assert said.replace("HOST", platform.node()) in error
