"""Repairs of a json: each kind is mended, counted, once; what is sound or cannot be told stays as it is."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from scratch_det.data.image import TURNS, decode_masks, encode_masks
from scratch_det.data.repair import Wishes, repair

SQUARE = [4, 6, 36, 6, 36, 38, 4, 38]
POINTS = [[4, 6], [36, 6], [36, 38], [4, 38]]
RLE = {"size": [64, 96], "counts": [100, 20, 96 * 64 - 120]}
RLE_BOX = [1, 36, 1, 20]  # 64 pixels a column


def content() -> dict[str, Any]:
    """Two images of 96 x 64, three objects; the file has other keys too."""
    box = {"bbox": [4, 6, 32, 32], "area": 1024, "iscrowd": 0, "segmentation": [SQUARE]}
    return {
        "info": {"year": 2020},
        "images": [{"id": k, "file_name": f"{k}.jpg", "width": 96, "height": 64, "license": 1} for k in (1, 2)],
        "annotations": [
            {"id": 11 + k, "image_id": 1 + k // 2, "category_id": 5 + k // 2, "score": 0.5, **deepcopy(box)}
            for k in range(3)
        ],
        "categories": [{"id": 5, "name": "cat"}, {"id": 6, "name": "dog"}],
    }


def mended(damage: Callable[[dict], Any], **wishes: Any) -> tuple[list[str], dict[str, Any]]:
    """The lines of the repair and the content after it, which a second repair leaves alone."""
    damage(damaged := content())
    said = repair(damaged, asked := Wishes(Path("absent"), **wishes))
    again = deepcopy(damaged)
    assert repair(again, asked) == []
    assert again == damaged
    return said, damaged


def test_nothing_in_a_sound_json() -> None:
    def other_shapes(c: dict) -> None:
        c["annotations"][0].update(segmentation=RLE, bbox=RLE_BOX)
        c["annotations"][1].update(segmentation=encode_masks(decode_masks([RLE], 64, 96))[0], iscrowd=1)
        c["annotations"][2].pop("segmentation")

    assert mended(other_shapes)[0] == []
    assert mended(lambda c: c["annotations"].clear(), boxes_as_masks=True, boxes_from_masks=True)[0] == []


def test_boxes_that_are_corners() -> None:
    """Not done twice: nobody can tell the two forms apart."""
    damaged = content()
    for one in damaged["annotations"]:
        one["bbox"] = [4, 6, 36, 38]
    said = repair(damaged, Wishes(Path("absent"), boxes_are_corners=True))
    assert (said[0].split(" (")[0], len(said)) == ("3 annotations with a box x0, y0, x1, y1", 1)
    assert [one["bbox"] for one in damaged["annotations"]] == [[4, 6, 32, 32]] * 3


@pytest.mark.parametrize("iscrowd", [1, "true", True])
def test_no_crowds(iscrowd: Any) -> None:
    said, after = mended(set_of(*CROWD, iscrowd, 0), no_crowds=True)
    assert (said[0][:26], len(said)) == ("1 annotations with iscrowd", 1)
    assert [one["iscrowd"] for one in after["annotations"]] == [0, 0, 0]


def test_shares_of_the_image() -> None:
    """Only where all boxes are: a box of a pixel is not one. The images have 96 x 64 pixels."""
    boxes, before = [[0.25, 0.5, 0.125, 0.25], [0, 0, 1, 1], [0.5, 0, 0.5, 0.5]], content()
    masks = [[[0.25, 0.5, 0.375, 0.5, 0.375, 0.75]], [SQUARE], []]
    damage = every(set_of(*BOX, *boxes), set_of(*MASK, *masks), set_of("annotations", "area", 0.03125))
    said, after = mended(damage)
    assert said == ["3 annotations with a box in shares of the image, from 0 to 1: made pixels"]
    assert [one["bbox"] for one in after["annotations"]] == [[24, 32, 12, 16], [0, 0, 96, 64], [48, 0, 48, 32]]
    assert [one["segmentation"] for one in after["annotations"]] == [[[24, 32, 36, 32, 36, 48]], [SQUARE], []]
    assert [one["area"] for one in after["annotations"]] == [192, *(one["area"] for one in before["annotations"][1:])]
    assert mended(set_of(*BOX, *boxes[:2]))[0] == []


def set_of(section: str, key: str, *values: Any) -> Callable[[dict], None]:
    """A change of the first entries' ``key``; None removes it."""

    def change(c: dict) -> None:
        for one, value in zip(c[section], values, strict=False):
            one[key] = value
            if value is None:
                del one[key]

    return change


def every(*changes: Callable[[dict], Any]) -> Callable[[dict], None]:
    return lambda c: [change(c) for change in changes][:0] and None


IMAGE_IDS, IMAGES_OF = ("images", "id"), ("annotations", "image_id")
MASK, BOX, CROWD = (("annotations", key) for key in ("segmentation", "bbox", "iscrowd"))


@pytest.mark.parametrize(
    ("damage", "said", "field", "expected"),
    [
        (lambda c: c["images"].append("nonsense"), "1 entries that are no", IMAGE_IDS, [1, 2]),
        (every(set_of(*IMAGE_IDS, "1", 2.0), set_of(*IMAGES_OF, "1", "1", 2.0)), "5 ids, widths", IMAGES_OF, [1, 1, 2]),
        (set_of(*IMAGES_OF, "1", 1, "2"), "2 ids, widths", IMAGES_OF, [1, 1, 2]),
        (set_of("images", "width", "96", 96.0), "2 ids, widths", ("images", "width"), [96, 96]),
        (every(set_of(*IMAGE_IDS, "b", "007"), set_of(*IMAGES_OF, "b", "b", "007")), "2 images with an id", IMAGES_OF,
            [2, 2, 1]),
        (every(set_of(*IMAGE_IDS, -1, 2**63), set_of(*IMAGES_OF, -1, -1, 2**63)), "2 images with an id", IMAGES_OF,
            [1, 1, 2]),
        (lambda c: c["images"].append({**c["images"][0], "id": None}), "1 images with an id", IMAGE_IDS, [1, 2, 3]),
        (lambda c: c["images"].append({**c["images"][0], "id": 1.5}), "1 images with an id", IMAGE_IDS, [1, 2, 3]),
        (lambda c: c["images"].append({**c["images"][0], "license": 2}), "1 images listed twice", IMAGE_IDS, [1, 2]),
        (set_of("annotations", "id", 11, 11, "x"), "2 annotations with an id", ("annotations", "id"), [11, 1, 2]),
        (set_of("annotations", "id", None, -3, 1), "2 annotations with an id", ("annotations", "id"), [3, 2, 1]),
        (every(set_of("categories", "id", "cat", "ant"), set_of("annotations", "category_id", "cat", "ant", "cat")),
            "2 categories with an id", ("annotations", "category_id"), [2, 1, 2]),
        (set_of("categories", "name", "a", "a"), "1 categories of a name", ("annotations", "category_id"), [5, 5, 5]),
        (lambda c: c["categories"].append({"id": 6, "name": "dog"}), "1 categories of a name", ("categories", "id"),
            [5, 6]),
        (set_of(*IMAGES_OF, 77, None), "2 annotations of images that are not", ("annotations", "id"), [13]),
        (set_of(*MASK, SQUARE, POINTS, [SQUARE]), "2 annotations with a mask [x, y, ...]", MASK, [[SQUARE]] * 3),
        (set_of(*MASK, [SQUARE, [1, 1, 5, 5], [], [1, 2, 3, 4, 5, 6, 7]]), "1 annotations with polygons of under", MASK,
            [[SQUARE]] * 3),
        (set_of(*MASK, [[1, 1, 5, 5]]), "1 annotations with polygons of under", MASK, [[], [SQUARE], [SQUARE]]),
        (set_of(*MASK, {"size": [64.0, "96"], "counts": [100.0, 20, 6024.0]}), "1 annotations with RLE counts", MASK,
            [RLE, [SQUARE], [SQUARE]]),
        (set_of(*MASK, {"size": [64, 96], "counts": str(rb"T3\4b")}), "1 annotations with RLE counts", MASK,
            [{"size": [64, 96], "counts": r"T3\4b"}, [SQUARE], [SQUARE]]),
        (set_of(*CROWD, None, "0", False), "3 annotations with iscrowd", CROWD, [0, 0, 0]),
        (set_of(*CROWD, True, "true", 2.0), "3 annotations with iscrowd", CROWD, [1, 1, 1]),
        (set_of(*BOX, None, [4, 6, 0, 32], [4, 6, 32, 32]), "2 annotations whose box", BOX, [[4, 6, 32, 32]] * 3),
        (every(set_of(*BOX, []), set_of(*MASK, RLE)), "1 annotations whose box", BOX,
            [RLE_BOX, *[[4, 6, 32, 32]] * 2]),
        (every(set_of(*BOX, [0, 0, 0, 0], None, []), set_of(*MASK, [], [], None)), "3 annotations without a box",
            BOX, []),
    ],
)  # fmt: skip
def test_kind(damage: Callable, said: str, field: tuple[str, str], expected: list) -> None:
    lines, after = mended(damage)
    assert len(lines) == 1
    assert lines[0].startswith(said)
    assert [one.get(field[1]) for one in after[field[0]]] == expected
    assert after["info"] == {"year": 2020}
    assert {one["score"] for one in after["annotations"]} <= {0.5}


@pytest.mark.parametrize(
    "damage",
    [
        every(set_of(*IMAGE_IDS, 1, 1), set_of(*IMAGES_OF, 1, 1, 1)),  # two files of one id, which objects name
        lambda c: c["images"].append({"id": 1, "file_name": "3.jpg", "width": 9, "height": 9}),
        lambda c: c["categories"][1].update(id=5),
        set_of(*IMAGES_OF, "a.jpg", "a.jpg", "b.jpg"),  # not one annotation has an image
        every(set_of("annotations", "category_id", 77), set_of("images", "file_name", ["a"], {})),
        every(set_of(*BOX, [1, 2, float("inf"), 4], ["a"] * 4, [1, 2, 3]), set_of(*MASK, [], [], [])),
        set_of(
            *MASK, {"size": [64, 96], "counts": "b'"}, {"size": [64, 96], "counts": [5, -5]}, [[1, 2, 3, 4, 5, "6"]]
        ),
        set_of(*MASK, {"size": [64, 96], "counts": "b'a', 1"}),
        every(set_of(*IMAGE_IDS, 0), set_of(*IMAGES_OF, 0, 0), set_of(*MASK, {"size": [64, 96], "counts": [5, -5]})),
        every(set_of("images", "width", "9" * 5000), set_of(*MASK, {"size": [64, 96], "counts": [9999]})),
        set_of("images", "file_name", "n" * 300),
    ],
)
def test_what_cannot_be_told_stays(damage: Callable) -> None:
    damage(before := content())
    assert mended(damage, boxes_from_masks=True) == ([], before)


def test_an_id_that_is_no_value_counts_as_missing() -> None:
    _, after = mended(every(set_of(*IMAGE_IDS, 1, [2]), set_of(*IMAGES_OF, 1, {}, [2])))
    assert [one["id"] for one in after["images"]] == [1, 2]
    assert [one["id"] for one in after["annotations"]] == [11]


def test_masks_and_boxes_of_each_other() -> None:
    def damage(c: dict) -> None:
        set_of(*MASK, [], {"size": [64, 96], "counts": [5]}, [[10, 20, 30.5, 20, 30, 41]])(c)

    said, after = mended(damage, boxes_as_masks=True, boxes_from_masks=True)
    assert [line.split(":")[0] for line in said] == [
        "1 annotations whose box is not that around the mask",
        "2 annotations without a mask that can be read",
    ]
    assert after["annotations"][2]["bbox"] == [10, 20, 20.5, 21]
    assert [one["segmentation"] for one in after["annotations"][:2]] == [[SQUARE], [SQUARE]]


def test_files(tmp_path: Path) -> None:
    """Names and sizes of what is on disk: the upright size where nothing else is asked for."""
    (tmp_path / "train").mkdir()
    image = Image.new("RGB", (96, 64))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "train/A 1.jpg", exif=exif)
    image.save(tmp_path / "train/2.jpg")
    damaged = content()
    damaged["images"][0].update(file_name=r"images\train\a%201.JPG", width=None, height="96px")
    damaged["images"][1].update(file_name="2.jpg", width=95.5)
    said = repair(damaged, Wishes(tmp_path))
    assert [line.split()[0] for line in said] == ["2", "2"]
    assert [one["file_name"] for one in damaged["images"]] == ["train/A 1.jpg", "train/2.jpg"]
    assert [(one["width"], one["height"]) for one in damaged["images"]] == [(64, 96), (96, 64)]
    damaged["images"][1].update(file_name="gone.jpg", height=0)
    assert repair(damaged, Wishes(tmp_path)) == []
    assert damaged["images"][1]["height"] == 0


@pytest.mark.parametrize("turn", TURNS)
def test_objects_drawn_on_stored_images(tmp_path: Path, turn: int) -> None:
    """They move as Pillow turns the image: polygons, RLE, boxes, keypoints."""
    width, height = 12, 8
    stored = np.zeros((height, width), np.uint8)
    stored[1:3, 2:7] = 1  # the object: x 2 to 7, y 1 to 3
    image = Image.fromarray(stored * 255)
    exif = Image.Exif()
    exif[0x0112] = turn
    image.save(tmp_path / "1.png", exif=exif)
    with Image.open(tmp_path / "1.png") as opened:
        upright = np.asarray(ImageOps.exif_transpose(opened)) // 255
    square, [rle] = [2, 1, 7, 1, 7, 3, 2, 3], encode_masks(stored[None])
    as_text = {"size": [8.0, 12.0], "counts": str(rle["counts"].encode())}
    objects = [
        {"segmentation": mask, "bbox": [2, 1, 5, 2], "keypoints": [2, 1, 2, 6, 2, 1, 0, 0, 0]}
        for mask in ([square], rle, square, [square, [1, 1, 5, 5]], as_text)
    ]
    damaged = {
        "images": [{"id": 1, "file_name": "1.png", "width": width, "height": height}],
        "annotations": [{"id": k, "image_id": 1, "iscrowd": 0, **one} for k, one in enumerate(objects)],
        "categories": [],
    }
    original = deepcopy(damaged)
    assert len(repair(damaged, Wishes(tmp_path, exif="stored"))) == 3 + (turn > 1)
    [size] = [(one["height"], one["width"]) for one in damaged["images"]]
    assert size == upright.shape
    y, x = upright.nonzero()
    for one in damaged["annotations"]:
        assert (decode_masks([one["segmentation"]], *size)[0] == upright).all()
        assert one["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
        points = np.reshape(one["keypoints"], (3, 3))
        assert points[:, 2].tolist() == [2, 1, 0]
        assert points[2].tolist() == [0, 0, 0]
        assert upright[points[:2, 1].astype(int), points[:2, 0].astype(int)].all()
    assert len(repair(original, Wishes(tmp_path, exif="turned"))) == 3 + (turn >= 5)
    assert (original["images"][0]["height"], original["images"][0]["width"]) == size
    assert original["annotations"][0]["bbox"] == [2, 1, 5, 2]
