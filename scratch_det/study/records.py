"""The record of each run of a study: read from run folders, saved and loaded as results/NAME/runs.csv and curves.csv.

What a run folder holds is written in ``scratch_det.engine.run_dir``. Beside the run folders DIR has study.json, what
the study is, and jobs/: of each step NAME.log, what its processes said, and NAME.exit, its exit code if it failed.

A results folder also has study.json: with what and by which commands it was made, and how long the runs took.
"""

import csv
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypedDict

import msgspec
from fvcore.common.config import CfgNode

from scratch_det.config.load import flatten, plain
from scratch_det.distributed.stop import signal_name
from scratch_det.engine.run_dir import Facts, RunDir
from scratch_det.errors import DataError, UserError
from scratch_det.evaluation.metrics import METRICS
from scratch_det.files import write_atomically
from scratch_det.reading import read_json, read_lines, read_series, regular
from scratch_det.study.experiments import find
from scratch_det.study.run import PRETRAIN, SEARCH, TRAIN, Job, Run, jobs_folder
from scratch_det.tables import as_csv, from_csv

STATES = WAITING, READY, QUEUED, RUNNING, INTERRUPTED, FAILED, BLOCKED, FINISHED, UNFINISHED = (
    "waiting", "ready", "queued", "running", "interrupted", "failed", "blocked", "finished",
    "unfinished",  # in a report: interrupted or running, which depends on the moment
)  # fmt: skip
DIVERGED = "diverged as expected"  # a status, not a state
LOSS = "total_loss"
EPOCHS = "epochs"  # among the metrics of a finished run: how often it saw an image, in the mean
SCORES = {name.partition("/")[2] for name in METRICS}  # of the names task/score; no scores by class
DECIMALS = 4  # in results/ and from run folders alike, so that both give the same tables and figures
TAIL = 2**20  # bytes at the end of a file in which the newest evaluation or the last words are looked for
START_OF_LOG = "--- started "  # begins the line that each start of a step writes into its log
FIX = "move the folder away, and scratch-det study run trains it again"
# Keys that a run sets itself, from its data and its machine, or that do not change its numbers.
NOT_COMPARED = {"MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "MODEL.DEVICE", "MODEL.WEIGHTS",
                "OUTPUT_DIR", "DATASETS.CLASS_NAMES", "DATALOADER.NUM_WORKERS", "SOLVER.CHECKPOINT_PERIOD",
                "SOLVER.REFERENCE_WORLD_SIZE"}  # fmt: skip

RUNS, CURVES = "runs.csv", "curves.csv"
RESTORE = "restore the folder's files as report --results wrote them, from version control or a copy"

Curve = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Record:
    """What is known of one run of a study.

    Attributes:
        run: which it is.
        state: one of the constants above.
        start: completed iterations of the checkpoint that it branched off; 0 for a run of its own.
        iteration: completed iterations of the whole run, those before a branch included.
        metrics: EPOCHS; of its last evaluation, in percent: "bbox/AP", "segm/AP50", "bbox_TTA/AP", ...
        curves: (completed iterations, value) of the same and of LOSS, those before ``start`` included.
        error: why it failed; of a waiting or blocked one what it waits for; of a finished one why it ended early.
        weights_sha256: digest of the final weights of a finished training, see ``weights.read``.
        found: by a finished search, as "KEY VALUE, KEY VALUE".
        seconds: spent on training so far; eta: seconds left by the run's own estimate. Not saved.
        made: with which "command", "seconds" and "environment", in a results folder's study.json.
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
    made: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_begun(self) -> bool:
        return bool(self.iteration or self.state == FINISHED)

    @property
    def status(self) -> str:
        """The state; DIVERGED where that is the result that was expected, with the words of ``engine.loop``."""
        is_expected = self.state == FAILED and self.run.diverges and "the loss is not finite" in self.error
        return DIVERGED if is_expected else self.state

    @property
    def iterations_done(self) -> int:
        """Those that the run itself has trained."""
        return max(self.iteration - self.start, 0)


# Run folders -----------------------------------------------------------------------------------------------------


def failure_of(jobs: Path, step: str) -> str:
    """Why a step failed: its exit code and the last error in its log since it was started; empty if it did not fail."""
    try:
        code = int(regular(jobs / f"{step}.exit").read_text())
    except (OSError, ValueError, DataError):
        return ""
    if code < 0 or 128 < code < 128 + signal.NSIG:  # ended by a signal, as Python and as a shell say it
        return f"ended by {signal_name(-code if code < 0 else code - 128)}"
    log = jobs / f"{step}.log"
    text = log.read_bytes()[-TAIL:].decode(errors="replace").rpartition(START_OF_LOG)[2] if log.is_file() else ""
    lines = [line.strip() for line in text.splitlines()[1:] if line.strip() and not line.startswith("srun: ")]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    last_words = errors or lines or ["it said nothing"]
    return f"exit code {code}: {last_words[-1]}"


def survey(jobs: Sequence[Job], out: Path, states: Mapping[str, str]) -> list[Record]:
    """The record of each of ``jobs`` without curves; ``states``: RUNNING or QUEUED, of those that are."""
    found: dict[str, Record] = {}
    for job in jobs:
        needed = [found[name] for name in job.needs if name in found]
        try:
            found[job.name] = _look(job, out, states.get(job.name, ""), needed)
        except DataError as error:  # a damaged folder keeps no other run from going on
            found[job.name] = Record(job.run, states.get(job.name, FAILED), job.start, error=str(error))
    return list(found.values())


def _look(job: Job, out: Path, state: str, needed: Sequence[Record]) -> Record:
    """The record of ``job``; ``needed``: those of the runs that it needs. Raises DataError for a damaged file."""
    run, folder, result = job.run, out / job.name, read_json(job.result(out), Facts, FIX)
    known = Record(run, READY, job.start, metrics=newest_metrics(folder, result))
    if result:  # whatever status.json says
        iteration = run.iterations if run.kind == SEARCH else result.get("iteration")
        epochs = {EPOCHS: result["epochs"]} if result.get("epochs") else {}
        digest = (result.get("weights_sha256") or "") if run.kind in (TRAIN, PRETRAIN) else ""
        found = ", ".join(f"{key} {value}" for key, value in result.get("best", {}).items())
        return replace(known, state=FINISHED, iteration=int(iteration or 0), seconds=result.get("seconds"),
                       metrics={**known.metrics, **epochs},
                       weights_sha256=digest, found=found, error=result.get("ended_early", ""))  # fmt: skip
    fix = "remove this file, and scratch-det study run continues the run"
    parts = sorted(folder.glob("trial_*")) if run.kind == SEARCH else [folder]
    reports = [read_json(part / "status.json", Facts, fix) for part in parts]
    status = {} if run.kind == SEARCH else reports[0]
    known = replace(known, iteration=sum(int(report.get("iteration") or 0) for report in reports))
    if state:
        return replace(known, state=state, eta=status.get("eta") if state == RUNNING else None)
    if missing := [path.relative_to(out) for path in job.inputs(out) if not path.exists()]:  # also of one that failed
        states = {one.run.name: one.state for one in needed}
        if failed := [name for name, its in states.items() if its in (FAILED, BLOCKED)]:
            return replace(known, state=BLOCKED, error=f"needs {', '.join(failed)}, which failed")
        if gone := [path for path in missing if states.get(path.parts[0]) == FINISHED]:
            name, early = gone[0].parts[0], next((f" ({one.error})" for one in needed if one.error), "")
            error = f"{name} is finished{early}, but {gone[0].name} is gone; move its folder away to repeat it"
            return replace(known, state=BLOCKED, error=error)
        return replace(known, state=WAITING, error=f"waits for {', '.join(map(str, missing))}")
    codes = [path for part in ("", "@*", ".trial_*") for path in jobs_folder(out).glob(f"{job.name}{part}.exit")]
    codes.sort(key=lambda path: (path.stem == job.name, path))  # why a point failed, before its search's choice
    reasons = [reason for path in codes if (reason := failure_of(path.parent, path.stem))]
    if reasons or status.get("state") == "failed":  # as the launcher saw it, or as the run said when there was none
        return replace(known, state=FAILED, error=reasons[0] if reasons else str(status.get("error", "")))
    is_paused = status.get("state") == "paused"  # a trunk between two of its steps
    return replace(known, state=INTERRUPTED) if (status or known.iteration) and not is_paused else known


def other_recipe(run_dir: RunDir, wanted: CfgNode) -> Iterator[str]:
    """How the config of the run in a folder differs from ``wanted``, a line a key; none where there is no run."""
    if not run_dir.holds_run():
        return
    try:
        made_with = flatten(run_dir.read_config())
    except (OSError, UserError) as error:
        yield str(error)
        return
    ignored = NOT_COMPARED | ({"SEED"} if wanted.SEED < 0 else set())
    for key, value in flatten(wanted).items():
        if key not in ignored and plain(made_with.get(key, value)) != plain(value):
            yield f"{run_dir.config} has {key} {plain(made_with[key])!r}, its recipe {plain(value)!r}"
    began, begins = made_with.get("MODEL.WEIGHTS"), wanted.MODEL.WEIGHTS
    if not run_dir.parent.exists() and bool(began) != bool(begins):  # from scratch, or not; paths may differ
        yield f"{run_dir.config} has MODEL.WEIGHTS {began!r}, its recipe {begins!r}"


def collect(records: Sequence[Record], out: Path) -> list[Record]:
    """``records`` with curves, from the run folders in ``out``."""
    paths = [(one, out / one.run.name / "metrics.json") for one in records]
    return [replace(one, curves=read_curves(path, one.run.iterations)) for one, path in paths]


def newest_metrics(folder: Path, result: Mapping[str, Any]) -> dict[str, float]:
    """Scores of result.json, or else of the last evaluation in metrics.json, by "task/score"."""
    path = folder / "metrics.json"
    if not result and path.exists():
        stat = path.stat()
        return _newest_in(path, stat.st_mtime_ns, stat.st_size)
    metrics = result.get("metrics")
    return _scores(metrics) if isinstance(metrics, dict) else {}


@lru_cache(maxsize=256)
def _newest_in(path: Path, _changed: int, _size: int) -> dict[str, float]:
    """Read once after each change: a running study is read twice a second, for weeks."""
    return {name: value for row in read_lines(path, TAIL) for name, value in _scores(row).items()}


def _scores(values: Mapping[str, Any]) -> dict[str, float]:
    """Scores that are numbers, by "task/score"."""
    found = {name: value for name, value in flatten(values, "/").items() if name.partition("/")[2] in SCORES}
    return {name: round(float(value), DECIMALS) for name, value in found.items() if isinstance(value, int | float)}


def read_curves(path: Path, last: int) -> dict[str, Curve]:
    """Curves of a run of ``last`` iterations by name."""
    series = sorted(read_series(path, last).items())
    return {name: tuple((at, round(value, DECIMALS)) for at, value in points)
            for name, points in series if name == LOSS or name.partition("/")[2] in SCORES}  # fmt: skip


# Results folders -------------------------------------------------------------------------------------------------


# The columns and what is in them; of RUNS they are called as the fields of Record, and its others are metrics.
LINE = {
    "run": str,
    "state": Literal[STATES],
    "start": int,
    "iteration": int,
    "error": str,
    "weights_sha256": str,
    "found": str,
}
POINT = {"run": str, "metric": str, "iterations": int, "value": float}


def save(records: Sequence[Record], folder: Path) -> None:
    """Write runs.csv, a line a run, and curves.csv, a line a point."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted({name for record in records for name in record.metrics})
    runs: list[Sequence[object]] = [(*LINE, *names)]
    points: list[Sequence[object]] = [[*POINT]]
    for one in records:
        numbers = [f"{one.metrics[name]:.{DECIMALS}f}" if name in one.metrics else "" for name in names]
        runs.append([one.run.name, *(getattr(one, name) for name in [*LINE][1:]), *numbers])
        for name, curve in one.curves.items():
            points += [(one.run.name, name, iteration, f"{value:.{DECIMALS}f}") for iteration, value in curve]
    for file, lines in ((RUNS, runs), (CURVES, points)):
        write_atomically(folder / file, as_csv(lines))


def load(folder: Path, own_runs: Sequence[Run] = ()) -> list[Record]:
    """What ``save`` wrote, of ``own_runs`` and listed ones.

    Raises DataError when a file is missing or damaged: where, and what.
    """
    points: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for line in _read_csv(folder / CURVES, POINT):
        points.setdefault(line["run"], {}).setdefault(line["metric"], []).append((line["iterations"], line["value"]))
    records: dict[str, Record] = {}
    for line in _read_csv(folder / RUNS, LINE):
        name = line["run"]
        curves = {metric: tuple(curve) for metric, curve in points.get(name, {}).items()}
        try:
            found = Record(**{**line, "run": find(name, own_runs), "curves": curves})
        except UserError as error:
            raise DataError(f"{folder / RUNS}: {error}; {RESTORE}") from None
        if records.setdefault(name, found) is not found:
            raise DataError(f"{folder / RUNS}: run {name} is listed twice; {RESTORE}")
    return list(records.values())


def _read_csv(path: Path, kinds: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells of each line by column, as ``kinds`` has them; those of other columns, if not empty, as "metrics".

    Raises DataError, with the line, for damage.
    """
    lines: list[dict[str, Any]] = []
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = reader.fieldnames or ()
            if missing := [column for column in kinds if column not in columns]:
                raise ValueError(f"there is no column {missing[0]}")
            kind: Any = TypedDict("kind", {**dict.fromkeys(columns, float), **kinds}, total=False)  # type: ignore[misc]
            for row in reader:
                if len(row) > len(columns):
                    raise ValueError(f"expected {len(columns)} cells, as in line 1")
                cells = {key: cell and from_csv(cell) for key, cell in row.items() if cell != "" or key in kinds}
                found: dict[str, Any] = msgspec.convert(cells, kind, strict=False)
                metrics = {key: value for key, value in found.items() if key not in kinds}
                lines.append({**{key: found[key] for key in kinds}, "metrics": metrics})
    except FileNotFoundError:
        raise DataError(f"{path} is missing; scratch-det study report --results writes it") from None
    except (csv.Error, ValueError) as error:
        raise DataError(f"{path}:{reader.line_num + isinstance(error, csv.Error)}: {error}; {RESTORE}") from None
    return lines
