"""What is written from the records of a study: its report, its results folder, and the tables of this repository.

The report is in DIR/report/, that of a part of the study in DIR/report/PART/: tables, figures, one page. It depends
only on the run folders: it is the same, byte for byte, however often the study was interrupted, and whatever was
reported before.

With --results, a study is also kept as data in a folder such as results/digits: runs.csv, curves.csv, and study.json
about how they were made: commands, versions, data and time, without paths of this machine. A study may be made in
parts, on several machines or at several times: runs that got further in the folder are kept.

Tables of results/ stand in README.md and docs/*.md, each between two lines that name its experiment, or one of
studies/:

<!-- results digits/table1 -->
<!-- end -->

docs/digits/ has the figures and the page of results/digits/ (docs/NAME/ of results/NAME/, by studies/NAME.yaml), and
SOURCE: SHA-256 of the numbers that they were drawn from, and of each figure. Remove SOURCE to draw them anew from the
same numbers, such as with another style.
"""

import hashlib
import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

from scratch_det.command_line import project_flags
from scratch_det.engine.run_dir import Facts
from scratch_det.errors import DataError, UserError
from scratch_det.files import ROOT, sha256_of, write_atomically
from scratch_det.log import say_now
from scratch_det.reading import read_json, read_series
from scratch_det.study import own
from scratch_det.study import records as stored
from scratch_det.study.experiments import jobs_of, of_place
from scratch_det.study.records import CURVES, FINISHED, FIX, RESTORE, RUNS, Record
from scratch_det.study.report.figures import FIGURES, draw, figures_of
from scratch_det.study.report.page import MADE_WITH, Folders, read_folders, study_page
from scratch_det.study.report.tables import DIGITS, FORMATS, WHOLES, as_markdown, has_something_to_show, tables_of
from scratch_det.study.run import COMMANDS, SEARCH
from scratch_det.study.study import DESCRIPTION, LOCK, Study

MARKER = re.compile(r"^<!--\s*(?:results\b(?P<experiment>.*?)|end)\s*-->", re.MULTILINE)


def write_report(study: Study, experiment: str, results: Path | None = None) -> list[Path]:
    """Write the report of ``experiment``, all of ``study`` or a part of it, and ``results``; returns the files.

    Raises UserError, before anything is written, when the study has no such runs, when none of them has anything to
    show, or when ``results`` is another experiment's or of other data; DataError for damaged files.
    """
    earlier = read_results(results, experiment) if results else {}
    runs = of_place(experiment)  # and those that they need:
    shown, names = {run.name for run in runs}, {job.name for job in jobs_of(runs)}
    if names - {job.name for job in study.jobs}:
        raise UserError(f"--out {study.out} holds the study {study.experiment}, of which {experiment} is no part")
    known = [one for one in stored.survey(study.jobs, study.out, {}) if one.run.name in names]
    records = [with_made(_without_machine(one, study.out), study) for one in stored.collect(known, study.out)]
    if not any(one.run.name in shown and has_something_to_show(one) for one in records):
        raise UserError(f"no run of {experiment} in {study.out} has anything to show yet; see scratch-det study status")
    report = study.out / "report" / ("" if experiment == study.experiment else experiment.replace("/", "-"))
    for folder in filter(None, (report, results)):
        folder.mkdir(parents=True, exist_ok=True)
    data = write_results(records, earlier, study, experiment, results) if results else ()
    tables, page = tables_of(experiment, records), report / "index.html"
    files = {report / f"{table.name}.{suffix}": text(table) for table in tables for suffix, text in FORMATS.items()}
    for path, content in files.items():
        write_atomically(path, content)
    drawn = draw(figures_of(experiment, records), report)
    figures = {path.stem: path.read_text() for path in drawn if path.suffix == ".svg"}
    folders = read_folders(records, study.out, page)
    write_atomically(page, study_page(f"{experiment}: report", tables, records, figures, folders))
    # Remove what an earlier report of more runs left; keep files with other names, which are not ours.
    named = {name.removeprefix(DIGITS) for job in study.jobs for name in (job.name, *job.run.places)}
    old = {report / f"{name}.{suffix}" for name in named for suffix in FORMATS}
    for path in {*old, *_figures_in(report)} - {*files, *drawn}:
        path.unlink(missing_ok=True)
    return [page, *files, *drawn, *data]


def _without_machine(record: Record, out: Path) -> Record:
    """``record`` without what differs between machines and starts of a study: running processes, and folders' paths."""
    error = record.error
    for folder in (out.resolve(), out, ROOT, Path.home()):
        if folder.parts:  # Path(".") has none
            error = re.sub(rf"(?<![\w./-]){re.escape(str(folder))}/", "", error)
    return replace(record, error=error, state=stored.UNFINISHED if record.state == stored.INTERRUPTED else record.state)


# Results folders -------------------------------------------------------------------------------------------------


def read_results(folder: Path, experiment: str) -> dict[str, Record]:
    """Records by the run's name; none where the folder is new.

    Raises UserError when it is no results folder of ``experiment``, DataError when its files are missing or damaged.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--results {folder} is a file; name a folder")
    if any((parent / LOCK).exists() for parent in (folder.resolve(), *folder.resolve().parents)):
        raise UserError(f"--results {folder} is in a study's folder; name another for the numbers")
    path = folder / DESCRIPTION
    if not path.exists():
        if there := [name for name in (RUNS, CURVES) if (folder / name).exists()]:
            raise DataError(f"{path} is missing beside {there[0]}; {RESTORE}")
        return {}
    content = read_json(path, fix=RESTORE)
    if (other := content.get("experiment")) != experiment:
        raise UserError(f"--results {folder} holds {other}, not {experiment}; name another folder")
    records = {one.run.name: one for one in stored.load(folder, of_place(experiment))}
    try:
        environments = [{**one, "datasets": {**one["datasets"]}} for one in content["environments"]]
        for name, about in content["runs"].items():
            made = {**about, "seconds": float(about["seconds"]), "environment": environments[about["environment"]]}
            records[name] = replace(records[name], made=made)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise DataError(f"{path} does not say how each run was made; {RESTORE}") from None
    if missing := [name for name, one in records.items() if one.is_begun and not one.made]:
        raise DataError(f"{path} does not say how {min(missing)} was made; {RESTORE}")
    require_unedited(folder)
    return records


def write_results(
    records: Sequence[Record], earlier: Mapping[str, Record], study: Study, experiment: str, folder: Path
) -> list[Path]:
    """Write ``records`` of ``study``, or those of ``read_results`` that got ``earlier`` further; returns the files.

    Raises UserError when some were made with other data than others.
    """
    kept = kept_of(records, earlier, folder)
    records = [earlier[one.run.name] if one.run.name in kept else one for one in records]
    datasets: dict[str, Any] = {}
    made = [one.made for one in records if one.made]
    for name, about in (pair for one in made for pair in one["environment"]["datasets"].items()):
        known = datasets.setdefault(name, about)
        keys = known.keys() & about.keys() - {
            "used_images_sha256"
        }  # earlier versions noted less; a recipe chooses them
        if any(known[key] != about[key] for key in keys):
            problem = f"some runs were made with another {name} than others: {datasets[name]}, {about}"
            raise UserError(f"--results {folder}: {problem}; name another folder")
    stored.save(records, folder)
    content = {"experiment": experiment, **describe(records), "sha256": _digests(folder)}
    write_atomically(folder / DESCRIPTION, json.dumps(content, indent=2) + "\n")
    return [folder / name for name in (RUNS, CURVES, DESCRIPTION)]


def kept_of(records: Sequence[Record], earlier: Mapping[str, Record], folder: Path) -> set[str]:
    """Names of the runs whose record got further ``earlier``; in ``records`` each run comes after those that it needs.

    A branch, an evaluation, and a run with values that a search found are kept only together with the run that they
    rest on, or where that run has ended with the same weights or values here.
    """
    now, old = ({(one.run.name, one.weights_sha256, one.found) for one in some} for some in (records, earlier.values()))
    same, kept = {name for name, *end in now & old if any(end)}, set[str]()
    for one in records:
        run, there = one.run, earlier.get(one.run.name, one)
        if (there.state == FINISHED, there.iteration) <= (one.state == FINISHED, one.iteration):
            continue
        needed = [run.trunk if there.start else None, run.evaluates, run.found_by]
        if changed := [name for name in needed if name and name not in kept | same]:
            say_now(f"{folder}: {run.name} is not kept, as it rests on another {changed[0]} than this one")
        else:
            kept.add(run.name)
    return kept


def require_unedited(folder: Path) -> None:
    """Raise DataError when runs.csv or curves.csv is not the one that the study.json beside it describes."""
    path = folder / DESCRIPTION
    if path.exists() and read_json(path, fix=RESTORE).get("sha256") != _digests(folder):
        raise DataError(f"{folder}: {RUNS} and {CURVES} are not those that {DESCRIPTION} describes; {RESTORE}")


def _digests(folder: Path) -> dict[str, str]:
    return {name: sha256_of(folder / name) for name in (RUNS, CURVES)}


def describe(records: Sequence[Record]) -> dict[str, Any]:
    """How much was trained, and how each run was made; equal environments are listed once.

    Iterations include those of unfinished runs. A cascade that goes on from another run saves nothing: it always does.
    ``run_hours`` is the sum over the runs: run folders do not tell which of them ran at the same time.
    """
    made = {one.run.name: one.made for one in records if one.made}
    environments = _different([about["environment"] for about in made.values()])
    return {
        "iterations": sum(one.iterations_done for one in records),
        "iterations_saved_by_sharing": sum(one.start for one in records if one.iteration and not one.run.is_switch),
        "run_hours": round(sum(about["seconds"] for about in made.values()) / 3600, 2),
        "environments": environments,
        "runs": {name: {**one, "environment": environments.index(one["environment"])} for name, one in made.items()},
    }


def with_made(record: Record, study: Study) -> Record:
    """``record`` with its run's command, seconds and environment; of a search of all of its trainings."""
    if not record.is_begun:
        return record
    job = next(job for job in study.jobs if job.name == record.run.name)
    command = ["scratch-det", COMMANDS[job.run.kind], *job.arguments(Path("DIR"), study.backend, study.gpus)]
    whole = ["scratch-det", "study", "run", study.experiment, "--out", "DIR", "--backend", study.backend]
    whole += ["--gpus", str(study.gpus), *([] if study.share_prefix else ["--no-share-prefix"]), *project_flags()]
    threads = f"OMP_NUM_THREADS={study.threads} " if study.threads else ""
    folder = study.out / job.name
    folders = sorted(folder.glob("trial_*")) if job.run.kind == SEARCH else [folder]
    found = [read_json(path, Facts, FIX) for one in folders if (path := one / "environment.json").exists()]
    found = [one | {key: one.get(key) or {} for key in ("git", "packages", "datasets")} for one in found]
    checkouts = [content["git"] for content in found if content["git"]]

    def common(values: Sequence[Any]) -> Any:  # where all agree, else a list of the different ones
        return different[0] if len(different := _different(values)) == 1 else different

    made = {
        "command": shlex.join(command).replace(f"{ROOT}/", "").replace(f"{Path.cwd()}/", ""),
        "seconds": round(sum(own_seconds(one, job.start) for one in folders), 1),
        "environment": {
            "study": threads + shlex.join(whole),
            **{key: common([content.get(key) for content in found]) for key in (*MADE_WITH, "packages")},
            "commit": common([git.get("commit") for git in checkouts]),
            "changed": any(git.get("changes") or git.get("diff") for git in checkouts),
            "datasets": {name: about for content in found for name, about in content["datasets"].items()},
        },
    }
    return replace(record, made=made)


def own_seconds(folder: Path, start: int) -> float:
    """Seconds of a finished training after iteration ``start``, where it branched off.

    A branch's result.json counts its trunk's iterations too; their share of the times in metrics.json is left out.
    """
    seconds = float(read_json(folder / "result.json", Facts, FIX).get("seconds") or 0.0)
    if not start:
        return seconds
    times = [(end, time) for end, time in read_series(folder / "metrics.json", sys.maxsize).get("time", ()) if time > 0]
    spent = [(time * (end - begin), end) for (begin, _), (end, time) in pairwise([(0, 0.0), *times])]
    share = sum(time for time, end in spent if end > start) / sum(time for time, _ in spent) if spent else 1
    return seconds * share


def _different(values: Sequence[Any]) -> list[Any]:
    return [value for number, value in enumerate(values) if value not in values[:number]]


# Documents of this repository ------------------------------------------------------------------------------------


def render(root: Path, check: bool = False) -> list[Path]:
    """Bring the documents of the repository in ``root`` up to date, unless ``check``; returns those that were not.

    Raises UserError, before anything is written, when a marker names no experiment or has no end, or when there are no
    results for it or they were edited.
    """

    @cache
    def records_of(name: str) -> list[Record]:
        folder = root / "results" / name
        if (folder / DESCRIPTION).exists():
            return [*read_results(folder, name).values()]
        return stored.load(folder, () if name in WHOLES else of_place(name))

    contents = {path: path.read_text() for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]}
    rendered = {path: rendered_text(text, path, records_of) for path, text in contents.items()}
    stale = [path for path, text in contents.items() if text != rendered[path]]
    for path in stale if not check else ():
        write_atomically(path, rendered[path])
    for name in (*WHOLES, *(path.stem for path in sorted(own.STUDIES.glob("*.yaml")))):
        results, folder = root / "results" / name, root / "docs" / name
        source, page = folder / "SOURCE", folder / "index.html"
        if not (results / RUNS).exists():
            continue
        records = records_of(name)
        if not source.exists() or source.read_text() != _source(results, folder):
            stale.append(source)
            if check:
                continue
            drawn = figures_of(name, records)
            for old in _figures_in(folder):
                old.unlink()
            draw(drawn, folder, ["svg"])
            write_atomically(source, _source(results, folder))
        figures = {path.stem: path.read_text() for path in _figures_in(folder) if path.suffix == ".svg"}
        text = study_page(f"{name}: report", tables_of(name, records), records, figures, Folders())
        if not page.exists() or page.read_text() != text:
            stale.append(page)
            if not check:
                write_atomically(page, text)
    return stale


def rendered_text(text: str, path: Path, records_of: Callable[[str], list[Record]]) -> str:
    """The text of ``path`` with the tables that its markers name."""
    parts, done, markers = [], 0, list(MARKER.finditer(text))
    for begin, end in zip_longest(markers[::2], markers[1::2]):
        where = f"{path}:{len(text[: begin.start()].splitlines()) + 1}"
        if begin["experiment"] is None:
            raise UserError(f"{where}: nothing begins before this end")
        if end is None or end["experiment"] is not None:
            raise UserError(f"{where}: no <!-- end --> follows")
        try:
            experiment = begin["experiment"].strip()
            is_digits = any(place.startswith(DIGITS) for run in of_place(experiment) for place in run.places)
            whole = experiment if own.file_of(experiment) else "digits" if is_digits else "paper"
            tables = tables_of(experiment, records_of(whole))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        parts += [text[done : begin.end()], "\n\n", "\n".join(map(as_markdown, tables)), "\n"]
        done = end.start()
    return "".join([*parts, text[done:]])


def _source(results: Path, folder: Path) -> str:
    """What SOURCE has to be: a line of digest and name for the numbers and for each figure."""
    numbers = hashlib.sha256(b"".join((results / name).read_bytes() for name in (RUNS, CURVES))).hexdigest()
    digests = {"numbers": numbers, **{path.name: sha256_of(path) for path in _figures_in(folder)}}
    return "".join(f"{digest}  {name}\n" for name, digest in digests.items())


def _figures_in(folder: Path) -> list[Path]:
    """The files in ``folder`` that ``draw`` may have written."""
    paths = [folder / f"{name}.{suffix}" for name in FIGURES for suffix in ("svg", "png")]
    return [path for path in paths if path.exists()]
