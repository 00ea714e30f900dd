"""The learning-rate schedules against numbers by hand, and a recipe at another batch."""

from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from fvcore.common.config import CfgNode

from scratch_det.config.load import LoadedConfig, flatten, get_cfg, load_config, set_key
from scratch_det.config.rules import check_config
from scratch_det.config.schedule import (
    BATCH_KEYS,
    Schedule,
    honour_reference_world_size,
    kx_schedule,
    learning_rate,
    learning_rate_line,
    scale_to_batch,
    settle_batch,
    shared_prefix,
    shorten,
)
from scratch_det.errors import ConfigError

SCRATCH_3X = ROOT / "configs/COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_3x_gn.yaml"
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


def solver(**keys: Any) -> CfgNode:
    """The paper's 2x with some keys of SOLVER changed, in lower case."""
    cfg = get_cfg()
    paper = {"base_lr": 0.02, "steps": (120_000, 160_000), "max_iter": 180_000, "warmup_iters": 500,
             "warmup_factor": 1 / 3}  # fmt: skip
    for name, value in {**paper, **keys}.items():
        set_key(cfg, f"SOLVER.{name.upper()}", value)
    return cfg


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
    assert learning_rate(solver(), iteration) == pytest.approx(expected, rel=1e-8)


def test_constant_warmup() -> None:
    rates = [learning_rate(solver(warmup_method="constant"), i) for i in (0, 499, 500)]
    assert rates == pytest.approx([0.02 / 3, 0.02 / 3, 0.02])


def test_warmup_and_drop_multiply() -> None:
    cfg = solver(base_lr=1.0, steps=(5,), warmup_iters=10, warmup_factor=0.0)
    assert learning_rate(cfg, 5) == pytest.approx(0.5 * 0.1)


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
    one, other = (solver(steps=schedule.steps, max_iter=schedule.max_iter) for schedule in (short, long))
    prefix = shared_prefix(short, long)
    for iteration in [*range(600), *range(600, prefix, 997), prefix - 1]:
        assert learning_rate(one, iteration) == learning_rate(other, iteration)
    assert learning_rate(one, prefix) != learning_rate(other, prefix)


@pytest.mark.parametrize("k", [0, -1])
def test_kx_rejects_nonsense(k: int) -> None:
    with pytest.raises(ValueError, match="k >= 1"):
        kx_schedule(k)


COSINE = {"lr_scheduler_name": "WarmupCosineLR", "base_lr": 0.1, "base_lr_end": 0.02, "max_iter": 100, "steps": (),
          "warmup_iters": 10, "warmup_factor": 0.25}  # fmt: skip


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
    assert learning_rate(solver(**COSINE), iteration) == pytest.approx(expected, rel=1e-8)


def test_cosine_with_constant_warmup_and_without_any() -> None:
    constant = solver(**COSINE, warmup_method="constant")
    assert [learning_rate(constant, i) for i in (0, 9)] == pytest.approx([0.025, 0.025])
    assert learning_rate(solver(**{**COSINE, "warmup_iters": 0}), 0) == pytest.approx(0.1)


def test_learning_rates_in_words() -> None:
    cosine = solver(**{**COSINE, "base_lr_end": 0.01, "warmup_factor": 0.5, "max_iter": 1000})
    assert learning_rate_line(cosine) == "learning rate 0.05 -> 0.1 over 10 it, along a cosine to 0.01, end 1,000"
    line = "learning rate {}, 0.002 from 120,000, 0.0002 from 160,000, end 180,000"
    assert learning_rate_line(solver()) == line.format("0.00667 -> 0.02 over 500 it")
    assert learning_rate_line(solver(warmup_method="constant")) == line.format("0.00667 for 500 it, then 0.02")
    assert learning_rate_line(solver(warmup_iters=0), 117_266) == line.format("0.02") + " (24.6 epochs)"


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


REFERENCE_8 = ("SOLVER.REFERENCE_WORLD_SIZE", 8)
AT_16 = (16, 0.02, 0.0, 270_000, (210_000, 250_000), 500, 10_000, 5_000)  # in the order of BATCH_KEYS
AT_2 = (2, 0.0025, 0.0, 2_160_000, (1_680_000, 2_000_000), 4_000, 80_000, 40_000)
AT_32 = (32, 0.04, 0.0, 135_000, (105_000, 125_000), 250, 5_000, 2_500)
AT_64 = (64, 0.08, 0.0, 67_500, (52_500, 62_500), 125, 2_500, 1_250)
AT_12 = (12, 0.015, 0.0, 360_000, (280_000, 333_333), 667, 13_333, 6_667)


def recipe(*overrides: object) -> LoadedConfig:
    return load_config(SCRATCH_3X, [str(word) for word in overrides])


def numbers(cfg: CfgNode) -> tuple[Any, ...]:
    values = flatten(cfg)
    return tuple(values[key] for key in BATCH_KEYS)


def rejection(loaded: LoadedConfig, **arguments: Any) -> str:
    with pytest.raises(ConfigError) as error:
        settle_batch(loaded, **arguments)
    return str(error.value)


class TestScaling:
    def test_only_what_depends_on_the_batch_changes(self) -> None:
        cfg, before = recipe().cfg, flatten(recipe().cfg)
        scale_to_batch(cfg, 2)
        after = flatten(cfg)
        assert numbers(cfg) == AT_2
        assert {key for key in after if after[key] != before[key]} == {*BATCH_KEYS} - {"SOLVER.BASE_LR_END"}

    @pytest.mark.parametrize(("batch", "expected"), [(2, AT_2), (12, AT_12), (16, AT_16), (32, AT_32), (64, AT_64)])
    def test_flag(self, batch: int, expected: tuple) -> None:
        loaded = recipe()
        settle_batch(loaded, scale_to=batch)
        assert numbers(loaded.cfg)[1] == pytest.approx(expected[1], rel=1e-12)
        assert (numbers(loaded.cfg)[0], *numbers(loaded.cfg)[2:]) == (batch, *expected[2:])
        assert numbers(loaded.file_cfg) == AT_16
        assert check_config(loaded.cfg) == []

    @pytest.mark.parametrize("batch", [1, 2, 4, 8])
    def test_there_and_back(self, batch: int) -> None:
        cfg = recipe().cfg
        scale_to_batch(cfg, batch)
        scale_to_batch(cfg, 16)
        assert cfg == recipe().cfg

    def test_periods_are_never_turned_off_nor_on(self) -> None:
        cfg = recipe("TEST.EVAL_PERIOD", 0, "SOLVER.CHECKPOINT_PERIOD", 3).cfg
        scale_to_batch(cfg, 1024)
        assert (cfg.TEST.EVAL_PERIOD, cfg.SOLVER.CHECKPOINT_PERIOD) == (0, 1)

    def test_the_end_of_a_cosine_is_rescaled_with_its_beginning(self) -> None:
        cfg = solver(lr_scheduler_name="WarmupCosineLR", steps=(), base_lr_end=0.002)
        scale_to_batch(cfg, 8)
        assert pytest.approx((0.01, 0.001)) == (cfg.SOLVER.BASE_LR, cfg.SOLVER.BASE_LR_END)

    def test_detectron2s_default_warmup(self) -> None:
        loaded = recipe("SOLVER.WARMUP_ITERS", 1000)
        settle_batch(loaded, scale_to=2)
        assert loaded.cfg.SOLVER.WARMUP_ITERS == 8000

    @pytest.mark.parametrize(("num_processes", "expected"), [(1, AT_2), (8, AT_16), (16, AT_32)])
    def test_reference_world_size(self, num_processes: int, expected: tuple) -> None:
        loaded = recipe(*REFERENCE_8)
        settle_batch(loaded, num_processes)
        assert numbers(loaded.cfg) == expected
        assert flatten(loaded.cfg)["SOLVER.REFERENCE_WORLD_SIZE"] == num_processes
        assert check_config(loaded.cfg, num_processes) == []

    def test_reference_world_size_there_and_back(self) -> None:
        cfg = recipe(*REFERENCE_8).cfg
        honour_reference_world_size(cfg, 2)
        honour_reference_world_size(cfg, 8)
        assert cfg == recipe(*REFERENCE_8).cfg

    @pytest.mark.parametrize("num_processes", [1, 4])
    def test_without_a_reference_the_batch_stays(self, num_processes: int) -> None:
        loaded = recipe()
        settle_batch(loaded, num_processes)
        assert numbers(loaded.cfg) == AT_16

    def test_flag_and_reference_may_agree(self) -> None:
        loaded = recipe(*REFERENCE_8)
        settle_batch(loaded, num_processes=1, scale_to=2)
        assert numbers(loaded.cfg) == AT_2

    def test_accumulation_changes_no_key(self) -> None:
        loaded = recipe()
        settle_batch(loaded, accumulate=8)
        assert loaded.cfg == recipe().cfg

    @pytest.mark.parametrize(
        "overrides",
        [
            ("SOLVER.IMS_PER_BATCH", 16),
            ("SOLVER.IMS_PER_BATCH", 2, "SOLVER.BASE_LR", 0.02),
            ("SOLVER.BASE_LR", 0.01),
        ],
    )
    def test_meant_changes_pass(self, overrides: tuple) -> None:
        loaded = recipe(*overrides)
        settle_batch(loaded)
        assert loaded.cfg == recipe(*overrides).cfg


class TestLog:
    def test_nothing_differs(self) -> None:
        assert settle_batch(recipe(), num_processes=2, accumulate=4) == [
            "batch 16 (processes x accumulate x images: 2 x 4 x 2), learning rate 0.02, 270,000 iterations, "
            "as in the recipe"
        ]

    def test_recipe_beside_this_run(self) -> None:
        assert settle_batch(recipe(), num_processes=2, scale_to=4) == [
            "                                 recipe           this run",
            "SOLVER.IMS_PER_BATCH             16               4",
            "SOLVER.BASE_LR                   0.02             0.005",
            "SOLVER.MAX_ITER                  270,000          1,080,000",
            "SOLVER.STEPS                     210,000 250,000  840,000 1,000,000",
            "SOLVER.WARMUP_ITERS              500              2,000",
            "TEST.EVAL_PERIOD                 10,000           40,000",
            "SOLVER.CHECKPOINT_PERIOD         5,000            20,000",
            "processes x accumulate x images  -                2 x 1 x 2",
            "images in all                    4,320,000        4,320,000",
            "rescaled from 16 to 4 images: learning rate x 0.25, iterations x 4",
        ]

    def test_reference_processes_are_shown(self, tmp_path: Path) -> None:
        leaf = tmp_path / "recipe.yaml"
        leaf.write_text(f"_BASE_: {SCRATCH_3X}\nSOLVER: {{REFERENCE_WORLD_SIZE: 8}}\n")
        lines = settle_batch(load_config(leaf), num_processes=1)
        assert "processes x accumulate x images  8 x 1 x 2        1 x 1 x 2" in lines

    def test_what_the_command_line_sets_is_rescaled_and_named(self) -> None:
        loaded = recipe("SOLVER.MAX_ITER", 40, "SOLVER.STEPS", "()", "SOLVER.WARMUP_ITERS", 10, "SEED", 1)
        lines = settle_batch(loaded, scale_to=2)
        assert lines[-1].endswith("the command line's SOLVER.MAX_ITER, SOLVER.STEPS, SOLVER.WARMUP_ITERS included")
        assert "SOLVER.MAX_ITER                  270,000          320" in lines
        assert "SOLVER.STEPS                     210,000 250,000  -" in lines

    def test_changes_by_hand_are_shown_without_a_rescaling(self) -> None:
        lines = settle_batch(recipe("SOLVER.IMS_PER_BATCH", 2, "SOLVER.BASE_LR", 0.0025))
        assert "SOLVER.BASE_LR                   0.02       0.0025" in lines
        assert lines[-1] == "images in all                    4,320,000  540,000"


class TestRejections:
    @pytest.mark.parametrize("scale_to", [None, 2])
    def test_a_batch_without_its_learning_rate(self, scale_to: int | None) -> None:
        assert rejection(recipe("SOLVER.IMS_PER_BATCH", 2), scale_to=scale_to) == (
            "command line: SOLVER.IMS_PER_BATCH is 2, the recipe's 16, but SOLVER.BASE_LR is still 0.02, expected "
            "0.0025 for 2 images; give --scale-to-batch 2 instead, which scales the schedule too, or name the rate as "
            "well: SOLVER.BASE_LR 0.02 keeps it"
        )

    def test_an_impossible_batch_is_left_to_the_rules(self) -> None:
        loaded = recipe("SOLVER.IMS_PER_BATCH", 0)
        settle_batch(loaded)
        with pytest.raises(ConfigError, match=r"SOLVER\.IMS_PER_BATCH is 0, expected 1 or more"):
            check_config(loaded.cfg)

    @pytest.mark.parametrize(("name", "flag"), [("scale_to", "--scale-to-batch"), ("accumulate", "--accumulate")])
    def test_flags_below_one(self, name: str, flag: str) -> None:
        assert rejection(recipe(), **{name: 0}) == f"command line: {flag} is 0, expected 1 or more"

    @pytest.mark.parametrize(
        ("num_processes", "found"), [(1, "makes the batch 2 in 1 process;"), (8, "makes the batch 16 in 8 processes;")]
    )
    def test_flag_against_reference(self, num_processes: int, found: str) -> None:
        message = rejection(recipe(*REFERENCE_8), num_processes=num_processes, scale_to=4)
        assert message.startswith("command line: --scale-to-batch is 4, but SOLVER.REFERENCE_WORLD_SIZE " + found)
        assert message.endswith("leave out one of the two: the flag, or set SOLVER.REFERENCE_WORLD_SIZE 0")

    @pytest.mark.parametrize(
        ("reference", "expected"),
        [
            (5, "a number of processes that share SOLVER.IMS_PER_BATCH 16 evenly; set SOLVER.REFERENCE_WORLD_SIZE 0 to "
                "keep the batch in any number"),
            (-8, "0 or more"),
        ],
    )  # fmt: skip
    def test_reference_that_does_not_divide(self, reference: int, expected: str) -> None:
        said = rejection(recipe("SOLVER.REFERENCE_WORLD_SIZE", reference))
        assert said == f"SOLVER.REFERENCE_WORLD_SIZE is {reference}, expected {expected}"

    @pytest.mark.parametrize(
        ("max_iter", "steps", "expected"),
        [
            (100, (40, 41), "(10, 10) of 25"),
            (100, (1,), "(0,) of 25"),
            (100, (99,), "(25,) of 25"),
            (1, (), "() of 0"),
        ],
    )
    def test_drops_that_fall_together(self, max_iter: int, steps: tuple[int, ...], expected: str) -> None:
        loaded = recipe("SOLVER.MAX_ITER", max_iter, "SOLVER.STEPS", steps, "SOLVER.WARMUP_ITERS", 0)
        assert rejection(loaded, scale_to=64) == (
            f"SOLVER.STEPS {steps} of SOLVER.MAX_ITER {max_iter} at 16 images cannot be scaled to 64: rounded "
            f"they are {expected} iterations, which do not increase from 0; choose a smaller batch, or "
            "fewer SOLVER.STEPS"
        )

    def test_a_broken_schedule_is_rejected_before_it_is_scaled(self) -> None:
        message = rejection(recipe("SOLVER.STEPS", "(5, 5)", "SOLVER.BASE_LR", -1.0), scale_to=2)
        assert "SOLVER.STEPS is (5, 5)" in message
        assert "SOLVER.BASE_LR is -1.0" in message


@pytest.mark.detectron2
@pytest.mark.parametrize(
    ("reference", "num_processes", "batch"), [(8, 1, 16), (8, 16, 16), (8, 3, 16), (3, 1, 12), (3, 7, 21), (7, 7, 14)]
)
def test_reference_world_size_is_detectron2s(reference: int, num_processes: int, batch: int) -> None:
    from detectron2.config import get_cfg as stock_cfg
    from detectron2.engine import DefaultTrainer

    overrides = ["SOLVER.REFERENCE_WORLD_SIZE", reference, "SOLVER.IMS_PER_BATCH", batch]
    stock = stock_cfg()
    stock.merge_from_file(str(SCRATCH_3X))
    stock.merge_from_list(overrides)
    cfg = load_config(SCRATCH_3X, overrides).cfg
    honour_reference_world_size(cfg, num_processes)
    assert numbers(cfg) == numbers(DefaultTrainer.auto_scale_workers(stock, num_processes))


class TestEpochs:
    @pytest.mark.parametrize(
        ("epochs", "max_iter", "steps", "warmup"),
        [
            (12, 88_716, (69_001, 82_144), 500),  # 118,288 images; 7/9 and 25/27 as in 3x
            (72, 532_296, (472_296, 512_296), 500),  # longer than 3x: the last 60k and 20k, as in 6x
            (0.01, 74, (58, 69), 37),
        ],
    )
    def test_length_and_drops(self, epochs: float, max_iter: int, steps: tuple[int, ...], warmup: int) -> None:
        recipe = load_config(SCRATCH_3X, ["TEST.EVAL_PERIOD", "5000"])
        line, *_ = settle_batch(recipe, epochs=epochs, images=118_288)
        solver = recipe.cfg.SOLVER
        assert (max_iter, steps, warmup) == (solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS)
        assert line == f"--epochs {epochs:g} of 118,288 training images at 16 each: {max_iter:,} iterations"
        assert recipe.cfg.TEST.EVAL_PERIOD == 5000
        check_config(recipe.cfg)

    def test_of_another_batch(self) -> None:
        recipe = load_config(SCRATCH_3X)
        settle_batch(recipe, scale_to=2, epochs=3, images=20)
        assert recipe.cfg.SOLVER.MAX_ITER == 30

    @pytest.mark.parametrize("epochs", [0, -1, float("nan"), float("inf")])
    def test_no_number_of_epochs(self, epochs: float) -> None:
        with pytest.raises(ConfigError, match=r"--epochs is .*, expected a number above 0"):
            settle_batch(load_config(SCRATCH_3X), epochs=epochs, images=9)

    def test_two_lengths(self) -> None:
        recipe = load_config(SCRATCH_3X, ["SOLVER.MAX_ITER", "9"])
        with pytest.raises(ConfigError, match=r"--epochs sets SOLVER\.MAX_ITER, too"):
            settle_batch(recipe, epochs=1, images=9)


class TestTrial:
    @pytest.mark.parametrize(
        ("iterations", "steps", "warmup"), [(40, (31, 37), 20), (2000, (1556, 1852), 500), (3, (2,), 1), (1, (), 0)]
    )
    def test_drops_are_in_proportion(self, iterations: int, steps: tuple[int, ...], warmup: int) -> None:
        cfg = load_config(SCRATCH_3X).cfg
        shorten(cfg, iterations)
        assert (iterations, steps, warmup) == (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS)
        assert cfg.TEST.EVAL_PERIOD == 0
        check_config(cfg)

    def test_a_smaller_batch_makes_it_no_longer(self) -> None:
        recipe = load_config(SCRATCH_3X)
        settle_batch(recipe, scale_to=2, trial=40)
        assert (recipe.cfg.SOLVER.MAX_ITER, recipe.cfg.SOLVER.STEPS) == (40, (31, 37))

    def test_no_iteration(self) -> None:
        with pytest.raises(ConfigError, match=r"--trial is 0, expected 1 or more iterations"):
            shorten(load_config(SCRATCH_3X).cfg, 0)

    def test_no_longer_than_the_run(self) -> None:
        cfg = load_config(SCRATCH_3X).cfg
        with pytest.raises(ConfigError, match=rf"--trial is {cfg.SOLVER.MAX_ITER + 1}, above SOLVER.MAX_ITER"):
            shorten(cfg, cfg.SOLVER.MAX_ITER + 1)
        shorten(cfg, cfg.SOLVER.MAX_ITER)
