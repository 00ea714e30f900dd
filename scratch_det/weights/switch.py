"""From a detector with one box head to a cascade: where the weights of each stage come from."""

from torch import Tensor

from scratch_det.errors import UserError
from scratch_det.weights.names import in_stage, stage_of

HEAD, PREDICTOR = "roi_heads.box_head.", "roi_heads.box_predictor."
BACKGROUND_SLOT = {"torchvision": 1, "detectron2": 0}  # torchvision regresses a box for the background too


def to_cascade(tensors: dict[str, Tensor], library: str, stages: int) -> dict[str, Tensor]:
    """The weights of a cascade of ``stages`` that begins as the plain detector of ``tensors``; names are ``library``'s.

    Every stage gets the plain box head, its class layer and, for the one box that it regresses, the mean of the plain
    layer over the classes; all else stays. A stage that starts from refined boxes moves them less, as its own weights
    (ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS) divide what it predicts. Raises UserError when it is a cascade already.
    """
    if any(stage_of(name) for name in tensors):
        raise UserError("it is a cascade already; continue it with --branch-from")
    return {
        new: value
        for name, tensor in tensors.items()
        for new, value in _places(name, tensor, library, stages)
    }  # fmt: skip


def _places(name: str, tensor: Tensor, library: str, stages: int) -> list[tuple[str, Tensor]]:
    if not name.startswith((HEAD, PREDICTOR)):
        return [(name, tensor)]
    if name.startswith(f"{PREDICTOR}bbox_pred."):
        tensor = tensor.unflatten(0, (-1, 4))[BACKGROUND_SLOT[library] :].mean(0)
    return [(in_stage(name, str(stage), library), tensor.clone()) for stage in range(stages)]
