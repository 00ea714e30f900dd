"""Large-scale jitter against boxes, masks and keypoints that were worked out by hand, and against detectron2's."""

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fvcore.common.config import CfgNode
from lsj import KEYS
from lsj.jitter import PAD_VALUE, boxes_inside, crop, fitted_size, jitter, pad
from samples import bitmaps, boxes_of, equal, sample
from torch import Tensor

from scratch_det.data.image import encode_masks
from scratch_det.data.masks import Masks
from scratch_det.data.transforms import flip

SIZES = [(480, 640), (640, 427), (375, 500), (333, 333), (612, 89)]


def config(size: int = 8) -> CfgNode:
    return CfgNode({"INPUT": {"LSJ": {"SIZE": size, "SCALES": KEYS["INPUT.LSJ.SCALES"]}}})


def drawing(scale: float, place: float = 0.0) -> Any:
    """A generator of these two numbers alone."""
    return SimpleNamespace(uniform=lambda low, high: scale, random=lambda: place)


def pictures(*masks: tuple[str, ...]) -> Tensor:
    """Uint8 [N, H, W], # being 1."""
    return torch.tensor([[[pixel == "#" for pixel in row] for row in rows] for rows in masks], dtype=torch.uint8)


@pytest.fixture
def scene() -> dict[str, Any]:
    """4 rows x 8 columns; a square, a triangle, a bar on the left, and a frame's corner: left column and top row."""
    masks = pictures(
        ("........", ".....##.", ".....##.", "........"),
        ("...#....", "..##....", ".###....", "####...."),
        ("##......", "##......", "........", "........"),
        ("########", "#.......", "#.......", "#......."),
    )
    points = [[5.5, 1.5, 2], [3.5, 0.5, 2], [0.5, 0.5, 2], [7.5, 0.5, 1]]
    return {
        "image": torch.arange(96, dtype=torch.uint8).reshape(3, 4, 8),
        "boxes": boxes_of((5, 1, 7, 3), (0, 0, 4, 4), (0, 0, 2, 2), (0, 0, 8, 4)),
        "labels": torch.tensor([0, 1, 2, 3]),
        "masks": Masks.read(encode_masks(masks.numpy())),
        "keypoints": torch.tensor(points)[:, None],
    }


class TestFittedSize:
    @pytest.mark.parametrize(
        ("height", "width", "side", "expected"),
        [
            (480, 640, 1024, (768, 1024)),  # x 1.6
            (640, 480, 102.4, (102, 77)),  # x 0.16: 102.4 and 76.8
            (480, 640, 2048, (1536, 2048)),
            (2, 500, 50, (1, 50)),  # 0.2 rows
        ],
    )
    def test_longer_side_fits(self, height: int, width: int, side: float, expected: tuple[int, int]) -> None:
        assert fitted_size(height, width, side) == expected


class TestCrop:
    def test_nothing_is_cut(self, scene: dict[str, Any]) -> None:
        found = crop(scene, 0, 0, 8)
        assert all(equal(found[key], scene[key]) for key in scene)

    def test_clipped_and_vanished(self, scene: dict[str, Any]) -> None:
        """Rows 1 to 3, columns 2 to 4 of the scene."""
        found = crop(scene, 1, 2, 3)
        assert torch.equal(found["image"], scene["image"][:, 1:4, 2:5])
        # Square and bar are outside; of the frame the box is inside, but no pixel of its mask.
        assert found["labels"].tolist() == [1]
        assert torch.equal(bitmaps(found["masks"], 3, 3), pictures(("##.", "##.", "##.")))
        assert found["boxes"].tolist() == [[0, 0, 2, 3]]
        assert found["keypoints"].tolist() == [[[0, 0, 0]]]  # was at row 0.5, above the cut

    def test_box_follows_the_mask_not_the_window(self, scene: dict[str, Any]) -> None:
        """Columns 0 and 1: the triangle begins in row 2 there, where its box cut in two would begin in row 0."""
        found = crop(scene, 0, 0, 2)
        assert found["labels"].tolist() == [2, 3]  # rows 0 and 1 alone: no pixel of the triangle
        assert found["boxes"].tolist() == [[0, 0, 2, 2], [0, 0, 2, 2]]
        below = crop(scene, 2, 0, 2)
        assert below["labels"].tolist() == [1, 3]
        assert below["boxes"].tolist() == [[0, 0, 2, 2], [0, 0, 1, 2]]
        left = crop({**scene, "image": scene["image"][..., :2]}, 0, 0, 4)
        assert left["boxes"][left["labels"] == 1].tolist() == [[0, 2, 2, 4]]

    def test_keypoints_move(self, scene: dict[str, Any]) -> None:
        found = crop(scene, 0, 3, 4)  # columns 3 to 6
        assert found["labels"].tolist() == [0, 1, 3]
        assert found["keypoints"][:, 0].tolist() == [[2.5, 1.5, 2], [0.5, 0.5, 2], [0, 0, 0]]  # the last is at 4.5

    def test_whole_objects_keep_fractions_of_pixels(self, scene: dict[str, Any]) -> None:
        scene["boxes"][0] = torch.tensor([5.2, 1.3, 6.9, 2.8])
        assert torch.allclose(crop(scene, 1, 4, 4)["boxes"], boxes_of((1.2, 0.3, 2.9, 1.8), (0, 0, 0, 0))[:1])

    def test_without_masks_boxes_are_clipped(self, scene: dict[str, Any]) -> None:
        del scene["masks"]
        found = crop(scene, 1, 2, 3)
        assert found["labels"].tolist() == [1, 3]
        assert found["boxes"].tolist() == [[0, 0, 2, 3], [0, 0, 3, 3]]

    def test_everything_vanishes(self, scene: dict[str, Any]) -> None:
        kept = {key: value[:1] if key != "image" else value for key, value in scene.items()}
        found = pad(crop(kept, 0, 0, 2), 2)
        assert len(found.pop("masks")) == 0
        shapes = {key: tuple(value.shape) for key, value in found.items()}
        assert shapes == {"image": (3, 2, 2), "boxes": (0, 4), "labels": (0,), "keypoints": (0, 1, 3)}
        assert all(value.dtype == scene[key].dtype for key, value in found.items())

    def test_inputs_are_not_changed(self, scene: dict[str, Any]) -> None:
        before = copy.deepcopy(scene)
        pad(crop(scene, 1, 2, 3), 3)
        assert all(equal(scene[key], before[key]) for key in scene)


class TestBoxesInside:
    @pytest.mark.parametrize("seed", range(20))
    def test_of_pixels(self, seed: int) -> None:
        """Whatever is cut off: the box of the pixels that are left, and zeros for nothing."""
        rng = np.random.default_rng(seed)
        pixels = (rng.random((4, 9, 12)) < rng.random((4, 1, 1)) ** 2).astype(np.uint8)
        top, left, height, width = (int(rng.integers(*ends)) for ends in ((0, 8), (0, 11), (1, 9), (1, 12)))
        left_over = torch.from_numpy(pixels[:, top : top + height, left : left + width])
        found = boxes_inside(Masks.read(encode_masks(pixels)).moved(offset=(-left, -top)), *left_over.shape[1:])
        for box, mask in zip(found.tolist(), left_over, strict=True):
            rows, columns = mask.nonzero().unbind(1)
            edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else [0, 0, 0, 0]
            assert box == edges

    def test_of_outlines(self) -> None:
        """A triangle cut on the right and below; a bow tie of which one wing is left, and another polygon outside."""
        triangle, bow, outside = [-2, -2, 8.5, -2, -2, 8.5], [-6, 1, 2, 1, -6, 3, 2, 3.5], [20, 1, 30, 1, 30, 9]
        masks = Masks.read([[triangle], [bow, outside], [outside], [[0.5, 0.5, 3, 0.5, 0.5, 2.25]]])
        found = boxes_inside(masks[torch.tensor([3, 0, 1, 2])], 5, 4)
        expected = boxes_of((0.5, 0.5, 3, 2.25), (0, 0, 4, 5), (0, 1, 2, 3.5), (0, 0, 0, 0))
        assert torch.allclose(found, expected)


def test_pad_is_grey_below_and_right(scene: dict[str, Any]) -> None:
    found = pad(scene, 8)
    assert torch.equal(found["image"][:, :4], scene["image"])
    assert (found["image"][:, 4:] == PAD_VALUE).all()
    assert all(equal(found[key], scene[key]) for key in ("boxes", "keypoints", "labels", "masks"))


class TestJitter:
    def test_small_is_padded(self, scene: dict[str, Any]) -> None:
        """Half of 8 px: 2 rows and 4 columns, the rest of the square is grey."""
        found = jitter(scene, config(), drawing(0.5))
        assert found["image"].shape == (3, 8, 8)
        assert (found["image"][:, 2:] == PAD_VALUE).all()
        assert (found["image"][:, :, 4:] == PAD_VALUE).all()
        assert (found["image"][:, :2, :4] < 96).all()
        assert found["boxes"][0].tolist() == [2.5, 0.5, 3.5, 1.5]
        assert found["keypoints"][0, 0].tolist() == [2.75, 0.75, 2]
        masks = bitmaps(found["masks"], 8, 8)
        assert masks[:, :2, :4].any()
        assert not masks[:, 2:].any()
        assert not masks[:, :, 4:].any()

    def test_large_is_cut(self, scene: dict[str, Any]) -> None:
        """Twice 8 px: 8 rows and 16 columns, of which those from 4 on: half of what is too much."""
        found = jitter(scene, config(), drawing(2.0, place=0.5))
        assert found["image"].shape == (3, 8, 8)
        assert found["labels"].tolist() == [0, 1, 3]
        assert found["boxes"].tolist() == [[6, 2, 8, 6], [0, 0, 4, 8], [0, 0, 8, 2]]
        doubled = bitmaps(scene["masks"], 4, 8)[0].repeat_interleave(2, 0).repeat_interleave(2, 1)
        assert torch.equal(bitmaps(found["masks"], 8, 8)[0], doubled[:, 4:12])
        assert found["keypoints"][:, 0].tolist() == [[7, 3, 2], [3, 1, 2], [0, 0, 0]]

    def test_flip_is_of_the_padded_square(self, scene: dict[str, Any]) -> None:
        found = flip(jitter(scene, config(), drawing(1.0)), "horizontal", [0])
        assert found["boxes"][0].tolist() == [1, 1, 3, 3]
        assert found["keypoints"][0, 0].tolist() == [2.5, 1.5, 2]
        turned = encode_masks(bitmaps(scene["masks"], 4, 8).transpose(1, 2).numpy())
        narrow = {**scene, "image": scene["image"].transpose(1, 2), "masks": Masks.read(turned)}
        narrow["boxes"] = scene["boxes"][:, [1, 0, 3, 2]]
        narrow["keypoints"] = scene["keypoints"][..., [1, 0, 2]]
        found = flip(jitter(narrow, config(), drawing(1.0)), "horizontal", [0])
        assert (found["image"][..., :4] == PAD_VALUE).all()  # the padding has changed sides
        assert found["boxes"][0].tolist() == [5, 5, 7, 7]

    @pytest.mark.parametrize("seed", range(20))
    def test_boxes_are_those_of_the_masks(self, seed: int) -> None:
        """Whatever is drawn: one square size, and boxes within a pixel of their masks."""
        found = jitter(sample(96, 64, seed=seed), config(128), np.random.default_rng(seed))
        assert found["image"].shape == (3, 128, 128)
        assert len(found["boxes"]) == len(found["masks"]) == len(found["labels"])
        for box, mask in zip(found["boxes"], bitmaps(found["masks"], 128, 128), strict=True):
            rows, columns = mask.nonzero().unbind(1)
            edges = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (box - edges).abs().max() <= 1

    def test_draws_depend_on_the_generator_alone(self) -> None:
        def drawn(seed: int) -> Tensor:
            return jitter(sample(), config(64), np.random.default_rng(seed))["image"]

        assert torch.equal(drawn(3), drawn(3))
        assert not torch.equal(drawn(3), drawn(4))

    @pytest.mark.detectron2
    @pytest.mark.parametrize("scale", [0.1, 0.37, 1.0, 1.31, 2.0])
    @pytest.mark.parametrize(("height", "width"), SIZES)
    def test_geometry_is_detectron2s(
        self, height: int, width: int, scale: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        T = pytest.importorskip("detectron2.data.transforms", reason="detectron2 is not installed")
        place = 0.73
        monkeypatch.setattr(np.random, "uniform", lambda low, high: place if (low, high) == (0.0, 1.0) else low)
        image = sample(height, width)["image"]
        theirs = T.AugInput(image.permute(1, 2, 0).numpy())
        steps = T.AugmentationList([T.ResizeScale(scale, scale, 1024, 1024), T.FixedSizeCrop((1024, 1024))])(theirs)
        ours = {"image": image, "boxes": boxes_of((0, 0, width, height)), "labels": torch.tensor([0])}
        ours["keypoints"] = torch.tensor([[[0.3 * width, 0.8 * height, 2]]])
        found = jitter(ours, config(1024), drawing(scale, place))
        moved = steps.apply_coords(np.array([[0.3 * width, 0.8 * height]]))[0]
        if ((moved >= 0) & (moved <= 1024)).all():
            assert np.allclose(found["keypoints"][0, 0, :2], moved, atol=1e-3)
        box = steps.apply_box(np.array([[0.0, 0.0, width, height]]))[0].clip(0, 1024)
        assert np.allclose(found["boxes"][0], box, atol=1e-3)
        grey = (theirs.image == PAD_VALUE).all(2)
        assert ((found["image"] == PAD_VALUE).all(0).numpy() == grey).mean() > 0.999
        assert np.abs(found["image"].permute(1, 2, 0).numpy().astype(int) - theirs.image).max() <= 2
