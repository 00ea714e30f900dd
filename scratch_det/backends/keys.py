"""Telling which values of detectron2's keys a backend can honour."""

from collections.abc import Iterable, Iterator
from typing import Any

from fvcore.common.config import CfgNode

from scratch_det.config import flatten
from scratch_det.errors import ConfigError, did_you_mean

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
