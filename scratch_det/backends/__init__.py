"""Backends: who builds the detector and turns a batch into losses or predictions. Everything else exists once.

A backend is a package of two modules, named in ``BACKENDS``:

``keys.py``, free of torch
    ``check(cfg)`` raises ConfigError for recipe keys that the backend cannot honour.
``model.py``
    ``build(cfg) -> nn.Module``: randomly initialised from torch's current seed, on the CPU.
    ``losses(model, batch) -> dict[str, Tensor]``: scalars by detectron2's names, to be summed.
    ``predict(model, batch) -> list[dict]``: one per image, in pixels of the original image, by falling score:
    ``boxes`` float32 [N, 4] x1 y1 x2 y2, ``scores`` float32 [N], ``labels`` int64 [N] 0-based and, with
    MODEL.MASK_ON, ``masks``, a list of N json-ready COCO RLEs. All on the CPU.
    ``library() -> str``: the library behind it, with its version.

``batch`` is a list of samples as ``scratch_det.data.dataset`` describes them.
"""

from importlib import import_module
from types import ModuleType

from fvcore.common.config import CfgNode

BACKENDS = ("torchvision",)
AUTO = "auto"


def choose(name: str) -> str:
    """The backend that ``name`` stands for; ``auto`` is the first one of BACKENDS."""
    return BACKENDS[0] if name == AUTO else name


def check_keys(name: str, cfg: CfgNode) -> None:
    """Refuse, before torch is imported, what backend ``name`` cannot honour. Raises ConfigError."""
    import_module(f"{__name__}.{name}.keys").check(cfg)


def load(name: str) -> ModuleType:
    """The backend's ``model`` module."""
    return import_module(f"{__name__}.{name}.model")
