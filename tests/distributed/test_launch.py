"""Several processes: who is who, and how they are started."""

import os
import signal
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scratch_det.distributed import launch
from scratch_det.distributed.group import Group
from scratch_det.distributed.launch import World, first_host, read_world
from scratch_det.distributed.stop import StopFlag, Stopped
from scratch_det.errors import UserError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node0",
            "MASTER_PORT": "29500"}  # fmt: skip
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "1", "SLURM_NODEID": "2",
        "SLURM_STEP_NODELIST": "gpu[07-09]", "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
        "SLURM_JOB_ID": "4012345"}  # fmt: skip

OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "2345664513"}  # fmt: skip
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"}  # MPICH, Intel MPI
MEETING = {"MASTER_ADDR": "head", "MASTER_PORT": "29500"}


class TestWorld:
    def test_nothing_set_is_a_single_process(self) -> None:
        assert read_world({}) == World()
        assert World().is_main

    def test_torchrun(self) -> None:
        world = read_world(TORCHRUN)
        assert world == World(5, 8, 1, 4, "node0", 29500)
        assert not world.is_main
        assert read_world({**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True"}).served

    def test_torchrun_with_one_process_is_a_single_process(self) -> None:
        assert read_world({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}) == World()

    def test_srun(self) -> None:
        assert read_world(SRUN) == World(5, 6, 1, 2, "gpu07", 20_000 + 4012345 % 12_000)

    def test_srun_with_uneven_nodes_and_given_meeting_point(self) -> None:
        environment = {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "1,2(x2),1", "MASTER_ADDR": "head", "MASTER_PORT": "7"}
        world = read_world({**environment, "SLURM_NODEID": "1"})
        assert (world.local_size, world.address, world.port) == (2, "head", 7)

    def test_a_batch_script_outside_srun_is_a_single_process(self) -> None:
        assert read_world({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) == World()

    def test_torchrun_inside_srun_counts(self) -> None:
        assert read_world({**SRUN, **TORCHRUN}).size == 8

    @pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
    def test_incomplete(self, missing: str) -> None:
        with pytest.raises(UserError, match=rf"incomplete \({missing} missing\): .*_") as caught:
            read_world({key: value for key, value in TORCHRUN.items() if key != missing})
        assert f" {missing}=" not in str(caught.value).split(";")[0]

    @pytest.mark.parametrize(
        ("environment", "world"),
        [
            (OPEN_MPI, World(1, 2, 1, 2, "127.0.0.1", 20_000 + 2345664513 % 12_000)),
            ({**OPEN_MPI, "MASTER_ADDR": "head", "MASTER_PORT": "7"}, World(1, 2, 1, 2, "head", 7)),
            (HYDRA, World(3, 4, 3, 4, "127.0.0.1", 20_000)),
            ({**HYDRA, **MEETING, "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}, World(3, 4, 1, 2, "head", 29500)),
            # a wrapper that sets torchrun's names without LOCAL_RANK: on one machine it is RANK
            ({"RANK": "1", "WORLD_SIZE": "2", **MEETING, "MASTER_ADDR": "127.0.0.1"}, World(1, 2, 1, 2, port=29500)),
            ({"RANK": "1", "WORLD_SIZE": "2", **MEETING, "LOCAL_WORLD_SIZE": "2"}, World(1, 2, 1, 2, "head", 29500)),
            # the launcher's own variable tells it
            ({"RANK": "1", "WORLD_SIZE": "2", **MEETING, **OPEN_MPI}, World(1, 2, 1, 2, "head", 29500)),
            ({**SRUN, "RANK": "5", "WORLD_SIZE": "6", **MEETING}, World(5, 6, 1, 2, "head", 29500)),
            # srun --mpi=pmi2, and mpirun in a job, whose daemons srun starts
            ({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "6"}, read_world(SRUN)),
            ({**SRUN, "SLURM_PROCID": "0", **OPEN_MPI}, World(1, 2, 1, 2, "127.0.0.1", 20_000 + 4012345 % 12_000)),
        ],
    )  # fmt: skip
    def test_mpirun(self, environment: dict[str, str], world: World) -> None:
        assert read_world(environment) == world

    def test_mpirun_on_several_machines_needs_a_meeting_point(self) -> None:
        with pytest.raises(UserError, match=r"\(MASTER_ADDR missing\): RANK=1, WORLD_SIZE=2, .* -x MASTER_ADDR=HOST"):
            read_world({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"})

    def test_one_process_of_mpirun_is_alone(self) -> None:
        assert read_world({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}) == World()
        assert read_world({"WORLD_SIZE": "1"}) == World()

    @pytest.mark.parametrize("change", [{"RANK": "8"}, {"LOCAL_RANK": "4"}, {"LOCAL_WORLD_SIZE": "9"}, {"RANK": "x"},
                                        {"MASTER_PORT": "99999"}])  # fmt: skip
    def test_contradiction(self, change: dict[str, str]) -> None:
        with pytest.raises(UserError, match="environment"):
            read_world({**TORCHRUN, **change})

    @pytest.mark.parametrize(
        ("nodelist", "host"),
        [("gpu7", "gpu7"), ("gpu[07-09,11]", "gpu07"), ("gpu[3],cpu1", "gpu3"), ("n[1-2]-ib,m1", "n1-ib"),
         ("a.b.c,d", "a.b.c"), ("rack1-gpu[001-002]", "rack1-gpu001")],
    )  # fmt: skip
    def test_first_host(self, nodelist: str, host: str) -> None:
        assert first_host(nodelist) == host


FLAGS: dict[str, Any] = {"num_gpus": 1, "num_machines": 1, "machine_rank": 0}


class TestFlags:
    @pytest.mark.parametrize(
        ("world", "change", "expected"),
        [
            (World(), {}, False),
            (World(), {"num_gpus": 0}, False),
            (World(), {"num_gpus": 2}, True),
            (World(), {"num_machines": 2}, True),
            (World(1, 2, 1, 2), {"num_gpus": 2}, False),  # one of the processes that were launched
            (World(1, 4, 1, 2), {"num_gpus": 2, "num_machines": 2, "machine_rank": 1}, False),
        ],
    )
    def test_who_launches(self, world: World, change: dict[str, Any], expected: bool) -> None:
        assert launch.several_to_launch(world, **{**FLAGS, **change}) == expected

    @pytest.mark.parametrize(
        ("world", "change", "message"),
        [
            (World(), {"num_gpus": -1}, "--num-gpus -1"),
            (World(), {"num_gpus": 10**9}, "at most 64 processes a machine"),
            (World(), {"num_machines": 0}, "--num-machines 0"),
            (World(), {"num_machines": 2, "machine_rank": 2}, "--machine-rank 2"),
            (World(0, 4, 0, 4), {"num_gpus": 8}, "started 4 processes, .* asks for 8"),
        ],
    )
    def test_contradictions(self, world: World, change: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            launch.several_to_launch(world, **{**FLAGS, **change})

    @pytest.mark.parametrize("url", ["auto", "tcp://host", "tcp://host:99999", "tcp://[::1", "env://", "host:1"])
    def test_several_machines_need_a_meeting_point(self, url: str) -> None:
        with pytest.raises(UserError, match="expected tcp://HOST:PORT"):
            launch.launch(2, 2, 0, url)

    @pytest.mark.parametrize(
        ("quotas", "cores"),
        [({}, 8), ({"job/step": "max 100000"}, 8), ({"job": "350000 100000", "job/step": "max 100000"}, 3),
         ({"": "1600000 100000", "job/step": "50000 100000"}, 1)],
        ids=str,
    )  # fmt: skip
    def test_the_quota_of_a_container_or_job(
        self, quotas: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "own").write_text("4:memory:/other\n0::/job/step\n")
        for name, quota in quotas.items():
            (tmp_path / "groups" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "groups" / name / "cpu.max").write_text(f"{quota}\n")
        monkeypatch.setattr(launch, "CGROUP", tmp_path / "own")
        monkeypatch.setattr(launch, "CGROUPS", tmp_path / "groups")
        monkeypatch.setattr(launch.os, "sched_getaffinity", lambda _: range(8), raising=False)
        assert launch.usable_cores() == cores

    def test_processes_share_the_cores_that_may_be_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        started = []
        monkeypatch.setattr(launch, "usable_cores", lambda: 6)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr(launch, "open_store", lambda *_: (None, 1))
        monkeypatch.setattr(launch, "_wait", lambda *_: 0)
        monkeypatch.setattr(launch.subprocess, "Popen", lambda command, env: started.append(env))
        assert launch.launch(2, 1, 0, "auto") == 0
        assert [env["OMP_NUM_THREADS"] for env in started] == ["3", "3"]

    def test_a_port_that_is_taken(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            with pytest.raises(UserError, match=r"cannot open 127\.0\.0\.1:\d+ .*give another: --dist-url"):
                launch.launch(2, 1, 0, f"tcp://127.0.0.1:{taken.getsockname()[1]}")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_while_waiting_for_the_others(rank: int) -> None:
    """Rank 0 waits for those that do not come, the others for the meeting point."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    stop = StopFlag()
    stop.requested = True
    with pytest.raises(Stopped):
        Group(World(rank, 2, rank, 2, port=port), "cpu", stop)


def test_a_stop_while_the_meeting_point_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch is imported there, which takes seconds."""
    monkeypatch.setattr(launch, "open_store", lambda *_: (os.kill(os.getpid(), signal.SIGTERM), 1))
    monkeypatch.setattr(launch.subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    with pytest.raises(Stopped, match="SIGTERM"):
        launch.launch(2, 1, 0, "auto")


@pytest.mark.parametrize(("machine_rank", "host"), [(0, "no.invalid"), (1, "no.invalid"), (0, "a..b"), (1, "a" * 80)])
def test_a_host_that_does_not_resolve(machine_rank: int, host: str) -> None:
    with pytest.raises(UserError, match=rf"cannot (open|reach) {host}:1234 .*; give another: --dist-url"):
        launch.launch(2, 2, machine_rank, f"tcp://{host}:1234")


@pytest.mark.parametrize(("count", "ends_at", "is_told"), [(1, "set", True), (2, "", False), (1, "add", False)])
def test_who_fails_first_says_so(
    count: int, ends_at: str, is_told: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Also where the store ends with another process before all have heard of it."""

    def answer(name: str) -> int:
        if name == ends_at:
            raise RuntimeError("Connection reset by peer")
        return count

    store = SimpleNamespace(add=lambda *_: answer("add"), set=lambda *_: answer("set"))
    group = Group(World(), "cpu", StopFlag())
    group.is_main, group.watch = False, SimpleNamespace(store=store)  # type: ignore[assignment]
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    group.fail(UserError("a mistake"))
    assert ended == [2]
    assert ("error: a mistake" in capsys.readouterr().err) == is_told
