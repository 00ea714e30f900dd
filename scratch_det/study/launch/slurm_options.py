"""What SLURM is asked for: a YAML file with sbatch's options, and what follows from it for one job."""

import os
import shutil
import subprocess
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from scratch_det.errors import ConfigError, UserError, did_you_mean
from scratch_det.study.job import Job
from scratch_det.study.run import SEARCH

PROGRAMS = ("sbatch", "srun", "squeue", "scancel", "scontrol")
NUMBERS = {"nodes": 1, "gpus_per_node": 0, "cpus_per_task": 1, "signal_delay_s": 1}  # the smallest that each may be
WORDS = (
    "account", "comment", "constraint", "exclude", "mail_type", "mail_user", "mem", "mem_per_cpu", "mem_per_gpu",
    "nodelist", "partition", "qos", "time", "wckey",
)  # fmt: skip
SETUP, MORE = "setup", "additional_parameters"
KINDS: dict[str, tuple[type, str]] = {SETUP: (list, "a list of lines"), MORE: (dict, "lines 'NAME: VALUE'")}
SECONDS_FOR_AN_ANSWER = 60.0
SECONDS_TO_STOP = 120  # from the signal to the end of the time limit


@dataclass(frozen=True)
class Options:
    """What all jobs have in common.

    Attributes:
        words: sbatch's options that are passed on as they are, by submitit's names.
        more: others, by sbatch's names without the dashes; True for one that takes no value.
        setup: shell lines before a run.
        nodes: of a run of several processes.
        gpus_per_node: the most that a run asks for on a node, 0 for none; None: one a process. A recipe whose
            MODEL.DEVICE is cpu asks for none.
        cpus_per_task: of a process; None for what the cluster gives.
        signal_delay_s: seconds before the time limit at which a run is told to stop.
    """

    words: dict[str, str] = field(default_factory=dict)
    more: dict[str, str | bool] = field(default_factory=dict)
    setup: tuple[str, ...] = ()
    nodes: int = 1
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    signal_delay_s: int = SECONDS_TO_STOP

    @property
    def threads(self) -> int:
        """Of a process on the CPU."""
        return self.cpus_per_task or 1


def require_slurm() -> None:
    """Raise UserError where there is no SLURM, none that answers, or no submitit."""
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        raise UserError(
            f"--launcher slurm: there is no {missing[0]} in PATH; start it on a login node of the cluster, or use "
            "--launcher local"
        )
    if not find_spec("submitit"):
        raise UserError("--launcher slurm needs submitit: pip install -e '.[slurm]'")
    if problem := no_answer():
        raise UserError(
            f"--launcher slurm: squeue does not answer ({problem}); start it on a login node when it does, or use "
            "--launcher local"
        )


def no_answer() -> str:
    """Why squeue says nothing; empty where it answers."""
    try:
        command = ["squeue", "--noheader", f"--user={os.getuid()}"]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS_FOR_AN_ANSWER)
    except subprocess.CalledProcessError as error:
        return str(error.stderr.strip().splitlines()[-1] if error.stderr.strip() else error)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return ""


def read_options(path: Path | None) -> Options:
    """The options in ``path``, the defaults without one. Raises ConfigError for what is no option."""
    content = _load(path) if path else {}
    known = [*NUMBERS, *WORDS, SETUP, MORE]
    if unknown := [key for key in content if key not in known]:
        raise ConfigError(
            f"{path}: {unknown[0]} is none of the options{did_you_mean(unknown[0], known)}; known are "
            f"{', '.join(sorted(known))}; others of sbatch's go below {MORE}"
        )
    for key, value in content.items():
        kind, expected = KINDS.get(key, (str, "one value"))
        words = value.values() if isinstance(value, dict) else value
        if not isinstance(value, kind) or not all(isinstance(word, str) for word in words):
            raise ConfigError(f"{path}: {key} is {value!r}, expected {expected}")
    return Options(
        words={key: content[key] for key in WORDS if key in content},
        more={key: word == "true" or word for key, word in content.get(MORE, {}).items()},
        setup=tuple(content.get(SETUP, ())),
        **{key: _number(path, key, content[key], least) for key, least in NUMBERS.items() if key in content},
    )


def shape(job: Job, gpus: int, options: Options) -> dict[str, int]:
    """How many nodes, tasks, GPUs and CPUs a job is given, by submitit's names; one task a process.

    A search is one task, which starts the processes of its trainings itself. Raises UserError for processes that the
    nodes cannot share.
    """
    processes = job.run.processes or gpus
    nodes = 1 if processes == 1 or job.run.kind == SEARCH else options.nodes
    here = processes // nodes
    if here * nodes != processes:
        raise UserError(
            f"{job.name} has {processes} processes, which {nodes} nodes cannot share; change nodes or --gpus"
        )
    if options.gpus_per_node and here > options.gpus_per_node:
        raise UserError(
            f"{job.name} needs {here} GPUs on a node, and gpus_per_node is {options.gpus_per_node}; give it more "
            "nodes, or change --gpus"
        )
    tasks = 1 if job.run.kind == SEARCH else here
    asked = {"nodes": nodes, "ntasks_per_node": tasks}
    if options.gpus_per_node != 0:
        asked["gpus_per_node"] = here
    if options.cpus_per_task:
        asked["cpus_per_task"] = options.cpus_per_task * here // tasks
    return asked


def _load(path: Path) -> dict[str, Any]:
    """The file's keys, every value as it is written there: YAML would read the time 12:00:00 as 43200."""
    try:
        content = yaml.load(path.read_bytes(), yaml.BaseLoader)
    except OSError as error:
        raise ConfigError(f"--slurm {path}: {error.strerror}; expected a file such as docs/slurm.yaml") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--slurm {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if content in (None, ""):
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--slurm {path}: expected lines such as 'partition: gpu'")
    return content


def _number(path: Path | None, key: str, word: str, least: int) -> int:
    if not word.isdecimal() or int(word) < least:
        raise ConfigError(f"{path}: {key} is {word}, expected a whole number, {least} or more")
    return int(word)
