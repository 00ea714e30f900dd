"""Notices on data that can be used but is likely a mistake; none in a sound file."""

import os
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import MASK_KINDS, rectangle_mask
from hotcoco import mask as mask_api
from toy_data import config, read_toy, rejection

from scratch_det.data.catalog import lookup
from scratch_det.data.coco import inspect_coco
from scratch_det.data.dataset import TrainingSet
from scratch_det.data.plausible import mask_extents

SIZE = (96, 64)
BOXES = [(40, 18, 30, 24), (18, 11, 30, 24), (6, 2, 30, 24), (56, 30, 30, 24)]
MASK = "annotations with a box that is not that of their mask (IoU below 0.5)"
AREA = "annotations with an area larger than that of their box"
SHARES = "annotations whose box has no number above 1: shares of the image, where pixels are expected"
CORNERS = "annotations with a box that fits its image as x0, y0, x1, y1, and sticks out as x, y, width, height"
CROWDS = "annotations that are crowds (iscrowd 1), most of all: crowds are not trained on"


@pytest.fixture
def notices(coco_factory) -> Callable[..., list[str]]:
    """The notices on one image with four polygons, after a change of each annotation and of the json's content."""

    def read(change: Callable = lambda one: None, whole: Callable = lambda content: None, kind: str = "polygon") -> Any:
        def replace(content: dict[str, Any]) -> None:
            content["annotations"] = [
                {"id": k, "image_id": 1, "category_id": 2 + k % 2, "bbox": list(box), "area": 720, "iscrowd": 0,
                 "segmentation": rectangle_mask(box, *SIZE, kind)} for k, box in enumerate(BOXES)
            ]  # fmt: skip
            for one in content["annotations"]:
                change(one)
            whole(content)

        coco_factory(num_images=1, size=SIZE, category_ids=(2, 3), change=replace)
        problems = inspect_coco(lookup("toy_train"), need_masks=True)[1]
        assert {one.severity for one in problems} <= {"notice"}
        return [str(one) for one in problems]

    return read


def update(function: Callable) -> Callable:
    """A change of one annotation to what ``function`` makes of x, y, width and height."""
    return lambda one: one.update(function(*one["bbox"]))


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_none_in_a_sound_file(notices, kind) -> None:
    assert notices(kind=kind) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x, y, w, h: {"bbox": [x / 2, y / 2, x, y]}, [f"4 {MASK}: id 0, 1, 2, 3"]),
        (lambda x, y, w, h: {"bbox": [x / 96, y / 64, w / 96, h / 64]}, [f"4 {SHARES}: id 0, 1, 2, 3"]),
        (lambda x, y, w, h: {"area": w * h * 2}, [f"4 {AREA}: id 0, 1, 2, 3"]),
        (lambda x, y, w, h: {"area": (w + 0.9) * (h + 0.9)}, []),  # rounded
        (lambda x, y, w, h: {"bbox": [x, y, w * 0.7, h * 0.72], "area": 9}, []),
        (lambda x, y, w, h: {"bbox": [x, y, w * 0.7, h * 0.71], "area": 9}, [f"4 {MASK}: id 0, 1, 2, 3"]),
        (lambda x, y, w, h: {"segmentation": {"size": [64, 96], "counts": [64 * 96]}}, [f"4 {MASK}: id 0, 1, 2, 3"]),
        (lambda x, y, w, h: {"bbox": [x, y, 1, 1], "segmentation": [[x, y, x + 0.5, y, x, y + 0.5]], "area": 0.1}, []),
    ],
)  # fmt: skip
def test_of_every_annotation(notices, change, expected) -> None:
    assert notices(update(change)) == expected


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_boxes_of_other_masks(notices, kind) -> None:
    def swap(content: dict) -> None:
        first, second, *_ = content["annotations"]
        first["segmentation"], second["segmentation"] = second["segmentation"], first["segmentation"]

    assert notices(whole=swap, kind=kind) == [f"2 {MASK}: id 0, 1"]


def test_extents_of_runs() -> None:
    rng, height, width = np.random.default_rng(0), 7, 5
    masks = rng.random((200, height, width)) < rng.uniform(0, 1, (200, 1, 1)) ** 4
    counts, expected = [], []
    for mask in masks:
        cuts = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=False, append=not mask[-1, -1]))
        counts.append(np.diff(cuts, prepend=0))
        y, x = np.nonzero(mask)
        expected.append([x.min(), y.min(), x.max() + 1, y.max() + 1] if len(x) else [0] * 4)
    empty = np.zeros(0, int)
    part = {
        "polygon": empty, "polygon_at": empty, "polygons_at": np.zeros(200, int),
        "rle_size": np.tile([height, width], (200, 1)),
    }  # fmt: skip
    np.testing.assert_array_equal(mask_extents(part, [runs.tolist() for runs in counts]), expected)


def test_extents_in_a_forked_process() -> None:
    """hotcoco's threads, which this one has started, are missing there."""
    empty = np.zeros(0, int)
    part = {"polygon": empty, "polygon_at": empty, "polygons_at": np.zeros(99, int), "rle_size": np.full((99, 2), 3)}
    mask_api.to_bbox([{"size": [3, 3], "counts": [4, 5]}] * 5000)
    if not (child := os.fork()):
        signal.alarm(20)  # ends it with a signal
        os._exit(mask_extents(part, [[4, 5]] * 99).shape[0])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 99


def test_corners(notices) -> None:
    assert notices(update(lambda x, y, w, h: {"bbox": [x, y, x + w, y + h]})) == [
        "2 annotations with a box that sticks out of its image by more than 1 pixel: id 0, 3",
        f"2 {CORNERS}: id 0, 3",
        f"1 {MASK}: id 1",
    ]


def test_one_box_that_sticks_out_has_no_corners(notices) -> None:
    def change(content: dict) -> None:
        content["annotations"][0].update(bbox=[10, 10, 90, 54], area=9, segmentation=[[10, 10, 100, 10, 100, 64]])

    assert notices(whole=change) == ["1 annotations with a box that sticks out of its image by more than 1 pixel: id 0"]


@pytest.mark.parametrize(("crowds", "expected"), [(2, []), (3, [f"3 {CROWDS}: id 0, 1, 2"])])
def test_crowds(notices, crowds, expected) -> None:
    assert notices(lambda one: one.update(iscrowd=int(one["id"] < crowds))) == expected


def test_nothing_but_crowds(notices) -> None:
    assert notices(lambda one: one.update(iscrowd=1)) == [f"4 {CROWDS}: id 0, 1, 2, 3"]
    message = rejection(TrainingSet, config(), [read_toy()])
    assert "images has an object\n  4 of 4 annotations are crowds (iscrowd 1)" in message
    assert message.endswith("scratch-det data fix toy_train --no-crowds writes a repaired copy")


def test_categories(notices) -> None:
    more = [{"id": 7, "name": "class2"}, {"id": 8, "name": "none"}]
    assert notices(whole=lambda content: content["categories"].extend(more)) == [
        "2 categories with the name of another: id 2 (class2), 7 (class2)",
        "2 categories without an annotation: id 7 (class2), 8 (none)",
    ]


def test_without_annotations_no_category_is_named(notices) -> None:
    assert notices(whole=lambda content: content["annotations"].clear()) == []


def test_ids_are_those_of_a_json_that_is_read_slowly(notices) -> None:
    found = notices(lambda one: one.update(id=f"a{one['id']}", area=9999))
    assert found == [f"4 {AREA}: id a0, a1, a2, a3"]
