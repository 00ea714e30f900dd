"""The table and the figure of a matrix of initialisations: differences, intervals and costs, worked out by hand."""

import math
from collections.abc import Mapping
from pathlib import Path

import pytest

from scratch_det.evaluation.metrics import VERMILION
from scratch_det.study import own
from scratch_det.study.records import FINISHED, READY, Record
from scratch_det.study.report.figures import figures_of
from scratch_det.study.report.page import curves
from scratch_det.study.report.seeds import difference, headlines, interval
from scratch_det.study.report.tables import Table, tables_of
from scratch_det.study.run import PRETRAIN

MATRIX = """
columns: {all: {recipe: scratch.yaml, lengths: [1, 2, 4], per_x: 9, seeds: [1, 2]}}
random: {}
known: {weights: a.pth, epochs: 1, images: 360, views: {2: 5, 10: 1}}
unknown: {weights: b.pth}
ours: {pretraining: crops}
crops: {recipe: crops.yaml, views: {10: 4}}
"""
# An iteration sees 2 images of 10 x 20 px, 1x 3,600 px; "known" was pre-trained with 360 x (5 x 2 x 2 + 10 x 10).
DETECTOR = """
INPUT: {MIN_SIZE_TRAIN: [10], MAX_SIZE_TRAIN: 20}
SOLVER: {IMS_PER_BATCH: 2}
MODEL: {BACKBONE: {FREEZE_AT: 0}}
"""
CROPS = "SOLVER: {IMS_PER_BATCH: 3, MAX_ITER: 3}\n"  # 9 images in 4 views of 10 x 10 px: 3,600
BOX = {"random_all_1x": 10.0, "random_all_2x": 20.0, "random_all_4x": 30.0, "known_all_1x": 25.0, "ours_all_1x": 15.0,
       "unknown_all_1x": 11.0}  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> str:
    for name, text in (("matrix", MATRIX), ("scratch", DETECTOR), ("crops", CROPS)):
        (tmp_path / f"{name}.yaml").write_text(text)
    return str(tmp_path / "matrix.yaml")


def records(file: str, box: Mapping[str, float] = BOX) -> list[Record]:
    """Those in ``box`` finished, seed 2 with one AP more; the others not begun."""
    found = []
    for run in own.runs(Path(file)):
        name = run.name.partition("_seed")[0]
        value = box.get(name, math.nan) + bool(run.seed)
        curves = {"bbox/AP": ((run.iterations // 2, value / 2), (run.iterations, value))}
        is_done = name in box or run.kind == PRETRAIN
        found.append(Record(run, FINISHED if is_done else READY, metrics={"bbox/AP": value} if name in box else {},
                            curves=curves if name in box else {}))  # fmt: skip
    return found


def rows(table: Table) -> dict[str, dict[str, str]]:
    return {row[0]: dict(zip(table.header[1:], row[1:], strict=True)) for row in table.rows}


def test_the_table(file: str) -> None:
    table, pretraining = tables_of(file, records(file))
    found = rows(table)
    assert [*found][:5] == ["random, all, 1x", "known, all, 1x", "unknown, all, 1x", "ours, all, 1x", "random, all, 2x"]
    half = 12.706 / 2  # t of one degree, times the deviation 0.7071 over the root of 2
    assert found["random, all, 1x"] == {"box AP": f"10.5 ± {half:.1f}", "n": "2",
                                        "box AP - random": "", "box AP - random, longest": "-20.0 ± 0.0",
                                        "pixels": "3.6 k", "random at that cost": ""}  # fmt: skip
    assert found["random, all, 4x"]["box AP - random, longest"] == ""
    one = found["known, all, 1x"]
    assert (one["box AP - random"], one["pixels"]) == ("+15.0 ± 0.0", "43.2 k + 3.6 k")
    assert one["box AP - random, longest"] == "-5.0 ± 0.0"
    assert one["random at that cost"] == "longer than any"
    assert found["ours, all, 1x"]["pixels"] == "3.6 k + 3.6 k"
    assert found["ours, all, 1x"]["random at that cost"] == "2x: -5.0 ± 0.0"
    assert found["unknown, all, 1x"]["random at that cost"] == "not known"
    assert found["known, all, 4x"]["box AP"] == found["known, all, 4x"]["box AP - random"] == "-"
    assert [*rows(pretraining)] == ["crops"]
    assert "Student's t" in table.notes[0]


def test_claims(file: str) -> None:
    """A row each, also of what has not run; they are no pairs for the headline, which names the random row."""
    text = "claims:\n  weights - longer: known_all_1x - random_all_4x\n  not run: known_all_4x\n"
    Path(file).write_text(f"{MATRIX}{text}")
    found = records(file)
    table = next(table for table in tables_of(file, found) if table.name == own.CLAIMS)
    assert table.rows == (("weights - longer", "-5.0 ± 0.0", "2", "yes"), ("not run", "-", "0", ""))
    assert len(headlines(found)) == 3
    assert headlines(found)[0].endswith(
        "In box AP, random minus known is -15.0 ± 0.0 at 1x (95 % intervals, 2 pairs of equal seeds)."
    )


def test_another_random_row_is_compared_with_the_first(file: str) -> None:
    Path(file).write_text(MATRIX.replace("crops: {", "other: {changes: {SOLVER.BASE_LR: 0.004}}\ncrops: {"))
    box = BOX | {"other_all_1x": 12.0, "other_all_4x": 31.0}
    found = rows(tables_of(file, records(file, box))[0])
    one = found["other, all, 1x"]
    assert (one["box AP - random"], one["box AP - random, longest"]) == ("+2.0 ± 0.0", "-18.0 ± 0.0")
    assert found["random, all, 1x"]["box AP - random, longest"] == "-20.0 ± 0.0"
    assert found["other, all, 4x"]["box AP - random"] == "+1.0 ± 0.0"
    labels = [text.get_text() for text in figures_of(file, records(file, box))["inits"].legends[0].get_texts()]
    assert labels[-1] == "other"
    colours = {line["family"]: line["colour"] for line in curves(records(file, box))["Initialisations"]}
    assert colours["random"] == VERMILION
    assert not any("other" in sentence for sentence in headlines(records(file, box)))  # it is random too
    assert len({*colours.values()}) == len(colours) == 5


def test_a_column_without_the_first_random_row(file: str) -> None:
    """The other random row is drawn as itself, not as random initialisation."""
    both = "random: {columns: [all]}\nother: {changes: {SOLVER.BASE_LR: 0.004}}\n"
    Path(file).write_text(f"columns: {{all: {{recipe: scratch.yaml}}, few: {{recipe: scratch.yaml}}}}\n{both}")
    figure = figures_of(file, records(file, {"random_all": 10.0, "other_all": 12.0, "other_few": 8.0}))["inits"]
    assert VERMILION in {line.get_color() for line in figure.axes[0].lines}
    assert VERMILION not in {line.get_color() for line in figure.axes[1].lines}


def test_pairs_have_the_seed_in_common(file: str) -> None:
    """The first of a row's seeds is not in the run's name. Here 2 and 3 are shared: 20 - 11 and 21 - 11."""
    rows_ = "random: {seeds: [1, 2, 3]}\nknown: {weights: a.pth, seeds: [2, 3, 4]}\n"
    Path(file).write_text(f"columns: {{all: {{recipe: scratch.yaml}}}}\n{rows_}")
    (table,) = tables_of(file, records(file, {"random_all": 10.0, "known_all": 20.0}))
    assert rows(table)["known, all"]["box AP - random"] == "+9.5 ± 6.4"


def test_intervals() -> None:
    assert interval([]) == "-"
    assert interval([1.0]) == "1.0"
    assert interval([1.0, 2.0, 3.0]) == "2.0 ± 2.5"  # 4.303 / the root of 3
    assert str(difference({None: 1.0, 2: 4.0}, {None: 2.0, 2: 3.0, 3: 9.0})) == "+0.0 ± 12.7"  # of -1 and +1
    assert str(difference({None: 1.0}, {})) == "-"
    assert str(difference({None: 1.0}, {None: 2.5})) == "-1.5"
    # Welch's: variances 2 / 2 and 2 / 2, so two degrees of freedom and 4.303 x the root of 2
    assert str(difference({1: 1.0, 2: 3.0}, {3: 11.0, 4: 13.0})) == "-10.0 ± 6.1"


def test_the_figure(file: str) -> None:
    figures = figures_of(file, records(file))
    (axes,) = figures["inits"].axes
    labels = [text.get_text() for text in figures["inits"].legends[0].get_texts()]
    assert labels == ["random initialisation", "known", "unknown", "ours"]
    colours = {line.get_color() for line in axes.lines}
    assert VERMILION in colours
    assert len(colours) == 4
    assert figures_of(file, records(file, {})) == {}
