"""Whose names a file of weights has."""

from torchvision.models import resnet18

from scratch_det.weights.origin import origin_of


def test_libraries_are_told_by_names() -> None:
    assert origin_of(resnet18().state_dict()) == ("torchvision", False)
    assert origin_of(["proposal_generator.x", "backbone.fpn_output2.bias"]) == ("detectron2", True)
    assert origin_of(["conv1_w", "res2_0_branch1_w"]) == ("Detectron", False)
    assert origin_of(["encoder.weight"]) is None
