"""What a file of weights says of itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scratch_det.errors import UserError
from scratch_det.weights.origin import read_weights
from scratch_det.weights.pixels import Pixels

MODEL = {"layer1.0.conv1.weight": torch.ones(2, 2)}
PIXELS = {"format": "BGR", "mean": [1.0, 2.0, 3.0], "std": [1, 1, 1]}


@pytest.mark.parametrize("change", [{"format": "GBR"}, {"mean": [1.0, 2.0]}, {"std": [1, 1, 0]}, {"mean": "abc"}, {}])
def test_pixels_that_are_none(change: dict[str, Any], tmp_path: Path) -> None:
    """A malformed statement is an error, not the recipe's pixels in silence."""
    path = tmp_path / "a.pth"
    torch.save({"model": MODEL, "pixels": PIXELS}, path)
    assert read_weights(path).pixels == Pixels("BGR", (1.0, 2.0, 3.0), (1.0, 1.0, 1.0))
    torch.save({"model": MODEL, "pixels": PIXELS | change if change else "BGR"}, path)
    with pytest.raises(UserError, match=r"a\.pth has pixels .*, expected format RGB or BGR, mean and std, three"):
        read_weights(path)


@pytest.mark.parametrize(("change", "found"), [(torch.Tensor.to_sparse, "layout torch.sparse_coo"),
                                               (lambda tensor: tensor.to("meta"), "a meta tensor")])  # fmt: skip
def test_tensors_without_all_their_numbers(change: Callable, found: str, tmp_path: Path) -> None:
    torch.save({"model": {name: change(tensor) for name, tensor in MODEL.items()}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=rf"a\.pth has .*{found}.* in layer1\.0\.conv1\.weight, expected finite"):
        read_weights(tmp_path / "a.pth")
