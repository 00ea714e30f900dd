"""One detector's weights as another's: with the other library's names, or as those of a cascade."""

from torch import Tensor

from scratch_det.errors import UserError
from scratch_det.weights.classes import BOX_DELTAS, CLASS_SCORES, ROWS, labels, num_classes, reordered
from scratch_det.weights.load import named_for_detector
from scratch_det.weights.names import BOTTOM_UP, BOX_HEAD, in_stage, renamed, stage_of, without_stage
from scratch_det.weights.origin import Weights


def convert(weights: Weights, to: str, own_names: bool = False) -> tuple[dict[str, Tensor], dict[str, str | None]]:
    """``weights`` in the names of ``to``, "torchvision" or "detectron2", and the new name of each, None without one.

    own_names: as in ``renamed``. A classifier's weights are listed by the names that they have in a detector.
    Raises UserError when they have the names of ``to`` already, and for boxes or masks that are not predicted for each
    class, which torchvision's always are (but in a cascade, whose boxes never are).
    """
    source = weights.library
    if source == to:
        raise UserError(f"{weights.path} is a {weights.kind} already; MODEL.WEIGHTS takes it as it is")
    names: dict[str, str | None]
    if not weights.is_detector:
        full, prefix = named_for_detector(weights, to), BOTTOM_UP[to]
        names = {name: name.removeprefix(prefix) if name.startswith(prefix) else None for name in full}
        return {new: full[name] for name, new in names.items() if new}, names
    names, tensors = renamed(weights.tensors, source, to, own_names), {}
    classes = range(num_classes(weights.tensors) or 0)
    for name, new in names.items():
        value, (layer, _, leaf) = weights.tensors[name], without_stage(name).rpartition(".")
        if layer == CLASS_SCORES or (layer in ROWS and not stage_of(name)):
            expected = ROWS[layer] * len(labels(layer, source, classes))
            if classes and leaf == "weight" and len(value) != expected:
                raise UserError(
                    f"{weights.path}: {name} has {len(value)} outputs, expected {expected} for {len(classes)} classes; "
                    "a detector with CLS_AGNOSTIC_BBOX_REG or CLS_AGNOSTIC_MASK has no counterpart to be converted to"
                )
            value = reordered(layer, value, source, to)
        if new:
            tensors[new] = value
    return tensors, names


def to_cascade(tensors: dict[str, Tensor], library: str, stages: int) -> dict[str, Tensor]:
    """The weights of a cascade of ``stages`` that begins as the plain detector of ``tensors``; names are ``library``'s.

    Every stage gets the plain box head, its class layer and, for the one box that it regresses, the mean of the plain
    layer over the classes; all else stays. A stage that starts from refined boxes moves them less, as its own weights
    (ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS) divide what it predicts. Raises UserError when it is a cascade already.
    """
    if any(stage_of(name) for name in tensors):
        raise UserError("it is a cascade already; continue it with --branch-from")
    cascade = {}
    for name, tensor in tensors.items():
        if name.startswith(f"{BOX_DELTAS}."):  # torchvision regresses a box for the background too
            of_classes = tensor.unflatten(0, (-1, 4))
            tensor = (of_classes[1:] if library == "torchvision" else of_classes).mean(0)
        if name.startswith((BOX_HEAD, "roi_heads.box_predictor.")):
            cascade |= {in_stage(name, str(k), library): tensor.clone() for k in range(stages)}
        else:
            cascade[name] = tensor
    return cascade
