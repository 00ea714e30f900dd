"""Weights & Biases as a writer: the recipe, the commit, numbers and pictures. The last AP is in the run's summary."""

import os
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import wandb
from PIL import Image

from scratch_det.config.load import flatten, plain
from scratch_det.engine.writers import PROJECT, SECONDS_TO_SEND, Run, Writer

STEP = "iteration"


class WandB(Writer):
    """A run of Weights & Biases; without a login it is kept in the run folder, and ``wandb sync`` sends it later."""

    is_slow = True

    def __init__(self, run: Run):
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
        recipe = {key: plain(value) for key, value in flatten(run.cfg).items()}
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=str(run.run_dir.path), dir=run.run_dir.path,
            id=run.id, resume="allow", mode=mode, config={**recipe, "git_commit": run.commit}, allow_val_change=True,
            settings=wandb.Settings(console="off", finish_timeout=SECONDS_TO_SEND),
        )  # fmt: skip
        run.id = self.run.id
        self.run.define_metric("*", step_metric=STEP)  # its own steps cannot have an evaluation after a resume

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        self.run.log({STEP: iteration, **values})

    def image(self, iteration: int, name: str, picture: bytes) -> None:
        self.run.log({STEP: iteration, name: wandb.Image(Image.open(BytesIO(picture)))})

    def close(self, end: str) -> None:
        self.run.finish(exit_code=int(end in ("failed", "stopped")))
