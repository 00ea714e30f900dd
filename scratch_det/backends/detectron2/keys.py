"""detectron2's own keys, and which of their values this repository's loop supports."""

from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from scratch_det.backends import ALLOWED_BY_LOOP, check_allowed
from scratch_det.config import with_project_keys


def defaults() -> CfgNode:
    """A fresh copy of all of detectron2's keys with its defaults, and those of projects."""
    return with_project_keys(_defaults().clone())


@cache
def _defaults() -> CfgNode:
    """Read from detectron2's own file, without importing detectron2, which would import torch.

    The file's only import is ``.config``, for the CfgNode; as a module of fvcore.common it gets fvcore's.
    """
    package: Any = find_spec("detectron2")
    file = Path(package.origin).parent / "config" / "defaults.py"
    spec: Any = spec_from_file_location("fvcore.common.detectron2_defaults", file)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module._C


def check(cfg: CfgNode) -> None:
    """Raise ConfigError, one line per key, when the config has values that this loop does not support."""
    c4 = cfg.MODEL.KEYPOINT_ON and cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeads"
    problem = "MODEL.ROI_HEADS.NAME is 'Res5ROIHeads', which has no keypoint head; with FPN it is StandardROIHeads"
    check_allowed("detectron2", cfg, ALLOWED_BY_LOOP, [problem] * c4)
