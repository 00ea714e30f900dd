"""The row "scoring": this repository's AP beside pycocotools'."""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from functools import partial
from operator import call
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from scratch_det.backends import is_installed
from scratch_det.benchmark import Options
from scratch_det.benchmark.data import made_up_predictions, write_coco
from scratch_det.benchmark.measure import Cost, in_fresh_process, take_turns
from scratch_det.benchmark.report import IN_S, Figure, beside, figures
from scratch_det.evaluation.average_precision import FIELDS, evaluate_predictions
from scratch_det.evaluation.predictions import Predictions, read_predictions, write_predictions
from scratch_det.evaluation.truth import load_truth

APS = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # in the order of pycocotools


def scoring(options: Options) -> Iterator[Figure]:
    """From the truth's json and predictions in memory to AP; then from two files, in a fresh process.

    Ours packs the json in its first call and reads the packed file in the others, as evaluations of a run do.
    """
    scorers = {name: one for name, one in SCORERS.items() if name == "ours" or is_installed(name)}
    with TemporaryDirectory() as folder:
        for number, in_memory in ((1000, True), (5000, False)):
            images = max(round(number * options.scale), 1)
            json_file, file = write_coco(Path(folder, str(number)), images), Path(folder, "results.json")
            predictions = made_up_predictions(json_file)
            write_predictions(file, predictions)
            size = f"{images:,} images, {len(predictions['score']):,} detections"
            del predictions
            for task, name in (("bbox", "boxes"), ("segm", "masks")) if in_memory else ():
                ways = [partial(score, json_file, read(file), task) for read, score in scorers.values()]
                yield from compared(f"scoring {name}, {size}", IN_S, take_turns(ways, options.repeats))
            if not in_memory:
                fresh = [partial(in_fresh_process, f"{__name__}:from_files", one, json_file, file) for one in scorers]
                costs = take_turns(fresh, options.repeats, call)
                yield from compared(f"scoring masks from files, {size}", (*IN_S, "peak MB"), costs)


def compared(what: str, units: Sequence[str], costs: list[list[Cost]]) -> Iterator[Figure]:
    """Our costs, and the peer's where there are any; says whether both found the same AP to the last digit."""
    ours, theirs = (np.array(one[0].value) for one in (costs[0], costs[-1]))
    same = np.array_equal(ours, theirs, equal_nan=True)
    note = "AP equal: yes" if same else f"AP equal: no, {np.nanmax(abs(ours - theirs)):.1g} apart"
    return figures(what, units, costs, beside("pycocotools"), note if len(costs) > 1 else "")


def our_aps(json_file: Path, predictions: Predictions, task: str) -> list[float]:
    """APS in percent; nan where there is no such object."""
    found = evaluate_predictions(load_truth(json_file), predictions, [task])[task]
    return [found[name] for name in APS]


def pycocotools_aps(json_file: Path, results: list[dict[str, Any]], task: str) -> list[float]:
    """The same by pycocotools, as detectron2 calls it."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    read = ("image_id", "category_id", "score", FIELDS[task])
    with redirect_stdout(io.StringIO()):
        truth = COCO(json_file)
        scorer = COCOeval(truth, truth.loadRes([{name: one[name] for name in read} for one in results]), task)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return [float(value) * 100 if value >= 0 else float("nan") for value in scorer.stats[: len(APS)]]


# how each side reads a results file, and finds APS from the truth's json, what it read, and the task
SCORERS: dict[str, tuple[Callable[..., Any], Callable[..., list[float]]]] = {
    "ours": (read_predictions, our_aps),
    "pycocotools": (lambda file: json.loads(file.read_bytes()), pycocotools_aps),
}


def from_files(name: str, json_file: str, results_file: str) -> list[float]:
    """Mask AP by one of SCORERS."""
    read, score = SCORERS[name]
    return score(Path(json_file), read(Path(results_file)), "segm")
