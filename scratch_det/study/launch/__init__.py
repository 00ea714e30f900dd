"""Launchers: who starts a job's command, and where. The rest of a study sees them as ``Launcher``.

local.py      processes on this machine, one or several a run; torchrun too; devices.py: its GPUs
slurm.py      jobs of a cluster, through submitit; slurm_options.py: what it is asked for
holders.py    who has a job on some machine, and queue.py, which SLURM has: both launchers heed both
"""

from collections.abc import Sequence
from typing import Protocol

from scratch_det.study.job import Job


class Launcher(Protocol):
    """Starts jobs and knows which of them have a process; what became of them is in their folders."""

    def describe(self, job: Job) -> str:
        """What ``start`` would run, to be read."""

    def start(self, jobs: Sequence[Job]) -> set[str]:
        """Start or continue those that nobody else has and that can be now; their names.

        The others are asked for again later.
        """

    def running(self) -> set[str]:
        """Names of the jobs that have a process or wait for one, whoever started them.

        Before it forgets a job that ended otherwise than it should, it leaves the reason in ``failure_file``.
        """

    def stop(self) -> set[str]:
        """Ask what this launcher, or one like it that is gone, has started to stop with a checkpoint.

        Names of what was asked and has not ended yet; asking twice is asking once.
        """
