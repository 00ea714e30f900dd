"""The diagnosis of runs or results on the command line, and their pictures."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from scratch_det.data.catalog import lookup
from scratch_det.data.coco import read_coco
from scratch_det.diagnosis.data import Filter, of_json
from scratch_det.diagnosis.numbers import SHOWN_SCORE, Image, diagnose
from scratch_det.diagnosis.page import MARKS, marked, render, write_page
from scratch_det.engine.run_dir import RunDir
from scratch_det.errors import UserError
from scratch_det.evaluation.metrics import EMA, PRETRAINED, SCRATCH, colors_of
from scratch_det.evaluation.predictions import RESULTS_FILE, Predictions, read_predictions
from scratch_det.evaluation.truth import Truth, truth_of
from scratch_det.reading import read_json
from scratch_det.visualization.page import Section
from scratch_det.weights.locate import split_part


class Evaluation(msgspec.Struct):
    """What is read of the result.json of scratch-det eval."""

    datasets: list[str] = []


TASKS = {"bbox": "boxes", "segm": "masks"}


def analyze_errors(words: Sequence[str], data: str | None, task: str, out: Path) -> str:
    """Write the page of runs, NAME=FOLDER or FOLDER, or of results; returns a line about it.

    data: the data set's name, by default the first that the first run was evaluated on. Raises UserError for what is
    no run and no results, DataError where predictions and data do not belong together.
    """
    paths: dict[str, Path] = {}
    for word in words:
        name, sign, path = ("", "", word) if Path(word).exists() else word.partition("=")
        paths[name if sign else Path(word).resolve().name] = Path(path if sign else word)
    if len(paths) < len(words):
        raise UserError(f"two of {', '.join(words)} have the same name: write NAME=FOLDER")
    data, truth, predictions = read_all(list(paths.values()), data, task)
    models = {name: diagnose(truth, one, task) for name, one in zip(paths, predictions, strict=True)}
    colors = colors_of({name: initialisation_of(path) for name, path in paths.items()})
    page = write_page(out, " and ".join(paths) + f" on {data}", models, truth, predictions, colors)
    return f"{page}; its numbers are in classes.csv and diagnosis.json beside it"


def initialisation_of(path: Path) -> str:
    """Of a run; nothing is known of results."""
    if not (run := RunDir(split_part(str(path))[0])).environment.is_file():
        return ""
    return PRETRAINED if run.read_config().MODEL.WEIGHTS else SCRATCH


def view_results(path: Path, data: str | None, task: str, chosen: Filter, out: Path) -> str:
    """Write a page of images, the worst first, truth beside what a run, or results, are right and wrong in.

    Returns the page. Raises as ``analyze_errors``, and as ``view_data`` for what ``chosen`` leaves without images.
    """
    data, truth, (predictions,) = read_all([path], data, task)
    numbers, found = set(chosen.numbers(truth.data).tolist()), diagnose(truth, predictions, task)
    images = [one for one in found.images if truth.numbers[one.place] in numbers]
    if chosen.classes:
        images = of_classes(images, truth, predictions, chosen.classes)
    pictures = []
    for one in images[: chosen.count]:
        if picture := marked(truth, found, predictions, one):
            pictures += [of_json(truth.data, int(truth.numbers[one.place]), [task]), picture]
    asked = f"Chosen: {chosen}. " if str(chosen) else ""
    of_these = " of these classes" if chosen.classes else ""
    note = f"{asked}The worst first, by F1{of_these}. First the truth, then what was found{of_these}: {MARKS}"
    section = Section(f"{len(pictures) // 2} of {len(images):,} images", note, pictures=pictures, layout="grid")
    objects, detections = int(found.counts.sum()), int(found.detections.sum())
    uncounted = len(truth.data.arrays["order"]) - objects
    crowds = f" (and crowds or ignored ones, which do not count: {uncounted:,})" if uncounted else ""
    headline = (
        f"{len(truth.images):,} images of {data}, {objects:,} objects{crowds}, {detections:,} detections with a score "
        f"from {SHOWN_SCORE:g}, matched by their {TASKS[task]}."
    )
    return str(render(out, f"{path.resolve().name} on {data}", headline, [section]))


def of_classes(images: Sequence[Image], truth: Truth, predictions: Predictions, classes: Sequence[str]) -> list[Image]:
    """The images, worst first, with what is right, wrong and missed of these classes alone."""
    kept = {truth.data.classes.index(name) for name in classes}
    labels = truth.places(predictions)[1].tolist()

    def of(one: Image) -> Image:
        objects = truth.data.objects(int(truth.numbers[one.place])) if one.missed else []
        right, wrong = (tuple(row for row in rows if labels[row] in kept) for rows in (one.right, one.wrong))
        return Image(one.place, right, wrong, tuple(k for k in one.missed if objects[k]["label"] in kept))

    return sorted(map(of, images), key=lambda one: one.rank)


def read_all(paths: Sequence[Path], data: str | None, task: str) -> tuple[str, Truth, list[Predictions]]:
    """The name of the data set, by default that of the first run, its truth, and the predictions of each path."""
    places = [(Path(place), part) for place, part in (split_part(str(path)) for path in paths)]
    if missing := [place for place, _ in places if not place.exists()]:
        raise UserError(f"there is no {missing[0]}; give a run's folder, or a json of results")
    first = places[0][0]
    data = data or evaluated_on(first)
    if not data:
        if first.is_dir() and not RunDir(first).environment.is_file():
            raise UserError(f"{first} is no run's folder; give one, or a json of results and its --data NAME")
        raise UserError(f"{first} does not say on which data set it was predicted: name it, --data NAME")
    truth = truth_of(read_coco(lookup(data), need_masks=task == "segm"))
    return data, truth, [read_predictions(results_of(place, data, bool(part))) for place, part in places]


def evaluated_on(path: Path) -> str | None:
    """The first data set that a run, or what scratch-det eval wrote into a folder of its own, was evaluated on."""
    if RunDir(path).environment.is_file():
        return next(iter(RunDir(path).read_config().DATASETS.TEST), None)
    results = sorted(path.glob("inference*/result.json"))
    return next((name for result in results for name in read_json(result, Evaluation).get("datasets", [])), None)


def results_of(path: Path, data: str, averaged: bool) -> Path:
    """The COCO results of a run on a data set, or ``path`` itself. Raises UserError where there are none.

    averaged: those of the averaged weights, which a folder with an evaluation alone may have as its only ones.
    """
    if path.is_file():
        return path
    is_run, end = (run := RunDir(path)).environment.is_file(), EMA * averaged
    own = not is_run or data in run.read_config().DATASETS.TEST
    folders = [path / f"inference{end}" / data, *[path / f"inference{end}"] * own, path / f"inference_{data}{end}"]
    folders += [*path.glob(f"inference_*{end}/{data}"), *[path / f"inference{EMA}"] * (not is_run)]
    places = [folder / RESULTS_FILE for folder in folders]
    if not (found := [place for place in places if place.is_file()]):
        expected = f"{path} holds no results of {data}: expected one of {', '.join(map(str, places))}"
        if not RunDir(path).environment.is_file():
            raise UserError(f"{expected}; give a run's folder, or a json of results")
        weights = f"--config-file {path}/config.yaml MODEL.WEIGHTS {path}/checkpoints/model_final.pth"
        fix = f"""scratch-det eval {weights} DATASETS.TEST "('{data}',)" OUTPUT_DIR {path}"""
        raise UserError(f"{expected}; evaluate it: {fix}")
    return found[0]
