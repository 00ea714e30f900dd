"""A worker: takes one point of the grid after another until all of them are settled, by whomever."""

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import IO, TYPE_CHECKING, Any

from scratch_det.distributed.stop import StopFlag, Stopped
from scratch_det.errors import UserError
from scratch_det.log import Progress, clock, say_now
from scratch_det.search.grid import Point
from scratch_det.search.search import Search
from scratch_det.search.trainer import CONSOLE, RunFailed, metric_of, run_point

if TYPE_CHECKING:
    from scratch_det.search.board import Board, Claim, Record

EXIT_SOME_FAILED = 1
SECONDS_BETWEEN_LOOKS = 5.0  # at the others' points, when all are taken

RunPoint = Callable[[Search, Point, IO[str], StopFlag], dict[str, Any]]


def search_grid(search: Search, run: RunPoint = run_point) -> int:
    """Join the search in ``search.out``, or begin it; the exit code: 0, or 1 when points failed.

    ``run`` makes a point's result. Raises UserError, with nothing written, for what can be refused, and Stopped.
    """
    search.check()
    if find_spec("optuna") is None:
        raise UserError("a search needs Optuna, which is not installed: pip install -e '.[search]'")
    from scratch_det.search.board import Board
    from scratch_det.search.report import report

    stop = StopFlag()
    board = Board(search)
    with stop.listening():
        Worker(board, run, stop).work()
    return EXIT_SOME_FAILED if report(board) else 0


class Worker:
    """One process of a search; see ``work``."""

    def __init__(self, board: "Board", run: RunPoint, stop: StopFlag):
        self.board, self.run, self.stop = board, run, stop
        self.announced = {record.point.name for record in board.records() if record.is_settled}

    def work(self) -> None:
        """Until all points are settled. Waits for those of others: should a worker die, its point is taken over."""
        with Progress("search", len(self.board.points), start=len(self.announced), say=None) as progress:
            while not all(record.is_settled for record in self.announce(progress)):
                if self.stop.requested:
                    raise Stopped(self.stop)
                if claim := self.board.take():
                    self.work_on(claim)
                else:
                    self.wait()

    def work_on(self, claim: "Claim") -> None:
        """Run a point and record what came of it."""
        say_now(f"training {claim.point}: see {self.board.search.folder(claim.point) / CONSOLE}")
        try:
            result = self.run(self.board.search, claim.point, claim.lock, self.stop)
            value = metric_of(result, self.board.search.metric)
        except RunFailed as failure:
            self.board.fail(claim, str(failure))
        else:
            self.board.finish(claim, value, result)

    def wait(self) -> None:
        """Let the others work for a while, or until a request to stop."""
        end = time.monotonic() + SECONDS_BETWEEN_LOOKS
        while time.monotonic() < end and not self.stop.requested:
            time.sleep(0.1)

    def announce(self, progress: Progress) -> "list[Record]":
        """A line for each point that was settled since the last look, by any worker; the records of all points."""
        records = self.board.records()
        for record in records:
            if record.is_settled and record.point.name not in self.announced:
                self.announced.add(record.point.name)
                progress.advance()
                found = f"{self.board.search.metric} {record}; {progress.done} of {progress.total}"
                say_now(f"{record.point}: {found}, eta {clock(progress.eta_seconds())}")
        return records
