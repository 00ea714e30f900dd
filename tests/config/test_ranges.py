"""Wrong values of every key: rejected with a message that says what is expected, or legal, and then they train."""

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from conftest import ROOT, SMALL_MODEL
from fvcore.common.config import CfgNode
from samples import sample

from scratch_det.backends import torchvision as backend
from scratch_det.backends.keys import check_keys
from scratch_det.config.load import Entry, _apply, flatten, get_cfg, load_config, set_key
from scratch_det.config.ranges import ROWS, known_values, row_of
from scratch_det.config.rules import check_config
from scratch_det.engine.state import build_optimizer, clip_gradients, set_learning_rate
from scratch_det.errors import ConfigError

WRONG: tuple[Any, ...] = (
    0, -1, 10**9, 10**30, -0.5, 0.5, 1e9, math.nan, math.inf, -math.inf, [], [0], [-1], [math.nan], [[-8]], [[0.0]],
    [[]], [10**9], "text", "", None, True, [None], [True], ["text"],
)  # fmt: skip


@cache
def recipe() -> CfgNode:
    words = [word for pair in SMALL_MODEL.items() for word in pair]
    return load_config(ROOT / "configs/Digits/quickstart.yaml", [*words, "MODEL.ROI_HEADS.NUM_CLASSES", "10"]).cfg


def problems_of(key: str, value: Any) -> list[str]:
    """What is wrong with the quickstart's config where this key has this value."""
    cfg, before = recipe(), flatten(recipe())
    try:
        return _apply(cfg, [Entry(key, value, "here")], before) or list(known_values(cfg, key))
    finally:
        set_key(cfg, key, before[key])


def has_numbers(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(has_numbers, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


NUMERIC = [key for key, value in flatten(get_cfg()).items() if has_numbers(value) or value in (None, [])]
NUMERIC.remove("MODEL.FPN.IN_FEATURES")
NUMERIC.remove("TEST.EXPECTED_RESULTS")  # of detectron2's trainer
NEVER = (math.nan, -math.inf, "text", True, [math.nan], [None])


def test_defaults_and_rows_belong_together() -> None:
    assert {row_of(key) for key in flatten(get_cfg())} >= set(ROWS)
    assert [problem.split()[0] for problem in known_values(get_cfg())] == ["DATASETS.TRAIN"]


@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_a_rejection_names_key_value_and_expectation(value: Any) -> None:
    for key in NUMERIC:
        problems = problems_of(key, value)
        for problem in problems:
            assert problem.removeprefix("here: ").startswith(f"{key} is "), problem
            assert repr(value).strip("[]") in problem, problem  # a list may be decoded as a tuple
            assert "expected" in problem, problem
        assert problems or repr(value) not in map(repr, NEVER), key


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 0),
        ("MODEL.ROI_HEADS.POSITIVE_FRACTION", 5.0),
        ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", -1),
        ("MODEL.RPN.IOU_THRESHOLDS", [0.7, 0.3]),
        ("MODEL.ROI_BOX_HEAD.FC_DIM", 0),
        ("MODEL.ROI_BOX_HEAD.NUM_CONV", -3),
        ("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 0),
        ("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", 10**9),
        ("MODEL.FPN.OUT_CHANNELS", 0),
        ("MODEL.ANCHOR_GENERATOR.SIZES", [[-8]]),
        ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.0]]),
        ("MODEL.PIXEL_STD", [1.0]),
        ("INPUT.MIN_SIZE_TRAIN", [800.5]),
        ("SOLVER.STEPS", [1.5]),
        ("DATALOADER.NUM_WORKERS", 10**9),
        ("TEST.AUG.MIN_SIZES", [400, 500.5]),
        ("TEST.KEYPOINT_OKS_SIGMAS", ["text"]),
    ],
)
def test_what_must_be_rejected(key: str, value: Any) -> None:
    [problem] = problems_of(key, value)
    assert problem.startswith(f"{key} is ")
    assert repr(value).strip("[]()") in problem


@pytest.mark.parametrize("value", [1e20, math.inf])
def test_a_number_that_is_too_large_is_called_so(value: float) -> None:
    [problem] = problems_of("SOLVER.BASE_LR", value)
    assert problem.startswith(f"SOLVER.BASE_LR is {value}, which is too large, expected above 0")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"MODEL.RPN.IOU_LABELS": [0, 1]}, "RPN.IOU_THRESHOLDS is [0.3, 0.7], expected 1 for IOU_LABELS [0, 1]"),
        ({"MODEL.ROI_HEADS.IOU_THRESHOLDS": [0.5, 0.7]}, "MODEL.ROI_HEADS.IOU_THRESHOLDS is [0.5, 0.7], expected 1"),
        ({"MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16]]}, "SIZES has 2 lists; expected one for all levels or one for"),
        ({"MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[1.0]] * 4 + [[0.5, 1.0]]}, "every level needs the same number"),
        ({"MODEL.ROI_BOX_HEAD.NUM_CONV": 0, "MODEL.ROI_BOX_HEAD.NUM_FC": 0}, "NUM_CONV 0 and NUM_FC 0, expected a"),
    ],
)
def test_lists_and_layers_agree(changes: dict[str, Any], expected: str) -> None:
    cfg = recipe().clone()
    for key, value in changes.items():
        set_key(cfg, key, value)
    with pytest.raises(ConfigError) as caught:
        check_config(cfg)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def legal() -> Iterator[tuple[str, Any, CfgNode]]:
    """Of the wrong values and of each range's ends those that pass every check without a GPU."""
    ends = (1, 1.0, 1e-9, [1], [[1]], [1e-9] * 4, [0.001, 0.999])
    for key in (key for key in NUMERIC if key.startswith(("MODEL.", "SOLVER.", "TEST.DET"))):
        for value in (*WRONG, *ends):
            cfg = recipe().clone()
            try:
                if not problems_of(key, value):
                    _apply(cfg, [Entry(key, value, "here")], flatten(cfg))
                    check_config(cfg)
                    check_keys("torchvision", cfg)
                    yield key, value, cfg
            except ConfigError:
                pass


@pytest.mark.slow
def test_what_is_accepted_trains() -> None:
    """A step and a prediction, with masks and keypoints."""
    failed, seen = [], 0
    for key, value, cfg in legal():
        cfg.MODEL.KEYPOINT_ON, cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True, True
        try:
            torch.manual_seed(0)
            model, one = backend.build(cfg), sample()
            one["labels"] %= cfg.MODEL.ROI_HEADS.NUM_CLASSES
            one["keypoints"] = torch.ones(len(one["boxes"]), cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, 3)
            optimizer = build_optimizer(cfg, model)
            set_learning_rate(optimizer, cfg, 0)
            sum(backend.losses(model, [one]).values()).backward()
            clip_gradients(cfg, model)
            optimizer.step()
            backend.predict(model, [one])
            seen += 1
        except Exception as error:
            failed.append(f"{key} {value}: {type(error).__name__}: {error}")
    assert not failed, "\n".join(failed)
    assert seen > 100
