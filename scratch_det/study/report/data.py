"""A study as data for results/: what was made in this folder, and what is there already and was made elsewhere.

So a study may be made in parts: some runs on one machine, the others on another, or later.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scratch_det.errors import DataError, UserError
from scratch_det.study.experiments import of_place
from scratch_det.study.outcome import Outcome
from scratch_det.study.report.description import describe_all, describe_part
from scratch_det.study.results import CURVES, RESTORE, RUNS, load, save
from scratch_det.study.standing import FINISHED, Standing, read_json
from scratch_det.study.study import DESCRIPTION, Study
from scratch_det.textfile import write_atomically

Part = Mapping[str, Any]


@dataclass(frozen=True)
class Data:
    """What is in ``folder``: finished runs by name, and the parts that they were made in, as in ``describe_part``."""

    folder: Path
    experiment: str
    finished: Mapping[str, Outcome] = field(default_factory=dict)
    parts: Sequence[Part] = ()

    @classmethod
    def of(cls, folder: Path, experiment: str) -> "Data":
        """Raises UserError when the folder is none or holds another experiment, DataError when files were edited."""
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--results {folder} is a file; name a folder")
        path = folder / DESCRIPTION
        if not path.exists():
            return cls(folder, experiment)
        description = read_json(path, mend=RESTORE)
        if (there := description.get("experiment")) != experiment:
            raise UserError(f"--results {folder} holds {there}, not {experiment}; name another folder")
        parts = description.get("parts")
        if not isinstance(parts, list) or not all(map(_is_part, parts)):
            raise DataError(f"{path} does not say in which parts the runs were made; {RESTORE}")
        outcomes = load(folder, of_place(experiment))
        return cls(folder, experiment, {one.run.name: one for one in outcomes if one.state == FINISHED}, parts)

    def add(self, outcomes: Sequence[Outcome], study: Study, standings: Sequence[Standing]) -> list[Path]:
        """Write ``outcomes``, but runs that have finished earlier and not here as they are; the files.

        Raises UserError when the two were made with other data.
        """
        kept = {one.run.name for one in outcomes if one.state != FINISHED and one.run.name in self.finished}
        here = describe_part(study, [standing for standing in standings if standing.job.name not in kept])
        parts = [part for earlier in self.parts if (part := _only(earlier, kept))["seconds"]] + [here]
        self._require_same_data(parts)
        outcomes = [self.finished[one.run.name] if one.run.name in kept else one for one in outcomes]
        save(outcomes, self.folder)
        description = {"experiment": self.experiment, **describe_all(study, outcomes, parts)}
        write_atomically(self.folder / DESCRIPTION, json.dumps(description, indent=2) + "\n")
        return [self.folder / name for name in (RUNS, CURVES, DESCRIPTION)]

    def _require_same_data(self, parts: Sequence[Part]) -> None:
        known: dict[str, Any] = {}
        for part in parts:
            for name, about in part["environment"].get("datasets", {}).items():
                if known.setdefault(name, about) != about:
                    raise UserError(
                        f"--results {self.folder} has runs made with another {name}: {known[name]}, here {about}; name "
                        "another folder"
                    )


def _is_part(content: Any) -> bool:
    return isinstance(content, dict) and all(isinstance(content.get(key), dict) for key in ("environment", "seconds"))


def _only(part: Part, names: set[str]) -> Part:
    return {**part, "seconds": {name: value for name, value in part["seconds"].items() if name in names}}
