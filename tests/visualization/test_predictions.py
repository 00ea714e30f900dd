"""Truth beside prediction: which objects are drawn, in what colour, where, with which words; any image, any number."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from pycocotools import mask as mask_api

from scratch_det.errors import DataError
from scratch_det.visualization.curves import draw_curves, draw_grid
from scratch_det.visualization.predictions import (
    COLUMNS,
    DPI,
    MOST_OBJECTS,
    PALETTE,
    SIDES,
    THRESHOLD,
    TILE,
    choose,
    class_colors,
    draw_predictions,
    draw_tile,
    tile_size,
)

GREY = 90
CLASSES = ["ant", "bee", "cat"]


def objects(count: int, width: int, height: int, kind: str = "bool", seed: int = 0) -> dict:
    """Random boxes with masks that fill them: bool [N, H, W], COCO RLEs or None."""
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, 0.6, (count, 2)) * (width, height)
    boxes = np.concatenate([start, start + rng.uniform(0.1, 0.4, (count, 2)) * (width, height)], axis=1)
    masks = np.zeros((count, height, width), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.astype(int), strict=True):
        mask[y0:y1, x0:x1] = True
    rles = [mask_api.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]
    kinds = {"bool": masks, "rle": rles, "none": None}
    return {"boxes": boxes, "labels": rng.integers(0, 3, count), "masks": kinds[kind]}


def sample(width=128, height=96, truth=3, found=3, scores=(0.55, 1.0), kind="bool", **extra) -> dict:
    prediction = objects(found, width, height, kind, seed=1)
    prediction["scores"] = np.linspace(*scores, found)
    image = np.full((height, width, 3), GREY, np.uint8)
    return {"image": image, "truth": objects(truth, width, height, kind), "prediction": prediction, **extra}


def by_hand(score: float = 0.9, **fields) -> dict:
    """A grey 100 x 50 image with a bee at x 20 to 60, y 10 to 30, whose mask is the left half of its box."""
    mask = np.zeros((1, 50, 100), bool)
    mask[0, 10:30, 20:40] = True
    truth = {"boxes": np.array([[20.0, 10, 60, 30]]), "labels": np.array([1]), "masks": mask, **fields}
    image = np.full((50, 100, 3), GREY, np.uint8)
    return {"image": image, "truth": truth, "prediction": {**truth, "scores": np.array([score])}}


def tile_of(one: dict, side: str, classes=CLASSES, colors=None) -> tuple[Axes, np.ndarray]:
    """The axes, and the pixels uint8 [height, width, 3] below its words."""
    height, width = tile_size(one["image"])
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    draw_tile(axes, one["image"], one[side], classes, colors or class_colors([one], len(classes)), (height, width))
    return axes, np.asarray(axes.images[0].get_array())


def words_in(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def write_row(folder: Path) -> Path:
    (folder / "metrics.json").write_text('{"iteration": 1, "total_loss": 1.0, "bbox/AP": 3.0, "lr": 0.1}\n')
    return folder / "metrics.json"


def rgb(color: str) -> np.ndarray:
    return np.round(np.multiply(to_rgb(color), 255))


def picture(path: Path) -> np.ndarray:
    image = cv2.imread(str(path))
    assert image is not None
    return image


class TestTile:
    @pytest.mark.parametrize(("score", "alpha", "width"), [(0.9, 0.45, 3), (0.4, 0.15, 1)])
    def test_box_and_mask(self, score: float, alpha: float, width: int) -> None:
        """Enlarged four times; what no score reaches the threshold for is drawn thin and pale."""
        _, pixels = tile_of(by_hand(score), "prediction")
        assert pixels.shape == (200, 400, 3)
        bee = rgb(PALETTE[1])
        assert (pixels[20, 20] == GREY).all()
        assert (pixels[80, 200] == GREY).all()  # in the box, not in the mask
        assert np.abs(pixels[80, 120] - (alpha * bee + (1 - alpha) * GREY)).max() <= 2
        for y, x in ((40, 150), (120, 150), (80, 80), (80, 240)):
            assert (pixels[y, x] == bee).all(), (y, x)
        row = (pixels[80, 220:260] == bee).all(1)  # across the right side of the box
        assert row.sum() == width

    def test_masks_may_be_rle_or_missing(self) -> None:
        one = by_hand()
        expected = tile_of(one, "truth")[1]
        rle = mask_api.encode(np.asfortranarray(one["truth"]["masks"][0], dtype=np.uint8))
        assert (tile_of(by_hand(masks=[rle]), "truth")[1] == expected).all()
        assert (tile_of(by_hand(masks=None), "truth")[1][80, 120] == GREY).all()

    def test_keypoints(self) -> None:
        """Visible and hidden ones (v 2 and 1), in white rings; not those without a label (v 0)."""
        points = np.array([[[10.0, 40, 2], [80, 40, 1], [90, 5, 0]]])
        _, pixels = tile_of(by_hand(keypoints=points, masks=None), "truth")
        for x, y in ((40, 160), (320, 160)):
            assert (pixels[y, x] == rgb(PALETTE[1])).all()
            assert (pixels[y - 6 : y + 7, x - 6 : x + 7] == 255).all(2).any()
        assert (pixels[10:30, 350:370] == GREY).all()

    def test_words(self) -> None:
        assert words_in(tile_of(by_hand(), "truth")[0]) == ["bee"]
        axes, _ = tile_of(by_hand(), "prediction")
        assert words_in(axes) == ["bee: 0.90"]
        x, y = axes.texts[0].get_position()
        assert 80 <= x < 90  # px of the tile: at the left side of the box,
        assert y < 40  # above it
        assert axes.texts[0].get_bbox_patch().get_facecolor()[:3] == to_rgb(PALETTE[1])

    def test_a_label_beyond_the_class_list(self) -> None:
        assert words_in(tile_of(by_hand(labels=np.array([77])), "truth")[0]) == ["class 77"]

    def test_below_the_threshold_the_best_few_are_drawn_thin(self) -> None:
        axes, _ = tile_of(sample(found=5, scores=(0.1, 0.3)), "prediction")
        *labels, note = words_in(axes)
        assert labels[0].endswith("0.30")
        assert note == "no score reaches 0.5; thin lines: the best 3"
        chosen, is_fallback = choose(sample(found=5, scores=(0.1, 0.7))["prediction"])
        assert (chosen.tolist(), is_fallback) == ([4, 3], False)

    @pytest.mark.parametrize(
        ("score", "shown"),
        [
            (0.496, "0.49"),
            (np.nextafter(np.float32(0.5), np.float32(0)), "0.49"),
            (0.29, "0.29"),
            (0.5, "0.50"),
            (1, "1.00"),
        ],
    )
    def test_a_score_below_the_threshold_does_not_look_as_if_it_reached_it(self, score: float, shown: str) -> None:
        label, *note = words_in(tile_of(by_hand(score), "prediction")[0])
        assert label == f"bee: {shown}"
        assert bool(note) == (float(shown) < THRESHOLD)

    @pytest.mark.parametrize(
        ("truth", "found", "notes"), [(0, 0, ("no objects", "no predictions")), (3, 0, ("", "no predictions"))]
    )
    def test_nothing_to_draw(self, truth: int, found: int, notes: tuple[str, str]) -> None:
        one = sample(truth=truth, found=found, scores=(0, 0))
        for side, note in zip(SIDES, notes, strict=True):
            axes, pixels = tile_of(one, side)
            assert (pixels == GREY).all() == bool(note)
            assert [word for word in words_in(axes) if word.startswith("no ")] == ([note] if note else [])

    def test_labels_do_not_cover_each_other(self) -> None:
        axes, _ = tile_of(sample(truth=200), "truth", [f"{name} with a long name" for name in CLASSES])
        renderer = axes.figure.canvas.get_renderer()
        extents = [text.get_window_extent(renderer) for text in axes.texts]
        assert 10 < len(extents) < MOST_OBJECTS
        for number, one in enumerate(extents):
            for other in extents[:number]:
                width, height = (min(one.max[i], other.max[i]) - max(one.min[i], other.min[i]) for i in (0, 1))
                assert max(width, 0) * max(height, 0) < 0.35 * one.width * one.height

    def test_the_most_important_objects_are_drawn(self) -> None:
        one = sample(truth=200, found=200, scores=(0.0, 1.0))
        for side in SIDES:
            assert len(choose(one[side])[0]) == MOST_OBJECTS
        boxes = one["truth"]["boxes"]
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        assert areas[choose(one["truth"])[0]].min() >= np.sort(areas)[-MOST_OBJECTS]
        assert choose(one["prediction"])[0].tolist() == list(range(199, 199 - MOST_OBJECTS, -1))

    def test_truth_and_prediction_share_a_colour_per_class(self) -> None:
        many, one = [f"c{i}" for i in range(80)], sample(truth=5, found=5)
        colors = class_colors([one], len(many))
        assert len(set(colors.values())) == len(colors) == len({*one["truth"]["labels"], *one["prediction"]["labels"]})
        for side in SIDES:
            for text in tile_of(one, side, many, colors)[0].texts:
                label = many.index(text.get_text().split(":")[0])
                assert text.get_bbox_patch().get_facecolor()[:3] == to_rgb(colors[label])


class TestPicture:
    @pytest.mark.parametrize("count", [1, 2, 5])
    def test_rows_and_columns(self, count: int, tmp_path: Path) -> None:
        """Small images are enlarged; each pair is truth, then prediction."""
        out = draw_predictions([by_hand() for _ in range(count)], CLASSES, tmp_path / "made/grid.png")
        per_row = min(COLUMNS, count)
        height, width, _ = picture(out).shape
        assert 0 < width - 2 * per_row * TILE < 20 * (2 * per_row + 1)
        assert 0 < height - (rows := -(-count // per_row)) * TILE // 2 < 30 * (rows + 1) + 10
        assert [path.name for path in out.parent.iterdir()] == ["grid.png"]

    def test_each_tile_is_where_it_belongs(self, tmp_path: Path) -> None:
        """Two images of other shapes and colours: their pixels are in their own tiles, as large as TILE."""
        samples = [sample(*shape, found=0, scores=(0, 0), truth=0) for shape in ((100, 50), (40, 80))]
        for one, level in zip(samples, (200, 20), strict=True):
            one["image"] = np.full_like(one["image"], level)
        image = picture(draw_predictions(samples, CLASSES, tmp_path / "two.png"))
        bright, dark = (np.nonzero((image == level).all(2)) for level in (200, 20))
        for (rows, _), height, width in ((bright, TILE // 2, TILE), (dark, TILE, TILE // 2)):
            assert len(rows) == pytest.approx(2 * height * width, rel=0.05)  # truth, prediction; less the notes
        assert np.percentile(bright[1], 99) < np.percentile(dark[1], 1)  # a few pixels of words are as grey

    def test_sizes_orientations_and_mask_kinds_mix(self, tmp_path: Path) -> None:
        shapes = [(640, 480), (480, 640), (1333, 200), (32, 32), (7, 300)]
        kinds = ["bool", "rle", "none", "rle", "bool"]
        samples = [sample(*shape, kind=kind) for shape, kind in zip(shapes, kinds, strict=True)]
        assert picture(draw_predictions(samples, CLASSES, tmp_path / "mixed.png")).std() > 3

    def test_titles(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        titles: list[str] = []
        monkeypatch.setattr(Axes, "set_title", lambda self, label, **style: titles.append(label))
        draw_predictions([{**by_hand(), "title": "1.jpg"}, by_hand()], CLASSES, tmp_path / "a.png")
        assert titles == ["truth: 1.jpg", "prediction", "truth", "prediction"]

    def test_a_name_with_dollars_is_no_formula(self, tmp_path: Path) -> None:
        odd = "$\\frac{1$"  # matplotlib would fail to set it
        draw_predictions([sample(title=odd)], [odd] * 3, tmp_path / "a.png")
        draw_curves(write_row(tmp_path), 2, tmp_path / "b.png", odd)
        draw_grid([{odd: odd, "b": "$"}, {odd: "$", "b": "$"}], [1, 2], odd, tmp_path / "c.png")

    def test_no_samples(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no samples"):
            draw_predictions([], CLASSES, tmp_path / "none.png")
