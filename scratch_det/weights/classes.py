"""The rows of a detector's weights that belong to its classes: in another library's order, or for another data set."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from scratch_det.errors import UserError, listed
from scratch_det.weights.names import without_stage

if TYPE_CHECKING:
    from scratch_det.weights.origin import Weights

CLASS_SCORES, BOX_DELTAS = "roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"
ROWS = {  # layers with rows for each class: how many
    CLASS_SCORES: 1,
    BOX_DELTAS: 4,
    "roi_heads.mask_predictor.mask_fcn_logits": 1,  # torchvision's
    "roi_heads.mask_head.predictor": 1,  # detectron2's
}

NOBODYS = "N/A"  # in the place of ids that no class has
BY_ID = MaskRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"]  # COCO's names by category id, 0 is the background
COCO = tuple(name for name in BY_ID[1:] if name != NOBODYS)


def num_classes(tensors: Mapping[str, Tensor]) -> int | None:
    """A detector's classes without background, from the class scores; None for a backbone."""
    scores = (value for name, value in tensors.items() if without_stage(name) == f"{CLASS_SCORES}.weight")
    return next((len(value) - 1 for value in scores), None)


def labels(layer: str, library: str, classes: Sequence[Any]) -> list[Any]:
    """Whose rows a layer of ROWS has, in their order; None is the background.

    It comes first in torchvision and Detectron; in detectron2 it comes last, and has neither box nor mask.
    """
    return [*classes, *[None] * (layer == CLASS_SCORES)] if library == "detectron2" else [None, *classes]


def with_rows(base: Tensor, here: Sequence[Any], value: Tensor, there: Sequence[Any]) -> Tensor:
    """A copy of ``base``, with rows of the labels ``here``; those of labels that are also ``there`` are ``value``'s."""
    places = {label: place for place, label in enumerate(there)}
    shared = [label for label in here if label in places]
    new, old = base.detach().clone(), value.unflatten(0, (len(there), -1))
    chosen = old[[places[label] for label in shared]]
    new.unflatten(0, (len(here), -1))[[here.index(label) for label in shared]] = chosen.to(new)
    return new


def reordered(layer: str, value: Tensor, source: str, target: str) -> Tensor:
    """The rows of a layer of ROWS as another library has them; zeros for a background that ``source`` has not."""
    classes = range(len(value) // ROWS[layer] - (None in labels(layer, source, ())))
    there, here = (labels(layer, library, classes) for library in (source, target))
    return with_rows(value.new_zeros(len(here) * ROWS[layer], *value.shape[1:]), here, value, there)


def without_unused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A detector of torchvision's 91 category ids with the rows of COCO's 80 classes and the background alone."""
    used = [place for place, name in enumerate(BY_ID) if name != NOBODYS]
    return {
        name: value.unflatten(0, (len(BY_ID), -1))[used].flatten(0, 1) if name.rpartition(".")[0] in ROWS else value
        for name, value in tensors.items()
    }


def check_classes(weights: "Weights", names: Sequence[str], to_evaluate: bool) -> None:
    """Raise UserError for a detector of other classes, or of the same in another order, than ``names`` of the data.

    A file without names, and an empty ``names``, agree with all.
    """
    theirs, count = weights.classes, num_classes(weights.tensors)
    if not names or count is None or (tuple(names) == theirs or (not theirs and count == len(names))):
        return
    same = sorted(theirs) == sorted(names)
    found = f"{count} classes{f' ({listed(theirs)})' * bool(theirs)}"
    fix = "train others with MODEL.WEIGHTS_NEW_CLASSES True, which keeps all other layers and the rows of equal names"
    raise UserError(
        f"weights file {weights.path} has {found}, the data {len(names)} ({listed(names)})"
        f"{': the same in another order' * same}; give equal classes equal names, or "
        + ("evaluate on data of the file's classes" if to_evaluate else fix)
    )


def with_new_classes(
    weights: "Weights", names: Sequence[str], wanted: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], str]:
    """A detector's tensors for the classes ``names``, and what was done, in words.

    wanted: the model's own tensors, of the same library. Rows of a class of equal name and of the background are the
    file's, other rows of class layers stay the model's, and so do layers of keypoints where their numbers differ.
    """
    tensors, count, changed = dict(weights.tensors), num_classes(weights.tensors) or 0, 0
    for name in tensors.keys() & wanted.keys():
        layer, value, own = without_stage(name).rpartition(".")[0], tensors[name], wanted[name]
        if ".keypoint" in name and own.shape != value.shape:
            tensors[name] = own
        elif layer in ROWS:
            there, here = (labels(layer, weights.library, one) for one in (weights.classes or range(count), names))
            if [len(value), len(own)] == [ROWS[layer] * len(one) for one in (there, here)]:  # else one box for all
                tensors[name], changed = with_rows(own, here, value, there), changed + 1
    shared = [name for name in names if name in weights.classes]
    unnamed = "" if weights.classes else ", as the file does not name its classes"
    return tensors, (
        f"of {len(names)} classes, {len(names) - len(shared)} start at random in {changed} tensors{unnamed}"
        + (f"; rows of {len(shared)} are the file's ({listed(shared)})" if shared else "")
    )
