"""Backends: the library that builds the detector and turns a batch into losses or predictions.

A backend is a module of this package with the name of its library, listed in BACKENDS; it has the functions of
``Backend``. The keys that a config may set with it stand in ``keys``, which like this file does not import torch.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from fvcore.common.config import CfgNode

from scratch_det.backends.keys import check_keys as check_keys
from scratch_det.backends.keys import detectron2_defaults
from scratch_det.config.load import flatten, get_cfg, load_config, with_project_keys
from scratch_det.config.rules import check_model
from scratch_det.errors import UserError

if TYPE_CHECKING:  # keys are checked before torch is imported
    from torch import Tensor, nn

BACKENDS = ("detectron2", "torchvision")
AUTO = "auto"
INSTALL_PAGE = "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"
TESTED = "detectron2 commit 02b5c4e2 (June 2026), torch 2.14.1, torchvision 0.29.1, setuptools 79.0"
ADVICE = f"\n  tested: {TESTED}\n  or train with --backend torchvision"

Batch = list[dict[str, Any]]  # samples as ``scratch_det.data.dataset`` describes them


class Backend(Protocol):
    """The functions of a backend's module. Boxes are x1 y1 x2 y2; labels are 0-based, without background."""

    def build(self, cfg: CfgNode) -> "nn.Module":
        """The model, randomly initialised from torch's current seed, on the CPU, with the library's weight names.

        Must also work under ``torch.device("meta")``.
        """

    def losses(self, model: "nn.Module", batch: Batch) -> "dict[str, Tensor]":
        """Scalar losses by detectron2's names; their sum is the total loss. Puts the model into training mode."""

    def predict(self, model: "nn.Module", batch: Batch) -> list[dict[str, Any]]:
        """Detections sorted by descending score, one dictionary per image, on the CPU. Sets evaluation mode.

        ``boxes`` float32 [N, 4] in pixels of the original image, ``scores`` float32 [N], ``labels`` int64 [N]; with
        MODEL.MASK_ON ``masks`` float32 [N, M, M], probabilities inside the box; with MODEL.KEYPOINT_ON ``keypoints``
        float32 [N, K, 3]: x, y and score, in continuous coordinates like the boxes.
        """

    def detect(self, model: "nn.Module", batch: Batch, candidates: bool = False) -> "list[dict[str, Tensor]]":
        """Only ``boxes``, ``scores`` and ``labels``, in pixels of the network's input. Evaluation mode, on the CPU.

        candidates: all boxes with SCORE_THRESH_TEST or more, those included that NMS or DETECTIONS_PER_IMAGE leave out.
        """

    def shapes(self, model: "nn.Module", batch: Batch, found: "list[dict[str, Tensor]]") -> "list[dict[str, Tensor]]":
        """Masks and keypoints of given ``boxes`` (pixels of the network's input) and ``labels``, one entry per image.

        With MODEL.MASK_ON ``masks`` float32 [N, M, M], probabilities inside the box; with MODEL.KEYPOINT_ON
        ``heat_maps`` float32 [N, K, S, S], logits of each keypoint in the box's cells. Evaluation mode, on the CPU.
        """


def choose(name: str) -> str:
    """The backend that ``name`` stands for; ``auto`` is the first installed one of BACKENDS.

    Raises UserError for a backend that is not installed.
    """
    if name == AUTO:
        return next(backend for backend in BACKENDS if is_installed(backend))
    if not is_installed(name):
        raise UserError(
            f"--backend {name}: {name} is not installed in this Python environment. It is not on PyPI; build it after "
            f"torch, with pip's --no-build-isolation, as {INSTALL_PAGE} says{ADVICE}"
        )
    return name


def is_installed(backend: str) -> bool:
    """Whether the library's package can be found; a source folder without __init__.py does not count."""
    found = find_spec(backend)
    return found is not None and found.origin is not None


def defaults(name: str) -> CfgNode:
    """A fresh copy of the keys that a config may set with backend ``name``, with their defaults, projects' included.

    With detectron2 all of its keys, with torchvision this repository's subset. Raises UserError as ``load``.
    """
    if name == "torchvision":
        return get_cfg()
    with _explaining(name):
        found = with_project_keys(detectron2_defaults().clone())
        if missing := sorted(flatten(get_cfg()).keys() - flatten(found).keys()):
            raise ImportError(f"no key {missing[0]}: another version of {name} is expected")
        return found


def model_config(config_file: str | Path, overrides: Sequence[str], name: str) -> CfgNode:
    """A recipe for its model alone: it need not be one that can be trained.

    Raises UserError, without importing torch, when backend ``name`` cannot build the model.
    """
    cfg = load_config(config_file, overrides, defaults(name)).cfg
    check_model(cfg)
    check_keys(name, cfg)
    return cfg


def load(name: str) -> Backend:
    """Import the backend. Raises UserError when its library is installed but does not work."""
    with _explaining(name), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # detectron2 uses torch.jit.script
        return cast(Backend, import_module(f"{__name__}.{name}"))


@contextmanager
def _explaining(name: str) -> Iterator[None]:
    """A broken detectron2 is a user error; torchvision is a dependency of this repository, so its errors are bugs."""
    try:
        yield
    except Exception as error:
        if name == "torchvision":
            raise
        raise UserError(
            f"{library(name)} is installed, but does not work ({type(error).__name__}: {error}); build it again "
            f"for this version of torch, see {INSTALL_PAGE}{ADVICE}"
        ) from None


def library(name: str) -> str:
    """The library of backend ``name``, with its version and, if it was installed from git, its commit."""
    try:
        installed = distribution(name)
    except PackageNotFoundError:  # a checkout on PYTHONPATH
        return f"{name} of unknown version"
    source = json.loads(installed.read_text("direct_url.json") or "{}")
    commit = source.get("vcs_info", {}).get("commit_id", "")
    return f"{name} {installed.version}" + (f" ({commit[:8]})" if commit else "")
