"""Transforms of samples: detectron2's sizes, objects that move with the image, draws of the given generator alone."""

import numpy as np
import pytest
import torch
from samples import bitmaps
from toy_data import config, extent, rectangle_sample, same

from scratch_det.data.transforms import augment, flip, keep_inside, output_size, resize


def detectron2_output_size(height: int, width: int, short_side: int, max_size: int) -> tuple[int, int]:
    """ResizeShortestEdge.get_output_shape, operation by operation."""
    size = short_side * 1.0
    scale = size / min(height, width)
    new_h, new_w = (size, scale * width) if height < width else (scale * height, size)
    if max(new_h, new_w) > max_size:
        scale = max_size * 1.0 / max(new_h, new_w)
        new_h, new_w = new_h * scale, new_w * scale
    return int(new_h + 0.5), int(new_w + 0.5)


class TestTransforms:
    @pytest.mark.parametrize(
        ("height", "width", "short_side", "max_size", "expected"),
        [
            (480, 640, 800, 1333, (800, 1067)),  # 640 * 800 / 480 = 1066.67
            (640, 480, 800, 1333, (1067, 800)),
            (200, 640, 800, 1333, (417, 1333)),  # capped: 200 * 1333 / 640 = 416.56
            (800, 800, 800, 1333, (800, 800)),
            (1000, 2000, 500, 1000, (500, 1000)),
            (3, 5, 2, 100, (2, 3)),  # 5 * 2 / 3 = 3.33
            (480, 640, 0, 1333, (480, 640)),
        ],
    )
    def test_output_size(self, height, width, short_side, max_size, expected):
        assert output_size(height, width, short_side, max_size) == expected

    @pytest.mark.parametrize(("short_side", "max_size"), [(800, 1333), (640, 1333), (128, 160)])
    def test_output_size_is_detectron2s(self, short_side, max_size):
        rng = np.random.default_rng(0)
        sizes = [(63, 186), (149, 298), (312, 156), *rng.integers(50, 1000, (2000, 2)).tolist()]
        for height, width in sizes:
            expected = detectron2_output_size(height, width, short_side, max_size)
            assert output_size(height, width, short_side, max_size) == expected, (height, width)

    def test_a_thin_image_keeps_a_pixel(self):
        assert output_size(1, 3000, 800, 1333) == (1, 1333)
        assert output_size(9000, 2, 800, 1333) == (1333, 1)

    @pytest.mark.parametrize("short_side", [25, 40, 63, 100])
    @pytest.mark.parametrize("direction", ["none", "horizontal", "vertical"])
    def test_boxes_and_masks_move_with_the_image(self, short_side, direction):
        size = output_size(40, 60, short_side, 1000)
        sample = resize(rectangle_sample(), size)
        if direction != "none":
            sample = flip(sample, direction)
        height, width = sample["image"].shape[-2:]
        assert (height, width) == size
        assert height == short_side
        masks = bitmaps(sample["masks"], height, width)
        for box, mask in zip(sample["boxes"], masks, strict=True):
            np.testing.assert_allclose(extent(mask), box, atol=1)
        bright = (sample["image"][0] > 100).to(torch.uint8)
        assert (bright != masks.amax(0)).float().mean() < 0.03

    @pytest.mark.parametrize("direction", ["horizontal", "vertical"])
    def test_flip_twice_is_identity(self, direction):
        sample = rectangle_sample()
        once = flip(sample, direction)
        assert not same(once, sample)
        assert same(flip(once, direction), sample)

    def test_flip_of_one_box(self):
        sample = {"image": torch.zeros(3, 40, 60), "boxes": torch.tensor([[1.0, 2.0, 11.0, 22.0]])}
        assert flip(sample, "horizontal")["boxes"].tolist() == [[49, 2, 59, 22]]
        assert flip(sample, "vertical")["boxes"].tolist() == [[1, 18, 11, 38]]

    def test_no_objects(self):
        sample = rectangle_sample()
        empty = {key: value if key == "image" else value[:0] for key, value in sample.items()}
        moved = flip(resize(empty, (63, 95)), "horizontal")
        assert moved["masks"].crop_and_resize(moved["boxes"], 28).shape == (0, 28, 28)
        assert moved["boxes"].shape == (0, 4)

    def test_inputs_are_not_changed(self):
        sample = rectangle_sample()
        flip(resize(sample, (63, 95)), "vertical")
        flip(sample, "horizontal")
        assert same(sample, rectangle_sample())

    def test_draws_depend_on_the_generator_alone(self):
        cfg = config(INPUT__MIN_SIZE_TRAIN=(30, 40, 50, 60))

        def draw(seed: int) -> dict:
            return augment(rectangle_sample(), cfg, np.random.default_rng(seed))

        first = [draw(seed) for seed in range(40)]
        assert all(same(draw(seed), first[seed]) for seed in reversed(range(40)))
        assert {sample["image"].shape[1] for sample in first} == {30, 40, 50, 60}

    def test_range_is_drawn_with_both_ends(self):
        cfg = config(INPUT__MIN_SIZE_TRAIN=(40, 43), INPUT__MIN_SIZE_TRAIN_SAMPLING="range")
        shapes = {augment(rectangle_sample(), cfg, np.random.default_rng(s))["image"].shape[1] for s in range(60)}
        assert shapes == {40, 41, 42, 43}


def test_stored_pixels() -> None:
    """An antialiased image."""
    image = (torch.arange(36, dtype=torch.uint8) * 7).reshape(1, 6, 6).expand(3, 6, 6)
    found = resize({"image": image}, (3, 4))["image"]
    assert found[0].tolist() == [[33, 42, 53, 62], [108, 117, 128, 137], [183, 192, 203, 212]]


@pytest.mark.parametrize("size", [(37, 53), (60, 41), (25, 29)])
def test_pixels_do_not_depend_on_the_order_in_memory(size: tuple[int, int]) -> None:
    """An image as it is decoded, all channels of a pixel together, becomes what one with separate channels does."""
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (25, 29, 3), dtype=np.uint8)).permute(2, 0, 1)
    for direction in ("horizontal", "vertical"):
        found, expected = (flip(resize({"image": one}, size), direction) for one in (image, image.contiguous()))
        assert found["image"].equal(expected["image"])
        assert found["image"].is_contiguous()
    assert resize({"image": image}, (25, 29))["image"].equal(image)


def test_keypoints_are_flipped_and_those_outside_are_unlabelled() -> None:
    points = torch.tensor([[[0.5, 3, 2], [60, 40, 1]], [[0, 0, 2], [60.5, 3, 2]], [[5, 40.5, 2], [5, 5, 0]]])
    sample = {"image": torch.zeros(3, 40, 60), "boxes": torch.tensor([[0.0, 0, 9, 9]] * 3), "keypoints": points}
    found = flip(sample, "horizontal", (1, 0))["keypoints"]
    assert found[0].tolist() == [[0, 40, 1], [59.5, 3, 2]]
    inside = keep_inside(sample)["keypoints"].tolist()
    assert inside == [[[0.5, 3, 2], [60, 40, 1]], [[0, 0, 2], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]]
