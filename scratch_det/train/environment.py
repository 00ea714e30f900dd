"""What a run was made with: versions, hardware, git state, data, command."""

import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from scratch_det import backends
from scratch_det.data.catalog import datasets_root
from scratch_det.train.start import Plan

PACKAGES = ("scratch_det", "torch", "torchvision", "detectron2", "fvcore", "numpy", "faster-coco-eval", "pillow")


def describe(plan: Plan, processes: int) -> dict[str, Any]:
    """The content of environment.json."""
    data_sets = plan.training + plan.test
    return {
        "command": shlex.join([sys.executable, *sys.argv]),
        "datasets_root": str(datasets_root()),
        "backend": plan.backend,
        "library": backends.library(plan.backend),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "processes": processes,
        "accumulate": plan.request.accumulate,
        "init_std": plan.request.init_std,
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "git": _git_state(),
        "trained_on": [data.entry.name for data in plan.training],
        "datasets": {
            data.entry.name: {f"{data.described_by}_sha256": data.digest, "images": len(data.images)}
            for data in data_sets
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    """Commit and uncommitted changes of the checkout that holds this package; None outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=here, check=True, capture_output=True, text=True, errors="replace"
        ).stdout

    try:
        return {"commit": git("rev-parse", "HEAD").strip(), "diff": git("diff", "HEAD")}
    except (OSError, subprocess.CalledProcessError):
        return None
