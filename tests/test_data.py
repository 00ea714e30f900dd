"""Data: names to files, files to checked annotations, positions to samples; whatever is wrong is said with its id."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import MASK_KINDS, rectangle_mask
from PIL import Image

from scratch_det.config import get_cfg, set_key
from scratch_det.data import dataset as samples
from scratch_det.data.catalog import lookup
from scratch_det.data.coco import CocoDataset, read_coco
from scratch_det.data.dataset import Stream
from scratch_det.data.image import decode_masks, encode_masks, read_image, to_rle
from scratch_det.data.transforms import augment, flip, output_size, resize
from scratch_det.distributed.launch import ALONE, World
from scratch_det.errors import DataError

EXIF_ORIENTATION = 0x0112


def read(name: str = "toy_train", need_masks: bool = True) -> CocoDataset:
    return read_coco(lookup(name), need_masks)


def refusal(action, *arguments) -> str:
    """The message of the DataError that ``action`` must raise."""
    with pytest.raises(DataError) as caught:
        action(*arguments)
    return str(caught.value)


class TestCatalog:
    def write(self, root: Path, text: str) -> None:
        (root / "catalog.yaml").write_text(text)

    def test_built_in_entry(self, datasets_root):
        (datasets_root / "coco" / "annotations").mkdir(parents=True)
        (datasets_root / "coco" / "val2017").mkdir()
        (datasets_root / "coco" / "annotations" / "instances_val2017.json").write_text("{}")
        entry = lookup("coco_2017_val")
        assert entry.json_file == datasets_root / "coco/annotations/instances_val2017.json"
        assert entry.image_root == datasets_root / "coco/val2017"
        assert entry.drop_empty_boxes  # COCO has a few boxes without area

    def test_default_root_is_the_datasets_folder_here(self, tmp_path, monkeypatch):
        monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "datasets" / "images").mkdir(parents=True)
        (tmp_path / "datasets" / "own.json").write_text("{}")
        self.write(tmp_path / "datasets", "own: {json: own.json, images: images, drop_empty_boxes: true}")
        entry = lookup("own")
        assert entry.json_file.resolve() == tmp_path / "datasets" / "own.json"
        assert entry.drop_empty_boxes

    def test_own_entry_wins_over_built_in(self, coco_factory):
        own = coco_factory("coco_2017_val")
        assert lookup("coco_2017_val").json_file == own

    def test_absolute_paths(self, datasets_root, coco_factory):
        path = coco_factory("elsewhere")
        self.write(datasets_root, yaml.safe_dump({"own": {"json": str(path), "images": str(path.parent / "images")}}))
        assert lookup("own").json_file == path

    def test_unknown_name(self, coco_factory, datasets_root):
        coco_factory("toy_train")
        message = refusal(lookup, "toy_trian")
        assert "data set 'toy_trian' is not in the catalog; did you mean 'toy_train'?" in message
        assert "coco_2017_val" in message
        assert f"write into {datasets_root / 'catalog.yaml'}:  toy_trian:" in message

    @pytest.mark.parametrize("missing", [{"json"}, {"images"}, {"json", "images"}])
    def test_missing_files_show_expected_and_found(self, datasets_root, missing):
        if "json" not in missing:
            (datasets_root / "a.json").write_text("{}")
        if "images" not in missing:
            (datasets_root / "photos").mkdir()
        (datasets_root / "other").mkdir()
        self.write(datasets_root, "own: {json: a.json, images: photos}")
        message = refusal(lookup, "own")
        for field, path in (("json", datasets_root / "a.json"), ("images", datasets_root / "photos")):
            assert f"{'missing ' if field in missing else 'found   '} {path}" in message
        assert f"{datasets_root} holds: " in message
        assert "other" in message
        assert "DETECTRON2_DATASETS" in message

    def test_missing_root(self, tmp_path, monkeypatch):
        monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
        assert f"{tmp_path / 'nowhere'} does not exist" in refusal(lookup, "coco_2017_val")

    def test_missing_digits_name_the_command(self, datasets_root):
        assert "python tools/prepare_digits.py" in refusal(lookup, "digits_train")

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("own: {json: a.json}", "entry 'own' is {'json': 'a.json'}; expected {json: PATH, images: FOLDER}"),
            ("own: a.json", "entry 'own' is 'a.json'"),
            ("own: {json: a.json, images: b, mask: c}", "known fields: ap, drop_empty_boxes, images, json"),
            ("own:\n  json: [\n", "catalog.yaml:3: not valid YAML"),
            ("- own\n", "expected 'name: {json: PATH, images: FOLDER}' entries"),
        ],
        ids=["no images", "a string", "unknown field", "no YAML", "a list"],
    )
    def test_malformed_entry(self, datasets_root, text, expected):
        self.write(datasets_root, text)
        message = refusal(lookup, "own")
        assert message.startswith(str(datasets_root / "catalog.yaml"))
        assert expected in message


class TestCoco:
    def test_classes_follow_category_ids_with_gaps(self, coco_factory):
        coco_factory(category_ids=(9, 2, 5))
        data = read()
        assert (data.classes, data.category_ids) == (["class2", "class5", "class9"], [2, 5, 9])
        for entry in (entry for entries in data.annotations.values() for entry in entries):
            assert data.category_ids[entry["label"]] == entry["category_id"]

    def test_crowd_is_kept_but_not_learned_from(self, coco_factory):
        coco_factory()
        data = read()
        assert [entry["iscrowd"] for entry in data.annotations[1]] == [0, 0, 1]
        assert [entry["id"] for entry in data.training_annotations(1)] == [101, 102]

    def test_image_without_objects(self, coco_factory):
        coco_factory(num_images=4)
        data = read()
        assert [image["id"] for image in data.images] == [1, 2, 3, 4]
        assert data.training_annotations(4) == []

    def test_empty_boxes_are_dropped_where_the_entry_says_so(self, coco_factory):
        coco_factory(change=lambda c: c["annotations"][1]["bbox"].__setitem__(2, 0), drop_empty_boxes=True)
        assert [entry["id"] for entry in read().training_annotations(1)] == [101]

    def test_crowd_may_be_empty_box(self, coco_factory):
        coco_factory(change=lambda c: c["annotations"][2]["bbox"].__setitem__(2, 0))
        assert len(read().annotations[1]) == 3

    def test_files_in_subfolders(self, coco_factory):
        path = coco_factory(change=lambda c: c["images"][0].update(file_name="sub/1.jpg"))
        assert "1 images that are not in" in refusal(read)
        (path.parent / "images" / "sub").mkdir()
        (path.parent / "images" / "1.jpg").rename(path.parent / "images" / "sub" / "1.jpg")
        assert len(read().images) == 4

    def test_digest_is_of_the_bytes(self, coco_factory):
        path = coco_factory()
        before = read().digest
        assert read().digest == before
        path.write_text(path.read_text() + "\n")
        assert read().digest != before

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (lambda c: c["annotations"][1].update(image_id=77), "unknown image_id: id 102 (image_id 77)"),
            (lambda c: c["annotations"][3].update(category_id=4), "unknown category_id: id 104 (category_id 4)"),
            (lambda c: c["annotations"][3].update(category_id=4), "known category ids: [2, 5, 9]"),
            (lambda c: c["annotations"][0]["bbox"].__setitem__(2, 0), "no width or height: id 101"),
            (lambda c: c["annotations"][0]["bbox"].__setitem__(3, -3.0), "no width or height: id 101"),
            (lambda c: c["annotations"][0]["bbox"].__setitem__(2, 0), "'drop_empty_boxes: true'"),
            (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "[x, y, width, height] of numbers: id 101"),
            (lambda c: c["annotations"][0].update(bbox=[1, 2, 3, "4"]), "[x, y, width, height] of numbers: id 101"),
            (lambda c: c["annotations"][0].pop("bbox"), "without id, image_id, category_id or bbox: id 101"),
            (lambda c: c["annotations"][0].pop("id"), "id (entry 0)"),
            (lambda c: c["annotations"][1].update(id=101), "1 duplicate annotation ids: id 101"),
            (lambda c: c["annotations"][1].update(segmentation=[]), "3+ points nor RLE: id 102"),
            (lambda c: c["annotations"][1].update(segmentation=[[1, 2, 3, 4]]), "3+ points nor RLE: id 102"),
            (lambda c: c["annotations"][1].update(segmentation={"counts": "x"}), "3+ points nor RLE: id 102"),
            (lambda c: c["annotations"][1].pop("segmentation"), "MODEL.MASK_ON False"),
            (
                lambda c: c["annotations"][1].update(segmentation={"size": [96, 64], "counts": [96 * 64]}),
                "RLE does not fit the image: size [height, width], counts that add up to height x width: id 102",
            ),
            (
                lambda c: c["annotations"][1].update(segmentation={"size": [64, 96], "counts": [5, 6000]}),
                "counts that add up to height x width: id 102",
            ),
            (lambda c: c["images"].append(dict(c["images"][2])), "1 duplicate image ids: id 3"),
            (lambda c: c["images"][1].pop("height"), "without id, file_name, width or height: id 2"),
            (lambda c: c["images"][1].update(file_name="9.jpg"), "images: id 2 (9.jpg)\n  complete the folder"),
            (lambda c: c["categories"].append({"id": 5, "name": "again"}), "1 duplicate category ids: id 5"),
            (lambda c: c["categories"][1].pop("name"), "categories without id or name: id 5"),
            (lambda c: c.update(images=[], annotations=[]), "data set 'toy_train' is empty: 0 images, 3 categories"),
            (lambda c: c.update(categories=[], annotations=[]), "is empty: 4 images, 0 categories"),
            (lambda c: c.pop("categories"), "no list 'categories'; COCO format has images, annotations, categories"),
            (lambda c: c.update(images={}), "no list 'images'"),
        ],
    )
    def test_what_is_wrong_is_said_with_its_id(self, coco_factory, change, expected):
        path = coco_factory(change=change)
        message = refusal(read)
        assert message.startswith(str(path))
        assert expected in message
        assert len(message.splitlines()) <= 2

    def test_many_offenders_are_counted(self, coco_factory):
        coco_factory(num_images=8, change=lambda c: [entry.update(image_id=77) for entry in c["annotations"]])
        message = refusal(read)
        assert "15 annotations with an unknown image_id: id 101 (image_id 77), 102" in message
        assert "105 (image_id 77), ..." in message
        assert "106" not in message

    def test_masks_are_not_asked_for_without_need(self, coco_factory):
        coco_factory(change=lambda c: [entry.pop("segmentation") for entry in c["annotations"]])
        assert len(read(need_masks=False).training_annotations(1)) == 2

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b'{"images": [\n  1,\n]}', ":3:1: broken json"),
            (b"", ":1:1: broken json"),
            (b'{"a": "\xff\xfe"}', "not a json text file"),
            (b"[1, 2]", "no list 'images'"),
        ],
    )
    def test_broken_json(self, coco_factory, content, expected):
        path = coco_factory()
        path.write_bytes(content)
        message = refusal(read)
        assert message.startswith(str(path))
        assert expected in message

    def test_tiny_coco(self, tiny_coco, datasets_root):
        fields = {
            "json": str(tiny_coco / "annotations/instances_val2017.json"),
            "images": str(tiny_coco / "val2017"),
        }
        (datasets_root / "catalog.yaml").write_text(yaml.safe_dump({"tiny": fields}))
        data = read("tiny")
        assert (len(data.classes), data.category_ids[-1], len(data.images)) == (80, 90, 50)
        every = [entry for entries in data.annotations.values() for entry in entries]
        learned = sum(len(data.training_annotations(image["id"])) for image in data.images)
        assert learned == sum(not entry["iscrowd"] for entry in every) < len(every)


class TestStream:
    EPOCHS = 5
    PORTRAIT = pytest.mark.parametrize(
        ("num_images", "num_portrait"),
        [(1, 0), (1, 1), (2, 1), (3, 1), (3, 2), (8, 0), (8, 2), (8, 3), (9, 0), (9, 2), (9, 3), (9, 9)],
    )

    def portrait(self, num_images: int, num_portrait: int) -> np.ndarray:
        return np.random.default_rng(3).permutation(np.arange(num_images) < num_portrait)

    def indices(self, stream: Stream) -> np.ndarray:
        return np.array([stream.index(position) for position in range(self.EPOCHS * stream.num_images)])

    @PORTRAIT
    def test_an_epoch_is_a_permutation(self, num_images, num_portrait):
        for portrait in (None, self.portrait(num_images, num_portrait)):
            epochs = self.indices(Stream(0, num_images, portrait)).reshape(self.EPOCHS, num_images)
            np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(num_images), (self.EPOCHS, 1)))

    @PORTRAIT
    def test_pairs_share_an_orientation(self, num_images, num_portrait):
        """Two images are left over, as the last pair, only when both orientations have an odd number of images."""
        portrait = self.portrait(num_images, num_portrait)
        for seed in range(4):
            order = portrait[self.indices(Stream(seed, num_images, portrait))]
            order = order[: len(order) // 2 * 2]
            mixed = np.flatnonzero(order[0::2] != order[1::2]) * 2
            unpaired = num_images % 2 == 0 and num_portrait % 2 == 1
            last_pairs = [epoch * num_images - 2 for epoch in range(1, self.EPOCHS + 1)]
            assert mixed.tolist() == (last_pairs if unpaired else [])

    def test_pairs_of_both_orientations_are_mixed(self):
        portrait = self.portrait(200, 100)
        order = portrait[self.indices(Stream(0, 200, portrait))].reshape(self.EPOCHS, 4, 50)
        assert (order.mean(axis=2) > 0.2).all()  # every quarter of every epoch has some of each
        assert (order.mean(axis=2) < 0.8).all()

    def test_epochs_and_seeds_differ(self):
        first, second = (self.indices(Stream(seed, 50)).reshape(self.EPOCHS, 50) for seed in (0, 1))
        assert len({tuple(epoch) for epoch in [*first, *second]}) == 2 * self.EPOCHS

    @pytest.mark.parametrize("grouped", [False, True])
    def test_no_history(self, grouped):
        portrait = self.portrait(9, 3) if grouped else None
        expected = self.indices(Stream(7, 9, portrait))
        positions = np.random.default_rng(0).permutation(len(expected))
        stream = Stream(7, 9, portrait)
        assert [stream.index(int(position)) for position in positions] == expected[positions].tolist()
        assert Stream(7, 9, portrait).index(40) == expected[40]

    def test_random_numbers_depend_on_seed_and_position_alone(self):
        def draw(stream: Stream, position: int) -> tuple:
            return tuple(stream.rng(position).random(3))

        assert draw(Stream(1, 9), 30) == draw(Stream(1, 500, np.ones(500, bool)), 30)
        stream = Stream(1, 9)
        first = draw(stream, 4)
        assert draw(stream, 5) != first
        assert draw(stream, 4) == first
        assert draw(Stream(2, 9), 4) != first

    @pytest.mark.parametrize(("seed", "num_images"), [(-1, 5), (0, 0)])
    def test_nonsense_is_refused(self, seed, num_images):
        with pytest.raises(ValueError, match="expected seed >= 0"):
            Stream(seed, num_images)


def detectron2_output_size(height: int, width: int, short_side: int, max_size: int) -> tuple[int, int]:
    """ResizeShortestEdge.get_output_shape, operation by operation."""
    size = short_side * 1.0
    scale = size / min(height, width)
    new_h, new_w = (size, scale * width) if height < width else (scale * height, size)
    if max(new_h, new_w) > max_size:
        scale = max_size * 1.0 / max(new_h, new_w)
        new_h, new_w = new_h * scale, new_w * scale
    return int(new_h + 0.5), int(new_w + 0.5)


def rectangle_sample(kind: str = "polygon", width: int = 60, height: int = 40) -> dict:
    """One image with two bright rectangles, their boxes (x1 y1 x2 y2) and masks."""
    boxes = [(6, 8, 20, 12), (36, 10, 10, 26)]
    image = torch.zeros((3, height, width), dtype=torch.uint8)
    for x, y, w, h in boxes:
        image[:, y : y + h, x : x + w] = 200
    return {
        "image": image,
        "boxes": torch.tensor([[x, y, x + w, y + h] for x, y, w, h in boxes], dtype=torch.float32),
        "labels": torch.tensor([0, 1]),
        "masks": decode_masks([rectangle_mask(box, width, height, kind) for box in boxes], height, width),
    }


def extent(mask: torch.Tensor) -> list[int]:
    """x1 y1 x2 y2 of the pixels that are set."""
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key] for key in a
    )


def config(**changes):
    """The defaults with ``SECTION__KEY=value`` changes, small and from scratch."""
    cfg = get_cfg()
    cfg.SEED, cfg.MODEL.MASK_ON, cfg.DATALOADER.NUM_WORKERS = 0, True, 0
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (48, 80), 128
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 80, 128
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER = 3, 4
    for key, value in changes.items():
        set_key(cfg, key.replace("__", "."), value)
    return cfg


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

    @pytest.mark.parametrize("short_side", [25, 40, 63, 100])
    @pytest.mark.parametrize("direction", ["none", "horizontal", "vertical"])
    def test_boxes_and_masks_move_with_the_image(self, short_side, direction):
        sample = resize(rectangle_sample(), short_side, 1000)
        if direction != "none":
            sample = flip(sample, direction)
        height, width = sample["image"].shape[-2:]
        assert (height, width) == (short_side, output_size(40, 60, short_side, 1000)[1])
        assert sample["masks"].shape == (2, height, width)
        for box, mask in zip(sample["boxes"], sample["masks"], strict=True):
            np.testing.assert_allclose(extent(mask), box, atol=1)
        bright = (sample["image"][0] > 100).to(torch.uint8)
        assert (bright != sample["masks"].amax(0)).float().mean() < 0.03

    def test_masks_stay_binary(self):
        assert resize(rectangle_sample(), 63, 1000)["masks"].unique().tolist() == [0, 1]

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
        moved = flip(resize(empty, 63, 1000), "horizontal")
        assert moved["masks"].shape == (0, *moved["image"].shape[-2:])
        assert moved["boxes"].shape == (0, 4)

    def test_inputs_are_not_changed(self):
        sample = rectangle_sample()
        flip(resize(sample, 63, 1000), "vertical")
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

    @pytest.mark.parametrize(("direction", "expected"), [("none", {6}), ("horizontal", {6, 34}), ("vertical", {6})])
    def test_random_flip(self, direction, expected):
        cfg = config(INPUT__MIN_SIZE_TRAIN=(40,), INPUT__RANDOM_FLIP=direction)
        drawn = [augment(rectangle_sample(), cfg, np.random.default_rng(seed)) for seed in range(40)]
        assert {int(sample["boxes"][0, 0]) for sample in drawn} == expected
        assert len({int(sample["boxes"][0, 1]) for sample in drawn}) == (2 if direction == "vertical" else 1)


class TestImages:
    def test_three_ways_to_write_a_mask_are_one(self):
        box, width, height = (6, 8, 20, 12), 60, 40
        masks = decode_masks([rectangle_mask(box, width, height, kind) for kind in MASK_KINDS], height, width)
        expected = torch.zeros(height, width, dtype=torch.uint8)
        expected[8:20, 6:26] = 1
        for mask in masks:
            assert torch.equal(mask, expected)

    def test_uncompressed_counts_run_down_the_columns(self):
        mask = decode_masks([{"size": [3, 2], "counts": [1, 2, 1, 1, 1]}], 3, 2)
        assert mask[0].tolist() == [[0, 0], [1, 1], [1, 0]]

    def test_polygons_of_one_object_are_joined(self):
        parts = rectangle_mask((2, 2, 4, 4), 20, 10, "polygon") + rectangle_mask((12, 3, 5, 5), 20, 10, "polygon")
        assert int(decode_masks([parts], 10, 20).sum()) == 16 + 25

    def test_no_masks(self):
        assert decode_masks([], 40, 60).shape == (0, 40, 60)

    def test_encode_decode_round_trip(self):
        masks = np.random.default_rng(0).integers(0, 2, (4, 30, 50), dtype=np.uint8)
        rles = encode_masks(masks)
        assert json.loads(json.dumps(rles)) == rles
        np.testing.assert_array_equal(decode_masks(rles, 30, 50), masks)

    def test_compressed_rle_is_passed_on(self):
        rle = rectangle_mask((6, 8, 20, 12), 60, 40, "compressed")
        assert to_rle(rle, 40, 60) == rle

    def save(self, path: Path, mode: str = "RGB", **options) -> Path:
        pixels = np.zeros((40, 60, 3), dtype=np.uint8)
        pixels[:, :30] = (250, 120, 10)
        Image.fromarray(pixels).convert(mode).save(path, **options)
        return path

    def test_colours_are_rgb(self, tmp_path):
        image = read_image(self.save(tmp_path / "a.png"), 60, 40)
        assert (image.shape, image.dtype) == ((40, 60, 3), np.uint8)
        assert image[0, 0].tolist() == [250, 120, 10]

    @pytest.mark.parametrize("mode", ["L", "CMYK"])
    def test_other_colour_modes(self, tmp_path, mode):
        assert read_image(self.save(tmp_path / "a.jpg", mode), 60, 40).shape == (40, 60, 3)

    def test_exif_turns_the_image_upright(self, tmp_path):
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = 6  # stored lying; upright after a quarter turn clockwise
        path = self.save(tmp_path / "a.jpg", exif=exif)
        upright = read_image(path, 40, 60)
        assert upright.shape == (60, 40, 3)
        assert upright[5, 20].astype(int).sum() > 300  # the left half is on top now
        assert upright[55, 20].astype(int).sum() < 60
        assert "image is 40 x 60 px, the json says 60 x 40" in refusal(read_image, path, 60, 40)

    def test_size_mismatch(self, tmp_path):
        path = self.save(tmp_path / "a.jpg")
        message = refusal(read_image, path, 61, 40)
        assert message.startswith(f"{path}: image is 60 x 40 px, the json says 61 x 40")

    @pytest.mark.parametrize("keep", [0, 10, 500])
    def test_truncated_jpeg(self, tmp_path, keep):
        path = self.save(tmp_path / "a.jpg")
        path.write_bytes(path.read_bytes()[:keep])
        message = refusal(read_image, path, 60, 40)
        assert message.startswith(f"{path}: cannot be decoded (")
        assert "fetch the file again" in message

    def test_missing_file(self, tmp_path):
        assert refusal(read_image, tmp_path / "a.jpg", 60, 40) == f"{tmp_path / 'a.jpg'}: image file is missing"


class TestSamples:
    def training_set(self, cfg=None) -> samples.TrainingSet:
        return samples.TrainingSet(cfg or config(), [read()])

    def test_sample(self, coco_factory):
        coco_factory()
        dataset = self.training_set(config(INPUT__MIN_SIZE_TRAIN=(64,), INPUT__RANDOM_FLIP="none"))
        position = next(p for p in range(3) if dataset[p]["image_id"] == 1)
        sample = dataset[position]
        assert (sample["height"], sample["width"], tuple(sample["image"].shape)) == (64, 96, (3, 64, 96))
        assert sample["boxes"].tolist() == [[4, 6, 36, 38], [48, 16, 80, 48]]
        assert sample["labels"].tolist() == [1, 2]
        for box, mask in zip(sample["boxes"], sample["masks"], strict=True):
            assert extent(mask) == box.tolist()
        assert (sample["image"].dtype, sample["masks"].dtype) == (torch.uint8, torch.uint8)

    def test_format_is_the_order_of_channels(self, coco_factory):
        stored = np.asarray(Image.open(coco_factory().parent / "images" / "1.jpg"))
        for order, pixels in (("RGB", stored), ("BGR", stored[:, :, ::-1])):
            sample = samples.EvaluationSet(config(INPUT__FORMAT=order, INPUT__MIN_SIZE_TEST=0), read())[0]
            np.testing.assert_array_equal(sample["image"].permute(1, 2, 0), pixels)

    def test_no_masks_without_mask_on(self, coco_factory):
        coco_factory()
        assert "masks" not in self.training_set(config(MODEL__MASK_ON=False))[0]

    @pytest.mark.parametrize(("filtered", "length", "dropped"), [(True, 3, 1), (False, 4, 0)])
    def test_images_without_objects(self, coco_factory, filtered, length, dropped):
        coco_factory(num_images=4)
        dataset = self.training_set(config(DATALOADER__FILTER_EMPTY_ANNOTATIONS=filtered))
        assert (len(dataset), dataset.num_dropped) == (length, dropped)
        objects = {dataset[position]["image_id"]: len(dataset[position]["boxes"]) for position in range(length)}
        assert objects == {1: 2, 2: 2, 3: 2} | ({} if filtered else {4: 0})
        assert all(dataset[position]["boxes"].shape[1] == 4 for position in range(length))

    def test_several_data_sets_are_one(self, coco_factory):
        coco_factory("first")
        coco_factory("second", seed=1)
        dataset = samples.TrainingSet(config(), [read("first"), read("second")])
        assert len(dataset) == 6
        assert sorted(dataset[position]["image_id"] for position in range(6)) == [1, 1, 2, 2, 3, 3]

    def test_no_objects_at_all(self, coco_factory):
        path = coco_factory(change=lambda c: c.update(annotations=[]))
        message = refusal(self.training_set)
        assert message.startswith(f"{path}: data set is empty for training: none of its 4 images has an object")

    def test_boxes_are_clipped_and_dropped_when_nothing_is_left(self, coco_factory):
        def change(content):
            content["annotations"][0]["bbox"] = [-10, -10, 46, 48]
            content["annotations"][1]["bbox"] = [95.9999999, 10, 5, 5]  # in float32 it begins at the right edge, 96

        coco_factory(change=change)
        dataset = self.training_set(config(INPUT__MIN_SIZE_TRAIN=(64,), INPUT__RANDOM_FLIP="none"))
        sample = next(dataset[p] for p in range(3) if dataset[p]["image_id"] == 1)
        assert sample["boxes"].tolist() == [[0, 0, 36, 38]]
        assert len(sample["labels"]) == len(sample["masks"]) == 1

    @pytest.mark.parametrize("workers", [1, 2, 4])
    def test_workers_change_nothing(self, coco_factory, workers):
        coco_factory(num_images=6)
        here, elsewhere = (
            list(samples.training_batches(self.training_set(cfg), cfg, 0))
            for cfg in (config(), config(DATALOADER__NUM_WORKERS=workers))
        )
        assert [len(batch) for batch in here] == [3] * 4
        for batch, other in zip(here, elsewhere, strict=True):
            assert all(same(a, b) for a, b in zip(batch, other, strict=True))

    def test_travels_to_spawned_workers(self, coco_factory):
        coco_factory()
        dataset = self.training_set(config())
        assert same(pickle.loads(pickle.dumps(dataset))[5], dataset[5])

    def test_batches_are_addressed_by_iteration(self, coco_factory):
        coco_factory(num_images=6)
        cfg = config()
        dataset = self.training_set(cfg)
        whole = list(samples.training_batches(dataset, cfg, 0))
        resumed = list(samples.training_batches(self.training_set(cfg), cfg, 2))
        assert len(resumed) == 2
        for batch, other in zip(whole[2:], resumed, strict=True):
            assert all(same(a, b) for a, b in zip(batch, other, strict=True))
        assert all(same(sample, dataset[6 + i]) for i, sample in enumerate(resumed[0]))

    @pytest.mark.parametrize(("size", "accumulate"), [(2, 1), (4, 1), (1, 2), (2, 2), (1, 4)])
    def test_split_over_processes_and_parts_changes_no_sample(self, coco_factory, size, accumulate):
        """Image, flip and size at every iteration: the processes' parts, in their order, are the whole batch."""
        coco_factory(num_images=6)
        cfg = config(SOLVER__IMS_PER_BATCH=4, SOLVER__MAX_ITER=3, INPUT__MIN_SIZE_TRAIN=(48, 64, 80))
        whole = list(samples.training_batches(self.training_set(cfg), cfg, 0))
        assert len({tuple(sample["image"].shape) for batch in whole for sample in batch}) > 2
        worlds = [World(rank, size, rank, size) for rank in range(size)] if size > 1 else [ALONE]
        feeds = [samples.training_batches(self.training_set(cfg), cfg, 0, world, accumulate) for world in worlds]
        for batch in whole:
            parts = [next(feed) for feed in feeds for _ in range(accumulate)]
            assert {len(part) for part in parts} == {4 // (size * accumulate)}
            found = [sample for part in parts for sample in part]
            assert all(same(a, b) for a, b in zip(batch, found, strict=True))
            assert [sample["position"] for sample in found] == [sample["position"] for sample in batch]

    def test_batch_size_changes_no_sample(self, coco_factory):
        coco_factory(num_images=6)
        flat = []
        for size in (2, 3):
            cfg = config(SOLVER__IMS_PER_BATCH=size, SOLVER__MAX_ITER=6 // size)
            batches = samples.training_batches(self.training_set(cfg), cfg, 0)
            flat.append([sample for batch in batches for sample in batch])
        assert all(same(a, b) for a, b in zip(*flat, strict=True))

    def test_test_set_is_every_image_once_in_order(self, coco_factory):
        coco_factory(num_images=4)
        cfg = config()
        found = [
            sample for batch in samples.evaluation_batches(samples.EvaluationSet(cfg, read()), cfg) for sample in batch
        ]
        assert [sample["image_id"] for sample in found] == [1, 2, 3, 4]
        assert [tuple(sample["image"].shape[1:]) for sample in found] == [(80, 120), (120, 80), (80, 120), (80, 120)]
        assert "boxes" not in found[0]

    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("kind", ["training", "test"])
    def test_a_damaged_image_is_one_clean_error(self, coco_factory, kind, workers):
        victim = coco_factory().parent / "images" / "2.jpg"
        victim.write_bytes(victim.read_bytes()[:300])
        cfg = config(DATALOADER__NUM_WORKERS=workers)
        if kind == "training":
            batches = samples.training_batches(self.training_set(cfg), cfg, 0)
        else:
            batches = samples.evaluation_batches(samples.EvaluationSet(cfg, read()), cfg)
        message = refusal(list, batches)
        assert message.startswith(f"{victim}: cannot be decoded")
        assert "Traceback" not in message
        assert len(message.splitlines()) == 1

    def test_records(self):
        items = [{"a": 1}, None, "x" * 1000, [1, 2]]
        records = samples.SerializedList(items)
        assert len(records) == 4
        assert [records[index] for index in (2, 0, 3, 1)] == [items[2], items[0], items[3], items[1]]
