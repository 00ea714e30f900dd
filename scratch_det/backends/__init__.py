"""Backends: who builds the detector and turns a batch into losses or predictions. Everything else exists once.

A backend is a package of two modules, named in ``BACKENDS`` after the library behind it:

``keys.py``, free of torch
    ``defaults() -> CfgNode``: every key that a recipe may set with this backend, with its default.
    ``check(cfg)`` raises ConfigError for recipe keys that the backend cannot honour.
``model.py``
    ``build(cfg) -> nn.Module``: randomly initialised from torch's current seed, on the CPU; in ``with
    torch.device("meta")`` without memory for its weights. Weights have the library's own names.
    ``losses(model, batch) -> dict[str, Tensor]``: scalars by detectron2's names, to be summed.
    ``predict(model, batch) -> list[dict]``: one per image, in pixels of the original image, by falling score:
    ``boxes`` float32 [N, 4] x1 y1 x2 y2, ``scores`` float32 [N], ``labels`` int64 [N] 0-based and, with
    MODEL.MASK_ON, ``masks``, a list of N json-ready COCO RLEs, with MODEL.KEYPOINT_ON ``keypoints`` float32 [N, K, 3]
    x y score, continuous as boxes are. All on the CPU.
    ``detect(model, batch) -> list[dict]``: boxes, scores and labels alone, in pixels of the network's input.
    ``shapes(model, batch, found) -> list[dict]``: for ``boxes`` in pixels of the network's input and their ``labels``,
    one dictionary an image: with MODEL.MASK_ON ``masks`` float32 [N, M, M], probabilities inside the box, with
    MODEL.KEYPOINT_ON ``heat_maps`` float32 [N, K, S, S], logits of each keypoint in the cells of the box.

``batch`` is a list of samples as ``scratch_det.data.dataset`` describes them.

Telling which values of detectron2's keys a backend can honour.
"""

import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from fvcore.common.config import CfgNode

from scratch_det.config import flatten, get_cfg
from scratch_det.errors import ConfigError, UserError, did_you_mean

BACKENDS = ("detectron2", "torchvision")
AUTO = "auto"
INSTALL_PAGE = "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"
TESTED = "detectron2 commit 02b5c4e2 (June 2026), torch 2.14.1, torchvision 0.29.1, setuptools 65.5"


def choose(name: str) -> str:
    """The backend that ``name`` stands for; ``auto`` is the first one of BACKENDS that is installed.

    Raises UserError for a backend that is not.
    """
    if name == AUTO:
        return next(backend for backend in BACKENDS if is_installed(backend))
    if not is_installed(name):
        raise UserError(
            f"--backend {name}: {name} is not installed in this Python environment. It is not on PyPI; build it after "
            f"torch, with pip's --no-build-isolation, as {INSTALL_PAGE} says\n"
            f"  tested: {TESTED}\n"
            "  or train with --backend torchvision"
        )
    return name


def is_installed(backend: str) -> bool:
    """Whether there is a package of the library's name; a folder with its sources beside the program is none."""
    found = find_spec(backend)
    return found is not None and found.origin is not None


def defaults(name: str) -> CfgNode:
    """The keys that a recipe may set with backend ``name``, and their defaults. Raises UserError as ``load``."""
    with _explaining(name):
        found = _module(name, "keys").defaults()
        if missing := sorted(flatten(get_cfg()).keys() - flatten(found).keys()):
            raise ImportError(f"it has no key {missing[0]}: another version of it is expected")
        return found


def check_keys(name: str, cfg: CfgNode) -> None:
    """Refuse, before torch is imported, what backend ``name`` cannot honour. Raises ConfigError."""
    _module(name, "keys").check(cfg)


def load(name: str) -> ModuleType:
    """The backend's ``model`` module. Raises UserError when the library behind it is there but does not work."""
    with _explaining(name), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # detectron2 uses torch.jit.script
        return _module(name, "model")


def _module(backend: str, name: str) -> ModuleType:
    return import_module(f"{__name__}.{backend}.{name}")


@contextmanager
def _explaining(name: str) -> Iterator[None]:
    """A detectron2 that does not work is the user's to mend; torchvision comes with this repository."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if name == "torchvision":
            raise
        raise UserError(
            f"{library(name)} is installed, but does not work ({type(error).__name__}: {error}); build it anew "
            f"against this torch, see {INSTALL_PAGE}\n"
            f"  tested: {TESTED}\n"
            "  or train with --backend torchvision"
        ) from None


def library(name: str) -> str:
    """The library behind backend ``name``, with its version and, where it was installed from git, its commit."""
    try:
        installed = distribution(name)
    except PackageNotFoundError:  # a checkout on PYTHONPATH
        return f"{name} of unknown version"
    source = json.loads(installed.read_text("direct_url.json") or "{}")
    commit = source.get("vcs_info", {}).get("commit_id", "")
    return f"{name} {installed.version}" + (f" ({commit[:8]})" if commit else "")


Honoured = dict[str, tuple[Any, ...]]  # a key that is not listed is honoured, whatever its value

LOOP: Honoured = {  # what data, loop and evaluation of this repository leave to choose, whoever builds the model
    "MODEL.LOAD_PROPOSALS": (False,),
    "INPUT.CROP.ENABLED": (False,),
    "DATALOADER.SAMPLER_TRAIN": ("TrainingSampler",),
    "TEST.PRECISE_BN.ENABLED": (False,),
}


def refuse(backend: str, problems: Iterable[str]) -> None:
    """Raise ConfigError, one line per problem, where there are any."""
    if lines := list(problems):
        raise ConfigError(f"the {backend} backend cannot honour this recipe:\n  " + "\n  ".join(lines))


def not_honoured(cfg: CfgNode, honoured: Honoured) -> Iterator[str]:
    """A line for every key of ``honoured`` that has another value, heads that are off left out."""
    keys = flatten(cfg)
    heads = {"MODEL.ROI_MASK_HEAD": cfg.MODEL.MASK_ON, "MODEL.ROI_KEYPOINT_HEAD": cfg.MODEL.KEYPOINT_ON}
    unused = tuple(head for head, is_on in heads.items() if not is_on)
    for key, values in honoured.items():
        if key.startswith(unused):
            continue
        if keys[key] not in values:
            has = " or ".join(repr(value) for value in values)
            mend = did_you_mean(str(keys[key]), [str(value) for value in values])
            mend += "; a project's are known with --project FOLDER" if key == "MODEL.BACKBONE.NAME" else ""
            yield f"{key} is {keys[key]!r}; it has {has}{mend}"
