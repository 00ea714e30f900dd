"""The model section: how large it is, found by building it without memory for its weights."""

from typing import NamedTuple

from fvcore.common.config import CfgNode

from scratch_det import backends
from scratch_det.check.report import Section


class Size(NamedTuple):
    """Counts of numbers: parameters, those of them that are trained, and all that a checkpoint holds of the model."""

    parameters: int
    trainable: int
    weights: int


def model_size(backend: str, cfg: CfgNode) -> Size:
    """The size of the recipe's model; ``cfg`` has passed every check and has the data set's NUM_CLASSES."""
    import torch

    with torch.device("meta"):
        model = backends.load(backend).build(cfg)
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    weights = sum(tensor.numel() for tensor in model.state_dict().values())
    return Size(sum(n for n, _ in counts), sum(n for n, trained in counts if trained), weights)


def check_model(section: Section, backend: str, cfg: CfgNode, num_gpus: int) -> Size:
    """Tell the model's size and whether the GPUs are there."""
    size = model_size(backend, cfg)
    section.add(
        f"{backend}: {size.parameters:,} parameters, {size.trainable:,} trainable, "
        f"{cfg.MODEL.ROI_HEADS.NUM_CLASSES} classes",
        **size._asdict(),
    )
    import torch

    visible = torch.cuda.device_count()
    if cfg.MODEL.DEVICE == "cuda" and visible < num_gpus:
        section.problem(
            "notice", f"MODEL.DEVICE is cuda and {num_gpus} GPUs are asked for, but {visible} are visible here"
            if visible else "MODEL.DEVICE is cuda, but no GPU is visible here: training would use the CPU",
        )  # fmt: skip
    return size
