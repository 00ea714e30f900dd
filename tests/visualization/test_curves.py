"""Curves: panels, lines, colours, labels and numbers of any run, and of several runs over each other."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from matplotlib.figure import Figure

from scratch_det.errors import ConfigError, DataError, UserError
from scratch_det.evaluation.metrics import COLORS, GREEN, INK, PURPLE, WINE
from scratch_det.reading import read_series
from scratch_det.study.records import read_curves
from scratch_det.visualization import curves
from scratch_det.visualization.curves import (
    MOST_POINTS,
    compare_runs,
    comparison,
    draw_curves,
    draw_grid,
    draw_losses,
    draw_rate,
    draw_scores,
    thin,
)

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


def axes_of(draw, tmp_path, rows, last=600):
    axes = Figure().subplots()
    draw(axes, read_series(write_rows(tmp_path / "metrics.json", rows), last))
    return axes


def words_in(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_the_losses_of_a_run(tmp_path):
    axes = axes_of(draw_losses, tmp_path, training_rows(30))
    assert axes.get_yscale() == "log"
    shown = {line.get_label(): line for line in axes.lines}
    assert list(shown) == ["total", "class", "box", "mask", "proposal objectness", "proposal box"]
    assert [shown[name].get_color() for name in ("total", "class", "box")] == [INK, WINE, GREEN]
    assert shown["total"].get_linewidth() > shown["class"].get_linewidth()
    assert shown["box"].get_xdata().tolist() == [20.0 * i + 20 for i in range(30)]
    assert shown["box"].get_ydata().tolist() == [2 / (i + 3) for i in range(30)]
    assert words_in(axes_of(draw_losses, tmp_path, [evaluation_row(600)])) == ["no training row yet"]


def test_the_scores_of_a_run(tmp_path):
    rows = [evaluation_row(300, 40.0), evaluation_row(600, 30.0), {"iteration": 600, "bbox_TTA/AP": 35.0}]
    axes = axes_of(draw_scores, tmp_path, rows)
    shown = {line.get_label(): (line.get_color(), line.get_marker(), *line.get_ydata()) for line in axes.lines}
    assert shown == {
        "box AP, best 40.0": (GREEN, "o", 40, 30),
        "mask AP, best 40.0": (PURPLE, "s", 40, 30),
        "box AP, test aug, best 35.0": (GREEN, "*", 35),
    }
    assert words_in(axes) == ["30.0", "30.0", "35.0"]  # of the ends; the highest above its point
    assert [text.get_verticalalignment() for text in axes.texts] == ["top", "top", "bottom"]
    assert (axes.get_ylabel(), axes.get_ylim()) == ("AP (%)", (0, 52))
    assert words_in(axes_of(draw_scores, tmp_path, training_rows(3))) == ["no evaluation yet"]


def test_the_axis_of_scores_ends_above_100_percent(tmp_path):
    row = {"iteration": 600, "classification/top1": 95.0, "classification/top5": 100.0}
    axes = axes_of(draw_scores, tmp_path, [row])
    assert (axes.get_ylabel(), axes.get_ylim()) == ("accuracy (%)", (0, 112))


def test_every_drop_of_the_learning_rate_stays_sharp(tmp_path):
    rows = [{"iteration": i, "lr": 0.02 if i < 77_777 else 0.002} for i in range(100_000)]
    x, y = axes_of(draw_rate, tmp_path, rows, 100_000).lines[0].get_data()
    assert len(x) <= MOST_POINTS + 2
    assert x[y == 0.02].max() + 1 == x[y == 0.002].min() == 77_778


def test_curves_of_two_data_sets(tmp_path):
    row = {"iteration": 600, "one_val/bbox/AP": 30.0, "other_val/bbox/AP": 20.0}
    axes = axes_of(draw_scores, tmp_path, [row])
    assert {line.get_label() for line in axes.lines} == {"one_val: box AP, best 30.0", "other_val: box AP, best 20.0"}
    assert len({line.get_linestyle() for line in axes.lines}) == 2


def test_curves_of_many_rows(tmp_path):
    rows = [*training_rows(4000), *(evaluation_row(i, i / 1e4) for i in range(0, 80_000, 2000))]
    picture(draw_curves(write_rows(tmp_path / "metrics.json", rows), 80_000, tmp_path / "curves.png", "a long run"))
    axes = axes_of(draw_losses, tmp_path, rows, 80_000)
    assert {len(line.get_xdata()) for line in axes.lines} == {MOST_POINTS}


def test_after_a_resume_the_last_value_of_an_iteration_counts(tmp_path):
    again = [row | {"total_loss": 7.0} for row in training_rows(20)[10:]]
    rows = [*training_rows(15), evaluation_row(300, 1.0), *again, evaluation_row(300, 2.0)]
    path = write_rows(tmp_path / "metrics.json", rows, tail='{"iteration": 419, "total_lo')
    series = read_series(path, 600)
    assert [iteration for iteration, _ in series["total_loss"]] == [i * 20 + 20 for i in range(20)]
    assert {value for _, value in series["total_loss"][10:]} == {7.0}
    assert series["bbox/AP"] == [(301, 2.0)]
    picture(draw_curves(path, 600, tmp_path / "curves.png", "a resumed run"))


def test_a_run_and_its_study_count_completed_iterations(tmp_path):
    rows = [*training_rows(30), evaluation_row(299, 1.0), evaluation_row(600, 2.0)]
    path = write_rows(tmp_path / "metrics.json", rows)
    found = read_curves(path, 600)
    assert found["bbox/AP"] == ((300, 1.0), (600, 2.0))
    for name, points in read_series(path, 600).items():
        if name in found:
            assert [iteration for iteration, _ in points] == [iteration for iteration, _ in found[name]]


def test_a_file_without_rows_is_rejected(tmp_path):
    with pytest.raises(DataError, match="holds no row"):
        draw_curves(write_rows(tmp_path / "metrics.json", []), 600, tmp_path / "curves.png", "nothing")
    assert not (tmp_path / "curves.png").exists()


class TestComparison:
    @pytest.fixture
    def runs(self, tmp_path) -> list[str]:
        rows = [*training_rows(30), evaluation_row(600)]
        for name in ("short", "long"):
            (tmp_path / name).mkdir()
            write_rows(tmp_path / name / "metrics.json", rows if name == "long" else rows[:10])
            (tmp_path / name / "config.yaml").write_text("SOLVER: {MAX_ITER: 600}\nMODEL: {WEIGHTS: ''}\n")
        return [f"{name}={tmp_path / name}" for name in ("short", "long")]

    def test_a_panel_for_each_metric(self, runs, tmp_path):
        """A run without evaluation is left out of that panel."""
        out = compare_runs(runs, ["total_loss", "bbox/AP", "lr"], tmp_path / "made/curves.png")
        assert picture(out).shape == (1152, 1080, 3)
        folders = dict(word.split("=") for word in runs)
        found = {label: read_series(Path(folder) / "metrics.json", 600) for label, folder in folders.items()}
        panels = comparison(found, ["total_loss", "bbox/AP", "lr"], dict(zip(found, COLORS, strict=False))).axes
        assert [axes.get_ylabel() for axes in panels] == ["total loss", "box AP (%)", "lr"]
        assert all(axes.get_xlim() == (0, 629) for axes in panels)  # up to the longest line, with matplotlib's margin
        lines = [
            [(line.get_label(), line.get_color(), line.get_xdata().size) for line in axes.lines] for axes in panels
        ]
        short, long = ("short", COLORS[0]), ("long", COLORS[1])
        assert lines == [[(*short, 10), (*long, 30)], [(*long, 1)], [(*short, 10), (*long, 30)]]
        assert [text.get_text() for text in panels[0].get_legend().get_texts()] == ["short", "long"]

    def test_without_an_evaluation_the_loss_alone(self, runs, tmp_path):
        path = tmp_path / "curves.png"
        heights = [picture(compare_runs(words, (), path)).shape[0] for words in (runs[:1], runs)]
        assert heights == [384, 768]

    @pytest.mark.parametrize(
        ("words", "keys", "out", "said"),
        [
            (["short"], ["lr"], "a.png", "short: short is another run's label too"),
            (["a=absent"], ["lr"], "a.png", "a=absent: there is no absent/metrics.json"),
            ([], ["total_los"], "a.png", " has total_los in its metrics.json; did you mean 'total_loss'?"),
            ([], ["lr"], "a.jpg", "the picture is a PNG"),
        ],
    )
    def test_rejections(self, words, keys, out, said, runs, tmp_path):
        with pytest.raises(UserError, match=re.escape(said)):
            compare_runs([*runs, *words], keys, tmp_path / out)

    @pytest.mark.parametrize("config", ["SOLVER: {}", "", "- 1", "SOLVER: {MAX_ITER: x}", "a: ["])
    def test_a_damaged_recipe(self, config, runs, tmp_path):
        (tmp_path / "long/config.yaml").write_text(config)
        with pytest.raises(
            ConfigError, match=r"long/config.yaml(:2: not valid YAML| has .*; restore it| holds no sec)"
        ):
            compare_runs(runs, ["lr"], tmp_path / "a.png")


def test_thin():
    curve = tuple((point, float(point % 5)) for point in range(1000))
    assert len(thin(curve, 200)) == 200
    assert {value for _, value in thin(curve, 200)} == {2.0}
    assert thin(curve, 1000) == curve


def test_the_heat_map_of_a_grid(tmp_path, monkeypatch):
    """The longest axis across, a row for each combination of the others; the best is framed, what failed is grey."""
    figures = []
    monkeypatch.setattr(curves, "save_figure", lambda figure, path: figures.append(figure) or path)
    points = [{"rate": rate, "scales": scales} for scales in ("one", "two") for rate in ("1", "2", "3")]
    draw_grid(points, [1.0, 2.0, None, 4.0, 3.0, 4.0], "bbox/AP", tmp_path / "search.png")
    (axes,) = figures[0].axes
    assert (axes.get_title(loc="left"), axes.get_xlabel()) == ("bbox/AP", "rate")
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "2", "3"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["scales one", "scales two"]
    written = {text.get_position(): (text.get_text(), text.get_color()) for text in axes.texts}
    assert [written[x, 0] for x in range(3)] == [("1.00", "white"), ("2.00", "white"), ("failed", "black")]
    assert [written[x, 1] for x in range(3)] == [("4.00", "black"), ("3.00", "black"), ("4.00", "black")]
    (frame,) = axes.patches
    assert frame.get_xy() == (-0.5, 0.5)  # of the first of two best ones
    draw_grid(points, [None] * 6, "bbox/AP", tmp_path / "search.png")
    assert not figures[1].axes[0].patches


def test_the_stages_of_a_cascade_are_told_apart():
    axes = Figure().subplots()
    curve = [(0, 1.0), (1, 2.0), (2, 3.0)]
    draw_losses(axes, {name: curve for name in ("total_loss", "loss_cls_stage0", "loss_cls_stage2", "loss_mask")})
    assert [line.get_label() for line in axes.lines] == ["total", "class, stage 0", "class, stage 2", "mask"]
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 4
