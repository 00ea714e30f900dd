"""MODEL_EMA: the moving average of the weights, which is kept, evaluated, saved and read beside the model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folder import NO_TEST, interrupted_after, is_same, lines, read, weights

from scratch_det import load
from scratch_det.conversion import convert_file
from scratch_det.diagnosis.command import evaluated_on, results_of, view_results
from scratch_det.diagnosis.data import Filter
from scratch_det.engine.checkpointer import read_checkpoint
from scratch_det.errors import ConfigError
from scratch_det.weights.origin import AVERAGE

Train = Callable[..., Path]
ON = ("MODEL_EMA.ENABLED", True)
FOUR = ("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 1, *ON)
CASCADE = ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)


def average(folder: Path, name: str = "model_final.pth") -> dict[str, torch.Tensor]:
    return read_checkpoint(folder / "checkpoints" / name)[AVERAGE]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(value.equal(other[key]) for key, value in one.items())


@pytest.mark.parametrize("decay", [0.999, 0.05])
def test_is_the_average_of_the_weights_after_each_iteration(decay: float, train: Train) -> None:
    folder = train(*FOUR, "MODEL_EMA.DECAY", decay, "MODEL.RESNETS.NORM", "BN", *NO_TEST, keep_last=0,
                   waive=("bn_has_images",))  # fmt: skip
    steps = [weights(folder, f"model_{number:07d}.pth") for number in range(3)] + [weights(folder)]
    expected = steps[0]
    for number, step in enumerate(steps[1:], start=1):
        stays = min(decay, number / (number + 9))
        expected = {key: stays * expected[key] + (1 - stays) * value for key, value in step.items()}
    found = average(folder)
    for key, value in found.items():
        if "num_batches" not in key:
            torch.testing.assert_close(value, expected[key])
    assert not same(found, steps[-1])


def test_the_training_is_the_same_without_it(train: Train) -> None:
    off, on = (train(*NO_TEST, *keys, name=str(len(keys))) for keys in ((), ON))
    assert same(weights(off), weights(on))
    assert lines(off)[0].keys() == lines(on)[0].keys()
    assert AVERAGE not in read_checkpoint(off / "checkpoints/model_final.pth")


def test_resumed_is_uninterrupted(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = (*FOUR, "SOLVER.AMP.ENABLED", True, "TEST.EVAL_PERIOD", 2)
    whole = train(*keys, name="whole", accumulate=2)
    with interrupted_after(monkeypatch, 3):
        train(*keys, name="parts", accumulate=2)
    assert is_same(train(*keys, name="parts", accumulate=2, resume=True), whole)
    assert same(average(whole.parent / "parts"), average(whole))
    assert read(whole, "result.json")["epochs"] == 2.67  # 4 times 2 of the 3 images that have objects


def test_is_evaluated_beside_the_model(train: Train) -> None:
    aug = ("TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", "(48,)")
    folder = train(*FOUR, *aug, "MODEL_EMA.DECAY", 0.0, "TEST.EVAL_PERIOD", 2)  # of DECAY 0 it is the model
    found = read(folder, "result.json")["metrics"]
    assert [*found] == ["bbox", "segm", "bbox_TTA", "segm_TTA", "bbox_EMA", "segm_EMA", "bbox_EMA_TTA", "segm_EMA_TTA"]
    assert all(found[task] == found[task.replace("_EMA", "")] for task in found)
    (during,) = (line for line in lines(folder) if line["iteration"] == 1 and "bbox/AP" in line)
    assert {key.partition("/")[0] for key in during if "/" in key} == {"bbox", "segm", "bbox_EMA", "segm_EMA"}
    results = "coco_instances_results.json"
    assert (folder / "inference_EMA" / results).read_bytes() == (folder / "inference" / results).read_bytes()
    assert (folder / "inference_EMA_TTA" / results).is_file()
    log = (folder / "log.txt").read_text()
    assert log.count(" box AP is ") == 2 * log.count(" the average of the weights: box AP is ") > 0
    assert " bbox_TTA |" in log.partition("per class:")[2]
    assert "EMA" not in log.partition("per class:")[2]


def test_several_test_sets(train: Train, coco_factory: Callable[..., Path]) -> None:
    coco_factory("other", seed=2)
    folder = train(*FOUR, "DATASETS.TEST", "('toy_val', 'other')")
    assert {name: {*found} for name, found in read(folder, "result.json")["metrics"].items()} == {
        name: {"bbox", "segm", "bbox_EMA", "segm_EMA"} for name in ("toy_val", "other")
    }
    assert (folder / "inference/other_EMA").is_dir()


def test_the_best_is_the_models(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """The AP of the average is higher throughout, and says nothing about model_best.pth."""
    scores = iter([10.0, 90.0, 30.0, 90.0, 20.0, 90.0, 20.0, 90.0])  # model, average, model, ...

    def evaluate(_: Any, *__: Any, **___: Any) -> dict[str, dict[str, float]]:
        return {"bbox": {"AP": next(scores)}}

    monkeypatch.setattr("scratch_det.evaluation.inference.evaluate_predictions", evaluate)
    folder = train(*FOUR, "TEST.EVAL_PERIOD", 1)
    assert read(folder, "checkpoints/index.json")["best"] == {"completed": 2, "ap": 30.0}
    assert read(folder, "result.json")["metrics"] == {"bbox": {"AP": 20.0}, "bbox_EMA": {"AP": 90.0}}


@pytest.mark.slow
def test_branches_and_a_run_that_begins_it_later(train: Train) -> None:
    whole = train(*FOUR, *NO_TEST, name="whole", keep_last=0)
    branch = {"branch_from": str(whole / "model_0000001.pth")}
    assert is_same(train(*FOUR, *NO_TEST, name="branch", **branch), whole)
    without = train(*FOUR, *NO_TEST, "MODEL_EMA.ENABLED", False, name="without", **branch)
    assert same(weights(without), weights(whole))
    late = train(*FOUR, *NO_TEST, "MODEL_EMA.DECAY", 0.5, name="late", branch_from=str(without / "model_0000002.pth"))
    ends = [weights(without, "model_0000002.pth"), weights(late)]
    for key, value in average(late).items():  # 0.25 = 3 / (3 + 9)
        torch.testing.assert_close(value, 0.25 * ends[0][key] + 0.75 * ends[1][key])


def test_a_switch_makes_a_cascade_of_it(train: Train) -> None:
    plain = train(*FOUR, *NO_TEST, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 20)
    cascade = train(*FOUR, *CASCADE, *NO_TEST, name="cascade", switch_from=str(plain / "model_0000001.pth"))
    assert average(cascade).keys() == weights(cascade).keys() != average(plain).keys()


def test_is_read_where_it_is_named(train: Train, tmp_path: Path) -> None:
    folder = train(*FOUR, "MODEL_EMA.DECAY", 0.9, backend="torchvision")
    final = str(folder / "checkpoints/model_final.pth")
    for source, expected in ((str(folder), weights(folder)), (f"{folder}#{AVERAGE}", average(folder))):
        assert same(load(source).model.state_dict(), expected)
    files = [folder / f"inference{end}/coco_instances_results.json" for end in ("", "_EMA")]
    model_finds, average_finds = (path.read_bytes() for path in files)
    assert model_finds != average_finds
    files[1].unlink()
    train("MODEL.WEIGHTS", f"{final}#{AVERAGE}", eval_only=True, backend="torchvision")
    alone = train("MODEL.WEIGHTS", f"{final}#{AVERAGE}", name="alone", eval_only=True, backend="torchvision")
    assert [evaluated_on(path) for path in (folder, alone)] == ["toy_val", "toy_val"]
    assert [results_of(folder, "toy_val", averaged) for averaged in (False, True)] == files
    its_own = alone / "inference_EMA" / files[0].name
    assert [results_of(alone, "toy_val", averaged) for averaged in (False, True)] == [its_own] * 2
    page = Path(view_results(Path(f"{folder}#{AVERAGE}"), None, "bbox", Filter(), tmp_path / "page"))
    assert f"#{AVERAGE} on toy_val" in page.read_text()
    assert [path.read_bytes() for path in files] == [model_finds, average_finds]
    assert read(folder, "inference_EMA/result.json")["weights"] == f"{final}#{AVERAGE}"
    convert_file(f"{folder}#{AVERAGE}", tmp_path / "converted.pth", "detectron2")
    converted = read_checkpoint(tmp_path / "converted.pth")["model"]
    assert converted["proposal_generator.rpn_head.conv.bias"].equal(average(folder)["rpn.head.conv.0.0.bias"])
    goes_on = train(*NO_TEST, "SOLVER.MAX_ITER", 1, "MODEL.WEIGHTS", final, name="goes_on", backend="torchvision")
    assert "left out model_ema" in (goes_on / "log.txt").read_text()


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_what_is_no_decay(decay: float, train: Train) -> None:
    with pytest.raises(ConfigError, match=r"MODEL_EMA\.DECAY is .*, expected 0 or more and below 1"):
        train(*ON, "MODEL_EMA.DECAY", decay)
