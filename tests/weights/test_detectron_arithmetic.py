"""What Detectron computes at test time, by formulas of its own, beside what is computed here: docs/fidelity.md.

A box of Detectron's has its last pixel as x2 and y2; here x2 and y2 are 1 more, the edge of that pixel.
"""

import math
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from hotcoco import mask as mask_api
from PIL import Image
from torch import nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.transforms.functional import pil_to_tensor

from scratch_det.backends.torchvision import PYRAMID_STRIDES
from scratch_det.backends.torchvision_heads import ROIPooler
from scratch_det.config.load import get_cfg
from scratch_det.data.transforms import output_size, resize
from scratch_det.evaluation.inference import DETECTRON, predict
from scratch_det.modeling.anchors import Anchors
from scratch_det.modeling.ops import decode_keypoints, paste_masks
from scratch_det.modeling.roi_align import roi_align

LAST_PIXEL = torch.tensor([0.0, 0.0, 1.0, 1.0])  # from Detectron's boxes to those here
SIZES, RATIOS, STRIDES = [[32], [64], [128], [256], [512]], [0.5, 1.0, 2.0], [4, 8, 16, 32, 64]


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(7)


def boxes(random: np.random.Generator, number: int, sides: tuple[float, float] = (8, 400)) -> np.ndarray:
    """In Detectron's coordinates, not in whole pixels."""
    corners, lengths = random.uniform(0, 300, (number, 2)), random.uniform(*sides, (number, 2))
    return np.hstack([corners, corners + lengths - 1])


class TestAnchors:
    @staticmethod
    def theirs(side: float, ratio: float, stride: int) -> tuple[float, float]:
        """Width and height: those of the window of one stride have whole pixels, and grow by side / stride."""
        width = np.round(np.sqrt(stride * stride / ratio))
        return width * side / stride, np.round(width * ratio) * side / stride

    def test_rounded_they_are_the_same(self) -> None:
        found = Anchors(SIZES, [RATIOS], STRIDES, 0.5, "Detectron").levels([torch.zeros(1, 1, 2, 3)] * 5)
        for level, stride, (side,) in zip(found, STRIDES, SIZES, strict=True):
            expected = []
            for row, column, ratio in product(range(2), range(3), RATIOS):
                width, height = self.theirs(side, ratio, stride)
                x, y = (stride - 1) / 2 + column * stride, (stride - 1) / 2 + row * stride  # the window's middle pixel
                expected.append([x - (width - 1) / 2, y - (height - 1) / 2, x + (width - 1) / 2, y + (height - 1) / 2])
            torch.testing.assert_close(level, torch.tensor(expected).float() + LAST_PIXEL)

    def test_the_largest_difference_without_rounding(self) -> None:
        exact = {(side, ratio): (side / ratio**0.5, side * ratio**0.5) for (side,) in SIZES for ratio in RATIOS}
        apart = {}
        for stride, (side,) in zip(STRIDES, SIZES, strict=True):
            pairs = [zip(self.theirs(side, ratio, stride), exact[side, ratio], strict=True) for ratio in RATIOS]
            apart[side] = max(abs(one / other - 1) for pair in pairs for one, other in pair)
        assert {side: round(100 * value, 1) for side, value in apart.items()} == {
            32: 6.1, 64: 6.1, 128: 6.1, 256: 2.8, 512: 1.6,
        }  # fmt: skip


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_decoding_is_the_same(weights: tuple[float, ...], random: np.random.Generator) -> None:
    base, deltas = boxes(random, 50), random.normal(0, 2, (50, 4))
    deltas[:5, 2:] = 90  # beyond the clip
    side = base[:, 2:] - base[:, :2] + 1
    centre = base[:, :2] + side / 2
    scaled = deltas / weights
    new = side * np.exp(np.minimum(scaled[:, 2:], math.log(1000 / 16)))
    centre = centre + scaled[:, :2] * side
    expected = np.hstack([centre - new / 2, centre + new / 2 - 1])
    ours = BoxCoder(weights).decode_single(torch.tensor(deltas), torch.tensor(base) + LAST_PIXEL)
    torch.testing.assert_close(ours - LAST_PIXEL, torch.tensor(expected))


@pytest.mark.parametrize("height", [640, 480])
def test_boxes_in_the_photograph_end_at_their_last_pixel(height: int) -> None:
    """Detectron divides the last pixel by the scale, not the edge; without the key boxes end 0.2 to 0.4 px earlier."""
    scale, cfg, edge = 800 / height, get_cfg(), 201.0
    sample = {"image": torch.zeros(3, 800, round(900 * scale)), "height": height, "width": 900}
    backend = SimpleNamespace(predict=lambda _, batch: [{"boxes": torch.tensor([[8.0, 16, edge, edge]]) / scale}])
    (plain,) = predict(backend, nn.Identity(), cfg, [sample])
    cfg.MODEL.ANCHOR_GENERATOR.ROUNDING = DETECTRON
    (found,) = predict(backend, nn.Identity(), cfg, [sample])
    expected = (edge - 1) / scale + 1
    assert found["boxes"][0].tolist() == pytest.approx([8 / scale, 16 / scale, expected, expected])
    assert (found["boxes"] - plain["boxes"])[0, 2].item() == pytest.approx({640: 0.2, 480: 0.4}[height], abs=1e-4)


def test_levels_are_the_same(random: np.random.Generator) -> None:
    found = boxes(random, 200, (8, 900))
    found = np.vstack([found, [[0, 0, 111, 111], [0, 0, 223, 223], [0, 0, 446, 446]]])  # at the borders, and below
    area = np.prod(found[:, 2:] - found[:, :2] + 1, axis=1)
    expected = np.clip(np.floor(4 + np.log2(np.sqrt(area) / 224 + 1e-6)), 2, 5)
    maps = {f"p{level}": torch.full((1, 1, 4, 4), float(level)) for level in range(2, 6)}
    strides = {name: PYRAMID_STRIDES[name] for name in maps}
    pooler = ROIPooler("ROIAlign", strides, 1, 2)
    pooler.pool = lambda one, of_level, *_: one[0, 0, 0, 0].expand(len(of_level), 1, 1, 1)
    assert pooler(maps, [torch.tensor(found) + LAST_PIXEL])[:, 0, 0, 0].tolist() == expected.tolist()


def pooled_by_hand(one: np.ndarray, box: np.ndarray, scale: float, side: int) -> np.ndarray:
    """Mean of 2 x 2 samples in each of side x side cells of a box that is x2 - x1 wide; no half pixel is moved."""
    start, length = box[:2] * scale, np.maximum((box[2:] - box[:2]) * scale, 1)
    out = np.zeros((side, side))
    for row, column, y, x in product(range(side), range(side), (0.25, 0.75), (0.25, 0.75)):
        at = start + length * [(column + x) / side, (row + y) / side]
        if ((at < -1) | (at > one.shape[::-1])).any():
            continue
        at = np.clip(at, 0, np.array(one.shape[::-1]) - 1)
        low = np.minimum(at.astype(int), np.array(one.shape[::-1]) - 2)
        (fx, fy), (left, top) = at - low, low
        square = one[top : top + 2, left : left + 2]
        out[row, column] += ([1 - fy, fy] @ square @ [1 - fx, fx]) / 4
    return out


def test_pooling_of_the_same_numbers_is_the_same(random: np.random.Generator) -> None:
    """Detectron gives its x2, a pixel less than here, to the same function: a box of 56 px is pooled 2 % smaller."""
    one, found = random.normal(size=(60, 80)), boxes(random, 8, (10, 120))
    rois = torch.tensor(np.hstack([np.zeros((8, 1)), found]), dtype=torch.float32)
    ours = roi_align(torch.tensor(one, dtype=torch.float32)[None, None], rois, 7, 0.25, ratio=2, aligned=False)
    for box, pooled in zip(found, ours, strict=True):
        np.testing.assert_allclose(pooled[0], pooled_by_hand(one, box, 0.25, 7), atol=1e-4)


class TestImages:
    def test_sizes_are_the_same(self) -> None:
        """Of every photograph of COCO's shapes: 640 px long, and any that the long side's limit shortens."""
        for short, long in [*product(range(100, 641, 3), [640]), (480, 800), (427, 1200), (333, 500)]:
            scale = 800 / short
            if round(scale * long) > 1333:
                scale = 1333 / long
            expected = [round(short * scale), round(long * scale)]
            assert np.abs(np.subtract(output_size(short, long, 800, 1333), expected)).max() <= (short == 333)

    def test_photographs_grow_and_grow_alike(self, tiny_coco: Path) -> None:
        """To less than a grey value; a photograph that shrinks is antialiased here."""
        path = min((tiny_coco / "val2017").iterdir())
        image = Image.open(path).convert("RGB")
        size = output_size(image.height, image.width, 800, 1333)
        theirs = cv2.resize(np.asarray(image, dtype=np.float32), size[::-1], interpolation=cv2.INTER_LINEAR)
        ours = resize({"image": pil_to_tensor(image)}, size)["image"].permute(1, 2, 0).numpy()
        assert np.abs(theirs - ours).max() < 1.1
        assert np.abs(theirs - ours).mean() < 0.3


def test_masks_are_pasted_nearly_alike(random: np.random.Generator) -> None:
    """Detectron truncates the box, enlarged by the mask's border, to whole pixels, and stretches the mask over it."""
    overlaps = []
    for side in (20, 40, 80, 160, 320):
        for _ in range(10):
            noise = random.normal(size=(28, 28)).astype(np.float32)
            y, x = np.mgrid[-1:1:28j, -1:1:28j]
            mask = 1 / (1 + np.exp(-4 * (0.8 - x * x - y * y + cv2.GaussianBlur(noise, (0, 0), 3))))
            corner = random.uniform(5, 60, 2)
            box = np.hstack([corner, corner + random.uniform(0.5, 1, 2) * side - 1])
            middle, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2 * 30 / 28
            x1, y1, x2, y2 = np.hstack([middle - half, middle + half]).astype(int)
            padded = cv2.resize(np.pad(mask, 1).astype(np.float32), (x2 - x1 + 1, y2 - y1 + 1)) > 0.5
            theirs = np.zeros((400, 400), np.uint8)
            rows, columns = np.mgrid[y1 : y2 + 1, x1 : x2 + 1]
            inside = (rows >= 0) & (columns >= 0)
            theirs[rows[inside], columns[inside]] = padded[inside]
            ours = paste_masks(
                torch.tensor(mask)[None], torch.tensor(box, dtype=torch.float32)[None] + LAST_PIXEL, 400, 400
            )
            ours = np.asarray(mask_api.decode(ours[0]))
            overlaps.append((side, (ours & theirs).sum() / (ours | theirs).sum()))
    means = {side: np.mean([iou for own, iou in overlaps if own == side]) for side in (20, 40, 80, 160, 320)}
    print({side: round(float(mean), 3) for side, mean in means.items()})
    assert means[20] > 0.85
    assert means[320] > 0.985


def test_keypoints_are_the_same(random: np.random.Generator) -> None:
    """For the same box: Detectron's is a pixel narrower and lower."""
    maps = np.stack([cv2.GaussianBlur(random.normal(size=(56, 56)), (0, 0), 4) for _ in range(12)]).reshape(
        4, 3, 56, 56
    )
    maps, found = maps.astype(np.float32) * 20, boxes(random, 4, (20, 200)).astype(np.float32)
    ours = decode_keypoints(torch.tensor(maps), torch.tensor(found))
    for box, one, points in zip(found, maps, ours, strict=True):
        length = np.maximum(box[2:] - box[:2], 1)
        for heat, (x, y, score) in zip(one, points.tolist(), strict=True):
            large = cv2.resize(heat, tuple(np.ceil(length).astype(int).tolist()), interpolation=cv2.INTER_CUBIC)
            row, column = np.unravel_index(large.argmax(), large.shape)
            expected = box[:2] + (np.array([column, row]) + 0.5) * length / large.shape[::-1]
            np.testing.assert_allclose([x, y], expected, atol=1e-3)
            assert 0 < score < 1
