"""The model section: how large it is, found by building it without memory for its weights."""

from typing import TYPE_CHECKING

from fvcore.common.config import CfgNode

from scratch_det import backends
from scratch_det.check.report import Section
from scratch_det.weights.address import place_of

if TYPE_CHECKING:
    from scratch_det.modeling.size import Size


def check_model(section: Section, backend: str, cfg: CfgNode, num_gpus: int) -> "Size":
    """Tell the model's size, whether MODEL.WEIGHTS fit it and whether the GPUs are there.

    ``cfg`` has passed every check and has NUM_CLASSES.
    """
    import torch  # here, so that refusals come at once

    from scratch_det.modeling.size import size_of
    from scratch_det.weights.load import load_weights

    with torch.device("meta"):
        model = backends.load(backend).build(cfg)
    size = size_of(model)
    section.add(
        f"{backend}: {size.parameters:,} parameters, {size.trainable:,} trainable, "
        f"{cfg.MODEL.ROI_HEADS.NUM_CLASSES} classes",
        **size._asdict(),
    )
    if cfg.MODEL.WEIGHTS and place_of(cfg.MODEL.WEIGHTS).is_file():
        if loaded := section.attempt(load_weights, model, cfg.MODEL.WEIGHTS, backend, cfg):
            section.add(loaded)
    elif cfg.MODEL.WEIGHTS:
        section.problem("notice", f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS}: not fetched yet, so not compared with the model")
    visible = torch.cuda.device_count()
    if cfg.MODEL.DEVICE == "cuda" and visible < num_gpus:
        section.problem(
            "notice", f"MODEL.DEVICE is cuda and {num_gpus} GPUs are asked for, but {visible} are visible here"
            if visible else "MODEL.DEVICE is cuda, but no GPU is visible here: training would use the CPU",
        )  # fmt: skip
    return size
