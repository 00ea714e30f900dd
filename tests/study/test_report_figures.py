"""A study's figures: complete for what there is, and the same bytes again."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from scratch_det.study.experiments import find, of_place
from scratch_det.study.job import jobs_of
from scratch_det.study.records import LOSS, Record
from scratch_det.study.report.figures import as_svg, draw, figures_of, mean_of, own_part, thin
from scratch_det.study.run import EVALUATE, TRAIN

TRUNK, BRANCH = "scratch_keypoint_rcnn_R_18_FPN_3x_gn", "scratch_keypoint_rcnn_R_18_FPN_2x_gn"


def made_up(place: str) -> list[Record]:
    """Every run of ``place`` finished, AP rising evenly to 40 and the loss falling."""
    outcomes = []
    for job in jobs_of(of_place(place)):
        run = job.run
        if run.kind == EVALUATE:
            metrics = {"bbox_TTA/AP": 42.0, "segm_TTA/AP": 37.0, "bbox/AP": 40.0, "segm/AP": 35.0}
            outcomes.append(Record(run, "finished", 0, 0, metrics))
            continue
        points = [run.iterations * part // 10 for part in range(1, 11)]
        ap = tuple((point, 40 * point / run.iterations) for point in points)
        names = ("bbox/AP", "segm/AP", "keypoints/AP") if run.kind == TRAIN else ()
        loss = {LOSS: tuple((point, 2 - point / run.iterations) for point in points)}
        curves = dict.fromkeys(names, ap) | loss
        outcomes.append(Record(run, "finished", job.start, run.iterations, dict.fromkeys(names, 40.0), curves))
    return outcomes


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
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["random initialisation, mean of 2 seeds"]

    def test_without_a_data_set(self, datasets_root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Figure 2 has its three panels, and the same bytes, wherever it is drawn."""
        found = figures_of("digits/figure1", made_up("digits/figure1"))
        assert [axes.get_title() for axes in found["figure2"].axes] == ["images", "instances", "pixels"]
        monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
        again = figures_of("digits/figure1", made_up("digits/figure1"))
        assert as_svg(found["figure2"]) == as_svg(again["figure2"])

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
        outcomes = [one for one in made_up("digits/figure1") if one.run.shown == "scratch, 6x"]
        begun = {"bbox/AP": outcomes[2].curves["bbox/AP"][:1]}
        outcomes[2] = replace(outcomes[2], state="running", curves=begun, metrics={})
        (axes, *_) = figures_of("digits/figure1", outcomes)["figure1"].axes
        thick = [line for line in axes.lines if line.get_linewidth() == 1.6]
        assert [len(line.get_xdata()) for line in thick] == [10]
        assert axes.get_legend().get_texts()[0].get_text() == "random initialisation, mean of 2 seeds"

    def test_an_unfinished_run_is_no_bar(self) -> None:
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
        with Image.open(first[1]) as picture:
            assert picture.width == 1400


class TestCurves:
    def test_a_branch_begins_at_its_trunk(self) -> None:
        curve = ((60, 1.0), (240, 2.0), (300, 3.0), (360, 4.0))
        branch = Record(find(BRANCH), "finished", 240, 360, curves={"bbox/AP": curve})
        assert own_part(branch, "bbox/AP", {TRUNK}) == curve[1:]
        assert own_part(branch, "bbox/AP", set()) == curve

    def test_mean_of_what_all_have(self) -> None:
        assert mean_of([((1, 2.0), (2, 4.0), (3, 9.0)), ((1, 4.0), (3, 1.0))]) == ((1, 3.0), (3, 5.0))

    def test_thin(self) -> None:
        curve = tuple((point, float(point % 5)) for point in range(1000))
        assert len(thin(curve, 200)) == 200
        assert {value for _, value in thin(curve, 200)} == {2.0}
        assert thin(curve, 1000) == curve
