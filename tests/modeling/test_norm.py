"""Normalisation layers: SyncBN in two processes against one process with the same values.

torch's kernels of SyncBN exist on GPUs only: here functions of their meaning stand for them.
"""

from collections.abc import Callable
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scratch_det.backends import torchvision as backend
from scratch_det.config.load import load_config
from scratch_det.data.masks import Masks
from scratch_det.modeling import norm as module
from scratch_det.modeling.norm import NORMS, SyncBatchNorm

CHANNELS, SIDE, STEPS = 4, 3, 2
SIZES = {"even": (2, 2), "uneven": (3, 1), "first empty": (0, 3), "second empty": (2, 0), "both empty": (0, 0)}
KINDS = {  # what a layer is made with, the type of its input, mean and standard deviation of that
    "float32": ({}, torch.float32, 1.0, 2.0),
    "float64": ({}, torch.float64, 1.0, 2.0),
    "cumulative": ({"momentum": None}, torch.float64, 1.0, 2.0),
    "bare": ({"affine": False, "track_running_stats": False}, torch.float64, 1.0, 2.0),
    "bfloat16": ({}, torch.bfloat16, 1.0, 2.0),
    "far": ({}, torch.float32, 10_000.0, 1.0),
}
TOLERANCES = {"float32": 2e-6, "bfloat16": 3e-2, "far": 2e-3}  # of the others: 1e-12
DIVIDED = {"uneven": (3, 1), "first empty": (0, 3)}  # the sizes that DistributedDataParallel is tried with


def batch(size: int, seed: int, kind: str) -> tuple[Tensor, Tensor]:
    """Input and the coefficients of its loss, both [size, C, H, W]."""
    _, dtype, mean, std = KINDS[kind]
    generator = torch.Generator().manual_seed(seed)
    x, coefficients = torch.randn((2, size, CHANNELS, SIDE, SIDE), generator=generator)
    return (mean + std * x).to(dtype), coefficients.to(dtype)


def layer(make: Callable[..., nn.Module], kind: str) -> nn.Module:
    options, dtype, *_ = KINDS[kind]
    norm = make(CHANNELS, **options).to(torch.promote_types(dtype, torch.float32))
    for place, parameter in enumerate(norm.parameters()):
        nn.init.uniform_(parameter, 0.5, 1.5, generator=torch.Generator().manual_seed(place))
    return norm


def trained(norm: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Outputs and gradients of one step per batch (the weights stay), and what the layer holds at the end."""
    outputs, gradients = [], []
    for x, coefficients in batches:
        x.requires_grad_()
        output = norm(x)
        (output * coefficients).sum().backward()
        outputs.append(output.detach())
        gradients.append(x.grad)
    return {
        "outputs": outputs,
        "gradients": gradients,
        "weights": [parameter.grad for parameter in norm.parameters()],
        "state": norm.state_dict(),
    }


def network(make: Callable[..., nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    parts = [nn.Conv2d(CHANNELS, 6, 3), make(6), nn.ReLU(), nn.Conv2d(6, 4, 1), make(4)]
    return nn.Sequential(*parts).double()


def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    assert x.numel()
    assert x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    var, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), (0, 2, 3), correction=0)
    return mean, (var + eps).rsqrt()


def batch_norm_gather_stats_with_counts(
    x: Tensor, means: Tensor, inverse_stds: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float,
    eps: float, counts: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rank by rank, as the kernel does: a first count of 0 would be a division by 0."""
    assert running_mean.dtype == running_var.dtype == means.dtype == counts.dtype
    number, mean, squares = torch.zeros_like(counts[0]), torch.zeros_like(means[0]), torch.zeros_like(means[0])
    for count, own_mean, inverse_std in zip(counts, means, inverse_stds, strict=True):
        factor = 1 / (number + count)
        squares += (inverse_std**-2 - eps) * count + (mean - own_mean) ** 2 * number * count * factor
        mean = number * factor * mean + count * factor * own_mean
        number = number + count
    running_mean.copy_((1 - momentum) * running_mean + momentum * mean)
    running_var.copy_((1 - momentum) * running_var + momentum * squares / (number - 1))
    return mean, (squares / number + eps).rsqrt()


def batch_norm_elemt(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse_std: Tensor, eps: float) -> Tensor:
    mean, inverse_std, weight, bias = (one[:, None, None] for one in (mean, inverse_std, weight, bias))
    return ((x.to(mean.dtype) - mean) * inverse_std * weight + bias).to(x.dtype)


def batch_norm_backward_reduce(
    grad: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor, *wanted: bool
) -> tuple[Tensor, ...]:
    assert wanted == (True, True, True)
    assert grad.is_contiguous()
    from_mean = x.to(mean.dtype) - mean[:, None, None]
    sum_dy, sum_dy_xmu = (values.to(mean.dtype).sum((0, 2, 3)) for values in (grad, grad * from_mean))
    return sum_dy, sum_dy_xmu, sum_dy_xmu * inverse_std, sum_dy


def batch_norm_backward_elemt(
    grad: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor, sum_dy: Tensor, sum_dy_xmu: Tensor,
    counts: Tensor,
) -> Tensor:  # fmt: skip
    assert counts.dtype == torch.int32
    assert counts.is_contiguous()
    number = counts.sum()
    slope, along_std = inverse_std * weight, inverse_std**2 * sum_dy_xmu / number
    mean, slope, along_std, along_mean = (one[:, None, None] for one in (mean, slope, along_std, sum_dy / number))
    return ((grad - along_mean - (x.to(mean.dtype) - mean) * along_std) * slope).to(x.dtype)


KERNELS = (batch_norm_stats, batch_norm_gather_stats_with_counts, batch_norm_elemt, batch_norm_backward_reduce,
           batch_norm_backward_elemt)  # fmt: skip
WAYS = {"own": (), "kernels": ("cpu",)}  # the devices that have kernels
CALLS: list[str] = []


def counted(kernel: Callable) -> Callable:
    return lambda *given: (CALLS.append(kernel.__name__), kernel(*given))[1]


def run_process(rank: int, folder: Path) -> None:
    """One of two processes: every case, its results into ``folder``."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=300)
    )
    results: dict[Any, Any] = {}
    for kernel in KERNELS:
        setattr(torch, kernel.__name__, counted(kernel))
    for way, name, kind in product(WAYS, SIZES, KINDS):
        module.HAVE_KERNELS = WAYS[way]
        batches = [batch(SIZES[name][rank], 10 * step + rank, kind) for step in range(STEPS)]
        results[way, name, kind] = trained(layer(SyncBatchNorm, kind), batches)
        results[way, name, kind, "calls"] = [*CALLS]
        CALLS.clear()
    module.HAVE_KERNELS = WAYS["own"]
    for name, sizes in DIVIDED.items():
        model = DistributedDataParallel(network(SyncBatchNorm))
        x, coefficients = batch(sizes[rank], rank, "float64")
        (model(x) * coefficients[..., :1, :1]).sum().backward()
        results[name, "divided"] = [parameter.grad for parameter in model.parameters()]
    evaluated = layer(SyncBatchNorm, "float64").eval()
    if rank == 0:  # the other one would never answer
        results["evaluation"] = trained(evaluated, [batch(size, 0, "float64") for size in (2, 0)])
    torch.save(results, folder / f"{rank}.pth")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """Results of both processes by (way, name of the sizes, kind)."""
    folder = tmp_path_factory.mktemp("two_processes")
    torch.multiprocessing.spawn(run_process, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pth") for rank in range(2)]


def joined(sizes: tuple[int, ...], step: int, kind: str) -> tuple[Tensor, Tensor]:
    parts = [batch(size, 10 * step + rank, kind) for rank, size in enumerate(sizes)]
    x, coefficients = (torch.cat(part) for part in zip(*parts, strict=True))
    return x, coefficients


class TestTwoProcesses:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", [name for name in SIZES if any(SIZES[name])])
    @pytest.mark.parametrize("way", WAYS)
    def test_are_one_process_with_both_batches(self, way: str, name: str, kind: str, two_processes: list[dict]) -> None:
        first, second = (results[way, name, kind] for results in two_processes)
        batches = [joined(SIZES[name], step, kind) for step in range(STEPS)]
        exact = trained(layer(nn.BatchNorm2d, kind).double(), [(x.detach().double(), c.double()) for x, c in batches])
        tolerance = TOLERANCES.get(kind, 1e-12)

        def close(found: Tensor, expected: Tensor) -> None:
            torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)

        for key in ("outputs", "gradients"):
            for step in range(STEPS):
                assert first[key][step].dtype == second[key][step].dtype == KINDS[kind][1]
                close(torch.cat([first[key][step], second[key][step]]), exact[key][step])
        for found, other, expected in zip(first["weights"], second["weights"], exact["weights"], strict=True):
            tolerance = 10 * TOLERANCES.get(kind, 1e-12)  # sums over up to 72 values
            close(found + other, expected)
        assert first["state"].keys() == second["state"].keys() == exact["state"].keys()
        for key, expected in exact["state"].items():
            if way == "own" or all(SIZES[name]):  # a rank without values computes them in another way
                assert first["state"][key].equal(second["state"][key])
            close(second["state"][key], expected)
            close(first["state"][key], expected)

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("name", SIZES)
    def test_kernels_are_used_where_there_are_some(self, name: str, way: str, two_processes: list[dict]) -> None:
        for rank, results in enumerate(two_processes):
            has_any = WAYS[way] and SIZES[name][rank]
            assert results[way, name, "bfloat16", "calls"] == [kernel.__name__ for kernel in KERNELS if has_any] * STEPS
            assert not results[way, name, "cumulative", "calls"]

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("way", WAYS)
    def test_both_empty_change_nothing(self, way: str, kind: str, two_processes: list[dict]) -> None:
        before = layer(SyncBatchNorm, kind).state_dict()
        for results in two_processes:
            found = results[way, "both empty", kind]
            assert all(value.shape == (0, CHANNELS, SIDE, SIDE) for value in found["outputs"] + found["gradients"])
            assert all(gradient.eq(0).all() for gradient in found["weights"])
            assert all(value.equal(before[key]) for key, value in found["state"].items())

    @pytest.mark.parametrize("name", DIVIDED)
    def test_data_parallel_gradients_are_the_mean_over_processes(self, name: str, two_processes: list[dict]) -> None:
        model = network(nn.BatchNorm2d)
        x, coefficients = joined(DIVIDED[name], 0, "float64")
        ((model(x) * coefficients[..., :1, :1]).sum() / 2).backward()
        for results in two_processes:
            for found, parameter in zip(results[name, "divided"], model.parameters(), strict=True):
                torch.testing.assert_close(found, parameter.grad, rtol=1e-10, atol=1e-12)

    def test_evaluation_needs_no_other_process(self, two_processes: list[dict]) -> None:
        found = two_processes[0]["evaluation"]
        expected = trained(layer(nn.BatchNorm2d, "float64").eval(), [batch(size, 0, "float64") for size in (2, 0)])
        for key in ("outputs", "gradients", "weights"):
            assert all(a.equal(b) for a, b in zip(found[key], expected[key], strict=True)), key


class TestOneProcess:
    @pytest.mark.parametrize("training", [True, False])
    def test_is_batch_norm(self, training: bool) -> None:
        batches = [batch(3, step, "float32") for step in range(STEPS)]
        found, expected = (
            trained(layer(make, "float32").train(training), [(x.detach().clone(), c) for x, c in batches])
            for make in (SyncBatchNorm, nn.BatchNorm2d)
        )
        for key in ("outputs", "gradients", "weights"):
            assert all(a.equal(b) for a, b in zip(found[key], expected[key], strict=True)), key
        assert all(value.equal(expected["state"][key]) for key, value in found["state"].items())

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("kind", ["float32", "cumulative", "bfloat16"])
    def test_an_empty_batch_is_connected_and_not_counted(self, kind: str, training: bool) -> None:
        norm = layer(SyncBatchNorm, kind).train(training)
        before = {key: value.clone() for key, value in norm.state_dict().items()}
        found = trained(norm, [batch(0, 0, kind)])
        assert found["outputs"][0].shape == found["gradients"][0].shape == (0, CHANNELS, SIDE, SIDE)
        assert found["outputs"][0].dtype == KINDS[kind][1]
        assert [gradient.tolist() for gradient in found["weights"]] == [[0.0] * CHANNELS] * 2
        assert all(value.equal(before[key]) for key, value in found["state"].items())

    def test_checkpoints_are_those_of_batch_norm(self) -> None:
        sync, plain = SyncBatchNorm(CHANNELS), layer(nn.BatchNorm2d, "float32")
        trained(plain, [batch(2, 0, "float32")])
        sync.load_state_dict(plain.state_dict())
        nn.BatchNorm2d(CHANNELS).load_state_dict(sync.state_dict())
        assert all(value.equal(plain.state_dict()[key]) for key, value in sync.state_dict().items())

    def test_a_model_trains_on_images_without_objects(self, toy_recipe: Path) -> None:
        parts = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
        overrides = [word for part in parts for word in (f"MODEL.{part}.NORM", "SyncBN")]
        torch.manual_seed(0)
        model = backend.build(load_config(toy_recipe, [*overrides, "MODEL.ROI_HEADS.NUM_CLASSES", "3"]).cfg)
        norms = [module for module in model.modules() if isinstance(module, SyncBatchNorm)]
        assert {type(norm) for norm in model.roi_heads.mask_head.modules()} & {SyncBatchNorm}
        empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        image = {"image": torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8), "height": 64, "width": 64}
        losses = backend.losses(model, [{**image, **empty, "masks": Masks.read([])}] * 2)
        total = sum(losses.values())
        total.backward()
        assert total.isfinite()
        assert all(norm.weight.grad.isfinite().all() and norm.bias.grad.isfinite().all() for norm in norms)


def test_every_norm_is_built_from_its_number_of_channels() -> None:
    assert {name: type(make(32)).__name__ for name, make in NORMS.items()} == {
        "": "Identity",
        "GN": "GroupNorm",
        "BN": "BatchNorm2d",
        "SyncBN": "SyncBatchNorm",
        "FrozenBN": "FrozenBatchNorm2d",
    }
