"""Studies on a cluster: options and refusals anywhere, and real jobs where SLURM is installed."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, load_tool
from run_folder import is_same, read
from slurm_cluster import cluster, field, said, skip_without_slurm, start_now, wait_for

from scratch_det.distributed.launch import read_world
from scratch_det.errors import UserError
from scratch_det.files import try_lock
from scratch_det.study.job import Job
from scratch_det.study.launch.holders import lock_file
from scratch_det.study.launch.local import Local
from scratch_det.study.launch.slurm import Slurm
from scratch_det.study.launch.slurm_options import PROGRAMS, Options, read_options, shape
from scratch_det.study.records import failure_file, jobs_folder
from scratch_det.study.run import SEARCH
from scratch_det.study.study import Study

ON_CPU = Options(gpus_per_node=0, cpus_per_task=1)
MINUTES = 600.0


def exit_code_of(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    """The exit code of tools/study.py."""
    monkeypatch.setattr(sys, "argv", ["study.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        load_tool("study").main()
    return int(ended.value.code or 0)


def script(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front of PATH whose SLURM answers nothing and fails."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in PROGRAMS:
        script(folder, name, "exit 1")
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study("digits/table1", tmp_path / "study", backend="torchvision").begin()


def jobs_without_needs(study: Study, number: int = 2) -> list[Job]:
    return [job for job in study.jobs if not job.needs][:number]


class TestOptions:
    def test_the_example(self) -> None:
        options = read_options(ROOT / "docs/slurm.yaml")
        assert options.words["time"] == "1-00:00:00"
        assert (options.nodes, options.gpus_per_node, options.cpus_per_task) == (1, None, 6)
        assert options.setup == ("export NCCL_DEBUG=WARN",)
        assert options.more == {"exclude": "broken01"}

    def test_values_are_sbatchs_and_not_yamls(self, tmp_path: Path) -> None:
        """YAML reads 12:00:00 as 43200 and 0123 as 83."""
        path = tmp_path / "slurm.yaml"
        path.write_text("time: 12:00:00\naccount: 0123\nadditional_parameters: {exclusive: true, begin: 16:00}\n")
        options = read_options(path)
        assert options.words == {"time": "12:00:00", "account": "0123"}
        assert options.more == {"exclusive": True, "begin": "16:00"}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("partion: gpu", "partion is none of the options; did you mean 'partition'?"),
            ("nodes: two", "nodes is two, expected a whole number, 1 or more"),
            ("setup: module load cuda", "expected a list of lines"),
            ("partition: [a, b]", "expected one value"),
            ("additional_parameters: {exclude: [a, b]}", "expected lines 'NAME: VALUE'"),
            ("- partition", "expected lines such as 'partition: gpu'"),
            ("partition: [", "not valid YAML"),
            (b"partition: \xe9", "not valid YAML"),
        ],
    )
    def test_refused(
        self, text: str | bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        path, out = tmp_path / "slurm.yaml", tmp_path / "study"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        code = exit_code_of(monkeypatch, "run", "digits/smoke", "--out", out, "--launcher", "slurm", "--slurm", path)
        assert (code, out.exists()) == (2, False)
        said = capsys.readouterr().err
        assert message in said
        assert str(path) in said
        assert said.count("\n") == 1

    def test_shapes(self, study: Study) -> None:
        job = jobs_without_needs(study)[0]
        search = replace(job, run=replace(job.run, kind=SEARCH))
        two_nodes = Options(nodes=2, gpus_per_node=4, cpus_per_task=3)
        assert shape(job, 8, two_nodes) == {"nodes": 2, "ntasks_per_node": 4, "gpus_per_node": 4, "cpus_per_task": 3}
        assert shape(job, 1, two_nodes) == {"nodes": 1, "ntasks_per_node": 1, "gpus_per_node": 1, "cpus_per_task": 3}
        assert shape(search, 4, two_nodes) == {
            "nodes": 1, "ntasks_per_node": 1, "gpus_per_node": 4, "cpus_per_task": 12,
        }  # fmt: skip
        assert shape(job, 2, ON_CPU) == {"nodes": 1, "ntasks_per_node": 2, "cpus_per_task": 1}
        assert shape(job, 8, Options()) == {"nodes": 1, "ntasks_per_node": 8, "gpus_per_node": 8}
        for gpus, options in ((3, two_nodes), (16, two_nodes)):
            with pytest.raises(UserError, match=job.name):
                shape(job, gpus, options)


class TestRefusals:
    def refused(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, out: Path, *arguments: Any
    ) -> str:
        assert exit_code_of(monkeypatch, "run", "digits/smoke", "--out", out, *arguments) == 2
        assert not out.exists()
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    def test_no_slurm(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        said = self.refused(monkeypatch, capsys, tmp_path / "study", "--launcher", "slurm")
        assert "there is no sbatch in PATH" in said

    @pytest.mark.usefixtures("programs")
    def test_no_submitit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        monkeypatch.setattr("scratch_det.study.launch.slurm_options.find_spec", lambda name: None)
        said = self.refused(monkeypatch, capsys, tmp_path / "study", "--launcher", "slurm")
        assert "pip install" in said

    def test_no_answer(
        self, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        pytest.importorskip("submitit")
        script(programs, "squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
        said = self.refused(monkeypatch, capsys, tmp_path / "study", "--launcher", "slurm")
        assert "squeue does not answer (slurm_load_jobs error: Unable to contact slurm controller)" in said

    def test_options_for_nobody(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        said = self.refused(monkeypatch, capsys, tmp_path / "study", "--slurm", ROOT / "docs/slurm.yaml")
        assert "the launcher is local" in said

    def test_processes_that_nodes_cannot_share(
        self, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        pytest.importorskip("submitit")
        script(programs, "squeue", "exit 0")
        (programs / "slurm.yaml").write_text("nodes: 2")
        asked = ("--launcher", "slurm", "--gpus", 3, "--slurm", programs / "slurm.yaml")
        assert "3 processes" in self.refused(monkeypatch, capsys, tmp_path / "study", *asked)


class TestQueue:
    """What squeue's answers mean; it is a script here."""

    def submitted(self, study: Study) -> tuple[Slurm, Job, Job]:
        one, other = jobs_without_needs(study)
        for job, number in ((one, "7_0"), (other, "7_1")):
            (jobs_folder(study.out) / f"{job.name}.slurm").write_text(f'{{"id": "{number}"}}')
        (jobs_folder(study.out) / "slurm").mkdir()
        return Slurm(study, ON_CPU), one, other

    def test_no_answer_means_running(self, programs: Path, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("scratch_det.study.launch.queue.SECONDS_BETWEEN_QUERIES", -1.0)
        slurm, one, other = self.submitted(study)
        assert slurm.running() == {one.name, other.name}
        script(programs, "squeue", "echo 7_1")
        assert slurm.running() == {other.name}
        script(programs, "squeue", "exit 1")
        assert slurm.running() == {other.name}

    def test_how_it_ended(self, programs: Path, study: Study) -> None:
        slurm, one, other = self.submitted(study)
        script(programs, "squeue", "exit 0")
        script(programs, "scontrol", "echo JobId=7 JobState=NODE_FAIL Reason=None")
        (slurm.queue.folder / "7_0_exit").write_text("2\n")
        log = "error: an earlier one\nsubmitit: Starting with JobEnvironment()\nerror: this one\nsrun: error: task 0\n"
        (slurm.queue.folder / "7_0_0_log.out").write_text(log)
        assert slurm.running() == set()
        assert failure_file(one, study.out).read_text() == "exit code 2: this one\n"
        assert failure_file(other, study.out).read_text() == "SLURM ended job 7_1: NODE_FAIL\n"

    def test_stopped_is_not_failed(self, programs: Path, study: Study) -> None:
        slurm, one, other = self.submitted(study)
        script(programs, "squeue", "exit 0")
        for number, code in (("7_0", 75), ("7_1", 138)):
            (slurm.queue.folder / f"{number}_exit").write_text(f"{code}\n")
        assert slurm.running() == set()
        assert not failure_file(one, study.out).exists()
        assert not failure_file(other, study.out).exists()

    @pytest.mark.usefixtures("programs")
    def test_nothing_is_submitted_twice(self, study: Study) -> None:
        """sbatch would fail."""
        slurm, one, other = self.submitted(study)
        slurm.start([one, other])

    def test_sbatch_refuses(self, programs: Path, study: Study, capsys: pytest.CaptureFixture) -> None:
        pytest.importorskip("submitit")
        script(programs, "sbatch", "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1")
        with pytest.raises(UserError, match="invalid partition specified: gpu"):
            Slurm(study, ON_CPU).start(jobs_without_needs(study))
        assert capsys.readouterr().err == ""
        assert not list(jobs_folder(study.out).glob("*.slurm"))

    def test_an_outage(self, programs: Path, study: Study, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
        """Said once; nothing is submitted anew before squeue has told that nothing came through."""
        pytest.importorskip("submitit")
        monkeypatch.setattr("scratch_det.study.launch.slurm.SECONDS_BETWEEN_TRIALS", -1.0)
        monkeypatch.setattr("scratch_det.study.launch.queue.SECONDS_BETWEEN_QUERIES", -1.0)
        slurm, (job, _) = Slurm(study, ON_CPU), jobs_without_needs(study)
        script(programs, "sbatch", "echo 'sbatch: error: Socket timed out on send/recv operation' >&2; exit 1")
        assert slurm.start([job]) == set()
        assert slurm.running() == {job.name}
        script(programs, "squeue", "exit 0")
        assert slurm.running() == set()
        slurm.start([job])
        assert slurm.running() == set()
        said = capfd.readouterr()
        assert (said.out + said.err).count("Socket timed out") == 1
        script(programs, "sbatch", "echo Submitted batch job 8")
        script(programs, "squeue", "echo 8 any")
        script(programs, "scontrol", "echo 'ClusterName             = big'")
        assert slurm.start([job]) == {job.name}
        assert slurm.running() == {job.name}
        assert read(jobs_folder(study.out), f"{job.name}.slurm") == {"id": "8", "where": f"{os.getuid()}@big"}

    def test_a_look_from_another_cluster(self, programs: Path, study: Study) -> None:
        """Its squeue has none of the jobs; nothing is concluded, cancelled or submitted again."""
        slurm, one, other = self.submitted(study)
        for job in (one, other):
            (jobs_folder(study.out) / f"{job.name}.slurm").write_text('{"id": "7", "where": "0@big"}')
        script(programs, "squeue", "exit 0")
        script(programs, "scontrol", "echo 'ClusterName             = small'")
        assert slurm.running() == {one.name, other.name}
        assert slurm.stop() == set()
        assert not failure_file(one, study.out).exists()

    def test_a_number_that_nobody_wrote_down(self, programs: Path, study: Study) -> None:
        """study.py was killed while it submitted an array, and before it submitted a job."""
        one, other, third = jobs_without_needs(study, 3)
        queue = Slurm(study, ON_CPU).queue
        queue.announce([one, other], "digits/table1-0123")
        queue.announce([third], "digits/table1-4567")
        script(programs, "squeue", "echo 7_0 digits/table1-0123; echo 7_1 digits/table1-0123; echo 9_1 another")
        assert Slurm(study, ON_CPU).running() == {one.name, other.name}
        numbers = [read(jobs_folder(study.out), f"{job.name}.slurm") for job in (one, other)]
        assert [about["id"] for about in numbers] == ["7_0", "7_1"]

    def test_the_other_launchers_runs(self, programs: Path, study: Study) -> None:
        slurm, one, other = self.submitted(study)
        local, third = Local(study), jobs_without_needs(study, 3)[2]
        script(programs, "squeue", "echo 7_0; echo 7_1")
        assert local.running() == {one.name, other.name}
        local.start([one])
        assert not local.processes
        assert (local.stop(), local.running()) == (set(), {one.name, other.name})
        lock = try_lock(lock_file(third, study.out))
        assert lock is not None
        with lock:
            assert slurm.running() == {one.name, other.name, third.name}
        assert slurm.running() == {one.name, other.name}

    def test_what_is_asked_for(self, study: Study) -> None:
        said = Slurm(study, replace(ON_CPU, more={"exclusive": True})).describe(study.jobs[0]).splitlines()[0]
        assert said.endswith("--cpus-per-task=1 --requeue --signal=USR1@120 --exclusive")

    def test_a_recipe_for_the_cpu_asks_for_no_gpus(self, study: Study, tmp_path: Path) -> None:
        options = Options(gpus_per_node=4)
        slurm = Slurm(study, options)
        assert "gpus" not in slurm.describe(study.jobs[0])
        threads = replace(study, threads=3)
        assert (
            "export OMP_NUM_THREADS=3"
            in Slurm(threads, options)._parameters(slurm.shapes[study.jobs[0].name], "x")["setup"]
        )
        for_gpus = Study("table1", tmp_path / "table1", backend="torchvision", gpus=4)
        assert "--gpus-per-node=4" in Slurm(for_gpus, options).describe(for_gpus.jobs[0])


@pytest.fixture(scope="module")
def real_slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    skip_without_slurm()
    pytest.importorskip("submitit")
    with pytest.MonkeyPatch.context() as patch, cluster(tmp_path_factory.mktemp("slurm"), patch):
        yield


class Quick(Slurm):
    """Runs that only say who they are, one of which refuses something."""

    def command(self, job: Job) -> list[str]:
        code = f"""
import json, os, pathlib, sys
names = [name for name in os.environ if name.startswith("SLURM_") or name == "OMP_NUM_THREADS"]
with open(r"{self.study.out}/{job.name}." + os.environ["SLURM_PROCID"], "w") as file:
    json.dump({{name: os.environ[name] for name in names}}, file)
if {job == self.study.jobs[-1]}:
    sys.exit("error: of no use")
result = pathlib.Path(r"{job.result(self.study.out)}")
result.parent.mkdir(exist_ok=True)
result.write_text("{{}}")
"""
        return [sys.executable, "-c", code]


@pytest.mark.usefixtures("real_slurm")
def test_an_array_of_two_tasks_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One array, own ports, SLURM's variables, and the last words of what fails."""
    monkeypatch.setattr("scratch_det.study.launch.queue.SECONDS_BETWEEN_QUERIES", 0.2)
    study = Study("digits/table1", tmp_path / "study", backend="torchvision", gpus=2, threads=1).begin()
    jobs = [study.jobs[0], study.jobs[-1]]
    slurm = Quick(study, ON_CPU)
    slurm.start(jobs)
    numbers = [read(jobs_folder(study.out), f"{job.name}.slurm")["id"] for job in jobs]
    assert [number.partition("_")[2] for number in numbers] == ["0", "1"]
    assert len({number.partition("_")[0] for number in numbers}) == 1
    assert slurm.running() == {job.name for job in jobs}
    wait_for(lambda: not slurm.running(), "both runs")
    worlds = [read_world(read(study.out, f"{job.name}.{rank}")) for job in jobs for rank in (0, 1)]
    assert [(world.rank, world.size, world.local_rank, world.by_srun) for world in worlds] == [
        (0, 2, 0, True), (1, 2, 1, True), (0, 2, 0, True), (1, 2, 1, True),
    ]  # fmt: skip
    assert len({world.port for world in worlds}) == 2
    assert read(study.out, f"{jobs[0].name}.0")["OMP_NUM_THREADS"] == "1"
    assert not failure_file(jobs[0], study.out).exists()
    assert failure_file(jobs[1], study.out).read_text() == "exit code 1: of no use\n"


class Runs:
    """Starts digits/smoke with a small digits set."""

    def __init__(self, folder: Path, processes: int):
        self.folder, self.processes = folder, processes
        make = [sys.executable, str(ROOT / "tools/prepare_digits.py"), "--out", str(folder / "datasets/digits")]
        subprocess.run([*make, "--train", "60", "--val", "6"], check=True, capture_output=True)
        (folder / "slurm.yaml").write_text(yaml.safe_dump({"gpus_per_node": 0, "cpus_per_task": 1}))
        self.environment = {
            **os.environ,
            "DETECTRON2_DATASETS": str(folder / "datasets"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }

    def start(self, launcher: str) -> subprocess.Popen:
        options = ["--slurm", str(self.folder / "slurm.yaml")] if launcher == "slurm" else []
        out = ["--out", str(self.folder / launcher), "--backend", "torchvision", "--gpus", str(self.processes)]
        command = [sys.executable, "tools/study.py", "run", "digits/smoke", *out, "--launcher", launcher, *options]
        with open(self.folder / f"{launcher}.out", "a") as file:
            return subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=file, stderr=file)

    def checkpoint(self, study: subprocess.Popen, iterations: int) -> None:
        """Wait for it in the trunk's folder."""
        path = self.folder / f"slurm/smoke_3x/checkpoints/model_{iterations - 1:07d}.pth"
        wait_for(lambda: path.exists() or study.poll() is not None, path.name, MINUTES)
        assert study.poll() is None, self.said("slurm")

    def said(self, launcher: str) -> str:
        return (self.folder / f"{launcher}.out").read_text()[-3000:]

    @property
    def number(self) -> str:
        """SLURM's, of the trunk."""
        return read(self.folder / "slurm/jobs", "smoke_3x.slurm")["id"]


@pytest.mark.slow
@pytest.mark.usefixtures("real_slurm")
@pytest.mark.parametrize("processes", [1, 2])
def test_requeued_and_preempted(processes: int, tmp_path: Path) -> None:
    """`scontrol requeue`, then study.py killed, then a signal: bitwise what the local launcher makes of the study."""
    runs = Runs(tmp_path, processes)
    study = runs.start("slurm")
    runs.checkpoint(study, 5)
    number = runs.number
    subprocess.run(["scontrol", "requeue", number], check=True)
    start_now(number)
    study.kill()
    study.wait()
    study = runs.start("slurm")
    runs.checkpoint(study, 15)
    subprocess.run(["scancel", "--signal=USR1", number], check=True)
    wait_for(lambda: field(number, "JobState") == "PENDING", "requeue after exit code 75", MINUTES)
    assert read(tmp_path / "slurm/smoke_3x", "status.json")["state"] == "stopped"
    start_now(number)
    assert study.wait(MINUTES) == 0, runs.said("slurm")
    assert field(number, "Restarts") == "2"
    assert said("squeue", "--noheader") == ""
    assert runs.start("local").wait(MINUTES) == 0, runs.said("local")
    for name in ("smoke_3x", "smoke_2x"):
        assert is_same(tmp_path / "slurm" / name, tmp_path / "local" / name)


@pytest.mark.slow
@pytest.mark.usefixtures("real_slurm")
def test_stopped_with_the_study(tmp_path: Path) -> None:
    """A checkpoint, exit code 75, and nothing is left in the queue; the same command would go on."""
    runs = Runs(tmp_path, 2)
    study = runs.start("slurm")
    runs.checkpoint(study, 5)
    number = runs.number
    study.send_signal(signal.SIGTERM)
    assert study.wait(MINUTES) == 75, runs.said("slurm")
    assert read(tmp_path / "slurm/smoke_3x", "status.json")["state"] == "stopped"
    assert said("squeue", "--noheader") == ""
    assert (field(number, "Restarts"), field(number, "ExitCode")) == ("0", "75:0")
    assert not list((tmp_path / "slurm/jobs").glob("*.failed"))
