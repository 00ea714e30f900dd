"""Whole runs on a pretended card (pretended.py): no operator mixes devices, and what the CPU waits for is counted.

A run trains, is saved, stops, resumes and evaluates. ``COSTS`` has the most that an iteration of two images, and an
image that is evaluated, may cost; lower a number when it falls.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import ROOT, edit, name_points
from gpu.pretended import MixedDevices, OnCard, pretended_card
from run_folder import CLOCK, lines
from torch import Tensor

from scratch_det import backends
from scratch_det.engine.command import start
from scratch_det.engine.loop import Trainer
from scratch_det.engine.plan import Request

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: tests marked gpu say more")

BOTH = [pytest.param(name, marks=pytest.mark.detectron2 if name == "detectron2" else ()) for name in backends.BACKENDS]
AMP = ("SOLVER.AMP.ENABLED", True)
SYNCBN = [word for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
          for word in (f"MODEL.{part}.NORM", "SyncBN")]  # fmt: skip
CASCADE = ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)
KEYPOINTS = ("MODEL.KEYPOINT_ON", True, "MODEL.MASK_ON", False, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(16, 16)",
             "TEST.KEYPOINT_OKS_SIGMAS", "[0.1, 0.1, 0.1]")  # fmt: skip
VGG = ROOT / "configs/COCO-Detection/scratch_faster_rcnn_VGG16_11x_train_aug.yaml"
OF_VGG = ("MODEL.ANCHOR_GENERATOR.SIZES", "[[8, 16, 32]]", "MODEL.ROI_BOX_HEAD.NUM_CONV", 0)
TTA = ("TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", "(48, 64)", "TEST.AUG.MAX_SIZE", 96)
SMALL = ("SOLVER.MAX_ITER", 2, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
VARIANTS: dict[str, tuple[Any, ...]] = {
    "GN": (),
    "GN, bfloat16": AMP,
    "GN, float16, clipped": (*AMP, "SOLVER.CLIP_GRADIENTS.ENABLED", True),
    "SyncBN, bfloat16": (*SYNCBN, *AMP),
    "cascade": CASCADE,
    "cascade, bfloat16, test aug": (*CASCADE, *AMP, *TTA),
    "keypoints, test aug": (*KEYPOINTS, *TTA),
    "VGG": OF_VGG,
    "accumulation": ("SOLVER.IMS_PER_BATCH", 4, "SOLVER.BASE_LR", 0.01),
    "no objects": ("DATALOADER.FILTER_EMPTY_ANNOTATIONS", False),
    "cascade, no objects": (*CASCADE, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False),
}
KINDS = ("waits an iteration", "copies an iteration", "waits an image", "copies an image")
COSTS: dict[str, dict[str, tuple[int, ...]]] = {
    "torchvision": {
        "GN": (31, 6, 12, 6),
        "GN, bfloat16": (31, 6, 12, 6),
        "GN, float16, clipped": (31, 6, 12, 6),
        "SyncBN, bfloat16": (31, 6, 12, 6),
        "cascade, bfloat16, test aug": (39, 14, 14, 12),
        "keypoints, test aug": (28, 6, 32, 6),
        "VGG": (24, 6, 10, 6),
        "accumulation": (62, 12, 12, 6),
        "no objects": (29, 6, 12, 6),
        "cascade, no objects": (37, 10, 14, 12),
    },
    "detectron2": {
        "GN": (64, 30, 24, 15),
        "GN, bfloat16": (64, 30, 24, 15),
        "GN, float16, clipped": (64, 30, 24, 15),
        "SyncBN, bfloat16": (64, 30, 24, 15),
        "cascade, bfloat16, test aug": (106, 32, 35, 17),
        "keypoints, test aug": (57, 22, 55, 26),
        "VGG": (43, 11, 14, 6),
        "accumulation": (128, 60, 24, 15),
        "no objects": (54, 28, 24, 15),
        "cascade, no objects": (92, 30, 35, 17),
    },
}
MOST_LINES = 30  # of a message


@contextmanager
def counted(card: OnCard, owner: Any, name: str) -> Iterator[list[tuple[Counter[str], Counter[str]]]]:
    """Waits and copies of each call of ``owner.name``."""
    found, original = [], getattr(owner, name)

    def call(*arguments: Any, **keywords: Any) -> Any:
        card.clear()
        result = original(*arguments, **keywords)
        found.append((card.waits.copy(), card.copies.copy()))
        return result

    with patch.object(owner, name, call):
        yield found


@pytest.fixture
def run(toy_recipe: Path, small_model: list[str], datasets_root: Path, tmp_path: Path) -> Callable[..., Path]:
    """``run(variant, backend, device)``: the folder of a run that stopped after one of two iterations, and resumed."""
    edit(datasets_root / "toy_val/annotations.json", lambda content: content["images"].__delitem__(slice(2, None)))

    def both(variant: str, backend: str, device: str = "cuda") -> Path:
        if "objects" in variant:
            edit(datasets_root / "toy_train/annotations.json", lambda content: content["annotations"].clear())
        if "keypoints" in variant:
            for name in ("toy_train", "toy_val"):
                edit(datasets_root / name / "annotations.json", name_points)
        words = [*SMALL, *VARIANTS[variant], "MODEL.DEVICE", device, "OUTPUT_DIR", tmp_path / device]
        if variant == "VGG":
            words = [*small_model, "DATASETS.TRAIN", "('toy_train',)", "DATASETS.TEST", "('toy_val',)", *words]
        recipe = VGG if variant == "VGG" else toy_recipe
        accumulate = 2 if variant == "accumulation" else 1
        for flags in ({"stop_at": 1}, {"resume": True}):
            start(Request(str(recipe), [*map(str, words)], backend, accumulate=accumulate, **flags))
        return tmp_path / device

    return both


@pytest.mark.parametrize("variant", COSTS["torchvision"])
@pytest.mark.parametrize("backend", BOTH)
def test_costs_of_a_run(backend: str, variant: str, run: Callable[..., Path]) -> None:
    library = import_module(f"scratch_det.backends.{backend}")
    with (
        pretended_card(bfloat16="float16" not in variant) as card,
        counted(card, Trainer, "run_iteration") as iterations,
        counted(card, library, "predict") as images,
        patch("scratch_det.engine.loop.Metrics.show"),
    ):
        run(variant, backend)
    costs = [
        max((call[kind] for call in calls), key=Counter.total) for calls in (iterations, images) for kind in (0, 1)
    ]
    allowed = COSTS[backend][variant]
    for kind, found, most in zip(KINDS, costs, allowed, strict=True):
        sources = "".join(f"\n  {count} {source}" for source, count in found.most_common(MOST_LINES))
        assert found.total() <= most, f"{found.total()} {kind}, at most {most} expected, from:{sources}"
    if (now := tuple(found.total() for found in costs)) != allowed:
        warnings.warn(f"COSTS of {backend}, {variant} have fallen: {now} instead of {allowed}", stacklevel=1)


def test_computes_what_the_cpu_computes(run: Callable[..., Path]) -> None:
    """So the backward pass of the pretended card is torch's, up to the rounding of another RoIAlign."""
    no_clock = dict.fromkeys(CLOCK, 0)
    on_cpu = lines(run("cascade", "torchvision", "cpu"))[0]
    with pretended_card():
        on_card = lines(run("cascade", "torchvision"))[0]
    assert {**on_card, **no_clock} == pytest.approx({**on_cpu, **no_clock}, rel=1e-4)


class TestOnCard:
    """What CUDA would refuse, and what it would wait for."""

    @pytest.mark.parametrize(
        "refused",
        [
            lambda card: card + torch.ones(3),
            lambda card: torch.cat([card, torch.ones(3)]),
            lambda card: torch.ones(3)[card > 0],
            lambda card: card.index_put_((card > 0,), torch.ones(3)),
            lambda card: card.numpy(),
            lambda card: np.asarray(card),
        ],
    )
    def test_refuses(self, refused: Callable[[Tensor], Any]) -> None:
        with pretended_card():
            card = torch.ones(3, device="cuda")
            with pytest.raises(MixedDevices):
                refused(card)

    @pytest.mark.parametrize(
        ("action", "waits", "copies"),
        [
            (lambda card: card * 2 + torch.tensor(1.0), 0, 0),
            (lambda card: card.sum().item(), 1, 0),
            (lambda card: bool((card > 0).all()), 1, 0),
            (lambda card: card.tolist(), 1, 0),
            (lambda card: card.cpu(), 1, 0),
            (lambda card: card[card > 0], 1, 0),
            (lambda card: card.nonzero(), 1, 0),
            (lambda card: card.masked_fill(card > 0, 0), 0, 0),
            (lambda card: card.index_put_((card > 0,), card.new_zeros(())), 0, 0),
            (lambda card: torch.tensor([1.0, 2.0], device="cuda"), 0, 1),
            (lambda card: torch.ones(3).to("cuda", non_blocking=True), 0, 1),
            (lambda card: torch.ones(3).pin_memory().to("cuda"), 0, 1),
            (lambda card: torch.ones(3).pin_memory().to("cuda", non_blocking=True), 0, 0),
            (lambda card: card.copy_(torch.ones(3)), 0, 1),
            (lambda card: card[torch.tensor([0, 1])], 0, 1),
            (lambda card: torch.zeros(3, device="cuda") + torch.arange(3, device="cuda"), 0, 0),
        ],
    )
    def test_counts(self, action: Callable[[Tensor], Any], waits: int, copies: int) -> None:
        with pretended_card() as card:
            values = torch.ones(3, device="cuda")
            card.clear()
            action(values)
            assert (card.waits.total(), card.copies.total()) == (waits, copies), (card.waits, card.copies)

    @pytest.mark.parametrize(("bfloat16", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
    def test_casts_as_cuda(self, bfloat16: bool, expected: torch.dtype) -> None:
        """CUDA's lists: products in half precision, norms and softmax in float32."""
        with pretended_card(bfloat16), torch.autocast("cuda", expected):
            x = torch.ones(2, 32, 4, 4, device="cuda", requires_grad=True)
            assert (x.flatten(1) @ x.flatten(1).T).dtype == expected
            assert torch.nn.functional.group_norm(x.to(expected), 32).dtype == torch.float32
            assert x.device == torch.device("cuda", 0)
