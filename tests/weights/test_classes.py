"""A detector's weights for other classes."""

from pathlib import Path

import pytest
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from scratch_det import backends
from scratch_det.config.load import load_config
from scratch_det.errors import UserError
from scratch_det.weights.classes import with_new_classes
from scratch_det.weights.load import load_weights
from scratch_det.weights.origin import Weights

LIBRARIES = ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)]
CLASS_LAYERS = {"torchvision": ("cls_score", "box_predictor.bbox_pred", "mask_fcn_logits"),
                "detectron2": ("cls_score", "box_predictor.bbox_pred", "mask_head.predictor")}  # fmt: skip


def detector(recipe: Path, library: str, names: list[str], *keys: object) -> tuple[CfgNode, nn.Module]:
    """The recipe for classes of these names, and its model."""
    overrides = ["MODEL.ROI_HEADS.NUM_CLASSES", len(names), "MODEL.MASK_ON", True, *keys]
    cfg = load_config(recipe, overrides, backends.defaults(library)).cfg
    cfg.DATASETS.CLASS_NAMES, cfg.MODEL.DEVICE = names, "cpu"
    torch.manual_seed(len(names))
    return cfg, backends.load(library).build(cfg)


def rows(tensor: Tensor, library: str, layer: str, count: int) -> list[Tensor]:
    """What belongs to each class; the background comes last."""
    has_background = library == "torchvision" or layer == "cls_score"
    parts = list(tensor.chunk(count + has_background))
    return parts[1:] + parts[:1] if library == "torchvision" else parts


@pytest.mark.parametrize("library", LIBRARIES)
def test_rows_of_equal_names_are_copied(library: str, toy_recipe: Path, tmp_path: Path) -> None:
    before, after = ["cat", "dog", "bird"], ["dog", "horse", "cat", "car"]
    old = detector(toy_recipe, library, before)[1].state_dict()
    torch.save({"model": old, "classes": before}, tmp_path / "a.pth")
    cfg, model = detector(toy_recipe, library, after)
    random = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r"has 3 classes \(cat, dog, bird\), the data 4 \(dog, h.*NEW_CLASSES True"):
        load_weights(model, tmp_path / "a.pth", library, cfg)
    cfg.MODEL.WEIGHTS_NEW_CLASSES = True
    said = load_weights(model, tmp_path / "a.pth", library, cfg)
    assert "of 4 classes, 2 start at random in 6 tensors; rows of 2 are the file's (dog, cat)" in said
    new, found = model.state_dict(), set()
    for name, value in new.items():
        layer = next((one for one in CLASS_LAYERS[library] if f"{one}." in name), None)
        if layer is None:
            assert value.equal(old[name]), name
            continue
        found.add(layer)
        theirs, ours = rows(old[name], library, layer, 3), rows(value, library, layer, 4)
        mine = rows(random[name], library, layer, 4)
        assert ours[0].equal(theirs[1])
        assert ours[2].equal(theirs[0])
        assert ours[1].equal(mine[1])
        assert ours[3].equal(mine[3])
        assert len(ours) == 4 or ours[4].equal(theirs[3])  # the background
    assert found == set(CLASS_LAYERS[library])


def test_the_same_names_in_another_order(toy_recipe: Path, tmp_path: Path) -> None:
    old = detector(toy_recipe, "torchvision", ["cat", "dog"])[1]
    torch.save({"model": old.state_dict(), "classes": ["cat", "dog"]}, tmp_path / "a.pth")
    cfg, model = detector(toy_recipe, "torchvision", ["dog", "cat"])
    for cfg.MODEL.WEIGHTS_NEW_CLASSES, evaluates in ((False, False), (True, True)):
        with pytest.raises(UserError, match="the same in another order"):
            load_weights(model, tmp_path / "a.pth", "torchvision", cfg, to_evaluate=evaluates)
    load_weights(model, tmp_path / "a.pth", "torchvision", cfg)
    scores = model.state_dict()["roi_heads.box_predictor.cls_score.bias"]
    assert scores[[0, 2, 1]].equal(old.state_dict()["roi_heads.box_predictor.cls_score.bias"])


def test_without_names_the_numbers_count(toy_recipe: Path, tmp_path: Path) -> None:
    torch.save({"model": detector(toy_recipe, "torchvision", ["a", "b"])[1].state_dict()}, tmp_path / "a.pth")
    cfg, model = detector(toy_recipe, "torchvision", ["x", "y"])
    load_weights(model, tmp_path / "a.pth", "torchvision", cfg)
    cfg, model = detector(toy_recipe, "torchvision", ["x", "y", "z"], "MODEL.WEIGHTS_NEW_CLASSES", True)
    said = load_weights(model, tmp_path / "a.pth", "torchvision", cfg)
    assert "3 start at random in 6 tensors, as the file does not name its classes" in said


def test_one_box_for_all_classes_stays(tmp_path: Path) -> None:
    """A cascade's in detectron2, where a file of one class has as many rows with or without."""
    predictor = "roi_heads.box_predictor.0."
    old = {f"{predictor}{name}.weight": torch.ones(rows, 3) for name, rows in (("cls_score", 2), ("bbox_pred", 4))}
    new = {f"{predictor}{name}.weight": torch.zeros(rows, 3) for name, rows in (("cls_score", 3), ("bbox_pred", 4))}
    weights = Weights(tmp_path, old, "detectron2", True, classes=("cat",))
    found, said = with_new_classes(weights, ["dog", "cat"], new)
    assert found[f"{predictor}bbox_pred.weight"].equal(torch.ones(4, 3))
    assert found[f"{predictor}cls_score.weight"][:, 0].tolist() == [0, 1, 1]
    assert said.startswith("of 2 classes, 1 start at random in 1 tensors; ")
