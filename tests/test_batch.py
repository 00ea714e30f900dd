"""A recipe at another batch: numbers by hand, the table in the log, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from fvcore.common.config import CfgNode

from scratch_det.config import LoadedConfig, check_config, load_config, settle_batch
from scratch_det.config.batch import KEYS, honour_reference_world_size, scale_to_batch
from scratch_det.config.defaults import flatten
from scratch_det.errors import ConfigError

SCRATCH_3X = Path(__file__).parents[1] / "configs/COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_3x_gn.yaml"
REFERENCE_8 = ("SOLVER.REFERENCE_WORLD_SIZE", 8)
AT_16 = (16, 0.02, 270_000, (210_000, 250_000), 500, 10_000, 5_000, 0.0)
AT_2 = (2, 0.0025, 2_160_000, (1_680_000, 2_000_000), 4_000, 80_000, 40_000, 0.0)
AT_32 = (32, 0.04, 135_000, (105_000, 125_000), 250, 5_000, 2_500, 0.0)


def recipe(*overrides: object) -> LoadedConfig:
    return load_config(SCRATCH_3X, [str(word) for word in overrides])


def numbers(cfg: CfgNode) -> tuple[Any, ...]:
    values = flatten(cfg)
    return tuple(values[key] for key in KEYS.values())


def refusal(loaded: LoadedConfig, **arguments: Any) -> str:
    with pytest.raises(ConfigError) as error:
        settle_batch(loaded, **arguments)
    return str(error.value)


class TestScaling:
    def test_only_what_depends_on_the_batch_changes(self) -> None:
        cfg, before = recipe().cfg, flatten(recipe().cfg)
        scale_to_batch(cfg, 2)
        after = flatten(cfg)
        assert numbers(cfg) == AT_2
        assert {key for key in after if after[key] != before[key]} == {*KEYS.values()} - {"SOLVER.BASE_LR_END"}

    @pytest.mark.parametrize(("batch", "expected"), [(2, AT_2), (16, AT_16), (32, AT_32)])
    def test_flag(self, batch: int, expected: tuple) -> None:
        loaded = recipe()
        settle_batch(loaded, scale_to=batch)
        assert numbers(loaded.cfg) == expected
        assert numbers(loaded.file_cfg) == AT_16
        assert check_config(loaded.cfg) == []

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
            "images an iteration              16               4",
            "processes x accumulate x images  -                2 x 1 x 2",
            "learning rate                    0.02             0.005",
            "iterations                       270,000          1,080,000",
            "drops at                         210,000 250,000  840,000 1,000,000",
            "warm-up iterations               500              2,000",
            "evaluation every                 10,000           40,000",
            "checkpoint every                 5,000            20,000",
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
        assert "iterations                       270,000          320" in lines
        assert "drops at                         210,000 250,000  -" in lines

    def test_changes_by_hand_are_shown_without_a_rescaling(self) -> None:
        lines = settle_batch(recipe("SOLVER.IMS_PER_BATCH", 2, "SOLVER.BASE_LR", 0.0025))
        assert "learning rate                    0.02             0.0025" in lines
        assert lines[-1] == "images in all                    4,320,000        540,000"


class TestRefusals:
    @pytest.mark.parametrize("scale_to", [None, 2])
    def test_a_batch_without_its_learning_rate(self, scale_to: int | None) -> None:
        assert refusal(recipe("SOLVER.IMS_PER_BATCH", 2), scale_to=scale_to) == (
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
        assert refusal(recipe(), **{name: 0}) == f"command line: {flag} is 0, expected 1 or more"

    @pytest.mark.parametrize(
        ("num_processes", "found"), [(1, "makes the batch 2 in 1 process;"), (8, "makes the batch 16 in 8 processes;")]
    )
    def test_flag_against_reference(self, num_processes: int, found: str) -> None:
        message = refusal(recipe(*REFERENCE_8), num_processes=num_processes, scale_to=4)
        assert message.startswith("command line: --scale-to-batch is 4, but SOLVER.REFERENCE_WORLD_SIZE " + found)
        assert message.endswith("leave out one of the two: the flag, or set SOLVER.REFERENCE_WORLD_SIZE 0")

    @pytest.mark.parametrize("reference", [5, -8])
    def test_reference_that_does_not_divide(self, reference: int) -> None:
        assert refusal(recipe("SOLVER.REFERENCE_WORLD_SIZE", reference)) == (
            f"SOLVER.REFERENCE_WORLD_SIZE is {reference}, expected a number of processes that share "
            "SOLVER.IMS_PER_BATCH 16 evenly; set SOLVER.REFERENCE_WORLD_SIZE 0 to keep the batch in any number"
        )

    def test_drops_that_fall_together(self) -> None:
        loaded = recipe("SOLVER.MAX_ITER", 100, "SOLVER.STEPS", "(40, 41)", "SOLVER.WARMUP_ITERS", 0)
        assert refusal(loaded, scale_to=64) == (
            "SOLVER.STEPS (40, 41) of SOLVER.MAX_ITER 100 at 16 images cannot be scaled to 64: steps must be positive "
            "and strictly increasing, not (10, 10); choose a smaller batch, or fewer SOLVER.STEPS"
        )

    def test_a_broken_schedule_is_refused_before_it_is_scaled(self) -> None:
        message = refusal(recipe("SOLVER.STEPS", "(5, 5)", "SOLVER.BASE_LR", -1.0), scale_to=2)
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
