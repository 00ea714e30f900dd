"""Pictures: written whole, of the promised size, not blank, whatever the run or the images look like."""

import json
import re

import cv2
import numpy as np
import pytest
from matplotlib.figure import Figure
from pycocotools import mask as mask_api

from scratch_det.errors import DataError, UserError
from scratch_det.study.records import read_curves
from scratch_det.visualization import predictions
from scratch_det.visualization.curves import compare_runs, draw_curves, draw_losses, draw_scores, read_series
from scratch_det.visualization.predictions import draw_predictions

LOSSES = ("total_loss", "loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc")


def training_rows(count: int, step: int = 20) -> list[dict]:
    return [
        {"iteration": i * step + step - 1, "lr": 0.02 if i < count * 0.8 else 0.002, "time": 0.1, "eta_seconds": 9.0}
        | {name: 2.0 / (1 + i + place) for place, name in enumerate(LOSSES)}
        for i in range(count)
    ]


def evaluation_row(iteration: int, ap: float | None = 30.0) -> dict:
    return {"iteration": iteration, "bbox/AP": ap, "bbox/AP50": 50.0, "segm/AP": ap, "segm/APs": None}


def write_rows(path, rows, tail: str = ""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def picture(path) -> np.ndarray:
    image = cv2.imread(str(path))
    assert image is not None
    assert image.std() > 3, "blank"
    return image


@pytest.mark.parametrize(
    "rows",
    [
        training_rows(1),
        training_rows(30),
        [*training_rows(30), evaluation_row(600)],
        [*training_rows(30), evaluation_row(300, None), evaluation_row(600, 0.0)],
        [evaluation_row(600)],
        [row | {"total_loss": None, "loss_cls": float("nan"), "loss_mask": 0.0} for row in training_rows(5)],
        [row | {"lr": 0.0} for row in training_rows(5)],
    ],
    ids=["one row", "no evaluation", "one evaluation", "null and zero AP", "evaluation only", "nan losses", "lr 0"],
)
def test_curves_of_any_run(tmp_path, rows):
    out = draw_curves(write_rows(tmp_path / "metrics.json", rows), 600, tmp_path / "made" / "curves.png", "a run")
    assert picture(out).shape == (1008, 1080, 3)
    assert [path.name for path in out.parent.iterdir()] == ["curves.png"]


def test_curves_of_two_data_sets(tmp_path):
    row = {"iteration": 600, "one_val/bbox/AP": 30.0, "other_val/bbox/AP": 20.0}
    axes = Figure().subplots()
    draw_scores(axes, read_series(write_rows(tmp_path / "metrics.json", [row]), 600))
    shown = {text.get_text() for text in axes.get_legend().get_texts()}
    assert shown == {"one_val: box AP, best 30.0", "other_val: box AP, best 20.0"}
    assert len({line.get_linestyle() for line in axes.lines}) == 2


def test_curves_of_100k_rows(tmp_path):
    rows = [*training_rows(100_000), *(evaluation_row(i, i / 1e5) for i in range(0, 2_000_000, 50_000))]
    path = write_rows(tmp_path / "metrics.json", rows)
    picture(draw_curves(path, 2_000_000, tmp_path / "curves.png", "a long run"))


def test_after_a_resume_the_last_value_of_an_iteration_counts(tmp_path):
    again = [row | {"total_loss": 7.0} for row in training_rows(20)[10:]]
    rows = [*training_rows(15), evaluation_row(300, 1.0), *again, evaluation_row(300, 2.0)]
    path = write_rows(tmp_path / "metrics.json", rows, tail='{"iteration": 419, "total_lo')
    x, y = read_series(path, 600)["total_loss"]
    assert x.tolist() == [i * 20 + 20 for i in range(20)]
    assert set(y[10:]) == {7.0}
    assert read_series(path, 600)["bbox/AP"][1].tolist() == [2.0]
    picture(draw_curves(path, 600, tmp_path / "curves.png", "a resumed run"))


def test_a_run_and_its_study_count_completed_iterations(tmp_path):
    rows = [*training_rows(30), evaluation_row(299, 1.0), evaluation_row(600, 2.0)]
    path = write_rows(tmp_path / "metrics.json", rows)
    curves = read_curves(path, 600)
    assert curves["bbox/AP"] == ((300, 1.0), (600, 2.0))
    for name, (x, _) in read_series(path, 600).items():
        if name in curves:
            assert x.tolist() == [iteration for iteration, _ in curves[name]]


def test_a_file_without_rows_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no row"):
        draw_curves(write_rows(tmp_path / "metrics.json", []), 600, tmp_path / "curves.png", "nothing")
    assert not (tmp_path / "curves.png").exists()


def objects(count: int, width: int, height: int, kind: str = "bool", seed: int = 0) -> dict:
    """Random boxes with masks that fill them: bool [N, H, W], COCO RLEs or None."""
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, 0.6, (count, 2)) * (width, height)
    boxes = np.concatenate([start, start + rng.uniform(0.1, 0.4, (count, 2)) * (width, height)], axis=1)
    masks = np.zeros((count, height, width), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.astype(int), strict=True):
        mask[y0:y1, x0:x1] = True
    rles = [mask_api.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]
    kinds = {"bool": masks, "rle": rles, "none": None}
    return {"boxes": boxes, "labels": rng.integers(0, 3, count), "masks": kinds[kind]}


def sample(width=128, height=96, truth=3, found=3, scores=(0.55, 1.0), kind="bool", **extra) -> dict:
    prediction = objects(found, width, height, kind, seed=1)
    prediction["scores"] = np.linspace(*scores, found)
    image = np.full((height, width, 3), 90, np.uint8)
    return {"image": image, "truth": objects(truth, width, height, kind), "prediction": prediction, **extra}


CLASSES = ["ant", "bee", "cat"]


def test_small_images_are_enlarged(tmp_path):
    image = picture(draw_predictions([sample(title="0001.jpg")], CLASSES, tmp_path / "one.png"))
    assert image.shape[1] >= 2 * 320
    assert image.shape[0] >= 300


@pytest.mark.parametrize("columns", [1, 2, 5])
def test_rows_and_columns(tmp_path, columns):
    samples = [sample() for _ in range(4)]
    height, width, _ = picture(draw_predictions(samples, CLASSES, tmp_path / "grid.png", columns=columns)).shape
    per_row = min(columns, 4)
    assert width > per_row * 2 * predictions.TILE
    assert height > -(-4 // per_row) * predictions.TILE * 96 / 128


def test_sizes_orientations_and_mask_kinds_mix(tmp_path):
    shapes = [(640, 480), (480, 640), (1333, 200), (32, 32), (7, 300)]
    kinds = ["bool", "rle", "none", "rle", "bool"]
    samples = [sample(*shape, kind=kind) for shape, kind in zip(shapes, kinds, strict=True)]
    picture(draw_predictions(samples, CLASSES, tmp_path / "mixed.png"))


@pytest.mark.parametrize(
    ("truth", "found", "scores"),
    [(0, 0, (0, 0)), (3, 0, (0, 0)), (0, 3, (0.6, 0.9)), (3, 5, (0.01, 0.3)), (200, 200, (0.0, 1.0))],
    ids=["nothing", "no predictions", "no truth", "all below the threshold", "crowded"],
)
def test_any_number_of_objects(tmp_path, truth, found, scores):
    picture(draw_predictions([sample(truth=truth, found=found, scores=scores)], CLASSES, tmp_path / "out.png"))


def test_below_the_threshold_the_best_few_are_dashed():
    one = sample(found=5, scores=(0.1, 0.3))
    things, note = predictions._things(one, "prediction", CLASSES, {}, (400, 300))
    assert [thing.dashed for thing in things] == [True] * 3
    assert things[0].text.endswith("0.30")
    assert note == "no score reaches 0.5; dashed: the best 3"
    one = sample(found=5, scores=(0.1, 0.7))
    things, note = predictions._things(one, "prediction", CLASSES, {}, (400, 300))
    assert [thing.dashed for thing in things] == [False, False]
    assert note == ""


@pytest.mark.parametrize(
    ("score", "shown"),
    [
        (0.496, "0.49"),
        (np.nextafter(np.float32(0.5), np.float32(0)), "0.49"),
        (0.29, "0.29"),
        (0.5, "0.50"),
        (1, "1.00"),
    ],
)
def test_a_score_below_the_threshold_does_not_look_as_if_it_reached_it(score, shown):
    one = sample(found=1, scores=(score, score))
    (thing,), note = predictions._things(one, "prediction", CLASSES, {}, (400, 300))
    assert thing.text.endswith(f": {shown}")
    assert bool(note) == thing.dashed == (float(shown) < predictions.THRESHOLD)


def test_keypoints_and_labels_beyond_the_class_list(tmp_path):
    one = sample()
    points = np.random.default_rng(0).uniform(10, 90, (3, 17, 3))
    one["truth"]["keypoints"] = one["prediction"]["keypoints"] = points
    one["truth"]["labels"][0] = 77
    picture(draw_predictions([one], CLASSES, tmp_path / "points.png"))


def test_truth_and_prediction_share_a_colour_per_class():
    many = [f"c{i}" for i in range(80)]
    one = sample()
    colors = predictions._class_colors([one], len(many))
    for side in predictions.SIDES:
        things, _ = predictions._things(one, side, many, colors, (400, 300))
        assert {(thing.text.split(":")[0], thing.color) for thing in things} <= {
            (many[label], color) for label, color in colors.items()
        }
    assert len(set(colors.values())) == len(colors)


def test_no_samples_are_refused(tmp_path):
    with pytest.raises(DataError, match="no samples"):
        draw_predictions([], CLASSES, tmp_path / "none.png")


class TestComparison:
    @pytest.fixture
    def runs(self, tmp_path) -> list[str]:
        rows = [*training_rows(30), evaluation_row(600)]
        for name in ("short", "long"):
            (tmp_path / name).mkdir()
            write_rows(tmp_path / name / "metrics.json", rows if name == "long" else rows[:10])
            (tmp_path / name / "config.yaml").write_text("SOLVER:\n  MAX_ITER: 600\n")
        return [f"{name}={tmp_path / name}" for name in ("short", "long")]

    def test_a_panel_for_each_metric(self, runs, tmp_path):
        """A run without evaluation is left out of that panel."""
        out = compare_runs(runs, ["total_loss", "bbox/AP", "lr"], tmp_path / "made/curves.png")
        assert picture(out).shape == (1152, 1080, 3)

    @pytest.mark.parametrize(
        ("words", "keys", "out", "said"),
        [
            (["short"], ["lr"], "a.png", "short: expected LABEL=FOLDER"),
            (["a=absent"], ["lr"], "a.png", "a=absent: there is no absent/metrics.json"),
            ([], ["total_los"], "a.png", "no run has total_los in its metrics.json; did you mean 'total_loss'?"),
            ([], ["lr"], "a.jpg", "the picture is a PNG"),
        ],
    )
    def test_refusals(self, words, keys, out, said, runs, tmp_path):
        with pytest.raises(UserError, match=re.escape(said)):
            compare_runs([*runs, *words], keys, tmp_path / out)

    @pytest.mark.parametrize("config", ["SOLVER: {}", "", "- 1", "SOLVER: {MAX_ITER: x}", "a: ["])
    def test_a_damaged_recipe(self, config, runs, tmp_path):
        (tmp_path / "long/config.yaml").write_text(config)
        with pytest.raises(DataError, match=r"long/config.yaml is not as the run wrote it \(.+\); restore it"):
            compare_runs(runs, ["lr"], tmp_path / "a.png")


def test_the_stages_of_a_cascade_are_told_apart():
    axes = Figure().subplots()
    x = np.arange(3.0)
    draw_losses(axes, {name: (x, x + 1) for name in ("total_loss", "loss_cls_stage0", "loss_cls_stage2", "loss_mask")})
    assert [line.get_label() for line in axes.lines] == ["total", "class, stage 0", "class, stage 2", "mask"]
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 4
