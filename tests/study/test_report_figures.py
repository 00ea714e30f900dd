"""A study's figures: what is in each, from records of which all or some are finished, and the same bytes again."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image

from scratch_det.evaluation.metrics import (
    BLUE,
    BROWN,
    GREEN,
    INK,
    OLIVE,
    PRETRAINED,
    PURPLE,
    SCRATCH,
    SKY,
    VERMILION,
)
from scratch_det.study import own
from scratch_det.study.digits import PER_X
from scratch_det.study.experiments import find, jobs_of, of_place
from scratch_det.study.records import LOSS, Record
from scratch_det.study.report.figures import FIGURES, REPORT_STYLE, draw, figures_of
from scratch_det.study.report.seeds import bands_of, own_part
from scratch_det.study.run import EVALUATE, TRAIN, Run
from scratch_det.visualization.curves import GROUND

TRUNK, BRANCH = "scratch_keypoint_rcnn_R_18_FPN_3x_gn", "scratch_keypoint_rcnn_R_18_FPN_2x_gn"


def made_up(place: str) -> list[Record]:
    """Every run of ``place`` finished, AP rising evenly to 40 and the loss falling."""
    records = []
    for job in jobs_of(of_place(place)):
        run = job.run
        if run.kind == EVALUATE:
            metrics = {"bbox_TTA/AP": 42.0, "segm_TTA/AP": 37.0, "bbox/AP": 40.0, "segm/AP": 35.0}
            records.append(Record(run, "finished", 0, 0, metrics))
            continue
        points = [run.iterations * part // 10 for part in range(1, 11)]
        ap = tuple((point, 40 * point / run.iterations) for point in points)
        names = ("bbox/AP", "segm/AP", "keypoints/AP") if run.kind == TRAIN else ()
        loss = {LOSS: tuple((point, 2 - point / run.iterations) for point in points)}
        curves = dict.fromkeys(names, ap) | loss
        records.append(Record(run, "finished", job.start, run.iterations, dict.fromkeys(names, 40.0), curves))
    return records


LOWER_VERMILION, LOWER_BLUE = VERMILION.lower(), BLUE.lower()  # as to_hex has them


def bars(axes: Axes) -> list[tuple[float, float, float, str]]:
    """Middle, bottom, height and colour of each, from left to right."""
    middles = [round(one.get_x() + one.get_width() / 2, 3) for one in axes.patches]
    return sorted(
        (x, one.get_y(), one.get_height(), to_hex(one.get_facecolor()))
        for x, one in zip(middles, axes.patches, strict=True)
    )


def ends(axes: Axes) -> set[tuple[float, float, str]]:
    """Iteration, value and colour of each marked end of a curve."""
    return {(*line.get_xydata()[0], line.get_color()) for line in axes.lines if len(line.get_xdata()) == 1}


def legend(axes: Axes) -> dict[str, str]:
    """Colour by label."""
    names, lines = axes.get_legend().get_texts(), axes.get_legend().legend_handles
    return {text.get_text(): line.get_color() for text, line in zip(names, lines, strict=True)}


def texts(found: Iterable[Text]) -> list[str]:
    return [text.get_text() for text in found]


class TestFigures:
    @pytest.mark.parametrize("whole", ["digits", "paper"])
    def test_all(self, whole: str, datasets_root: Path) -> None:
        """On digits there is no second body, and so no Figure 3."""
        names = {f"figure{number}" for number in range(1, 9)}
        expected = names if whole == "paper" else names - {"figure3"} | {"norms"}
        found = figures_of(whole, made_up(whole))
        assert set(found) == expected
        small = " in miniature" * (whole == "digits")
        for name in expected & names:
            assert found[name].get_suptitle().startswith(f"Figure {name[-1]}{small}: ")

    def test_those_whose_runs_are_all_there(self, datasets_root: Path) -> None:
        assert list(figures_of("digits/table1", made_up("digits/table1"))) == ["figure1", "figure2"]
        assert list(figures_of("digits/smoke", made_up("digits/smoke"))) == ["smoke"]

    def test_partial(self, datasets_root: Path) -> None:
        waiting = [Record(one.run, "waiting", one.start, 0) for one in made_up("digits")]
        assert list(figures_of("digits", waiting)) == ["figure2"]
        some = [one for one in made_up("digits/figure1") if one.run.init == "scratch"][1:]
        (axes, *_) = figures_of("digits/figure1", some)["figure1"].axes
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [
            "random initialisation, mean and range of 4 seeds"
        ]

    def test_without_a_data_set(self, datasets_root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Figure 2 has its three panels, and the same bytes, wherever it is drawn."""
        found = figures_of("digits/figure1", made_up("digits/figure1"))
        assert [axes.get_title() for axes in found["figure2"].axes] == ["images", "instances", "pixels"]
        monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
        again = figures_of("digits/figure1", made_up("digits/figure1"))
        (first, _), (second, _) = (
            draw({"figure2": one["figure2"]}, tmp_path / name) for name, one in (("first", found), ("again", again))
        )
        assert first.read_bytes() == second.read_bytes()

    def test_a_branch_begins_on_the_mean_of_its_trunk(self) -> None:
        """6x is finished with two seeds, its branch 5x with one, so the thick lines are of that one."""
        everything = [one for one in made_up("digits/figure1") if one.run.init == "scratch"]
        trunks = [one for one in everything if one.run.shown == "scratch, 6x"][:2]
        branches = [one for one in everything if one.run.shown == "scratch, 5x"][:1]
        other = tuple((at, value / 2) for at, value in trunks[1].curves["bbox/AP"])
        trunks[1] = replace(trunks[1], curves={"bbox/AP": other})
        (axes, *_) = figures_of("digits/figure1", [*trunks, *branches])["figure1"].axes
        thick = [line for line in axes.lines if line.get_linewidth() == 1.6]
        assert [list(line.get_ydata()) for line in thick] == [
            [value for _, value in trunks[0].curves["bbox/AP"]],
            [value for _, value in own_part(branches[0], "bbox/AP", {trunks[0].run.name})],
        ]
        assert axes.get_legend().get_texts()[0].get_text() == "random initialisation"

    def test_a_seed_that_has_begun_leaves_the_mean_alone(self) -> None:
        records = [one for one in made_up("digits/figure1") if one.run.shown == "scratch, 6x"]
        begun = {"bbox/AP": records[2].curves["bbox/AP"][:1]}
        records[2] = replace(records[2], state="running", curves=begun, metrics={})
        (axes, *_) = figures_of("digits/figure1", records)["figure1"].axes
        thick = [line for line in axes.lines if line.get_linewidth() == 1.6]
        assert [len(line.get_xdata()) for line in thick] == [10]
        assert axes.get_legend().get_texts()[0].get_text() == "random initialisation, mean and range of 4 seeds"
        assert not [line for line in axes.lines if line.get_linewidth() == 0.6]

    def test_seeds_are_a_band_around_their_mean(self) -> None:
        records = [one for one in made_up("digits/figure1") if one.run.shown == "scratch, 6x"]
        lower = tuple((at, value / 2) for at, value in records[1].curves["bbox/AP"])
        records[1] = replace(records[1], curves={"bbox/AP": lower})
        (axes, *_) = figures_of("digits/figure1", records)["figure1"].axes
        (band,) = axes.collections
        (outline,) = band.get_paths()
        assert sorted({y for x, y in outline.vertices if x == 6 * PER_X}) == [20.0, 40.0]
        assert to_hex(band.get_facecolor()[0]) == LOWER_VERMILION

    def test_what_the_paper_reports_is_an_open_mark(self) -> None:
        """Table 1's ends in Figure 1; of Figure 5's points those that it gives a number for."""
        (axes, *_) = figures_of("figure1", made_up("figure1"))["figure1"].axes
        marks = [line for line in axes.lines if line.get_markerfacecolor() == GROUND and len(line.get_xdata())]
        assert [list(zip(*line.get_data(), strict=True)) for line in marks] == [
            [(540_000, 41.3), (450_000, 40.7), (360_000, 40.6), (270_000, 39.5), (180_000, 36.8)],
            [(540_000, 41.1), (450_000, 40.9), (360_000, 40.9), (270_000, 40.8), (180_000, 40.3)],
        ]
        assert list(legend(axes)) == ["random initialisation", "pre-trained", "the paper"]
        found = figures_of("figure5", made_up("figure5"))["figure5"].axes[2]
        assert found.get_title() == "R101-FPN, box AP"
        marks = {tuple(point) for line in found.lines if line.get_markerfacecolor() == GROUND
                 for point in np.round(line.get_xydata(), 2).tolist()}  # fmt: skip
        assert marks == {(-0.1, 42.7), (0.1, 42.2), (0.9, 45.0), (1.9, 47.4)}

    def test_an_unfinished_run_is_no_point(self) -> None:
        unfinished = [replace(one, state="interrupted") for one in made_up("digits/figure5")]
        assert figures_of("digits/figure5", unfinished) == {}

    def test_ends_are_marked(self) -> None:
        """Five schedules of two initialisations, and the usual length of fine-tuning."""
        (axes, *_) = figures_of("figure1", made_up("figure1"))["figure1"].axes
        ends = [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 1]
        assert sorted(ends) == sorted(2 * [180_000, 270_000, 360_000, 450_000, 540_000])
        assert [list(line.get_xdata()) for line in axes.lines if line.get_linestyle() == "--"] == [2 * [180_000]]

    def test_the_same_bytes(self, tmp_path: Path) -> None:
        first, again = (draw(figures_of("figure8", made_up("figure8")), tmp_path / name) for name in ("first", "again"))
        assert [path.name for path in first] == ["figure8.svg", "figure8.png"]
        assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
        assert "date" not in first[0].read_text()
        assert "@media (prefers-color-scheme: dark)" in first[0].read_text()
        with Image.open(first[1]) as picture:
            assert picture.width == 1400


class TestContent:
    """Colours are those of the initialisations in every figure: pre-trained blue, scratch vermilion."""

    def test_schedules(self) -> None:
        (figure,) = figures_of("digits/figure6", made_up("digits/figure6")).values()
        axes = figure.axes[0]
        assert figure.get_suptitle() == "Figure 6 in miniature: R18-FPN with GN"
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("iteration", "keypoint AP (%)")
        assert legend(axes) == {"random initialisation": VERMILION, "pre-trained": BLUE}
        assert ends(axes) == {(x, 40.0, color) for x in (2 * PER_X, 3 * PER_X) for color in (VERMILION, BLUE)}
        (top,) = axes.child_axes
        assert texts(top.get_xticklabels()) == ["1x", "typical fine-tuning: 2x", "3x"]

    def test_what_is_seen(self) -> None:
        """Figure 2 of the paper: ImageNet counts 100 epochs, 1,281,167 images of one instance and 224 x 224 pixels."""
        images, instances, pixels = figures_of("figure1", made_up("figure1"))["figure2"].axes
        imagenet, tuned, trained = 128_116_700, 180_000 * 16, 540_000 * 16
        assert bars(images) == [
            (0, 0, imagenet, SKY.lower()),
            (0, imagenet, tuned, LOWER_BLUE),
            (1, 0, trained, LOWER_VERMILION),
        ]
        assert texts(images.texts) == ["131.0 M", "8.6 M"]
        assert [round(height / 1e6, 1) for _, _, height, _ in bars(instances)] == [128.1, 20.9, 62.8]
        assert [round(height / 1e12, 2) for _, _, height, _ in bars(pixels)] == [6.43, 3.07, 9.21]
        assert texts(images.get_xticklabels()) == ["pre-trained", "scratch"]
        assert images.yaxis.get_major_formatter()(20e6) == "20 M"
        (legend_below,) = images.figure.legends
        assert texts(legend_below.get_texts()) == ["pre-training", "fine-tuning", "random initialisation"]

    def test_enhanced(self) -> None:
        """Test aug is measured with it; each step has a point for both initialisations, and its number at it."""
        (figure,) = figures_of("digits/figure5", made_up("digits/figure5")).values()
        assert [axes.get_title() for axes in figure.axes] == ["R18-FPN, box AP", "R18-FPN, mask AP"]
        for axes, augmented in zip(figure.axes, (42.0, 37.0), strict=True):
            heights = [40.0, 40.0, 40.0, augmented]
            for line, shift, color in zip(axes.lines, (-0.1, 0.1), (VERMILION, BLUE), strict=True):
                assert line.get_color() == color
                assert line.get_xydata().tolist() == [[x + shift, height] for x, height in enumerate(heights)]
            assert texts(axes.texts) == 2 * [f"{height:.1f}" for height in heights]
            assert texts(axes.get_xticklabels()) == ["baseline", "+ train aug", "+ cascade", "+ test aug"]
            assert axes.get_ylim() == (min(heights) - 2, min(heights) + 5)  # one scale: 4 more than the mask APs span
        assert texts(figure.legends[0].get_texts()) == ["random initialisation", "pre-trained"]

    def test_small_data(self) -> None:
        figure = figures_of("digits/figure7", made_up("digits/figure7"))["figure7"]
        third, tenth = "a third of the images", "a tenth of the images"
        titles = [axes.get_title() for axes in figure.axes]
        assert titles == [f"{third}\nhyper-parameters of all", third, tenth]
        both = {(k * PER_X, 40.0, color) for k in (1, 3) for color in (VERMILION, BLUE)}
        assert [ends(axes) for axes in figure.axes] == [{(PER_X, 40.0, BLUE)}, both, both]
        assert {axes.get_ylim() for axes in figure.axes} == {(0, 1.08 * 40)}
        assert [axes.get_ylabel() for axes in figure.axes] == ["box AP (%)", "", ""]

    def test_training_loss(self) -> None:
        (figure,) = figures_of("digits/figure8", made_up("digits/figure8")).values()
        (axes,) = figure.axes
        assert figure.get_suptitle() == "Figure 8 in miniature: R18-FPN, training loss with a tenth of the images"
        assert axes.get_ylabel() == "training loss"
        assert legend(axes) == {"random initialisation": VERMILION, "pre-trained": BLUE}
        last = [(line.get_color(), line.get_xdata()[-1], line.get_ydata()[-1]) for line in axes.lines]
        assert last == 2 * [(VERMILION, 3 * PER_X, 1.0)] + 2 * [(BLUE, PER_X, 1.0)]  # as logged, and smoothed

    def test_norms(self) -> None:
        """A line for each, with its last value in the legend."""
        records = made_up("digits/norms")
        records = [
            replace(one, curves={"bbox/AP": ((3 * PER_X, float(number)),)}) for number, one in enumerate(records)
        ]
        (figure,) = figures_of("digits/norms", records).values()
        assert legend(figure.axes[0]) == {
            "GN: 0.0": GREEN,
            "SyncBN: 1.0": PURPLE,
            "BN, 2 images a process: 2.0": SKY,
            "FrozenBN, res2 frozen: 3.0": BROWN,
            "none: 4.0": INK,
            "GN, all weights from N(0, 0.01): 5.0": OLIVE,
        }
        assert figure.get_suptitle() == "In miniature: R18-FPN from scratch, 3x, by normalisation"

    def test_own_runs(self) -> None:
        """The mean of a recipe's seeds with their range, in the colours of the initialisations."""
        runs = [
            Run(name, (own.PLACE,), shown, init, 0, length=40, seed=seed)
            for name, shown, init, seed in [
                ("new", "new", SCRATCH, None),
                ("new_seed2", "new", SCRATCH, 2),
                ("old", "old", PRETRAINED, None),
            ]
        ]
        records = [
            Record(run, "finished", 0, 40, curves={"bbox/AP": ((20, ap / 2), (40, ap))})
            for run, ap in zip(runs, (20.0, 22.0, 30.0), strict=True)
        ]
        with rc_context(REPORT_STYLE):
            figure = FIGURES[own.PLACE](records)
        axes = figure.axes[0]
        assert legend(axes) == {"new: 21.0": VERMILION, "old: 30.0": BLUE}
        assert len(axes.collections) == 1
        assert ends(axes) == {(40, 30.0, BLUE), (40, 21.0, VERMILION)}

    def test_files(self, tmp_path: Path) -> None:
        """Both formats show the lines in their colours; the SVG has the texts."""
        (figure,) = figures_of("digits/figure6", made_up("digits/figure6")).values()
        svg, png = draw({"x": figure}, tmp_path)
        with Image.open(png) as picture:
            pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
        for color in (VERMILION, BLUE):
            assert (pixels == list(bytes.fromhex(color[1:]))).all(1).sum() > 200
            assert f"stroke: {color.lower()}" in svg.read_text()
        for text in (
            "Figure 6 in miniature: R18-FPN with GN",
            "keypoint AP (%)",
            "random initialisation",
            "pre-trained",
        ):
            assert f">{text}</text>" in svg.read_text()


class TestCurves:
    def test_a_branch_begins_at_its_trunk(self) -> None:
        curve = ((120, 1.0), (480, 2.0), (600, 3.0), (720, 4.0))
        branch = Record(find(BRANCH), "finished", 480, 720, curves={"bbox/AP": curve})
        assert own_part(branch, "bbox/AP", {TRUNK}) == curve[1:]
        assert own_part(branch, "bbox/AP", set()) == curve

    @pytest.mark.parametrize(("end", "value"), [(2160, 1.0), (1800, 2.0)])
    def test_the_mean_is_of_what_all_seeds_have(self, end: int, value: float) -> None:
        """Also where a run has ended early."""
        runs = [run for run in of_place("digits/figure1") if run.shown == "scratch, 6x"]
        whole = ((1080, 2.0), (1800, 4.0), (2160, 9.0))
        ends = zip(runs, (whole, ((1080, 4.0), (end, value))), strict=False)
        records = [Record(run, "finished", curves={"bbox/AP": curve}) for run, curve in ends]
        (band,) = bands_of(records, "bbox/AP", lambda run: run.init)
        last = dict(whole)[end]
        assert band.seeds == 2
        assert (band.mean, band.low, band.high) == (
            ((1080, 3.0), (end, (last + value) / 2)), ((1080, 2.0), (end, value)), ((1080, 4.0), (end, last)),
        )  # fmt: skip
