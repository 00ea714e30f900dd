"""Run a study: start what can start, until nothing is left to start."""

import time
from collections.abc import Sequence

from scratch_det.distributed.stop import StopFlag, Stopped
from scratch_det.study.board import Board
from scratch_det.study.job import Job
from scratch_det.study.launch import Launcher
from scratch_det.study.records import FAILED, FINISHED, INTERRUPTED, READY, RUNNING, Record, survey
from scratch_det.study.study import Study

SECONDS_BETWEEN_LOOKS = 0.5
EXIT_SOME_FAILED = 1


def run_study(study: Study, jobs: Sequence[Job], launcher: Launcher, max_parallel: int) -> int:
    """Start ``jobs`` as soon as what they need is there, at most ``max_parallel`` at once; the exit code.

    What an earlier start left is continued, and what it found failed is tried once more. A failed run does not keep
    others from going on. All state is in the run folders, so this process may die at any moment. Raises Stopped, when
    the runs have stopped, after a signal that asks for it.
    """
    stop = StopFlag()
    tried: set[str] = set()
    chosen = {job.name for job in jobs}
    with stop.listening(), Board(study, chosen) as board:
        while True:
            running = launcher.running()
            standings = survey(study.jobs, study.out, running)
            board.show(standings, tried)
            jobs_by_name = {job.name: job for job in study.jobs}
            mine = [standing for standing in standings if standing.run.name in chosen]
            if stop.requested:
                if not launcher.stop():
                    raise Stopped(stop)
            else:
                free = max_parallel - sum(
                    jobs_by_name[s.run.name].weight(study.gpus) for s in standings if s.state == RUNNING
                )
                startable = [jobs_by_name[standing.run.name] for standing in mine if can_start(standing, tried)]
                tried |= launcher.start(fitting(startable, free, max_parallel, study.gpus))
                if not startable and not any(standing.state == RUNNING for standing in mine):
                    board.conclude(mine)
                    return 0 if all(standing.state == FINISHED for standing in mine) else EXIT_SOME_FAILED
            time.sleep(SECONDS_BETWEEN_LOOKS)


def can_start(standing: Record, tried: set[str]) -> bool:
    """Whether it has all it needs; a failed one gets one trial more, one that was preempted as many as it takes."""
    return standing.state in (READY, INTERRUPTED) or (standing.state == FAILED and standing.run.name not in tried)


def fitting(jobs: Sequence[Job], free: int, max_parallel: int, gpus: int) -> list[Job]:
    """Those, in order, that fit into ``free`` places; one that needs more than all of them is let in alone."""
    found = []
    for job in jobs:
        weight = min(job.weight(gpus), max_parallel)
        if weight > free:
            break  # a smaller one that slipped in would let it wait for ever
        found.append(job)
        free -= weight
    return found
