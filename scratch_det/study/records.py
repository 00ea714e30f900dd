"""The record of each run of a study: read from run folders, saved and loaded as results/NAME/runs.csv and curves.csv.

What a run folder holds is written in ``scratch_det.engine.run_dir``. Beside the run folders DIR has study.json, what
the study is, and jobs/: of each step NAME.log, what its processes said, and NAME.exit, its exit code if it failed.

A results folder also has study.json: with what and by which commands it was made, and how long the runs took.
"""

import csv
import io
import json
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

from fvcore.common.config import CfgNode

from scratch_det.config import flatten
from scratch_det.distributed.stop import last_word
from scratch_det.errors import DataError, UserError
from scratch_det.evaluation.metrics import METRICS
from scratch_det.files import completed, read_lines, weights_sha256, write_atomically
from scratch_det.study.experiments import find
from scratch_det.study.job import Job
from scratch_det.study.run import PRETRAIN, SEARCH, TRAIN, Run

WAITING, READY, QUEUED, RUNNING, INTERRUPTED, FAILED, BLOCKED, FINISHED = (
    "waiting", "ready", "queued", "running", "interrupted", "failed", "blocked", "finished",
)  # fmt: skip
UNFINISHED = "unfinished"  # in a report: interrupted or running, which depends on the moment
LOSS = "total_loss"
SCORES = {name.partition("/")[2] for name in METRICS}  # of the names task/score; no scores by class
DECIMALS = 4  # in results/ and from run folders alike, so that both give the same tables and figures
TAIL = 2**20  # bytes at the end of a file in which the newest evaluation or the last words are looked for
START_OF_LOG = "--- started "  # begins the line that each start of a step writes into its log
FIX = "move the folder away, and study.py run makes it anew"
STATUS = "status.json"
FIX_STATUS = "remove this file, and study.py run continues the run"

RUNS, CURVES = "runs.csv", "curves.csv"
STATES = (WAITING, READY, UNFINISHED, FAILED, BLOCKED, FINISHED)
FIELDS = ("run", "state", "start", "iteration", "error", "weights_sha256", "found")
POINT = ("run", "metric", "iterations", "value")
WRITES_IT = "tools/study.py report EXPERIMENT --out DIR --results FOLDER writes it"
RESTORE = "restore the folder's files as report --results wrote them, from version control or a copy"

Curve = tuple[tuple[int, float], ...]
Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Record:
    """What is known of one run of a study.

    Attributes:
        run: which it is.
        state: one of the constants above.
        start: completed iterations of the checkpoint that it branched off; 0 for a run of its own.
        iteration: completed iterations of the whole run, those before a branch included.
        metrics: of its last evaluation, in percent: "bbox/AP", "segm/AP50", "bbox_TTA/AP", "classification/top1", ...
        curves: (completed iterations, value) of the same and of LOSS, those before ``start`` included.
        error: why it failed; of a waiting or blocked one what it waits for.
        weights_sha256: digest of the final weights of a finished training, see ``scratch_det.files``.
        found: by a finished search, as "KEY VALUE, KEY VALUE".
        seconds: spent on training so far; eta: seconds left by the run's own estimate. Not saved.
    """

    run: Run
    state: str
    start: int = 0
    iteration: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)
    error: str = ""
    weights_sha256: str = ""
    found: str = ""
    seconds: float | None = None
    eta: float | None = None

    @property
    def shares(self) -> bool:
        """Whether other schedules' numbers come from the same first iterations as this one's."""
        return self.start > 0

    @property
    def iterations_done(self) -> int:
        """Those that the run itself has trained."""
        return max(self.iteration - self.start, 0)

    @property
    def iterations_left(self) -> int:
        """Those that the run itself has still to train."""
        return self.run.iterations - self.start - self.iterations_done


# Run folders -----------------------------------------------------------------------------------------------------


def jobs_folder(out: Path) -> Path:
    return out / "jobs"


def failure_of(jobs: Path, step: str) -> str:
    """Why a step failed: its exit code, and the last words of its log since it was started; empty if it did not."""
    try:
        code = int((jobs / f"{step}.exit").read_text())
    except (OSError, ValueError):
        return ""
    log = jobs / f"{step}.log"
    said = log.read_bytes()[-TAIL:].decode(errors="replace").rpartition(START_OF_LOG)[2] if log.exists() else ""
    is_signal = 128 < code < 128 + signal.NSIG  # as a shell says it
    lines = [line for line in said.splitlines()[1:] if not line.startswith("srun: ")]
    return last_word("\n".join(lines), 128 - code if is_signal else code)


def survey(jobs: Sequence[Job], out: Path, states: Mapping[str, str]) -> list[Record]:
    """The record of each of ``jobs`` without curves and weights; ``states``: RUNNING or QUEUED, of those that are."""
    found: dict[str, Record] = {}
    for job in jobs:
        needed = [found[name] for name in job.needs if name in found]
        try:
            found[job.name] = look(job, out, states.get(job.name, ""), needed)
        except DataError as error:  # a damaged folder keeps no other run from going on
            found[job.name] = Record(job.run, states.get(job.name, FAILED), job.start, error=str(error))
    return list(found.values())


def look(job: Job, out: Path, state: str, needed: Sequence[Record] = ()) -> Record:
    """The record of ``job``; ``needed``: those of the runs that it needs. Raises DataError for a damaged file."""
    folder, result = out / job.name, read_json(job.result(out))
    known = Record(job.run, READY, job.start, metrics=newest_metrics(folder, result))
    if result:  # whatever status.json says
        iteration = job.run.iterations if job.run.kind == SEARCH else number(result, "iteration", job.result(out))
        seconds = number(result, "seconds", job.result(out))
        digest = result.get("weights_sha256", "") if job.run.kind in (TRAIN, PRETRAIN) else ""
        return replace(known, state=FINISHED, iteration=int(iteration or 0), seconds=seconds, weights_sha256=digest)
    status = read_json(folder / STATUS, FIX_STATUS)
    known = replace(known, iteration=_iteration(job, folder))
    if state:
        eta = number(status, "eta", folder / STATUS, FIX_STATUS) if state == RUNNING else None
        return replace(known, state=state, eta=eta)
    if missing := [path for path in job.inputs(out) if not path.exists()]:  # also of one that failed for lack of it
        reason = _never_comes(missing, needed, out)
        waits = f"waits for {', '.join(str(path.relative_to(out)) for path in missing)}"
        return replace(known, state=BLOCKED if reason else WAITING, error=reason or waits)
    codes = [path for part in ("", "@*", ".trial_*") for path in jobs_folder(out).glob(f"{job.name}{part}.exit")]
    if reasons := [reason for path in sorted(codes) if (reason := failure_of(path.parent, path.stem))]:
        return replace(known, state=FAILED, error=reasons[0])
    if status.get("state") == "failed":  # while nobody looked after it
        return replace(known, state=FAILED, error=str(status.get("error", "")))
    return replace(known, state=INTERRUPTED) if status or known.iteration else known


def collect(records: Sequence[Record], out: Path) -> list[Record]:
    """``records`` with curves, digests of final weights and what searches found, from the run folders in ``out``."""
    return [
        replace(
            record,
            curves=read_curves(out / record.run.name / "metrics.json", record.run.iterations),
            weights_sha256=record.weights_sha256 or _final_weights(record, out),
            found=_found(record, out),
        )
        for record in records
    ]


def newest_metrics(folder: Path, result: Mapping[str, Any]) -> dict[str, float]:
    """Scores of result.json, or else of the last evaluation in metrics.json, by "task/score"."""
    path = folder / "metrics.json"
    if not result and path.exists():
        about = path.stat()
        return _newest_in(path, (about.st_mtime_ns, about.st_size))
    tasks = result.get("metrics")
    return _scores(
        (f"{task}/{name}", value)
        for task, values in (tasks.items() if isinstance(tasks, dict) else ())
        for name, value in (values.items() if isinstance(values, dict) else ())
    )


@lru_cache(maxsize=256)
def _newest_in(path: Path, _changed: tuple[int, int]) -> dict[str, float]:
    """Read once after each change: a running study is looked at twice a second, for weeks."""
    return _scores(pair for row in read_rows(path, TAIL) for pair in row.items())


def _scores(pairs: Iterable[tuple[str, Any]]) -> dict[str, float]:
    return {name: round(value, DECIMALS) for name, value in pairs if _is_score(name) and isinstance(value, int | float)}


def _is_score(name: str) -> bool:
    return name.partition("/")[2] in SCORES


def read_curves(path: Path, last: int) -> dict[str, Curve]:
    """Curves of a run of ``last`` iterations by name; after a resume the last of two values of one iteration counts."""
    points: dict[str, dict[int, float]] = {}
    for row in read_rows(path):
        for name, value in row.items():
            if "iteration" in row and (name == LOSS or _is_score(name)) and isinstance(value, int | float):
                points.setdefault(name, {})[completed(row, last)] = round(float(value), DECIMALS)
    return {name: tuple(sorted(found.items())) for name, found in sorted(points.items())}


def read_rows(path: Path, most: int | None = None) -> list[dict[str, Any]]:
    """The complete lines of a metrics.json, those in its last ``most`` bytes; none where there is no file.

    Raises DataError when an iteration or a time is no number.
    """
    rows = list(read_lines(path, most))
    for row in rows:
        for key in ("iteration", "time"):
            number(row, key, path)
    return rows


def read_json(path: Path, fix: str = FIX) -> dict[str, Any]:
    """The object in a file; empty where there is no file. Raises DataError when something else is in it."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error}); {fix}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); {fix}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} holds {type(content).__name__}, expected an object; {fix}")
    return content


def number(content: Mapping[str, Any], key: str, path: Path, fix: str = FIX) -> float | None:
    """A number or nothing. Raises DataError when ``path``, where ``content`` is from, has something else there."""
    value = content.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value)):
        raise DataError(f"{path} has {key} {value!r}, expected a number; {fix}")
    return value


def _iteration(job: Job, folder: Path) -> int:
    """Completed iterations by status.json; of a search those of its points."""
    folders = sorted(folder.glob("trial_*")) if job.run.kind == SEARCH else [folder]
    paths = [folder / STATUS for folder in folders]
    return sum(int(number(read_json(path, FIX_STATUS), "iteration", path, FIX_STATUS) or 0) for path in paths)


def _never_comes(missing: Sequence[Path], needed: Sequence[Record], out: Path) -> str:
    """Why what is missing will not come; empty when it still may."""
    if broken := [record.run.name for record in needed if record.state in (FAILED, BLOCKED)]:
        return f"needs {', '.join(broken)}, which failed"
    for record in needed:
        gone = [path for path in missing if path.is_relative_to(out / record.run.name)]
        if gone and record.state == FINISHED:
            return f"{record.run.name} is finished, but {gone[0].name} is gone; move its folder away to make it anew"
    return ""


def _final_weights(record: Record, out: Path) -> str:
    """Of a run folder whose result.json does not have it, as an older version left it."""
    if record.state != FINISHED or record.run.kind not in (TRAIN, PRETRAIN):
        return ""
    return weights_sha256(out / record.run.name / "checkpoints/model_final.pth")


def _found(record: Record, out: Path) -> str:
    if record.state != FINISHED or record.run.kind != SEARCH:
        return ""
    path = out / record.run.name / "best.yaml"
    try:
        values = flatten(CfgNode.load_cfg(path.read_text()))
    except Exception as error:  # whatever yaml and yacs make of a file that was edited
        raise DataError(f"{path} is not as the search wrote it ({str(error).splitlines()[0]}); restore it") from None
    return ", ".join(f"{key} {value}" for key, value in values.items())


# Results folders -------------------------------------------------------------------------------------------------


def save(records: Sequence[Record], folder: Path) -> None:
    """Write runs.csv, a line a run, and curves.csv, a line a point."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted({name for record in records for name in record.metrics})
    rows = [[*FIELDS, *names]]
    for one in records:
        numbers = ["" if name not in one.metrics else f"{one.metrics[name]:.{DECIMALS}f}" for name in names]
        known = [one.run.name, one.state, str(one.start), str(one.iteration), one.error, one.weights_sha256, one.found]
        rows.append([*known, *numbers])
    points = [
        [one.run.name, name, str(iteration), f"{value:.{DECIMALS}f}"]
        for one in records
        for name, curve in one.curves.items()
        for iteration, value in curve
    ]
    for file, lines in ((RUNS, rows), (CURVES, [POINT, *points])):
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(lines)
        write_atomically(folder / file, text.getvalue())


def load(folder: Path, own_runs: Sequence[Run] = ()) -> list[Record]:
    """What ``save`` wrote, of ``own_runs`` and listed ones.

    Raises DataError when a file is missing or was edited: where, and what.
    """
    lines = _read_csv(folder / RUNS, FIELDS)
    names = [line["run"] for line in lines.values()]
    if twice := [place for number, (place, line) in enumerate(lines.items()) if line["run"] in names[:number]]:
        raise DataError(f"{twice[0]}: {lines[twice[0]]['run']} is there twice; {RESTORE}")
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for place, line in _read_csv(folder / CURVES, POINT).items():
        point = _cell(int, line, "iterations", place), _cell(float, line, "value", place)
        curves.setdefault(line["run"], {}).setdefault(line["metric"], []).append(point)
    return [
        Record(
            run=_cell(partial(find, own_runs=own_runs), line, "run", place),
            state=_cell(_state, line, "state", place),
            start=_cell(int, line, "start", place),
            iteration=_cell(int, line, "iteration", place),
            metrics={name: _cell(float, line, name, place) for name in line if name not in FIELDS and line[name]},
            curves={name: tuple(points) for name, points in curves.get(line["run"], {}).items()},
            error=line["error"],
            weights_sha256=line["weights_sha256"],
            found=line["found"],
        )
        for place, line in lines.items()
    ]


def _state(word: str) -> str:
    if word not in STATES:
        raise ValueError(f"{word!r} is none of {', '.join(STATES)}")
    return word


def _cell(kind: Callable[[str], Kind], line: Mapping[str, str], column: str, place: str) -> Kind:
    """A cell as int, float, or as the run of that name."""
    try:
        return kind(line[column])
    except (ValueError, UserError) as error:
        raise DataError(f"{place}, column {column}: {error}; {RESTORE}") from None


def _read_csv(path: Path, columns: Sequence[str]) -> dict[str, dict[str, str]]:
    """Cells by column for each "FILE:LINE"; each line has as many cells as the header, which has ``columns``."""
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file, strict=True)
            lines = {f"{path}:{reader.line_num}": row for row in reader}
    except FileNotFoundError:
        raise DataError(f"{path} is missing; {WRITES_IT}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {error}; {RESTORE}") from None
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num + 1}: {error}; {RESTORE}") from None
    if missing := [column for column in columns if column not in (reader.fieldnames or ())]:
        raise DataError(f"{path}:1: there is no column {missing[0]}; {RESTORE}")
    for place, line in lines.items():
        if None in line or None in line.values():
            raise DataError(f"{place}: expected {len(reader.fieldnames or ())} cells, as in line 1; {RESTORE}")
    return lines
