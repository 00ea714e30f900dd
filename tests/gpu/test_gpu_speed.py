"""What a GPU takes: figures, nothing is asserted of them but that they are there."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from gpu.kit import CASCADE, DEVICE, GN, IS_SMALL, KEYPOINTS, SYNCBN, state_of
from hotcoco import mask as mask_api
from run_folder import lines
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from scratch_det.backends import torchvision as backend
from scratch_det.data.dataset import EvaluationSet, TrainingSet
from scratch_det.data.loading import training_batches
from scratch_det.engine.loop import Trainer
from scratch_det.engine.plan import Plan
from scratch_det.modeling.ops import paste_masks

TF32, BFLOAT16 = ("FLOAT32_PRECISION", "high"), ("SOLVER.AMP.ENABLED", True)
ITERATIONS = 2 if IS_SMALL else 40
STEPS = {
    "GN, TF32": (GN, TF32),
    "GN, bfloat16": (GN, BFLOAT16),
    "GN, bfloat16, 16 images": (GN, (*BFLOAT16, "SOLVER.IMS_PER_BATCH", 2 if IS_SMALL else 16)),
    "SyncBN, TF32": (SYNCBN, TF32),
    "SyncBN, bfloat16": (SYNCBN, BFLOAT16),
    "cascade, TF32": (CASCADE, TF32),
    "cascade, bfloat16": (CASCADE, BFLOAT16),
    "keypoints, TF32": (KEYPOINTS, TF32),
    "keypoints, bfloat16": (KEYPOINTS, BFLOAT16),
}
COUNTED = ("cudaLaunchKernel", "cudaStreamSynchronize", "cudaMemcpyAsync", "cudaMalloc")


def synchronize() -> None:
    if DEVICE != "cpu":
        torch.cuda.synchronize()


def milliseconds(actions: list[Callable[[], Any]]) -> float:
    """Of one of ``actions`` in the mean, after the first one has been called once."""
    actions[0]()
    synchronize()
    began = time.perf_counter()
    for action in actions:
        action()
    synchronize()
    return round(1e3 * (time.perf_counter() - began) / len(actions), 2)


@pytest.mark.gpu(seconds=60)
@pytest.mark.parametrize("kind", STEPS)
def test_iteration(kind: str, train: Callable[..., Path], record_property: Callable) -> None:
    """The median of the last 20 iterations of a run, and the most memory that it had."""
    recipe, keys = STEPS[kind]
    iterations = 8 if "16" in kind and not IS_SMALL else ITERATIONS
    last = lines(train(recipe, *keys, "SOLVER.MAX_ITER", iterations))[-1]
    record_property("ms", round(1e3 * last["time"], 1))
    record_property("ms_for_data", round(1e3 * last["data_time"], 1))
    record_property("GiB", None if DEVICE == "cpu" else round(torch.cuda.max_memory_allocated() / 2**30, 2))


@pytest.mark.gpu(seconds=60)
def test_evaluation(plan: Callable[..., Plan], record_property: Callable) -> None:
    """Milliseconds of an image: the network, without the heads after the boxes, masks pasted and encoded, encoded."""
    made = plan(GN, "DATASETS.TEST", "('drawn_val',)")
    model = state_of(made).model
    dataset = EvaluationSet(made.cfg, made.test[0])
    samples = [[dataset[place]] for place in range(len(dataset))]
    found = backend.predict(model, samples[0])[0]
    height, width = samples[0][0]["height"], samples[0][0]["width"]
    masks, boxes = torch.rand(len(found["boxes"]), 28, 28), found["boxes"]
    bitmaps = [mask_api.decode(one) for one in paste_masks(masks, boxes, height, width)]
    record_property("detections", len(boxes))
    record_property("ms", milliseconds([partial(backend.predict, model, one) for one in samples]))
    record_property("ms_boxes", milliseconds([partial(backend.detect, model, one) for one in samples]))
    record_property("ms_paste_and_encode", milliseconds([partial(paste_masks, masks, boxes, height, width)] * 3))
    record_property("ms_encode", milliseconds([lambda: [mask_api.encode(one) for one in bitmaps]] * 3))


@pytest.mark.gpu(seconds=40)
def test_profile_of_an_iteration(train: Callable[..., Path], record_property: Callable) -> None:
    """How long the card computes in one iteration, and how often the CPU starts, copies and waits."""
    original, seen = Trainer.run_iteration, []

    def run_iteration(*arguments: Any) -> Any:
        if arguments[1] < ITERATIONS - 1:
            return original(*arguments)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE != "cpu" else [])]
        with profile(activities=activities) as found:
            began = time.perf_counter()
            result = original(*arguments)
            synchronize()
            seen.append(time.perf_counter() - began)
        seen.append(found.key_averages())
        return result

    with patch.object(Trainer, "run_iteration", run_iteration):
        train(GN, *BFLOAT16, "SOLVER.MAX_ITER", ITERATIONS)
    seconds, events = seen
    record_property("ms", round(1e3 * seconds, 1))
    of_kernels = [one.self_device_time_total for one in events if one.device_type == DeviceType.CUDA]  # microseconds
    record_property("ms_of_kernels", round(sum(of_kernels) / 1e3, 1))
    for name in COUNTED:
        record_property(name, sum(one.count for one in events if one.key == name))


@pytest.mark.gpu(seconds=40)
def test_loader(plan: Callable[..., Plan], record_property: Callable) -> None:
    """Images a second of the recipe's workers, in batches of 16, with nothing else to do."""
    made = plan(GN, "SOLVER.IMS_PER_BATCH", 2 if IS_SMALL else 16, "SOLVER.MAX_ITER", 4 if IS_SMALL else 20)
    batches = training_batches(TrainingSet(made.cfg, made.training), made.cfg, 0)
    for _ in range(2):
        next(batches)
    began = time.perf_counter()
    images = sum(len(batch) for batch in batches)
    record_property("images_a_second", round(images / (time.perf_counter() - began), 1))
    record_property("workers", made.cfg.DATALOADER.NUM_WORKERS)
