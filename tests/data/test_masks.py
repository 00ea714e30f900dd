"""Masks as edges against points tested one by one, pycocotools' bitmaps and detectron2's targets."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MASK_KINDS, rectangle_mask
from pycocotools import mask as mask_api
from samples import bitmaps, boxes_of, equal, rectangles
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from scratch_det.data import masks as module
from scratch_det.data.image import decode_masks
from scratch_det.data.masks import Masks

HEIGHT, WIDTH = 40, 60
SQUARE, DIAMOND = [4, 4, 20, 4, 20, 20, 4, 20], [30.5, 2, 50, 20.3, 31, 38, 25, 20]
STAR = [30, 2, 42, 38, 10, 15, 50, 15, 18, 38]  # crosses itself; its middle is outside by the even-odd rule


def noise(seed: int, count: int = 4, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Uint8 [count, height, width]: pixels set alone and in clumps, with holes, on the borders too."""
    rng = np.random.default_rng(seed)
    return (rng.random((count, height, width)) < rng.random((count, 1, 1))).astype(np.uint8)


def encoded(masks: np.ndarray) -> list[dict[str, Any]]:
    return [mask_api.encode(np.asfortranarray(mask)) for mask in masks]


def polygons(seed: int, count: int = 5) -> list[list[list[float]]]:
    """Objects of one to three polygons with any corners, most of which cross themselves."""
    rng = np.random.default_rng(seed)
    return [[(rng.random((rng.integers(3, 9), 2)) * [WIDTH, HEIGHT]).ravel().tolist() for _ in range(1 + i % 3)]
            for i in range(count)]  # fmt: skip


def drawn_boxes(seed: int, count: int) -> Tensor:
    """Boxes of 1 to 50 px, many across the borders."""
    rng = np.random.default_rng(seed)
    corners = rng.random((count, 2)) * [WIDTH, HEIGHT] - 10
    return torch.from_numpy(np.hstack([corners, corners + 1 + rng.random((count, 2)) * 49])).float()


def is_inside(polygon: list[float], x: float, y: float) -> bool:
    """The even-odd rule: a ray to the left crosses an odd number of edges."""
    corners = np.reshape(polygon, (-1, 2))
    crossed = False
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        crossed ^= (y0 <= y) != (y1 <= y) and x0 + (y - y0) * (x1 - x0) / (y1 - y0) <= x
    return bool(crossed)


class TestTargets:
    def test_by_hand(self) -> None:
        """Boxes that hold the square or a corner of it; a centre on its left border is inside, on the right one not."""
        masks = Masks.read([[SQUARE]])[torch.zeros(4, dtype=torch.int64)]
        boxes = boxes_of((4, 4, 20, 20), (-4, 4, 12, 12), (2, 0, 6, 8), (18, 0, 22, 8))
        found = masks.crop_and_resize(boxes, 2)
        assert found.dtype == torch.bool
        rows = [[[1, 1], [1, 1]], [[0, 1], [0, 1]], [[0, 0], [0, 1]], [[0, 0], [1, 0]]]
        assert found.int().tolist() == rows
        assert masks[:1].crop_and_resize(boxes_of((3.5, 3.5, 4.5, 4.5)), 1).item()
        assert not masks[:1].crop_and_resize(boxes_of((19.5, 19.5, 20.5, 20.5)), 1).any()

    @pytest.mark.parametrize("seed", range(4))
    def test_cells_are_their_centres(self, seed: int) -> None:
        objects, boxes, resolution = polygons(seed), drawn_boxes(seed, 20), 9
        matched = torch.from_numpy(np.random.default_rng(seed).integers(0, len(objects), len(boxes)))
        found = Masks.read(objects)[matched].crop_and_resize(boxes, resolution)
        assert found.any()
        for cells, box, mask in zip(found, boxes.tolist(), matched.tolist(), strict=True):
            x, y = (box[i] + (np.arange(resolution) + 0.5) / resolution * (box[i + 2] - box[i]) for i in (0, 1))
            expected = [[any(is_inside(part, a, b) for part in objects[mask]) for a in x] for b in y]
            assert cells.tolist() == expected

    @pytest.mark.parametrize("seed", range(3))
    def test_an_rle_is_read_at_the_centres_of_the_cells(self, seed: int) -> None:
        pixels, boxes = noise(seed), drawn_boxes(seed, 20)
        matched = torch.arange(20) % len(pixels)
        found = Masks.read(encoded(pixels))[matched].crop_and_resize(boxes, 7)
        padded = np.pad(pixels, ((0, 0), (100, 100), (100, 100)))
        for cells, box, mask in zip(found, boxes.numpy(), padded[matched], strict=True):
            column, row = ((box[i] + (np.arange(7) + 0.5) / 7 * (box[i + 2] - box[i])).astype(float) for i in (0, 1))
            expected = mask[np.ix_(np.floor(row).astype(int) + 100, np.floor(column).astype(int) + 100)]
            assert cells.int().tolist() == expected.tolist()

    @pytest.mark.parametrize("polygon", [SQUARE, DIAMOND, STAR, [3, 3, 57, 3, 57, 3.4, 3, 3.4]])
    def test_polygons_are_filled_as_by_pycocotools(self, polygon: list[float]) -> None:
        """At 32 x the size, where half a pixel hardly counts; the star's middle is empty in both."""
        large = [float(value) * 32 for value in polygon]
        rle = mask_api.merge(mask_api.frPyObjects([large], 32 * HEIGHT, 32 * WIDTH))
        found, expected = bitmaps(Masks.read([[large]]), 32 * HEIGHT, 32 * WIDTH)[0], mask_api.decode(rle)
        assert (found.numpy() & expected).sum() / (found.numpy() | expected).sum() > 0.98
        if polygon is STAR:
            assert not expected[32 * 18, 32 * 30]

    def test_parts_are_united(self) -> None:
        """Where two polygons of an object overlap it is inside, unlike in a polygon that crosses itself."""
        other = [10, 10, 30, 10, 30, 30, 10, 30]
        both, one, two = bitmaps(Masks.read([[SQUARE, other], [SQUARE], [other]]), HEIGHT, WIDTH)
        assert both.equal(one | two)
        assert (one & two).any()

    @pytest.mark.parametrize("edges", [256, 257])
    def test_many_edges_left_of_a_centre(self, edges: int) -> None:
        zigzag = [value for i in range(edges + 1) for value in (4 + i / edges, HEIGHT * (i % 2))]
        masks = Masks.read([[[*zigzag, 50, zigzag[-1], 50, 0]]])
        assert masks.crop_and_resize(boxes_of((0, 0, WIDTH, HEIGHT)), 1).item() == edges % 2

    def test_of_many_boxes_in_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        masks, boxes = Masks.read(polygons(0))[torch.arange(50) % 5], drawn_boxes(0, 50)
        whole = masks.crop_and_resize(boxes, 28)
        for most in (0, 100):
            monkeypatch.setattr(module, "MOST_PAIRS", most)
            assert masks.crop_and_resize(boxes, 28).equal(whole)

    def test_nothing(self) -> None:
        flat = [[[3, 3, 9, 3, 20, 3]], [], {"size": [4, 5], "counts": [20]}, {"size": [4, 5], "counts": ""}]
        found = Masks.read(flat)
        assert len(found) == 4
        assert not found.crop_and_resize(boxes_of((0, 0, 30, 30)).expand(4, 4), 28).any()
        assert Masks.read([]).crop_and_resize(torch.zeros(0, 4), 28).shape == (0, 28, 28)
        assert found[torch.zeros(4, dtype=torch.bool)].crop_and_resize(torch.zeros(0, 4), 14).shape == (0, 14, 14)

    @pytest.mark.detectron2
    def test_targets_of_real_objects_are_close_to_detectron2s(self, tiny_coco: Path) -> None:
        """28 x 28 cells of boxes around COCO's objects, as docs/backends.md has them; prints the mean IoUs (-s)."""
        from detectron2.structures import BitMasks, PolygonMasks

        content = json.loads((tiny_coco / "annotations/instances_train2017.json").read_text())
        generator = torch.Generator().manual_seed(0)
        overlaps = []
        for image in content["images"]:
            objects = [one for one in content["annotations"] if one["image_id"] == image["id"] and not one["iscrowd"]]
            if not objects:
                continue
            polygons = [one["segmentation"] for one in objects]
            boxes, chosen = torch.tensor([one["bbox"] for one in objects]), torch.arange(16) % len(objects)
            boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)[chosen]
            size = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
            boxes = boxes + 0.3 * size * (torch.rand(16, 4, generator=generator) - 0.5)
            found = Masks.read(polygons)[chosen].crop_and_resize(boxes, 28)
            pixels = torch.from_numpy(decode_masks(polygons, image["height"], image["width"]))
            theirs = (
                PolygonMasks([[np.array(part) for part in one] for one in polygons])[chosen],
                BitMasks(pixels)[chosen],
            )
            targets = [one.crop_and_resize(boxes, 28) for one in theirs]
            overlaps.append([(found & one).sum((1, 2)) / (found | one).sum((1, 2)).clamp(min=1) for one in targets])
        with_polygons, with_bitmaps = (torch.cat(each).mean() for each in zip(*overlaps, strict=True))
        print(f"IoU with PolygonMasks {with_polygons:.3f}, with BitMasks {with_bitmaps:.3f}")
        assert with_polygons > 0.98
        assert with_bitmaps > 0.96


class TestReading:
    @pytest.mark.parametrize("seed", range(5))
    def test_an_rle_loses_nothing(self, seed: int) -> None:
        for pixels in (noise(seed), noise(seed, height=1), noise(seed, width=1), np.ones((1, 3, 5), np.uint8)):
            assert bitmaps(Masks.read(encoded(pixels)), *pixels.shape[1:]).numpy().tolist() == pixels.tolist()

    def test_holes(self) -> None:
        ring = np.zeros((1, HEIGHT, WIDTH), np.uint8)
        ring[0, 5:30, 5:30], ring[0, 10:20, 10:20] = 1, 0
        masks = Masks.read(encoded(ring))
        assert masks.edges.tolist() == [[5, 5, 5, 30], [10, 10, 10, 20], [20, 10, 20, 20], [30, 5, 30, 30]]
        assert bitmaps(masks, HEIGHT, WIDTH).numpy().tolist() == ring.tolist()

    def test_three_ways_to_write_a_mask_are_one(self) -> None:
        masks = Masks.read([rectangle_mask((6, 8, 20, 12), WIDTH, HEIGHT, kind) for kind in MASK_KINDS])
        expected = torch.zeros(HEIGHT, WIDTH, dtype=torch.uint8)
        expected[8:20, 6:26] = 1
        assert all(mask.equal(expected) for mask in bitmaps(masks, HEIGHT, WIDTH))

    def test_arrays_and_bytes(self) -> None:
        [rle] = encoded(noise(0, 1))
        written = [[SQUARE, DIAMOND], {"size": rle["size"], "counts": rle["counts"].decode()}]
        packed = [[np.array(SQUARE, np.float32), np.array(DIAMOND)], rle]
        assert equal(Masks.read(written), Masks.read(packed))


class TestMoving:
    @pytest.mark.parametrize("scale", [(2.0, 3.0), (-1.0, 1.0), (1.0, -1.0), (0.5, 1.3)])
    def test_what_is_drawn_moves_with_boxes(self, scale: tuple[float, float]) -> None:
        """Scaled, mirrored and shifted masks in boxes moved alike are what they were, mirrored."""
        masks, boxes = Masks.read([*polygons(1), *encoded(noise(1, 1))]), drawn_boxes(1, 6)
        offset = 3.0, 70.0
        moved = (
            (boxes * torch.tensor(scale * 2) + torch.tensor(offset * 2)).view(-1, 2, 2).sort(dim=1).values.flatten(1)
        )
        found = masks.moved(scale, offset).crop_and_resize(moved, 28)
        mirrored = [axis for axis, factor in ((2, scale[0]), (1, scale[1])) if factor < 0]
        assert (found != masks.crop_and_resize(boxes, 28).flip(mirrored)).float().mean() < 2e-3  # rounding

    def test_whole_pixels_move_exactly(self) -> None:
        pixels = noise(2)
        masks = Masks.read(encoded(pixels))
        flipped = bitmaps(masks.moved((-1.0, 1.0), (WIDTH, 0.0)), HEIGHT, WIDTH).numpy()
        assert (flipped == pixels[:, :, ::-1]).all()
        doubled = bitmaps(masks.moved((2.0, 2.0)), 2 * HEIGHT, 2 * WIDTH).numpy()
        assert (doubled == pixels.repeat(2, axis=1).repeat(2, axis=2)).all()
        cut = bitmaps(masks.moved(offset=(-7.0, -5.0)), HEIGHT - 5, WIDTH - 7).numpy()
        assert (cut == pixels[:, 5:, 7:]).all()

    def test_selections(self) -> None:
        masks, boxes = Masks.read(polygons(3)), drawn_boxes(3, 5)
        whole = masks.crop_and_resize(boxes, 14)
        for index in (torch.tensor([True, False, True, True, False]), torch.tensor([4, 0, 0]), slice(1, 3)):
            assert masks[index].crop_and_resize(boxes[index], 14).equal(whole[index])
            assert len(masks[index]) == len(boxes[index])
        twice = masks[torch.tensor([3, 1])][torch.tensor([1])]
        assert twice.crop_and_resize(boxes[1:2], 14).equal(whole[1:2])

    def test_to_another_device(self) -> None:
        moved = Masks.read(polygons(0)).to("meta", non_blocking=True)
        assert {tensor.device.type for tensor in vars(moved).values()} == {"meta"}

    def test_a_loader_pins_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every tensor, by a stand-in for what needs a GPU."""
        pinned: list[Tensor] = []
        monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
        sample = {"masks": Masks.read(polygons(0))}
        [found] = pin_memory([sample])
        assert equal(found["masks"], sample["masks"])
        assert len(pinned) == len(vars(sample["masks"]))

    def test_travels_between_processes(self) -> None:
        masks = Masks.read(polygons(4))
        assert equal(pickle.loads(pickle.dumps(masks)), masks)
        samples = [{"masks": rectangles(drawn_boxes(seed, 3))} for seed in range(3)]
        for batch, sample in zip(DataLoader(samples, num_workers=1, collate_fn=list), samples, strict=True):
            assert equal(batch[0]["masks"], sample["masks"])
