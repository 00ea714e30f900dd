"""What a run is made of between two iterations."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from scratch_det.train.optimizer import build_optimizer


class State:
    """Model, optimizer, loss scaler, number of completed iterations and seconds spent on them.

    SOLVER.AMP.ENABLED means bfloat16 where the device has it (no loss scaling needed), else float16 with scaling.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, device: torch.device):
        self.model, self.device = model, device
        self.optimizer = build_optimizer(cfg, model)
        self.amp = cfg.SOLVER.AMP.ENABLED
        bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
        self.amp_type = torch.bfloat16 if bfloat16 else torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp and not bfloat16)
        self.iteration, self.seconds = 0, 0.0

    def autocast(self) -> AbstractContextManager:
        """The precision of the forward pass."""
        return torch.autocast(self.device.type, dtype=self.amp_type, enabled=self.amp)

    def advance(self, seconds: float) -> None:
        """One more iteration is complete."""
        self.iteration += 1
        self.seconds += seconds

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers; ``iteration`` is the last completed one, 0-based as in detectron2."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "iteration": self.iteration - 1,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.iteration, self.seconds = state["iteration"] + 1, state["seconds"]
