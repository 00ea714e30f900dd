"""A study as data for results/: what was made in this folder, and what is there already and was made elsewhere.

So a study may be made in parts: some runs on one machine, the others on another, or later.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scratch_det.errors import DataError, UserError
from scratch_det.files import write_atomically
from scratch_det.log import say_now
from scratch_det.study.experiments import of_place
from scratch_det.study.records import CURVES, FINISHED, RESTORE, RUNS, Record, load, read_json, save
from scratch_det.study.report.description import Made, describe, made_of
from scratch_det.study.study import DESCRIPTION, LOCK, Study


@dataclass(frozen=True)
class Data:
    """What is in ``folder``: outcomes and how each was made, both by the run's name."""

    folder: Path
    experiment: str
    outcomes: Mapping[str, Record] = field(default_factory=dict)
    made: Mapping[str, Made] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, experiment: str) -> "Data":
        """Raises UserError when the folder is none or holds something else, DataError when its files were edited."""
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--results {folder} is a file; name a folder")
        if any((there / LOCK).exists() for there in (folder.resolve(), *folder.resolve().parents)):
            raise UserError(f"--results {folder} is in a study's folder; name another for the numbers")
        path, there = folder / DESCRIPTION, [name for name in (RUNS, CURVES) if (folder / name).exists()]
        if not path.exists():
            if there:
                raise DataError(f"{path} is missing beside {there[0]}; {RESTORE}")
            return cls(folder, experiment)
        description = read_json(path, fix=RESTORE)
        if (other := description.get("experiment")) != experiment:
            raise UserError(f"--results {folder} holds {other}, not {experiment}; name another folder")
        outcomes = {one.run.name: one for one in load(folder, of_place(experiment))}
        made = _read_made(description, path)
        require_unedited(folder)
        return cls(folder, experiment, outcomes, made)

    def add(self, outcomes: Sequence[Record], study: Study) -> list[Path]:
        """Write ``outcomes``, of which the folder's own are taken that got further; the files.

        Raises UserError when both were made with other data.
        """
        kept = self._kept(outcomes)
        ours = made_of(study, [one for one in outcomes if one.run.name not in kept])
        made = {name: about for name, about in self.made.items() if name in kept} | ours
        self._require_same_data(about["environment"] for about in made.values())
        outcomes = [self.outcomes[one.run.name] if one.run.name in kept else one for one in outcomes]
        save(outcomes, self.folder)
        description = {"experiment": self.experiment, **describe(outcomes, made), "sha256": _digests(self.folder)}
        write_atomically(self.folder / DESCRIPTION, json.dumps(description, indent=2) + "\n")
        return [self.folder / name for name in (RUNS, CURVES, DESCRIPTION)]

    def _kept(self, outcomes: Sequence[Record]) -> set[str]:
        """Names of the runs that got further here than in ``outcomes``, which are in an order of what needs what.

        A branch, an evaluation, and a run with values that a search found are kept together with what they rest on, or
        where that is the same to the last bit.
        """
        kept: set[str] = set()
        now = {one.run.name: one for one in outcomes}
        for name, one in now.items():
            there = self.outcomes.get(name)
            if there is None or not _is_further(there, one):
                continue
            parents = [one.run.trunk if there.start else None, one.run.evaluates, one.run.found_by]
            changed = [p for p in parents if p and p not in kept and not _is_same(self.outcomes.get(p), now.get(p))]
            if changed:
                say_now(f"{self.folder}: {name} is not kept, as it rests on another {changed[0]} than this one")
            else:
                kept.add(name)
        return kept

    def _require_same_data(self, environments: Iterable[Mapping[str, Any]]) -> None:
        known: dict[str, Any] = {}
        for environment in environments:
            for name, about in environment["datasets"].items():
                if known.setdefault(name, about) != about:
                    raise UserError(
                        f"--results {self.folder}: some runs were made with another {name} than others: {known[name]}, "
                        f"{about}; name another folder"
                    )


def require_unedited(folder: Path) -> None:
    """Raise DataError when runs.csv or curves.csv is not the one that the study.json beside it describes."""
    path = folder / DESCRIPTION
    if path.exists() and read_json(path, fix=RESTORE).get("sha256") != _digests(folder):
        raise DataError(f"{folder}: {RUNS} and {CURVES} are not those that {DESCRIPTION} describes; {RESTORE}")


def _is_further(one: Record, other: Record) -> bool:
    return (one.state == FINISHED, one.iteration) > (other.state == FINISHED, other.iteration)


def _is_same(one: Record | None, other: Record | None) -> bool:
    """Whether two have ended alike, to the last bit."""
    if one is None or other is None:
        return False
    ends = [(outcome.weights_sha256, outcome.found) for outcome in (one, other)]
    return any(ends[0]) and ends[0] == ends[1]


def _read_made(description: Mapping[str, Any], path: Path) -> dict[str, Made]:
    try:
        environments = [
            {**environment, "datasets": {**environment["datasets"]}} for environment in description["environments"]
        ]
        return {
            name: {
                "command": about["command"],
                "seconds": float(about["seconds"]),
                "environment": environments[about["environment"]],
            }
            for name, about in description["runs"].items()
        }
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise DataError(f"{path} does not say how each run was made; {RESTORE}") from None


def _digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (RUNS, CURVES)}
