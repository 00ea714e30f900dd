"""Tables of a study from hand-made records, and their formats."""

import csv
import io
from dataclasses import replace
from typing import Any

import pytest

from scratch_det.study.experiments import find, of_place
from scratch_det.study.records import BLOCKED, FAILED, FINISHED, LOSS, RUNNING, WAITING, Record
from scratch_det.study.report.tables import FORMATS, Table, as_latex, as_markdown, tables_of
from scratch_det.study.run import TRAIN
from scratch_det.tables import from_csv

R18 = "{}_mask_rcnn_R_18_FPN_{}x_gn"


def outcome(name: str, ap: float | None = None, state: str = FINISHED, start: int = 0, **fields: Any) -> Record:
    """One whose box AP is ``ap``; a test aug run's is measured with it."""
    key = "bbox_TTA/AP" if name.endswith("test_aug") else "bbox/AP"
    metrics = {} if ap is None else {key: ap}
    return Record(find(name), state, start, find(name).iterations, **{"metrics": metrics, **fields})


def table(experiment: str, *outcomes: Record) -> Table:
    (found,) = tables_of(experiment, outcomes)
    return found


def row(found: Table, label: str) -> dict[str, str]:
    """Cells by column."""
    cells = {cells[0]: cells for cells in found.rows}[label]
    return dict(zip(found.header, cells, strict=True))


class TestTable1:
    def test_paper_ours_difference(self) -> None:
        found = table("table1", outcome("scratch_mask_rcnn_R_50_FPN_6x_gn", 40.94))
        assert found.header == ("", "2x", "3x", "4x", "5x", "6x")
        assert [cells[0] for cells in found.rows] == [
            "R50, scratch",
            "R50, pretrained",
            "R101, scratch",
            "R101, pretrained",
        ]
        assert row(found, "R50, scratch")["6x"] == "41.3 / 40.9 / -0.4"
        assert row(found, "R101, pretrained")["2x"] == "41.8 / - / -"

    def test_no_negative_zero(self) -> None:
        found = table("table1", outcome("scratch_mask_rcnn_R_50_FPN_6x_gn", 41.28))
        assert row(found, "R50, scratch")["6x"] == "41.3 / 41.3 / +0.0"

    def test_seeds(self) -> None:
        name = R18.format("scratch", 6)
        found = table(
            "digits/table1", *(outcome(name + end, ap) for end, ap in (("", 30), ("_seed2", 31), ("_seed3", 35)))
        )
        assert row(found, "R18, scratch")["6x"] == "32.0 ± 2.6"  # sqrt((4 + 1 + 9) / 2)
        assert "sample deviation over 3 seeds" in " ".join(found.notes)

    def test_numbers_of_seeds_that_differ(self) -> None:
        runs = [outcome(R18.format("scratch", 6) + end, ap) for end, ap in (("", 30), ("_seed2", 31), ("_seed3", 35))]
        runs += [outcome(R18.format("scratch", 5) + end, ap) for end, ap in (("", 30), ("_seed2", 32))]
        found = row(table("digits/table1", *runs), "R18, scratch")
        assert (found["5x"], found["6x"]) == ("31.0 ± 1.4 (n = 2)", "32.0 ± 2.6 (n = 3)")

    def test_one_seed_of_three(self) -> None:
        name = R18.format("scratch", 6)
        found = table("digits/table1", outcome(name, 30), outcome(f"{name}_seed2", 40, RUNNING))
        assert row(found, "R18, scratch")["6x"] == "30.0"

    def test_initialisations_are_what_is_compared_on_digits(self) -> None:
        aps = {"scratch": (30, 32), "pretrained": (33, 37)}
        runs = [
            outcome(R18.format(init, 2) + end, ap)
            for init, row in aps.items()
            for end, ap in zip(("", "_seed2"), row, strict=True)
        ]
        found = table("digits/table1", *runs, outcome(R18.format("scratch", 6), 40))
        ours, paper = row(found, "scratch - pretrained"), row(found, "scratch - pretrained, R50 in the paper")
        assert (
            ours["2x"] == "-4.0 ± 12.7"
        )  # of -3 and -5: t of one degree, 12.706, times the deviation over the root of 2
        assert ours["6x"] == "-"
        assert (paper["2x"], paper["6x"]) == ("-3.5", "+0.2")

    def test_the_papers_numbers_are_no_columns_on_digits(self) -> None:
        assert " / " not in FORMATS["csv"](table("digits/table1", outcome(R18.format("scratch", 6), 40)))

    def test_a_spreadsheet_computes_nothing(self) -> None:
        """A text that would be a formula begins with '; numbers, and numbers with a deviation, do not."""
        texts = ["=1+1", "+ cascade", "-2+3+cmd|' /C calc'!A0", "@SUM(1)", "\t=1"]
        numbers = ["-9.0", "+1.4 ± 0.5", "-", "-4.0 ± 2.2 (n = 2)", "-0.5 / - / -", "-1e-05"]
        rows = tuple((text,) for text in (*texts, *numbers))
        written = list(csv.reader(io.StringIO(FORMATS["csv"](Table("", "", ("a",), rows)))))
        assert written == [["a"], *([f"'{text}"] for text in texts), *([number] for number in numbers)]
        assert [from_csv(cell) for (cell,) in written[1:]] == [*texts, *numbers]

    def test_nothing_is_known(self) -> None:
        assert set(table("digits/table1").rows[0][1:]) == {"-"}


class TestTables2And3:
    def test_table2(self) -> None:
        metrics = {"bbox/AP": 40.0, "segm/AP75": 33.0}
        found = table(
            "digits/table2",
            outcome(R18.format("scratch", 6), metrics=metrics),
            outcome(R18.format("pretrained", 6), 39),
        )
        assert found.header == ("", "box AP", "box AP50", "box AP75", "mask AP", "mask AP50", "mask AP75")
        assert list(row(found, "R18, scratch").values())[1:] == ["40.0", "-", "-", "-", "-", "33.0"]
        assert row(found, "scratch - pretrained")["box AP"] == "+1.0"
        assert row(found, "scratch - pretrained, R50 in the paper")["box AP75"] == "+1.0"  # 45.6 - 44.6

    def test_table3(self) -> None:
        name = "scratch_cascade_mask_rcnn_X_152_8x32d_FPN_9x_gn_train_aug_test_aug"
        found = table("table3", outcome(name, 50.4))
        assert row(found, "X152, scratch, train aug, cascade, test aug")["box AP"] == "50.9 / 50.4 / -0.5"
        pretrained = row(found, "X152, pretrained, train aug, cascade, test aug")
        assert (pretrained["box AP"], pretrained["mask AP"], pretrained["box AP50"]) == (
            "50.3 / - / -",
            "42.5 / - / -",
            "-",
        )
        assert not any("ImageNet" in cells[0] for cells in found.rows)


class TestOtherPlaces:
    def test_epochs_of_a_row(self) -> None:
        runs = [outcome(R18.format(init, 6), metrics={"bbox/AP": 30.0, "epochs": epochs})
                for init, epochs in (("scratch", 1080.0), ("pretrained", 72.5))]  # fmt: skip
        found = table("digits/table2", *runs)
        assert [row(found, f"R18, {init}")["epochs"] for init in ("scratch", "pretrained")] == ["1,080", "72"]
        assert "6x, 72 epochs" in table("digits/table1", runs[1]).header

    @pytest.mark.parametrize("place", ["digits/freezing", "digits/small_data"])
    def test_seeds_share_a_row(self, place: str) -> None:
        trained = {run.repeats for run in of_place(place) if run.kind == TRAIN}
        assert len(table(place).rows) == len(trained)

    def test_columns_are_what_the_runs_have(self) -> None:
        (found,) = tables_of("vgg", [])
        assert found.header == ("", "box AP")
        run = outcome("pretrain_digits_R_18_gn", metrics={"classification/top1": 98.3, "classification/top5": 99.9})
        assert row(table("digits/pretraining", run), "classification, GN") == {
            "": "classification, GN",
            "top-1": "98.3",
            "top-5": "99.9",
        }

    def test_voc(self) -> None:
        run = outcome("scratch_faster_rcnn_R_101_FPN_144k_gn", metrics={"bbox/AP50": 77.0})
        assert row(table("voc", run), "PASCAL VOC, scratch, 144k")["box AP50"] == "77.6 / 77.0 / -0.6"

    def test_equal_labels_are_told_apart(self) -> None:
        labels = [cells[0] for cells in table("digits/norms").rows]
        assert len(set(labels)) == len(of_place("digits/norms"))
        assert {"GN", "SyncBN", "none"} <= set(labels)

    def test_every_place_has_one(self) -> None:
        places = {place for run in [*of_place("paper"), *of_place("digits")] for place in run.places}
        for place in sorted(places - {"digits/claims"}):  # which says nothing before runs have finished
            (found,) = tables_of(place, [])
            assert {len(cells) for cells in found.rows} == {len(found.header)}, place

    @pytest.mark.parametrize("place", ["digits/small_data", "digits/figure7", "digits/figure8"])
    def test_what_a_search_chose(self, place: str) -> None:
        search = outcome("search_tenth", found="SOLVER.BASE_LR 0.04")
        assert "search_tenth chose SOLVER.BASE_LR 0.04." in table(place, search).notes

    def test_one_run(self) -> None:
        name = R18.format("scratch", 2)
        assert row(table(name, outcome(name, 20.0)), "scratch, 2x")["box AP"] == "20.0"

    def test_a_whole_has_the_places_of_which_something_is_known(self) -> None:
        found = tables_of("digits", [outcome(R18.format("scratch", 2), 20), outcome("search_third", state=WAITING)])
        assert [one.name for one in found] == ["table1"]
        assert tables_of("paper", []) == []


class TestSharing:
    def trunk_and_branch(self, start: int) -> tuple[Record, Record]:
        return outcome(R18.format("scratch", 6), 30), outcome(R18.format("scratch", 5), 29, start=start)

    def test_trunk_and_branch_are_marked(self) -> None:
        found = table("digits/table1", *self.trunk_and_branch(1560), outcome(R18.format("pretrained", 6), 31))
        cells = row(found, "R18, scratch")
        assert (cells["6x"], cells["5x"]) == ("30.0†", "29.0†")
        assert row(found, "R18, pretrained")["6x"] == "31.0"
        assert any("not independent" in note for note in found.notes)

    def test_trained_apart_they_are_not(self) -> None:
        found = table("digits/table1", *self.trunk_and_branch(0))
        assert "†" not in as_markdown(found)

    def test_a_trunk_alone_in_its_table_is_not(self) -> None:
        assert "†" not in as_markdown(table("digits/table2", *self.trunk_and_branch(1560)))

    def test_test_aug_rests_on_what_it_evaluates(self) -> None:
        plain, cascade = (f"scratch_{kind}mask_rcnn_R_18_FPN_9x_gn_train_aug" for kind in ("", "cascade_"))
        found = table(
            "digits/table3", outcome(plain, 30), outcome(f"{cascade}_test_aug", 33), outcome(cascade, 32, start=2160)
        )
        cells = [cells[1] for cells in found.rows if "train aug" in cells[0]]
        assert cells == ["30.0†", "32.0†", "33.0†"]


class TestUnfinished:
    def test_how_far_it_is(self) -> None:
        curves = {"bbox/AP": ((60, 1.0), (120, 4.26))}
        found = table("digits/table1", outcome(R18.format("scratch", 6), 4.26, RUNNING, curves=curves))
        assert row(found, "R18, scratch")["6x"] == "(4.3 at 120 of 2,160)"
        assert row(found, "scratch - pretrained")["6x"] == "-"

    def test_failed(self) -> None:
        name = R18.format("scratch", 6)
        found = table("digits/table1", outcome(name, state=FAILED, error="loss is NaN | in\niteration 7"))
        assert row(found, "R18, scratch")["6x"] == "failed"
        assert rf"{name} failed: loss is NaN \| in iteration 7" in as_markdown(found).splitlines()

    def test_the_first_seed_says_how_far_they_are(self) -> None:
        name, points = R18.format("scratch", 6), ((60, 1.0), (120, 2.0))
        runs = [
            outcome(name + end, None, RUNNING, curves={"bbox/AP": curve})
            for end, curve in (("", points), ("_seed2", points[:1]))
        ]
        assert row(table("digits/table1", *runs), "R18, scratch")["6x"] == "(2.0 at 120 of 2,160)"

    def test_blocked(self) -> None:
        name = R18.format("scratch", 5)
        found = table("digits/table1", outcome(name, state=BLOCKED, error="needs x, which failed"))
        assert found.notes[-1] == f"{name} blocked: needs x, which failed"
        assert row(found, "R18, scratch")["5x"] == "-"
        assert table("digits/table1", outcome(name, state=FAILED)).notes[-1] == f"{name} failed: no reason was left"

    def test_nan_is_no_number(self) -> None:
        assert row(table("digits/table1", outcome(R18.format("scratch", 6), float("nan"))), "R18, scratch")["6x"] == "-"


class TestControl:
    def pair(self, **fields: Any) -> list[Record]:
        name, curves = R18.format("scratch", 3), {LOSS: ((20, 2.5), (40, 2.25))}
        return [
            outcome(name, 20.12341, curves=curves),
            replace(outcome(f"{name}_unshared", 20.12342, curves=curves), **fields),
        ]

    def test_equal_as_stored(self) -> None:
        found = table("digits/control", *self.pair())
        assert found.rows == (
            ("bbox/AP", "20.1234", "20.1234", "equal"),
            ("points of the curves", "2", "2", "2 equal"),
            ("final weights, SHA-256", "-", "-", "-"),
        )
        assert found.notes[0].startswith("All numbers are equal")

    @pytest.mark.parametrize(
        "other", [{"metrics": {"bbox/AP": 20.1235}}, {"curves": {LOSS: ((20, 2.5), (40, 2.2501))}}]
    )
    def test_not_equal(self, other: dict[str, Any]) -> None:
        found = table("digits/control", *self.pair(**other))
        assert found.notes[0].startswith("All numbers are NOT equal")

    @pytest.mark.parametrize(("ours", "verdict"), [("b" * 64, "equal"), ("a" * 64, "not equal"), ("", "-")])
    def test_weights(self, ours: str, verdict: str) -> None:
        branch, apart = self.pair(weights_sha256="b" * 64)
        found = table("digits/control", replace(branch, weights_sha256=ours), apart)
        assert found.rows[-1] == ("final weights, SHA-256", ours[:12] or "-", "b" * 12, verdict)

    def test_not_finished(self) -> None:
        assert table("digits/control", self.pair()[0]).rows == (("bbox/AP", "20.1", "-", "not finished"),)


class TestFormats:
    NASTY = Table("x", "a & b", ("", "50%"), (("x_1 #2 {a} ~ ^ \\ $", "1.0 ± 0.2†"),), ("<!-- end -->\n| a* [b](c)",))

    def test_latex(self) -> None:
        text = as_latex(self.NASTY)
        assert r"\caption{a \& b}" in text
        assert r" & 50\% \\" in text
        first = r"x\_1 \#2 \{a\} \textasciitilde{} \textasciicircum{} \textbackslash{} \$"
        assert rf"{first} & 1.0 $\pm$ 0.2$^{{\dagger}}$ \\" in text
        assert r"\textless{}!-{}- end -{}-\textgreater{} \textbar{} a* {[}b{]}(c)" in text
        assert text.isascii()

    def test_markdown(self) -> None:
        text = as_markdown(self.NASTY)
        assert r"&lt;!-- end --&gt; \| a\* \[b\](c)" in text
        assert text.startswith("**a &amp; b**\n\n")

    def test_csv(self) -> None:
        assert FORMATS["csv"](Table("x", "", ("", "a"), (("b, c", "1"),))) == ',a\n"b, c",1\n'

    def test_control_characters_are_left_out(self) -> None:
        assert "\x1b" not in as_latex(replace(self.NASTY, notes=("\x1b[31mred",)))
