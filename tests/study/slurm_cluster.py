"""A SLURM of this machine alone, below a temporary folder, from the programs that Debian's packages install."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
JobRequeue=1
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def skip_without_slurm() -> None:
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        pytest.skip(f"{missing[0]} is not installed (Debian's packages: slurmctld, slurmd, slurm-client, munge)")
    if os.geteuid():
        pytest.skip("only root may start slurmd")


@contextmanager
def cluster(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Its commands work, in this process and in those that it starts, as long as the block lasts."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(host=socket.gethostname(), folder=folder, ports=free_ports(2)))
    patch.setenv("SLURM_CONF", str(configuration))
    paths = {
        "key-file": key,
        **{name: folder / f"munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")},
    }
    munge = [f"--{option}={path}" for option, path in paths.items()]
    with ExitStack() as daemons:
        for command in (
            ["munged", "--foreground", "--force", *munge],
            ["slurmctld", "-D", "-c", "-f", str(configuration)],
            ["slurmd", "-D", "-f", str(configuration)],
        ):
            daemons.enter_context(daemon(command, folder / f"{command[0]}.out"))
            if command[0] == "munged":
                wait_for(lambda: (folder / "munge.socket").exists(), "munged")
        wait_for(lambda: said("sinfo", "--noheader", "--format=%T").strip() == "idle", "the node")
        yield
        said("scancel", "--user=root")
        wait_for(lambda: not said("squeue", "--noheader"), "the end of all jobs")


@contextmanager
def daemon(command: list[str], log: Path) -> Iterator[None]:
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=30)


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} seconds"
        time.sleep(0.2)


def field(number: str, name: str) -> str:
    """What `scontrol show job` says, such as JobState."""
    words = said("scontrol", "--oneliner", "show", "job", number).split()
    return next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), "")


def start_now(number: str) -> None:
    """SLURM lets a requeued job wait for two minutes."""
    wait_for(lambda: field(number, "JobState") == "PENDING", "the job is queued again")
    subprocess.run(["scontrol", "update", f"JobId={number}", "StartTime=now"], check=True)
