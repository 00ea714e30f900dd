"""Trainings that fresh processes start, to be timed as a whole. Needs no torch before a training does."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from scratch_det.engine.command import start
from scratch_det.engine.plan import Request


class Begun(BaseException):
    """The first iteration is done."""


def run(config_file: str, overrides: list[str], backend: str) -> None:
    """The command of scratch-det train with --resume."""
    start(Request(config_file, overrides, backend, resume=True))


def first_iteration(config_file: str, overrides: list[str], backend: str) -> None:
    """The same command in a new folder, up to the end of its first iteration."""
    from scratch_det.engine.loop import Trainer

    with TemporaryDirectory() as folder:
        words = [*overrides, "OUTPUT_DIR", f"{folder}/run"]
        _stop_after_first(Trainer, "run_iteration", lambda: run(config_file, words, backend))


def detectron2_first_iteration(config_file: str, names: dict[str, tuple[str, str]]) -> None:
    """Its DefaultTrainer with its own config file, up to the same point; names: json and images of each data set."""
    from detectron2.config import get_cfg
    from detectron2.data.datasets import register_coco_instances
    from detectron2.engine import DefaultTrainer

    for name, (json_file, images) in names.items():
        register_coco_instances(name, {}, json_file, images)
    cfg = get_cfg()
    cfg.set_new_allowed(True)  # keys of this repository are in the file too
    cfg.merge_from_file(config_file)
    Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    _stop_after_first(DefaultTrainer, "run_step", lambda: DefaultTrainer(cfg).train())


def _stop_after_first(trainer: type, name: str, train: Callable[[], None]) -> None:
    step = getattr(trainer, name)

    def only_once(*arguments: Any) -> None:
        step(*arguments)
        raise Begun

    with patch.object(trainer, name, only_once), suppress(Begun):
        train()
