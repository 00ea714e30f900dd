"""Steps as jobs of a SLURM cluster: the whole graph is submitted at once, and SLURM keeps the order.

A step waits for those that it needs (``afterok``; a search's choice ``afterany``) and for whatever of the same run was
submitted before (``singleton``, by the job's name). Submitting again leaves out what is done, queued or running. A run
that is preempted, reaches its time limit or is requeued by hand starts anew under its number, with --resume. The job's
script is made from a template, slurm.sh beside this file or that of --slurm FILE, and left in jobs/NAME.sh.
"""

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from jinja2 import Environment, StrictUndefined, TemplateError

from scratch_det.errors import ConfigError, UserError
from scratch_det.files import write_atomically
from scratch_det.study.records import QUEUED, RUNNING, START_OF_LOG, jobs_folder
from scratch_det.study.run import Step

PROGRAMS = ("sbatch", "srun", "squeue", "scontrol")
TEMPLATE = Path(__file__).with_name("slurm.sh")
SECONDS_FOR_AN_ANSWER = 60
TRANSIENT = ("Unable to contact", "timed out", "temporarily", "Zero Bytes", "standby", "MaxSubmitJob", "QOSMaxSubmit")


class Slurm:
    """The jobs of the study in ``out``; ``threads``: of a process on the CPU."""

    def __init__(self, out: Path, template: Path | None = None, threads: int = 1):
        """Raises ConfigError for a file that is no template."""
        self.out, self.path, self.threads = out, template or TEMPLATE, threads
        self.mark = sha256(str(out.resolve()).encode()).hexdigest()[:8]  # of this study, in the names of its jobs
        try:
            text = self.path.read_text()
            self.template = Environment(undefined=StrictUndefined, trim_blocks=True).from_string(text)
            self.template.globals["fail"] = self.fail
        except OSError as error:
            raise ConfigError(f"--slurm {template}: {error.strerror}; expected a file such as docs/slurm.sh") from None
        except (TemplateError, UnicodeDecodeError) as error:
            raise ConfigError(f"--slurm {template}: {error}; expected a job script such as docs/slurm.sh") from None
        example = Step("NAME", "NAME", ("tools/train_net.py",))
        if not text.startswith("#!") or shlex.join(example.command(launches=False)) not in self.script(example):
            raise ConfigError(
                f"--slurm {template}: expected a job script that begins with #!, in which {{{{ command }}}} is the "
                "run, such as docs/slurm.sh; a YAML file of sbatch's options is no longer read"
            )

    def script(self, step: Step) -> str:
        """The job's script. Raises ConfigError for a placeholder that does not exist."""
        processes = max(step.processes, 1)
        words = {  # the placeholders; paths and the command are quoted for the shell
            "name": step.name,
            "command": shlex.join(step.command(launches=False)),
            "processes": processes,
            "gpus": processes if step.on_gpu else 0,
            "threads": 0 if step.on_gpu else self.threads,
            "exit_file": shlex.quote(f"{jobs_folder(self.out).absolute() / step.file_name}.exit"),
            "started": shlex.quote(START_OF_LOG),
        }
        try:
            return self.template.render(**words) + "\n"
        except TemplateError as error:
            raise ConfigError(f"--slurm {self.path}: {error}; placeholders are {', '.join(words)}") from None

    def fail(self, message: str) -> None:
        """For a template that cannot have a step's number of processes."""
        raise ConfigError(f"--slurm {self.path}: {message}")

    def check(self, steps: Sequence[Step]) -> None:
        """Raise ConfigError, before anything is submitted, for a step that the template rejects."""
        for step in steps:
            self.script(step)

    def options(self, step: Step, ids: dict[str, str]) -> list[str]:
        """sbatch's that are no matter of the template; ``ids``: SLURM's numbers of steps submitted before."""
        condition = "afterany" if step.also_after_failures else "afterok"
        after = [f"{condition}:{ids[name]}" for name in step.needs if name in ids]
        return [
            # One name for all steps that write into one folder: no two of them may go on at once.
            f"--job-name={step.name.partition('@')[0]}.{self.mark}",
            f"--dependency={','.join([*after, 'singleton'])}",
            f"--comment={step.name}",  # by which squeue tells them apart
            "--kill-on-invalid-dep=yes",
            "--requeue",
            f"--output={str(jobs_folder(self.out).absolute() / step.file_name).replace('%', '%%')}.log",
            "--open-mode=append",
        ]

    def submit(self, steps: Sequence[Step]) -> list[str]:
        """Submit those of ``steps`` that are neither done nor queued nor running; SLURM's numbers of the new jobs.

        Raises UserError when squeue does not answer, or sbatch refuses.
        """
        marked = [job for job in _squeue() if job.name.endswith(f".{self.mark}") and job.state != "COMPLETING"]
        ids = {job.step: job.id for job in marked}
        scripts = {step: self.script(step) for step in steps if not step.is_done and step.name not in ids}
        new: list[str] = []
        for step, text in scripts.items():
            path = jobs_folder(self.out) / f"{step.file_name}.sh"
            left = path.with_suffix(".exit")
            earlier = left.stat().st_mtime_ns if left.exists() else 0
            write_atomically(path, text)
            command = ["sbatch", "--parsable", *self.options(step, ids), str(path)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                path.unlink()  # a script is there for what SLURM was given; --dry-run prints it
                said = (done.stderr.strip().splitlines() or ["sbatch: it said nothing"])[-1]
                if any(words in done.stderr for words in TRANSIENT):
                    raise UserError(
                        f"{step.name}: SLURM cannot take more jobs now ({said}): {len(new)} jobs are submitted; give "
                        "the same command again later"
                    )
                raise UserError(
                    f"{step.name}: {said}; {len(new)} jobs are submitted; change the job template (--slurm FILE), and "
                    "give the same command again"
                )
            if left.exists() and left.stat().st_mtime_ns == earlier:  # else it is of this job, and it was quick
                left.unlink()
            ids[step.name] = done.stdout.strip().partition(";")[0]
            new.append(ids[step.name])
        return new

    def states(self) -> dict[str, str]:
        """RUNNING or QUEUED by the name of the run. Raises UserError when squeue does not answer."""
        jobs = [(job.name.rpartition("."), job.state) for job in _squeue()]
        found = [(name.partition("/")[0], state) for (name, _, mark), state in jobs if mark == self.mark]
        return {run: QUEUED for run, _ in found} | {run: RUNNING for run, state in found if state == "RUNNING"}


def require_slurm() -> None:
    """Raise UserError where there is no SLURM, or none that answers."""
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        raise UserError(
            f"--launcher slurm: there is no {missing[0]} in PATH; start it on a login node of the cluster, or use "
            "--launcher local"
        )
    _squeue()


@dataclass(frozen=True)
class QueuedJob:
    """One of one's jobs, as squeue shows it; ``step``: its comment."""

    id: str
    state: str
    name: str
    step: str


def _squeue() -> list[QueuedJob]:
    """One's jobs, of all studies. Raises UserError when squeue does not answer."""
    command = ["squeue", "--me", "--noheader", "--format=%i %T %j %k"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS_FOR_AN_ANSWER)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or "").strip().splitlines() or [str(error)]
        raise UserError(
            f"--launcher slurm: squeue does not answer ({said[-1]}); start it on a login node when it does, or use "
            "--launcher local"
        ) from None
    rows = [line.split(maxsplit=3) for line in done.stdout.splitlines()]
    return [QueuedJob(*row, *[""] * (4 - len(row))) for row in rows if len(row) > 2]  # some clusters drop comments
