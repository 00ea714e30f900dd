"""Who does what: Optuna's record of the points in DIR/search.db, and a lock for each point that is worked on.

Optuna's queue holds the whole grid from the start. Its GridSampler could hand out the points too, but it would count a
failed one as visited for good, and it stops ``Study.optimize`` at the end, which is not used here: a point outlives the
worker that took it.

A worker has a point as long as it, or the trainer that it started, lives and holds the lock in the point's folder: what
is running by the record and not locked was left by a worker that died. SQLite is touched with DIR/search.lock held.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import optuna
from fvcore.common.config import CfgNode
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from scratch_det.engine.resume import EVALUATION, config_changes
from scratch_det.errors import UserError
from scratch_det.files import locked, try_lock
from scratch_det.search.grid import Point
from scratch_det.search.search import Search

SECONDS_FOR_DATABASE = 20.0  # how long another program, such as optuna-dashboard, may have it locked


@dataclass(frozen=True)
class Claim:
    """A point that this worker has; ``lock`` goes to the trainer as well."""

    point: Point
    trial: optuna.Trial
    lock: IO[str]


@dataclass(frozen=True)
class Record:
    """What is known of a point: its state in Optuna's words, its metric and seconds, or its error."""

    point: Point
    state: TrialState
    value: float | None = None
    seconds: float | None = None
    error: str = ""

    @property
    def is_settled(self) -> bool:
        """Whether nobody will work on it any more: finished, or failed."""
        return self.state.is_finished()

    @property
    def has_failed(self) -> bool:
        return self.state == TrialState.FAIL

    def __str__(self) -> str:
        return f"{self.value:.2f}" if self.value is not None else "failed" if self.has_failed else "not finished"


class Board:
    """The points of one search and their states, shared by all workers.

    A new one puts points that failed earlier back into the queue. Raises UserError when DIR/search.db is another
    search's, locked, or no database.
    """

    def __init__(self, search: Search):
        self.search, self.path = search, search.out / "search.db"
        self.points = {point.name: point for point in search.points}
        search.out.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with self.held():
            self.study = self._open()
            self._check_description()
            for name, trial in self._latest().items():
                if trial is None or trial.state == TrialState.FAIL:
                    self._enqueue(name)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other workers from the database and from the files that the search writes."""
        with locked(self.search.out / "search.lock"):
            try:
                yield
            except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
                cause = error if isinstance(error, SQLAlchemyError) else error.__cause__
                raise UserError(
                    f"{self.path} cannot be used as the search's database ({getattr(cause, 'orig', cause)}); end what "
                    "else has it open, or name another folder: --out DIR; runs in their folders are not lost"
                ) from None

    def take(self) -> Claim | None:
        """A point that nobody works on; None when there is none now."""
        with self.held():
            self._free_abandoned()
            first = next(iter(self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))), None)
            lock = self._try_lock(first.user_attrs["point"]) if first else None
            if lock is None:  # also while the last processes of a run that failed are ending
                return None
            trial = self.study.ask(self._distributions())  # the first one of the queue
            return Claim(self.points[trial.user_attrs["point"]], trial, lock)

    def finish(self, claim: Claim, value: float, result: dict[str, Any]) -> None:
        """Record the metric, with the rest of result.json, and give the point up."""
        with self.held(), claim.lock:
            for name, content in result.items():
                claim.trial.set_user_attr(name, content)
            self.study.tell(claim.trial, value)

    def fail(self, claim: Claim, error: str) -> None:
        """Record why there is no result and give the point up."""
        with self.held(), claim.lock:
            claim.trial.set_user_attr("error", error)
            self.study.tell(claim.trial, state=TrialState.FAIL)

    def records(self) -> list[Record]:
        """One for each point, in the grid's order."""
        with self.held():
            return [self._record(self.points[name], trial) for name, trial in self._latest().items() if trial]

    def _open(self) -> optuna.Study:
        try:
            storage = optuna.storages.RDBStorage(
                f"sqlite:///{self.path.absolute()}", engine_kwargs={"connect_args": {"timeout": SECONDS_FOR_DATABASE}}
            )
        except RuntimeError as error:  # another version of Optuna wrote it
            raise UserError(f"{self.path}: {error}; name another folder: --out DIR") from None
        return optuna.create_study(study_name="search", storage=storage, direction="maximize", load_if_exists=True)

    def _check_description(self) -> None:
        """Write down what the search is, or refuse one that differs from what was written."""
        now, earlier = self.search.describe(), self.study.user_attrs.get("description")
        if earlier is None:
            return self.study.set_user_attr("description", now)
        if changes := list(_differences(earlier, now)):
            raise UserError(
                f"{self.path} holds another search:\n  "
                + "\n  ".join(changes)
                + "\n  give the command with the earlier values again, or name another folder: --out DIR"
            )
        return None

    def _latest(self) -> dict[str, FrozenTrial | None]:
        """Optuna's newest trial of each point by its name, in the grid's order."""
        latest: dict[str, FrozenTrial | None] = dict.fromkeys(self.points)
        latest.update({trial.user_attrs["point"]: trial for trial in self.study.get_trials(deepcopy=False)})
        return latest

    def _record(self, point: Point, trial: FrozenTrial) -> Record:
        value = trial.value if trial.state == TrialState.COMPLETE else None
        return Record(point, trial.state, value, trial.user_attrs.get("seconds"), trial.user_attrs.get("error", ""))

    def _enqueue(self, name: str) -> None:
        self.study.enqueue_trial(self.points[name].labels, user_attrs={"point": name})

    def _free_abandoned(self) -> None:
        """Put back into the queue what a worker left that died."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if lock := self._try_lock(trial.user_attrs["point"]):
                with lock:
                    self.study.tell(trial.number, state=TrialState.FAIL)
                    self._enqueue(trial.user_attrs["point"])

    def _try_lock(self, name: str) -> IO[str] | None:
        return try_lock(self.search.folder(self.points[name]) / "worker.lock")

    def _distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
        axes = next(iter(self.points.values())).labels
        labels = {axis: dict.fromkeys(point.labels[axis] for point in self.points.values()) for axis in axes}
        return {axis: CategoricalDistribution(tuple(choices)) for axis, choices in labels.items()}


def _differences(earlier: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """One line for each thing that would make two workers do different searches."""
    for name in now:
        if name != "recipe" and earlier[name] != now[name]:
            yield f"{name} was {earlier[name]}, now {now[name]}"
    before, after = (CfgNode.load_cfg(description["recipe"]) for description in (earlier, now))
    for change in config_changes(before, after, completed=1):
        if change.refused or change.is_schedule or change.effect == EVALUATION:
            yield f"{change.what} was {change.earlier!r}, now {change.now!r}"
