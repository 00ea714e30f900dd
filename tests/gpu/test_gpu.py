"""What only a GPU can say on whether training is right, most important first (conftest.py says how to run it)."""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from gpu.kit import CASCADE, DEVICE, GN, IS_SMALL, KEYPOINTS, SYNCBN, first_batch, state_of, step
from hotcoco import mask as mask_api
from run_folder import lines, weights
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from scratch_det.backends import torchvision as backend
from scratch_det.data.dataset import EvaluationSet
from scratch_det.data.transforms import PER_OBJECT
from scratch_det.distributed.devices import SHARE_GPUS
from scratch_det.engine.plan import Plan
from scratch_det.modeling import norm
from scratch_det.modeling.ops import paste_masks
from scratch_det.weights.read import read_checkpoint

ITERATIONS = 4 if IS_SMALL else 20
CLOSE = 1e-3


@pytest.fixture
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions without TF32, which is torch's choice for them; matrix products have none."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def distance(one: Path, other: Path) -> float:
    """The largest difference of two runs' final weights."""
    ours, theirs = weights(one), weights(other)
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)


@pytest.mark.gpu(seconds=150)
def test_whole_run_same_twice_and_resumed(train: Callable[..., Path], record_property: Callable) -> None:
    """Train, evaluate, draw; the same again; and with a stop half-way. Weights may differ by atomic sums' order."""
    keys = ("SOLVER.MAX_ITER", ITERATIONS, "DATASETS.TEST", "('drawn_val',)")
    whole, again = (train(GN, *keys, name=name) for name in ("whole", "again"))
    for flags in ({"stop_at": ITERATIONS // 2}, {"resume": True}):
        resumed = train(GN, *keys, name="resumed", **flags)
    first, second = distance(whole, again), distance(whole, resumed)
    record_property("weights_apart_same_twice", first)
    record_property("weights_apart_resumed", second)
    loss = lines(whole)[0]["total_loss"]
    record_property("loss", round(loss, 4))
    assert (whole / "result.json").exists()
    assert math.isfinite(loss)
    assert not IS_SMALL or first == second == 0


@pytest.mark.gpu(seconds=90)
@pytest.mark.parametrize("recipe", [GN, CASCADE, KEYPOINTS], ids=["GN", "cascade", "keypoints"])
@pytest.mark.usefixtures("float32")
def test_losses_are_the_cpus(recipe: str, plan: Callable[..., Plan], record_property: Callable) -> None:
    """Same weights, same image, nothing sampled at random."""
    every = ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 300_000, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 4_000,
             "SOLVER.IMS_PER_BATCH", 1)  # fmt: skip
    made = plan(recipe, *every)
    here, there = state_of(made), state_of(made, "cpu")
    there.model.load_state_dict(here.model.state_dict())
    batch = first_batch(made)
    with torch.no_grad():
        ours, theirs = ({name: loss.item() for name, loss in backend.losses(state.model, batch).items()}
                        for state in (here, there))  # fmt: skip
    apart = {name: abs(ours[name] - theirs[name]) / max(abs(theirs[name]), CLOSE) for name in theirs}
    record_property("apart", float(f"{max(apart.values()):.2g}"))
    assert max(apart.values()) < CLOSE, apart


@pytest.mark.gpu(seconds=60)
def test_group_of_one_process(plan: Callable[..., Plan], record_property: Callable) -> None:
    """NCCL's collectives, and DistributedDataParallel around every head, with and without objects."""
    library = "gloo" if IS_SMALL else "cpu:gloo,cuda:nccl"
    dist.init_process_group(library, store=dist.HashStore(), rank=0, world_size=1)
    try:
        values = torch.ones(3, device=DEVICE)
        dist.all_reduce(values)
        dist.barrier()
        assert values.tolist() == [1, 1, 1]
        for recipe in (GN, CASCADE, KEYPOINTS):
            made = plan(recipe)
            state, batch = state_of(made), first_batch(made)
            state.parallel = DistributedDataParallel(state.model, gradient_as_bucket_view=True)
            without = [{key: value[:0] if key in PER_OBJECT else value for key, value in one.items()} for one in batch]
            losses = [step(state, samples) for samples in (batch, without, batch)]
            record_property(Path(recipe).stem, " ".join(f"{loss:.3f}" for loss in losses))
            assert all(map(math.isfinite, losses))
    finally:
        dist.destroy_process_group()


@pytest.mark.gpu(seconds=120)
@pytest.mark.parametrize("recipe", [GN, SYNCBN], ids=["GN", "SyncBN"])
def test_two_processes_on_one_card(
    recipe: str, words: Callable, train: Callable[..., Path], tmp_path: Path, record_property: Callable
) -> None:
    """gloo carries the tensors, since NCCL refuses one card twice; as one process with the same images."""
    keys = ("SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 2)
    command = f"tools/train_net.py --config-file {recipe} --num-gpus 2 --backend torchvision".split()
    environment = {**os.environ, SHARE_GPUS: "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, *command, *words(*keys, name="two")], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-1000:]
    loss = lines(tmp_path / "two")[0]["total_loss"]
    record_property("loss", round(loss, 4))
    assert math.isfinite(loss)
    if recipe == GN:
        one = lines(train(recipe, *keys, name="one", accumulate=2))[0]["total_loss"]
        record_property("one_process", round(one, 4))
        assert loss == pytest.approx(one, rel=0.02)  # of two iterations, with TF32


@contextmanager
def a_pair_of_ranks() -> Iterator[None]:
    """This process and another one with the same values."""

    def all_gather(rows: list[Tensor], own: Tensor) -> None:
        for row in rows:
            row.copy_(own)

    with (
        patch.object(dist, "is_initialized", return_value=True),
        patch.object(dist, "get_world_size", return_value=2),
        patch.object(dist, "all_gather", all_gather),
        patch.object(dist, "all_reduce", lambda values: values.mul_(2)),
    ):
        yield


def normalised(devices: tuple[str, ...], dtype: torch.dtype) -> list[Tensor]:
    """SyncBN's output, gradients and statistics; ``devices``: those on which it takes torch's kernels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 64, 25, 21, generator=generator).to(DEVICE, dtype).requires_grad_()
    slope = torch.randn(4, 64, 25, 21, generator=generator).to(DEVICE, dtype)
    layer = norm.SyncBatchNorm(64).to(DEVICE)
    with a_pair_of_ranks(), patch.object(norm, "HAVE_KERNELS", devices):
        y = layer(x)
        (y * slope).sum().backward()
    return [y.detach(), x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var]


@pytest.mark.gpu(seconds=30)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_kernels_of_syncbn_are_our_arithmetic(dtype: torch.dtype, record_property: Callable) -> None:
    ours, kernels = normalised((), dtype), normalised(("cuda",), dtype)
    apart = [float((one.float() - other.float()).abs().max() / other.float().abs().max())
             for one, other in zip(ours, kernels, strict=True)]  # fmt: skip
    record_property("apart", float(f"{max(apart):.2g}"))
    assert max(apart) < (1e-4 if dtype == torch.float32 else 2e-2), apart


@pytest.mark.gpu(seconds=60)
@pytest.mark.usefixtures("float32")
def test_masks_are_the_cpus(plan: Callable[..., Plan], record_property: Callable) -> None:
    """Masks in the same boxes, pasted into the image, but for pixels that are as near as rounding to the border."""
    made = plan(GN, "DATASETS.TEST", "('drawn_val',)")
    here, there = state_of(made).model, state_of(made, "cpu").model
    there.load_state_dict(here.state_dict())
    batch = [EvaluationSet(made.cfg, made.test[0])[0]]
    found = backend.detect(there, batch)
    size = tuple(batch[0]["image"].shape[1:])
    ours, theirs = (paste_masks(backend.shapes(model, batch, found)[0]["masks"], found[0]["boxes"], *size)
                    for model in (here, there))  # fmt: skip
    others = [pixels(one, other) for one, other in zip(ours, theirs, strict=True)]
    record_property("masks", len(others))
    record_property("other_masks", sum(map(bool, others)))
    record_property("other_pixels", sum(others))
    assert sum(others) <= CLOSE * len(others) * size[0] * size[1]


def pixels(one: dict[str, Any], other: dict[str, Any]) -> int:
    """How many pixels of two RLEs differ."""
    ours, theirs = (mask_api.decode(mask) for mask in (one, other))
    return int((ours != theirs).sum())


@pytest.mark.gpu(seconds=40)
def test_float16(train: Callable[..., Path], record_property: Callable) -> None:
    """A card without bfloat16: the loss is scaled, gradients are clipped after that."""
    keys = ("SOLVER.AMP.ENABLED", True, "SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.MAX_ITER", ITERATIONS)
    with patch("torch.cuda.is_bf16_supported", return_value=False):
        folder = train(GN, *keys)
    loss = lines(folder)[0]["total_loss"]
    record_property("loss", round(loss, 4))
    record_property("scale", read_checkpoint(folder / "checkpoints/model_final.pth")["scaler"].get("scale"))
    assert math.isfinite(loss)
