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
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined, TemplateError

from scratch_det.errors import ConfigError, UserError
from scratch_det.files import find_file, write_atomically
from scratch_det.study.records import QUEUED, RUNNING, START_OF_LOG
from scratch_det.study.run import Step

PROGRAMS = ("sbatch", "srun", "squeue", "scontrol")
TEMPLATE = Path(__file__).with_name("slurm.sh")
SECONDS_FOR_AN_ANSWER = 60
ELSEWHERE = "start it on a login node of the cluster, or use --launcher local"


class Slurm:
    """The jobs of the study in ``out``."""

    def __init__(self, out: Path, template: Path | None = None):
        """Raises ConfigError for a file that is no template."""
        self.out, self.path = out, find_file(template or TEMPLATE)
        self.mark = sha256(str(out.resolve()).encode()).hexdigest()[:8]  # of this study, in the names of its jobs
        try:
            text = self.path.read_text()
            self.template = Environment(undefined=StrictUndefined, trim_blocks=True).from_string(text)
        except (OSError, TemplateError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"--slurm {template}: {reason}; expected a job script such as docs/slurm.sh") from None
        self.template.globals["fail"] = self.fail
        example = Step("NAME", "NAME", ("train",))
        if not text.startswith("#!") or shlex.join(example.command(launches=False)) not in self.script(example):
            raise ConfigError(f"--slurm {template}: expected #! and {{{{ command }}}}, the run, as in docs/slurm.sh")

    def fail(self, message: str) -> None:
        """For a template that cannot have a step's number of processes."""
        raise ConfigError(f"--slurm {self.path}: {message}")

    def script(self, step: Step) -> str:
        """The job's script. Raises ConfigError for a placeholder that does not exist, and where the template fails."""
        processes = max(step.processes, 1)
        words = {  # the placeholders; paths and the command are quoted for the shell
            "name": step.name,
            "command": shlex.join(step.command(launches=False)),
            "processes": processes,
            "gpus": processes if step.on_gpu else 0,
            "threads": 0 if step.on_gpu else step.threads,
            "exit_file": shlex.quote(str(step.file(self.out.absolute(), ".exit"))),
            "started": shlex.quote(START_OF_LOG),
        }
        if lines := [word for word in words if "\n" in str(words[word])]:  # which would end a line of #SBATCH
            raise UserError(f"{step.name!r}: its {lines[0]} has several lines, {words[lines[0]]!r}; rename the folder")
        try:
            return self.template.render(**words) + "\n"
        except TemplateError as error:
            raise ConfigError(f"--slurm {self.path}: {error}; placeholders are {', '.join(words)}") from None

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
            f"--output={str(step.file(self.out.absolute(), '.log')).replace('%', '%%')}",
            "--open-mode=append",
        ]

    def shown(self, step: Step) -> str:
        """What would be submitted, with names in the place of numbers."""
        return f"# sbatch {shlex.join(self.options(step, {name: name for name in step.needs}))}\n{self.script(step)}"

    def submit(self, steps: Sequence[Step]) -> list[str]:
        """Submit those of ``steps`` that are neither done nor queued nor running; SLURM's numbers of the new jobs.

        Raises UserError when squeue does not answer, or sbatch rejects a job.
        """
        ids = {job.step: job.id for job in self.queued() if job.state != "COMPLETING"}
        scripts = {step: self.script(step) for step in steps if not step.is_done and step.name not in ids}
        new: list[str] = []
        for step, text in scripts.items():
            path, left = step.file(self.out, ".sh"), step.file(self.out, ".exit")
            earlier = left.stat().st_mtime_ns if left.exists() else 0
            write_atomically(path, text)
            command = ["sbatch", "--parsable", *self.options(step, ids), str(path)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                path.unlink()  # a script is there for what SLURM was given; --dry-run prints it
                raise UserError(
                    f"{step.name}: {last_line(done.stderr, 'sbatch')}; {len(new)} jobs are submitted; give the same "
                    "command again: later if SLURM takes no more jobs now, else with another job template, --slurm FILE"
                )
            if left.exists() and left.stat().st_mtime_ns == earlier:  # else it is of this job, and it was quick
                left.unlink()
            ids[step.name] = done.stdout.strip().partition(";")[0]
            new.append(ids[step.name])
        return new

    def queued(self) -> list["QueuedJob"]:
        """This study's jobs. Raises UserError when squeue does not answer."""
        return [job for job in squeue() if job.name.endswith(f".{self.mark}")]

    def states(self) -> dict[str, str]:
        """RUNNING or QUEUED by the name of the run. Raises UserError when squeue does not answer."""
        found = [(job.name.rpartition(".")[0].partition("/")[0], job.state) for job in self.queued()]
        return {run: QUEUED for run, _ in found} | {run: RUNNING for run, state in found if state == "RUNNING"}


class QueuedJob(NamedTuple):
    """A job as squeue shows it; ``step``: its comment, which some clusters drop."""

    id: str
    state: str
    name: str
    step: str = ""


def squeue() -> list[QueuedJob]:
    """The user's jobs, of all studies. Raises UserError when there is no SLURM, or it does not answer."""
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        raise UserError(f"--launcher slurm: there is no {missing[0]} in PATH; {ELSEWHERE}")
    command = ["squeue", "--me", "--noheader", "--format=%i %T %j %k"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS_FOR_AN_ANSWER)
    except (OSError, subprocess.SubprocessError) as error:
        reason = last_line(getattr(error, "stderr", None) or "", str(error))
        raise UserError(f"--launcher slurm: squeue does not answer ({reason}); {ELSEWHERE}") from None
    return [QueuedJob(*row) for line in done.stdout.splitlines() if len(row := line.split(maxsplit=3)) > 2]


def last_line(text: str, otherwise: str) -> str:
    return (text.strip().splitlines() or [otherwise])[-1]
