"""The torchvision backend against numbers that detectron2 computed, stored in tests/assets/detectron2_values.json.

Needs no detectron2; where it is installed, the stored numbers are compared with it.
"""

import json
from typing import Any

import pytest
import torch
from backends.detectron2_values import CASES, FILE, plain

STORED = json.loads(FILE.read_text())


def close(found: Any, expected: Any, path: str = "", rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Raise AssertionError with the path of the first number that differs."""
    if "image" in path.rpartition("/")[2]:
        return same_detections(found, expected, path)
    if isinstance(expected, dict):
        assert set(found) == set(expected), path
        for name in expected:
            close(
                found[name], expected[name], f"{path}/{name}", *((2e-3, atol) if name == "gradients" else (rtol, atol))
            )
        return
    torch.testing.assert_close(
        torch.tensor(found),
        torch.tensor(expected),
        rtol=rtol,
        atol=atol,
        check_dtype=False,
        msg=lambda m: f"{path}: {m}",
    )


def same_detections(found: dict[str, Any], expected: dict[str, Any], path: str) -> None:
    """Each stored detection is there; in any order, as scores may be equal to the last bit."""
    assert len(found["scores"]) == len(expected["scores"]), path
    boxes, free = torch.tensor(found["boxes"]), set(range(len(found["scores"])))
    for number, box in enumerate(expected["boxes"]):
        apart = (boxes - torch.tensor(box)).abs().amax(1)
        same = [i for i in free if apart[i] < 0.02 and found["labels"][i] == expected["labels"][number]]
        assert same, f"{path}: no detection near {box} of class {expected['labels'][number]}"
        one = min(same, key=lambda i: abs(found["scores"][i] - expected["scores"][number]))
        free.remove(one)
        assert found["scores"][one] == pytest.approx(expected["scores"][number], rel=1e-3), path
        if "masks" in expected:
            assert found["masks"][one] == pytest.approx(expected["masks"][number], abs=3), path
        if "keypoints" in expected:
            close(found["keypoints"][one], expected["keypoints"][number], f"{path}/keypoints", 1e-3, 0.02)


def test_every_case_is_stored() -> None:
    assert list(STORED) == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_torchvision_backend(name: str) -> None:
    close(plain(CASES[name].ours()), STORED[name], name)


@pytest.mark.detectron2
@pytest.mark.parametrize("name", CASES)
def test_stored_numbers_are_detectron2s(name: str) -> None:
    close(plain(CASES[name].theirs()), STORED[name], name)
