"""The diagnosis of runs or results on the command line."""

from collections.abc import Sequence
from pathlib import Path

from scratch_det.data.catalog import lookup
from scratch_det.data.coco import read_coco
from scratch_det.diagnosis.numbers import diagnose
from scratch_det.diagnosis.page import write_page
from scratch_det.engine.run_dir import RunDir
from scratch_det.errors import UserError
from scratch_det.evaluation.inference import RESULTS_FILE
from scratch_det.evaluation.metrics import PRETRAINED, SCRATCH, colors_of
from scratch_det.evaluation.predictions import read_predictions
from scratch_det.evaluation.truth import truth_of


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
    if missing := [path for path in paths.values() if not path.exists()]:
        raise UserError(f"there is no {missing[0]}; give a run's folder, or a json of results")
    folder = next(iter(paths.values()))
    if not data and RunDir(folder).environment.is_file():
        data = next(iter(RunDir(folder).read_config().DATASETS.TEST), None)
    if not data:
        raise UserError(f"{folder} does not say on which data set it was predicted: name it, --data NAME")
    truth = truth_of(read_coco(lookup(data), need_masks=task == "segm"))
    predictions = [read_predictions(results_of(path, data)) for path in paths.values()]
    models = {name: diagnose(truth, one, task) for name, one in zip(paths, predictions, strict=True)}
    colors = colors_of({name: initialisation_of(path) for name, path in paths.items()})
    page = write_page(out, " and ".join(paths) + f" on {data}", models, truth, predictions, colors)
    return f"{page}; its numbers are in classes.csv and diagnosis.json beside it"


def initialisation_of(path: Path) -> str:
    """Of a run; nothing is known of results."""
    if not RunDir(path).environment.is_file():
        return ""
    return PRETRAINED if RunDir(path).read_config().MODEL.WEIGHTS else SCRATCH


def results_of(path: Path, data: str) -> Path:
    """The COCO results of a run on a data set, or ``path`` itself. Raises UserError where there are none."""
    if path.is_file():
        return path
    own = not (run := RunDir(path)).environment.is_file() or data in run.read_config().DATASETS.TEST
    folders = [path / "inference" / data, *[path / "inference"] * own, path / f"inference_{data}"]
    places = [folder / RESULTS_FILE for folder in (*folders, *path.glob(f"inference_*/{data}"))]
    if not (found := [place for place in places if place.is_file()]):
        raise UserError(
            f"{path} holds no results of {data}: expected one of {', '.join(map(str, places))}; evaluate it: "
            f"scratch-det eval, or give a json of results"
        )
    return found[0]
