"""What the text of the miniature says in numbers."""

from dataclasses import replace

import pytest

from scratch_det.study.digits import CLAIMS, runs
from scratch_det.study.experiments import of_place
from scratch_det.study.records import FINISHED, INTERRUPTED, Record
from scratch_det.study.report.seeds import stated
from scratch_det.study.run import Claim, Run

ONE = Run("one", ("p",), "one", "scratch", k=2)
OTHER = replace(ONE, name="other")


def records(run: Run, *scores: float) -> list[Record]:
    """Of seeds 1 (the recipe's), 2, 3, ..."""
    repeated = [run, *(replace(run, name=f"{run.name}_seed{n}", recipe=run.name, seed=n) for n in range(2, 9))]
    return [Record(one, FINISHED, metrics={"bbox/AP": score}) for one, score in zip(repeated, scores, strict=False)]


CLAIM = Claim("one - other", ((1, "one", "bbox/AP"), (-1, "other", "bbox/AP")))


@pytest.mark.parametrize(
    ("ours", "theirs", "row"),
    [
        # differences 1, 2, 3: mean 2, deviation 1; t of two degrees of freedom at 97.5 % is 4.303
        ((11, 22, 33), (10, 20, 30), ("+2.0 ± 2.5", "3", "no")),
        ((12, 22.1, 32.2), (10, 20, 30), ("+2.1 ± 0.2", "3", "yes")),
        ((11, 22), (10,), ("+1.0", "1", "")),  # one seed of both
    ],
)
def test_estimate_and_interval(ours: tuple[float, ...], theirs: tuple[float, ...], row: tuple[str, ...]) -> None:
    assert stated([CLAIM], [*records(ONE, *ours), *records(OTHER, *theirs)])[1] == (("one - other", *row),)


def test_nothing_is_said_before_the_runs() -> None:
    assert stated([CLAIM], records(ONE, 11))[1] == (("one - other", "-", "0", ""),)


def test_a_run_that_is_not_finished_does_not_count() -> None:
    first, second = records(ONE, 1, 2)
    unfinished = replace(second, state=INTERRUPTED)
    assert stated([CLAIM], [first, unfinished, *records(OTHER, 0, 0)])[1][0][2] == "1"


def test_claims_are_about_runs_of_the_miniature() -> None:
    """In the place that the table is of; those of the plan's questions repeated with other seeds."""
    placed = {run.name for run in of_place("digits/claims")}
    for claim in CLAIMS:
        for _, name, _ in claim.terms:
            assert name in placed
            assert sum(run.repeats == name for run in runs()) >= (3 if claim.text[0].isdecimal() else 1), name
    assert len({claim.text for claim in CLAIMS}) == len(CLAIMS)
