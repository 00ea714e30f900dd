"""The keypoints that the categories of a COCO json name, and what becomes of them in a mirror."""

from collections.abc import Iterator, Sequence
from typing import Any

from scratch_det.data.problem import Problem, error

Record = dict[str, Any]
LEFT, RIGHT = "left_", "right_"  # how COCO's names of a person's keypoints begin


def category_problems(categories: list[Record]) -> Iterator[Problem]:
    """Categories without keypoints, with others than the first one's, or with a ``flip_map`` that is none."""
    first = names_of(categories)
    yield from error(
        "categories without keypoints, a list of different names",
        (one["id"] for one in categories if not _are_names(one.get("keypoints"))),
        "name them in the order of the annotations' x, y, v, or train without (MODEL.KEYPOINT_ON False)",
    )
    yield from error(
        f"categories whose keypoints or flip_map are not those of category {categories[0]['id']}",
        (one["id"] for one in categories[1:] if _naming(one) != _naming(categories[0])),
        "one keypoint head predicts all classes: give all categories the same",
    )
    yield from error(
        "categories whose flip_map is not a list of [name, name], each one of the keypoints and none twice",
        (one["id"] for one in categories if not _is_flip_map(one.get("flip_map", []), first)),
        'such as [["left_eye", "right_eye"]]: what changes places in a mirror',
    )


def names_of(categories: list[Record]) -> tuple[str, ...]:
    """The keypoints of categories that agree on them."""
    names = categories[0].get("keypoints")
    return tuple(names) if _are_names(names) else ()


def mirror_of(categories: list[Record]) -> tuple[int, ...] | None:
    """The place from which a mirrored object takes each keypoint; None when neither flip_map nor names tell."""
    names, pairs = names_of(categories), categories[0].get("flip_map")
    partner = dict(pairs) if pairs is not None else _sides(names)
    if partner is None:
        return None
    partner |= {other: name for name, other in partner.items()}
    return tuple(names.index(partner.get(name, name)) for name in names)


def _sides(names: Sequence[str]) -> dict[str, str] | None:
    """left_eye -> right_eye and so on; None where there is no pair, or a side without its other one."""
    left = {name.removeprefix(LEFT) for name in names if name.startswith(LEFT)}
    right = {name.removeprefix(RIGHT) for name in names if name.startswith(RIGHT)}
    return {LEFT + name: RIGHT + name for name in left} if left and left == right else None


def _naming(category: Record) -> tuple[Any, Any]:
    return category.get("keypoints"), category.get("flip_map")


def _are_names(names: Any) -> bool:
    texts = isinstance(names, list) and len(names) > 0 and all(isinstance(name, str) for name in names)
    return texts and len(set(names)) == len(names)


def _is_flip_map(pairs: Any, names: Sequence[str]) -> bool:
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        return False
    named = [name for pair in pairs for name in pair]
    return all(name in names for name in named) and all(named.count(name) == 1 for name in named)
