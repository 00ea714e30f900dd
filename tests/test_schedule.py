"""The learning-rate schedules, against numbers written out by hand."""

import pytest

from scratch_det.schedule import Schedule, kx_schedule, lr_at, shared_prefix

PAPER = {"base_lr": 0.02, "gamma": 0.1, "warmup_iters": 500, "warmup_factor": 1 / 3}
PAPER_SCHEDULES = {
    1: Schedule(90_000, (60_000, 80_000)),
    2: Schedule(180_000, (120_000, 160_000)),
    3: Schedule(270_000, (210_000, 250_000)),
    4: Schedule(360_000, (300_000, 340_000)),
    5: Schedule(450_000, (390_000, 430_000)),
    6: Schedule(540_000, (480_000, 520_000)),
    9: Schedule(810_000, (750_000, 790_000)),
}


@pytest.mark.parametrize(("k", "schedule"), PAPER_SCHEDULES.items())
def test_kx_is_the_papers(k: int, schedule: Schedule) -> None:
    assert kx_schedule(k) == schedule


@pytest.mark.parametrize(
    ("iteration", "expected"),
    [
        (0, 0.0066666667),
        (250, 0.0133333333),
        (499, 0.0199733333),
        (500, 0.02),
        (119_999, 0.02),
        (120_000, 0.002),
        (159_999, 0.002),
        (160_000, 0.0002),
        (179_999, 0.0002),
    ],
)
def test_learning_rates_of_2x(iteration: int, expected: float) -> None:
    assert lr_at(iteration, steps=(120_000, 160_000), **PAPER) == pytest.approx(expected, rel=1e-8)


def test_constant_warmup() -> None:
    rates = [lr_at(i, steps=(), **PAPER, warmup_method="constant") for i in (0, 499, 500)]
    assert rates == pytest.approx([0.02 / 3, 0.02 / 3, 0.02])


def test_warmup_and_drop_multiply() -> None:
    rate = lr_at(5, base_lr=1.0, steps=(5,), gamma=0.1, warmup_iters=10, warmup_factor=0.0)
    assert rate == pytest.approx(0.5 * 0.1)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (kx_schedule(2), kx_schedule(6), 120_000),
        (kx_schedule(6), kx_schedule(5), 390_000),
        (kx_schedule(3), kx_schedule(3), 270_000),
        (Schedule(100, (50,)), Schedule(100, (50, 80)), 80),
        (Schedule(100, ()), Schedule(60, ()), 60),
    ],
)
def test_shared_prefix(a: Schedule, b: Schedule, expected: int) -> None:
    assert shared_prefix(a, b) == shared_prefix(b, a) == expected


def test_rates_are_bitwise_equal_on_the_prefix_and_differ_right_after() -> None:
    short, long = kx_schedule(2), kx_schedule(6)
    prefix = shared_prefix(short, long)
    for iteration in [*range(600), *range(600, prefix, 997), prefix - 1]:
        assert lr_at(iteration, steps=short.steps, **PAPER) == lr_at(iteration, steps=long.steps, **PAPER)
    assert lr_at(prefix, steps=short.steps, **PAPER) != lr_at(prefix, steps=long.steps, **PAPER)


@pytest.mark.parametrize("k", [0, -1])
def test_kx_refuses_nonsense(k: int) -> None:
    with pytest.raises(ValueError, match="k >= 1"):
        kx_schedule(k)


@pytest.mark.parametrize(("max_iter", "steps"), [(0, ()), (10, (10,)), (10, (5, 5)), (10, (6, 5)), (10, (0,))])
def test_schedule_refuses_nonsense(max_iter: int, steps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="steps"):
        Schedule(max_iter, steps)


@pytest.mark.parametrize(
    "wrong",
    [
        {"iteration": -1},
        {"base_lr": 0.0},
        {"gamma": 0.0},
        {"steps": (8, 4)},
        {"warmup_iters": -1},
        {"warmup_factor": 2.0},
        {"warmup_method": "cosine"},
    ],
)
def test_lr_at_refuses_nonsense(wrong: dict[str, object]) -> None:
    arguments: dict[str, object] = {"iteration": 3, "steps": (4, 8), **PAPER, **wrong}
    with pytest.raises(ValueError, match=r"must|needs"):
        lr_at(**arguments)  # type: ignore[arg-type]
