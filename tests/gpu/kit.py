"""Where the checks on a GPU run, their recipes, and the parts of a run that they take apart."""

import os
from typing import Any

import torch

from scratch_det import backends
from scratch_det.data.dataset import TrainingSet
from scratch_det.engine.plan import Plan
from scratch_det.engine.state import State, build_state

ON = "SCRATCH_DET_GPU_CHECK_ON"
DEVICE = os.environ.get(ON, "cuda")
IS_SMALL = DEVICE == "cpu"
COCO = "configs/COCO-InstanceSegmentation"
GN, SYNCBN = f"{COCO}/scratch_mask_rcnn_R_50_FPN_2x_gn.yaml", f"{COCO}/scratch_mask_rcnn_R_50_FPN_2x_syncbn.yaml"
CASCADE = f"{COCO}/scratch_cascade_mask_rcnn_R_50_FPN_9x_gn_train_aug.yaml"
KEYPOINTS = "configs/COCO-Keypoints/scratch_keypoint_rcnn_R_50_FPN_2x_gn.yaml"


def state_of(plan: Plan, device: str = DEVICE) -> State:
    """The model and optimizer of a plan."""
    return build_state(plan.cfg, backends.load("torchvision"), torch.device(device, 0 if device == "cuda" else None))


def first_batch(plan: Plan) -> list[dict[str, Any]]:
    """The samples of a plan's first iteration."""
    dataset = TrainingSet(plan.cfg, plan.training)
    return [dataset[position] for position in range(plan.cfg.SOLVER.IMS_PER_BATCH)]


def step(state: State, batch: list[dict[str, Any]]) -> float:
    """One update of the weights; the total loss before it."""
    state.optimizer.zero_grad()
    with state.forward():
        loss = sum(backends.load("torchvision").losses(state.parallel, batch).values())
    state.scaler.scale(loss).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    return loss.item()
