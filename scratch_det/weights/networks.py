"""Which networks a checkpoint holds: known names behind any prefix, also inside of nested dictionaries."""

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scratch_det.weights.names import BOTTOM_UP

SIGNS = (  # a name that a network's file has behind its prefix: the library that names so, and whether it is a detector
    ("rpn.head.bbox_pred.weight", "torchvision", True),
    ("proposal_generator.rpn_head.anchor_deltas.weight", "detectron2", True),
    ("layer1.0.conv1.weight", "torchvision", False),
    ("features.28.weight", "torchvision", False),  # the last convolution of VGG-16
    ("res2.0.conv1.weight", "detectron2", False),
    ("res2_0_branch2a_w", "Detectron", False),
    ("encoder.stages.0.layers.0.layer.0.convolution.weight", "RESNETS", False),  # transformers'
    ("4.0.conv1.weight", "RESNETS", False),  # of nn.Sequential
)
BODIES = (*BOTTOM_UP.values(), "backbone.")  # where a detector has its bottom-up network; the last without a pyramid
DEPTH = 5  # dictionaries inside of each other that are looked into


class Network(NamedTuple):
    """A network in a file.

    prefix: what comes before its names, keys of nested dictionaries included: "", "state_dict.module.encoder_q.".
    library: whose names follow, see ``Weights``, or RESNETS of ``names``; "" for those of the model's own network.
    is_detector: a whole detector, else a bottom-up network with the layers of its pre-training.
    lacks: what its names need before them to be those of the model's own network.
    """

    prefix: str
    library: str
    is_detector: bool
    lacks: str = ""


def tensors_by_name(content: dict[Any, Any], prefix: str = "", depth: int = DEPTH) -> dict[str, Tensor]:
    """The tensors of nested dictionaries, keys joined by dots; arrays of NumPy become tensors."""
    found = {}
    for key, value in content.items():
        if not isinstance(key, str):
            continue
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        if isinstance(value, Tensor):
            found[prefix + key] = value
        elif isinstance(value, dict) and depth:
            found |= tensors_by_name(value, f"{prefix}{key}.", depth - 1)
    return found


def networks_in(names: Collection[str], bottom_up: Any = None) -> list[Network]:
    """The detectors and classifiers that have ``names``, in their order.

    bottom_up: the model's network, one of ``scratch_det.modeling.backbones``; its own names are looked for, too, first
    if it states ``pixels``, which are those of its family's files.
    """
    known = [Network(prefix, library, is_detector)
             for sign, library, is_detector in SIGNS for prefix in _prefixes(names, sign)]  # fmt: skip
    own = [] if bottom_up is None else _by_own_names(names, bottom_up)
    detectors = [network for network in known if network.is_detector]
    bodies = {network.prefix + body for network in detectors for body in BODIES}
    classifiers = own if own and (hasattr(bottom_up, "pixels") or not known) else known
    return detectors + [one for one in classifiers if not one.is_detector and one.prefix not in bodies]


def _prefixes(names: Collection[str], sign: str) -> list[str]:
    """What comes before a name, wherever it ends one of ``names``."""
    return [name.removesuffix(sign) for name in names if f".{name}".endswith(f".{sign}")]


def _by_own_names(names: Collection[str], bottom_up: Any) -> list[Network]:
    """Where at least half as many of the network's own names are as in the best place."""
    own = list(bottom_up.state_dict())
    first = getattr(bottom_up, "first_layer", own[0]).split(".")
    found: dict[str, tuple[int, Network]] = {}  # by the first layer's name in the file
    for place in range(len(first)):  # the fewest missing parts of the name first
        lacks, sign = "".join(f"{part}." for part in first[:place]), ".".join(first[place:])
        rest = [name.removeprefix(lacks) for name in own if name.startswith(lacks)]
        for prefix in _prefixes(names, sign):
            covered = sum(prefix + one in names for one in rest)
            found.setdefault(prefix + sign, (covered, Network(prefix, "", False, lacks)))
    best = max((covered for covered, _ in found.values()), default=0)
    return [network for covered, network in found.values() if 2 * covered >= best]
