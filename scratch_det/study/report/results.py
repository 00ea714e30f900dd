"""A study as data in a folder such as results/digits: runs.csv, curves.csv, and study.json about how they were made.

That is commands, versions, data and time, without paths of this machine. A study may be made in parts, on several
machines or at several times: runs that got further in the folder are kept.
"""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from scratch_det.command_line import project_flags
from scratch_det.engine.run_dir import Facts
from scratch_det.errors import DataError, UserError
from scratch_det.files import ROOT, sha256_of, write_atomically
from scratch_det.log import say_now
from scratch_det.reading import read_json, read_series
from scratch_det.study import records as stored
from scratch_det.study.experiments import of_place
from scratch_det.study.records import CURVES, FINISHED, FIX, RESTORE, RUNS, Record
from scratch_det.study.run import SEARCH
from scratch_det.study.study import DESCRIPTION, LOCK, Study

MADE_WITH = ("backend", "library", "python", "platform", "threads", "processes", "accumulate", "gpus")


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
    if content.get("sha256") != _digests(folder):
        raise DataError(f"{folder}: {RUNS} and {CURVES} are not those that {DESCRIPTION} describes; {RESTORE}")
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
        keys = known.keys() & about.keys() - {"used_images_sha256"}  # earlier versions noted less; a recipe's choice
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
    command = ["scratch-det", job.run.kind, *job.arguments(Path("DIR"), study.backend, study.gpus)]
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
