"""The rows of a detector's weights that belong to its classes, and those of another data set in their place."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from scratch_det.errors import UserError, listed
from scratch_det.weights.names import without_stage
from scratch_det.weights.origin import Weights

CLASS_SCORES, BOX_DELTAS = "roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"
ROWS = {  # layers with rows for each class, by library: how many
    "torchvision": {CLASS_SCORES: 1, BOX_DELTAS: 4, "roi_heads.mask_predictor.mask_fcn_logits": 1},
    "detectron2": {CLASS_SCORES: 1, BOX_DELTAS: 4, "roi_heads.mask_head.predictor": 1},
}


def num_classes(weights: Weights) -> int | None:
    """Classes without background, from the class scores; None for a backbone."""
    scores = (value for name, value in weights.tensors.items() if without_stage(name) == f"{CLASS_SCORES}.weight")
    return next((len(value) - 1 for value in scores), None)


def check_classes(weights: Weights, names: Sequence[str]) -> None:
    """Raise UserError for a detector of other classes, or of the same in another order, than ``names`` of the data.

    A file without names, and an empty ``names``, agree with all.
    """
    theirs, count = weights.classes, num_classes(weights)
    if not names or count is None or (tuple(names) == theirs or (not theirs and count == len(names))):
        return
    same = sorted(theirs) == sorted(names)
    found = f"{count} classes{f' ({listed(theirs)})' * bool(theirs)}"
    raise UserError(
        f"weights file {weights.path} has {found}, the data {len(names)} ({listed(names)})"
        f"{': the same in another order' * same}; MODEL.WEIGHTS_NEW_CLASSES True keeps all layers but those of the "
        "classes and the rows of classes of equal name"
    )


def with_new_classes(
    weights: Weights, names: Sequence[str], wanted: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], str]:
    """A detector's tensors for the classes ``names``, and what was done, in words.

    wanted: the model's own tensors, of the same library. Rows of a class of equal name and of the background are the
    file's, other rows of class layers stay the model's, and so do layers of keypoints where their numbers differ.
    """
    tensors, theirs, kept = dict(weights.tensors), weights.classes, []
    in_torchvision, count = weights.library == "torchvision", num_classes(weights) or 0
    shared = [(theirs.index(name), place) for place, name in enumerate(names) if name in theirs]
    for name, value in weights.tensors.items():
        layer = without_stage(name).rpartition(".")[0]
        rows, target = ROWS[weights.library].get(layer), wanted.get(name)
        if rows is None or target is None:
            if target is not None and ".keypoint" in name and target.shape != value.shape:
                tensors[name] = target
            continue
        has_background = in_torchvision or layer == CLASS_SCORES
        if len(value) != rows * (count + has_background):
            continue  # one box for all classes
        first = 1 if in_torchvision else 0  # the background is class 0 there, the last one in detectron2
        pairs = [(there + first, here + first) for there, here in shared]
        if has_background:
            pairs.append((0, 0) if in_torchvision else (count, len(names)))
        new = target.detach().clone()
        for there, here in pairs:
            new[here * rows : (here + 1) * rows] = value[there * rows : (there + 1) * rows]
        tensors[name] = new
        kept.append(name)
    of_equal_name = f"rows of {len(shared)} of equal name are the file's ({listed([names[k] for _, k in shared])}), "
    said = f"new classes in {len(kept)} tensors: {of_equal_name if shared else ''}all others stay random"
    return tensors, said + ("" if theirs else "; the file does not name its classes")
