"""The sentence that a study's page begins with: what it says, and what it does not say where an interval has 0."""

import math
from collections.abc import Sequence

import pytest

from scratch_det.evaluation.metrics import PRETRAINED, SCRATCH
from scratch_det.study import own
from scratch_det.study.experiments import find
from scratch_det.study.records import FAILED, FINISHED, Record
from scratch_det.study.report.page import Folders, study_page
from scratch_det.study.report.seeds import Difference, headlines
from scratch_det.study.report.tables import tables_of
from scratch_det.study.run import Run

NAME = "{}_mask_rcnn_R_18_FPN_{}x_gn{}"


def pairs(gaps: dict[int, Sequence[float]]) -> list[Record]:
    """Of 30 AP with pre-training, and that with the ``gaps`` of the seeds from scratch, by length."""
    aps = [(SCRATCH, k, seed, 30 + gap) for k, row in gaps.items() for seed, gap in zip(("", 2, 3), row, strict=False)]
    aps += [(PRETRAINED, k, seed, 30.0) for _, k, seed, _ in aps]
    return [Record(find(NAME.format(init, k, seed and f"_seed{seed}")), FINISHED, metrics={"bbox/AP": ap})
            for init, k, seed, ap in aps]  # fmt: skip


BEHIND, AHEAD, LEVEL, BELOW = (-5, -5.2, -4.8), (5, 5.2, 4.8), (3, 0.1, 0.2), (-3, -0.1, -0.2)
TAIL = "(95 % intervals, 3 pairs of equal seeds)."


@pytest.mark.parametrize(
    ("gaps", "said"),
    [
        (
            {2: BEHIND, 4: LEVEL, 6: AHEAD},
            "R18: scratch catches up with pre-trained at 4x and is ahead at 6x. In box AP, scratch minus pre-trained "
            f"is -5.0 ± 0.5 at 2x, +1.1 ± 4.1 at 4x, +5.0 ± 0.5 at 6x {TAIL}",
        ),
        (
            {2: BEHIND, 6: LEVEL},
            "R18: scratch catches up with pre-trained at 6x. In box AP, scratch minus pre-trained is "
            f"-5.0 ± 0.5 at 2x, +1.1 ± 4.1 at 6x {TAIL}",
        ),
        (
            {2: BEHIND, 5: LEVEL, 6: BEHIND},
            "R18: scratch does not catch up with pre-trained by 6x. In box AP, scratch minus pre-trained is "
            f"-5.0 ± 0.5 at 2x, -5.0 ± 0.5 at 6x {TAIL}",
        ),
        (
            {2: BEHIND, 6: BELOW},
            "R18: scratch and pre-trained cannot be told apart at 6x. In box AP, scratch minus pre-trained is "
            f"-5.0 ± 0.5 at 2x, -1.1 ± 4.1 at 6x {TAIL}",
        ),
        (
            {6: AHEAD},
            "R18: scratch is ahead of pre-trained at 6x. In box AP, scratch minus pre-trained is "
            f"+5.0 ± 0.5 at 6x {TAIL}",
        ),
        (
            {2: (-3,), 6: (1,)},
            "R18: In box AP, scratch minus pre-trained is -3.0 at 2x, +1.0 at 6x. "
            "One seed, so no interval: neither is said to be ahead.",
        ),
    ],
    ids=["ahead in the end", "level", "behind", "below, not measurably", "always ahead", "one seed"],
)
def test_table_1(gaps: dict[int, Sequence[float]], said: str) -> None:
    assert headlines(pairs(gaps)) == [said]


def test_without_a_pair() -> None:
    """Of other lengths, of one initialisation, not finished, and of several recipes."""
    records = pairs({2: AHEAD, 6: AHEAD})
    assert headlines([one for one in records if (one.run.init == SCRATCH) == (one.run.k == 6)]) == []
    assert headlines([one for one in records if one.run.init == SCRATCH]) == []
    assert headlines([Record(one.run, "running", metrics=one.metrics) for one in records]) == []


def test_own_runs() -> None:
    """Two recipes are a pair if they are as long; with a third one nobody knows which is meant."""
    runs = [Run(name, (own.PLACE,), name, init, 0, length=40)
            for name, init in (("ours", SCRATCH), ("theirs", PRETRAINED), ("more", SCRATCH))]  # fmt: skip
    records = [Record(run, FINISHED, metrics={"bbox/AP": 30.0}) for run in runs]
    (said,) = headlines(records[:2])
    assert said.startswith("In box AP, scratch minus pre-trained is +0.0 at 40 iterations. One seed")
    assert headlines(records) == []


@pytest.mark.parametrize(
    ("value", "half", "side"), [(1, 0.5, 1), (-1, 0.5, -1), (1, 2, 0), (-1, 2, 0), (1, math.nan, 0)]
)
def test_sides(value: float, half: float, side: int) -> None:
    assert Difference(value, half).side == side


def test_an_expected_divergence_is_no_failure() -> None:
    """Only that of the runs that say so, and only with a loss that is not finite."""
    says = "exit code 2: the loss is not finite at iteration 3"
    none, bn = (find(f"scratch_mask_rcnn_R_18_FPN_3x_{norm}") for norm in ("none", "bn"))
    records = [Record(none, FAILED, error=says), Record(bn, FAILED, error=says)]
    page = study_page("x", [], records, {}, Folders())
    assert "1 diverged as expected, 1 failed" in page
    sections = {name: page.partition(f'<section id="{name}">')[2].partition("</section>")[0]
                for name in ("failed", "diverged-as-expected")}  # fmt: skip
    assert [bn.name in text for text in sections.values()] == [True, False]
    assert [none.name in text for text in sections.values()] == [False, True]
    cells = {row[0]: row[1] for row in tables_of("digits/norms", records)[0].rows}
    assert (cells["none"], cells["BN, 2 images a process"]) == ("diverged", "failed")
    assert Record(none, FAILED, error="exit code 1: no space left").status == FAILED
