"""The checks before a run: a run raises the first error, scratch-det check collects all; both from the same list."""

import re
from pathlib import Path

import pytest

from scratch_det.engine.plan import CLASSIFICATION, DETECTION, Request, make_plan
from scratch_det.errors import Report, UserError

CASCADE = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"]


def errors(request: Request, task: str = DETECTION) -> tuple[str, list[str]]:
    """What a run raises, and what a check collects."""
    with pytest.raises(UserError) as caught:
        make_plan(request, task=task)
    report = Report(strict=False)
    make_plan(request, task=task, report=report)
    assert not report.ok
    return str(caught.value), report.messages("error")


@pytest.mark.parametrize(
    ("overrides", "flags"),
    [
        (["SOLVER.BASE_LR", "-1.0", "MODEL.BACKBONE.FREEZE_AT", "2"], {}),
        (["SOLVER.BASE_LRR", "1"], {}),
        (["SOLVER.IMS_PER_BATCH", "4"], {}),
        (["MODEL.WEIGHTS", "/nowhere/a.pth"], {}),
        (["INPUT.CROP.ENABLED", "True"], {}),
        (["DATASETS.TRAIN", "('toy_trian',)"], {}),
        (["MODEL.ROI_HEADS.NUM_CLASSES", "80"], {}),
        ([], {"keep_last": -1, "keep_at": (7,), "stop_at": 9}),
        ([], {"branch_from": "a.pth", "switch_from": "b.pth"}),
        ([], {"init_std": 2.0}),
        (["DATASETS.TEST", "()"], {"eval_only": True}),
        ([], {"eval_only": True, "accumulate": 2}),
        ([], {"eval_only": True, "epochs": 2}),
        ([], {"epochs": -1}),
        (["DATASETS.TRAIN", "('toy_trian',)"], {"epochs": 2}),
    ],
    ids=str,
)
def test_a_run_raises_what_a_check_collects(toy_recipe: Path, overrides: list[str], flags: dict) -> None:
    raised, collected = errors(Request(str(toy_recipe), overrides, "torchvision", **flags))
    assert set(re.split(r"\n(?!\s)", raised)) <= set(collected)


def test_epochs_are_of_the_images_that_are_trained_on(toy_recipe: Path) -> None:
    """Three of four have objects: four passes in batches of 2."""
    for keys, count in (([], 6), (["DATALOADER.FILTER_EMPTY_ANNOTATIONS", "False"], 8)):
        plan = make_plan(Request(str(toy_recipe), keys, "torchvision", epochs=4))
        assert count == plan.cfg.SOLVER.MAX_ITER


def test_later_sections_are_looked_at_in_spite_of_errors(toy_recipe: Path, datasets_root: Path) -> None:
    (datasets_root / "toy_val/annotations.json").unlink()
    overrides = ["SEED", "one", "SOLVER.BASE_LR", "-1.0"]
    raised, collected = errors(Request(str(toy_recipe), overrides, "torchvision", keep_last=-1))
    assert raised == collected[0]
    for part in ("SEED is 'one'", "SOLVER.BASE_LR is -1.0", "--keep-last is -1", "'toy_val' is not complete"):
        assert sum(part in message for message in collected) == 1


def test_a_detectors_recipe_is_none_for_pre_training(toy_recipe: Path) -> None:
    raised, collected = errors(Request(str(toy_recipe), ["MODEL.WEIGHTS", "a.pth"]), CLASSIFICATION)
    assert raised.startswith("MODEL.WEIGHTS is a.pth, but pre-training starts at random")
    expected = "expected classified images, {folder: PATH}"
    assert any(expected in one and one.endswith("; one with json is for scratch-det train") for one in collected)


@pytest.mark.parametrize("strict", [True, False])
def test_a_cascade_from_its_first_iteration_is_a_notice(toy_recipe: Path, tmp_path: Path, strict: bool) -> None:
    report = Report(strict)
    make_plan(Request(str(toy_recipe), CASCADE, "torchvision"), report=report)
    [notice] = report.messages("notice")
    assert notice.startswith("this trains a cascade from its first iteration on; the paper switches to it")
    (tmp_path / "model.pth").touch()
    report = Report(strict)
    make_plan(Request(str(toy_recipe), CASCADE, "torchvision", switch_from=str(tmp_path / "model.pth")), report=report)
    assert not [one for one in report.messages("notice") if "first iteration" in one]


def test_a_plan_has_what_the_data_decides(toy_recipe: Path, tmp_path: Path) -> None:
    report = Report()
    plan = make_plan(Request(str(toy_recipe), [], "torchvision"), report=report)
    assert [section.name for section in report.sections] == ["recipe", "batch", "output", "data"]
    assert (plan.cfg.MODEL.ROI_HEADS.NUM_CLASSES, plan.backend) == (3, "torchvision")
    assert [data.entry.name for data in (*plan.training, *plan.test)] == ["toy_train", "toy_val"]
    assert not (tmp_path / "run").exists()


def test_notices_on_data_come_with_their_fix(toy_recipe: Path) -> None:
    report = Report()
    make_plan(Request(str(toy_recipe), ["DATASETS.TEST", "('toy_train',)"], "torchvision"), report=report)
    [notice] = report.messages("notice")
    assert notice.startswith("toy_train: 4 images that are also in toy_train, which is trained on: id 1, 2, 3, 4\n  ")
