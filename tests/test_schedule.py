"""The learning-rate schedules, against numbers written out by hand."""

from dataclasses import replace

import pytest

from scratch_det.config import get_cfg, set_key
from scratch_det.config.schedule import (
    BatchSettings,
    Schedule,
    cosine_lr_at,
    kx_schedule,
    learning_rate,
    learning_rate_line,
    lr_at,
    rescale,
    shared_prefix,
)

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

PAPER_3X = BatchSettings(
    batch=16,
    base_lr=0.02,
    max_iter=270_000,
    steps=(210_000, 250_000),
    warmup_iters=500,
    eval_period=10_000,
    checkpoint_period=5_000,
)


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


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (2, BatchSettings(2, 0.0025, 2_160_000, (1_680_000, 2_000_000), 4_000, 80_000, 40_000)),
        (32, BatchSettings(32, 0.04, 135_000, (105_000, 125_000), 250, 5_000, 2_500)),
        (64, BatchSettings(64, 0.08, 67_500, (52_500, 62_500), 125, 2_500, 1_250)),
        (12, BatchSettings(12, 0.015, 360_000, (280_000, 333_333), 667, 13_333, 6_667)),
    ],
)
def test_rescale(batch: int, expected: BatchSettings) -> None:
    found = rescale(PAPER_3X, batch)
    assert found.base_lr == pytest.approx(expected.base_lr, rel=1e-12)
    assert replace(found, base_lr=expected.base_lr) == expected


def test_rescale_to_the_same_batch_changes_nothing() -> None:
    assert rescale(PAPER_3X, 16) == PAPER_3X


@pytest.mark.parametrize("batch", [1, 2, 4, 8])
def test_rescale_there_and_back(batch: int) -> None:
    assert rescale(rescale(PAPER_3X, batch), 16) == PAPER_3X


def test_rescaled_periods_are_never_turned_off_nor_on() -> None:
    found = rescale(replace(PAPER_3X, eval_period=0, checkpoint_period=3), 1024)
    assert (found.eval_period, found.checkpoint_period) == (0, 1)


@pytest.mark.parametrize(
    ("max_iter", "steps", "expected"),
    [
        (100, (40, 41), r"strictly increasing, not \(10, 10\)"),
        (100, (1,), r"positive and strictly increasing, not \(0,\)"),
        (100, (99,), r"steps \(25,\) must lie inside a run of 25"),
        (1, (), "inside a run of 0 >= 1"),
    ],
)
def test_rescale_refuses_drops_that_fall_together(max_iter: int, steps: tuple[int, ...], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        rescale(replace(PAPER_3X, max_iter=max_iter, steps=steps), 64)


@pytest.mark.parametrize(("old", "new"), [(0, 2), (16, 0), (16, -2)])
def test_rescale_refuses_empty_batches(old: int, new: int) -> None:
    with pytest.raises(ValueError, match="1 or more images"):
        rescale(replace(PAPER_3X, batch=old), new)


COSINE = {"base_lr": 0.1, "base_lr_end": 0.02, "max_iter": 100, "warmup_iters": 10, "warmup_factor": 0.25}


@pytest.mark.parametrize(
    ("iteration", "expected"),
    [
        (0, 0.025),
        (5, (0.025 + 0.0980422607) / 2),  # half-way to where the cosine is at 10: 0.06 + 0.04 cos 18 degrees
        (10, 0.0980422607),
        (25, 0.0882842712),  # cos 45 degrees
        (50, 0.06),
        (75, 0.0317157288),
        (100, 0.02),
    ],
)
def test_cosine(iteration: int, expected: float) -> None:
    assert cosine_lr_at(iteration, **COSINE) == pytest.approx(expected, rel=1e-8)


def test_cosine_with_constant_warmup_and_without_any() -> None:
    assert [cosine_lr_at(i, **COSINE, warmup_method="constant") for i in (0, 9)] == pytest.approx([0.025, 0.025])
    assert cosine_lr_at(0, **{**COSINE, "warmup_iters": 0}) == pytest.approx(0.1)


@pytest.mark.parametrize("wrong", [{"iteration": -1}, {"base_lr_end": 0.2}, {"base_lr_end": -0.1}])
def test_cosine_refuses_nonsense(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be >= 0"):
        cosine_lr_at(**{"iteration": 3, **COSINE, **wrong})  # type: ignore[arg-type]


def test_the_end_of_a_cosine_is_rescaled_with_its_beginning() -> None:
    found = rescale(replace(PAPER_3X, steps=(), base_lr_end=0.002), 8)
    assert (found.base_lr, found.base_lr_end) == pytest.approx((0.01, 0.001))


def test_a_recipes_cosine_in_words() -> None:
    cfg = get_cfg()
    for key, value in {"LR_SCHEDULER_NAME": "WarmupCosineLR", "BASE_LR": 0.1, "BASE_LR_END": 0.01, "STEPS": (),
                       "WARMUP_ITERS": 10, "WARMUP_FACTOR": 0.5, "MAX_ITER": 1000}.items():  # fmt: skip
        set_key(cfg, f"SOLVER.{key}", value)
    assert learning_rate_line(cfg) == "learning rate 0.05 -> 0.1 over 10 it, along a cosine to 0.01, end 1,000"


@pytest.mark.detectron2
@pytest.mark.parametrize("method", ["linear", "constant"])
@pytest.mark.parametrize("name", ["WarmupCosineLR", "WarmupMultiStepLR"])
def test_rates_are_detectron2s(name: str, method: str) -> None:
    import torch
    from detectron2.config import get_cfg as detectron2s
    from detectron2.solver import build_lr_scheduler

    cfg = detectron2s()
    cfg.merge_from_list(["SOLVER.LR_SCHEDULER_NAME", name, "SOLVER.BASE_LR", 0.1, "SOLVER.WARMUP_ITERS", 7,
                         "SOLVER.WARMUP_FACTOR", 0.2, "SOLVER.WARMUP_METHOD", method, "SOLVER.MAX_ITER", 90,
                         "SOLVER.STEPS", (50, 80), "SOLVER.BASE_LR_END", 0.01])  # fmt: skip
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    for iteration in range(cfg.SOLVER.MAX_ITER):
        assert learning_rate(cfg, iteration) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        scheduler.step()
