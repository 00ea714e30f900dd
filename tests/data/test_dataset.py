"""Position in the stream -> image and augmentation -> sample -> batches, whatever the split over workers and ranks."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from samples import bitmaps
from toy_data import config, extent, read_toy, rejection, same

from scratch_det.config.choices import REPEATS
from scratch_det.data import dataset as samples
from scratch_det.data.dataset import Stream, TrainingSet, repeat_factors
from scratch_det.data.loading import evaluation_batches, training_batches
from scratch_det.distributed.launch import ALONE, World


class TestStream:
    EPOCHS = 5
    PORTRAIT = pytest.mark.parametrize(
        ("num_images", "num_portrait"),
        [(1, 0), (1, 1), (2, 1), (3, 1), (3, 2), (8, 0), (8, 2), (8, 3), (9, 0), (9, 2), (9, 3), (9, 9)],
    )

    def portrait(self, num_images: int, num_portrait: int) -> np.ndarray:
        return np.random.default_rng(3).permutation(np.arange(num_images) < num_portrait)

    def indices(self, stream: Stream) -> np.ndarray:
        return np.array([stream.at(position)[0] for position in range(self.EPOCHS * stream.num_images)])

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
        assert [stream.at(int(position))[0] for position in positions] == expected[positions].tolist()
        assert Stream(7, 9, portrait).at(40)[0] == expected[40]

    @pytest.mark.parametrize("num_portrait", [0, 5])
    def test_images_are_shown_as_often_as_asked_for(self, num_portrait):
        factors = np.array([1, 1, 1.3, 2.5, 1, 3.0, 1, 1.7, 1.0, 1])  # 14.5
        portrait = self.portrait(10, num_portrait) if num_portrait else None
        stream = Stream(0, 10, portrait, factors)
        assert stream.length == 15
        shown = np.array([stream.at(position)[0] for position in range(400 * 15)]).reshape(400, 15)
        counts = np.array([np.bincount(epoch, minlength=10) for epoch in shown])
        assert counts.mean(0) == pytest.approx(factors * 15 / 14.5, abs=0.1)
        assert ((counts >= np.floor(factors)) & (counts <= np.ceil(factors * 15 / 14.5))).all()
        assert stream.at(77)[0] == Stream(0, 10, portrait, factors).at(77)[0]

    def test_factors_of_one_show_each_image_once(self):
        stream = Stream(0, 9, None, np.ones(9))
        assert sorted(stream.at(position)[0] for position in range(9, 18)) == list(range(9))

    def test_random_numbers_depend_on_seed_and_position_alone(self):
        def draw(stream: Stream, position: int) -> tuple:
            return tuple(stream.at(position)[1].random(3))

        assert draw(Stream(1, 9), 30) == draw(Stream(1, 500, np.ones(500, bool)), 30)
        stream = Stream(1, 9)
        first = draw(stream, 4)
        assert draw(stream, 5) != first
        assert draw(stream, 4) == first
        assert draw(Stream(2, 9), 4) != first


class TestSamples:
    def training_set(self, cfg=None) -> samples.TrainingSet:
        return samples.TrainingSet(cfg or config(), [read_toy()])

    def test_sample(self, coco_factory):
        coco_factory()
        dataset = self.training_set(config(INPUT__MIN_SIZE_TRAIN=(64,), INPUT__RANDOM_FLIP="none"))
        position = next(p for p in range(3) if dataset[p]["image_id"] == 1)
        sample = dataset[position]
        assert (sample["height"], sample["width"], tuple(sample["image"].shape)) == (64, 96, (3, 64, 96))
        assert sample["file_name"] == "1.jpg"
        assert sample["boxes"].tolist() == [[4, 6, 36, 38], [48, 16, 80, 48]]
        assert sample["labels"].tolist() == [1, 2]
        for box, mask in zip(sample["boxes"], bitmaps(sample["masks"], 64, 96), strict=True):
            assert extent(mask) == box.tolist()
        assert sample["image"].dtype == torch.uint8
        assert sample["image"].is_contiguous()

    def test_format_is_the_order_of_channels(self, coco_factory):
        stored = np.asarray(Image.open(coco_factory().parent / "images" / "1.jpg"))
        for order, pixels in (("RGB", stored), ("BGR", stored[:, :, ::-1])):
            sample = samples.EvaluationSet(config(INPUT__FORMAT=order, INPUT__MIN_SIZE_TEST=0), read_toy())[0]
            np.testing.assert_array_equal(sample["image"].permute(1, 2, 0), pixels)

    def test_no_masks_without_mask_on(self, coco_factory):
        coco_factory()
        assert "masks" not in self.training_set(config(MODEL__MASK_ON=False))[0]

    @pytest.mark.parametrize(("filtered", "length", "dropped"), [(True, 3, 1), (False, 4, 0)])
    def test_images_without_objects(self, coco_factory, filtered, length, dropped):
        coco_factory(num_images=4)
        dataset = self.training_set(config(DATALOADER__FILTER_EMPTY_ANNOTATIONS=filtered))
        assert dataset.description == f"{length} training images; {dropped} without objects left out"
        objects = {dataset[position]["image_id"]: len(dataset[position]["boxes"]) for position in range(length)}
        assert objects == {1: 2, 2: 2, 3: 2} | ({} if filtered else {4: 0})
        assert all(dataset[position]["boxes"].shape[1] == 4 for position in range(length))

    @pytest.mark.parametrize(("direction", "left", "top"), [
        ("none", {4}, {6}), ("horizontal", {4, 60}, {6}), ("vertical", {4}, {6, 26}),
    ])  # fmt: skip
    def test_random_flip(self, coco_factory, direction, left, top):
        """The first box of image 1, 96 x 64 px, begins at 4, 6 and is 32 px wide and high."""
        coco_factory()
        dataset = self.training_set(config(INPUT__MIN_SIZE_TRAIN=(64,), INPUT__RANDOM_FLIP=direction))
        drawn = [sample["boxes"][0] for p in range(60) if (sample := dataset[p])["image_id"] == 1]
        assert ({int(box[0]) for box in drawn}, {int(box[1]) for box in drawn}) == (left, top)

    def test_several_data_sets_are_one(self, coco_factory):
        coco_factory("first")
        coco_factory("second", seed=1)
        dataset = samples.TrainingSet(config(), [read_toy("first"), read_toy("second")])
        assert len(dataset) == 6
        assert sorted(dataset[position]["image_id"] for position in range(6)) == [1, 1, 2, 2, 3, 3]

    def test_no_objects_at_all(self, coco_factory):
        path = coco_factory(change=lambda c: c.update(annotations=[]))
        message = rejection(self.training_set)
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
            list(training_batches(self.training_set(cfg), cfg, 0))
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
        whole = list(training_batches(dataset, cfg, 0))
        resumed = list(training_batches(self.training_set(cfg), cfg, 2))
        assert len(resumed) == 2
        for batch, other in zip(whole[2:], resumed, strict=True):
            assert all(same(a, b) for a, b in zip(batch, other, strict=True))
        assert all(same(sample, dataset[6 + i]) for i, sample in enumerate(resumed[0]))

    @pytest.mark.parametrize(("size", "accumulate"), [(2, 1), (4, 1), (1, 2), (2, 2), (1, 4)])
    def test_split_over_processes_and_parts_changes_no_sample(self, coco_factory, size, accumulate):
        """Image, flip and size at every iteration: the processes' parts, in their order, are the whole batch."""
        coco_factory(num_images=6)
        cfg = config(SOLVER__IMS_PER_BATCH=4, SOLVER__MAX_ITER=3, INPUT__MIN_SIZE_TRAIN=(48, 64, 80))
        whole = list(training_batches(self.training_set(cfg), cfg, 0))
        assert len({tuple(sample["image"].shape) for batch in whole for sample in batch}) > 2
        worlds = [World(rank, size, rank, size) for rank in range(size)] if size > 1 else [ALONE]
        feeds = [training_batches(self.training_set(cfg), cfg, 0, world, accumulate) for world in worlds]
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
            batches = training_batches(self.training_set(cfg), cfg, 0)
            flat.append([sample for batch in batches for sample in batch])
        assert all(same(a, b) for a, b in zip(*flat, strict=True))

    def test_test_set_is_every_image_once_in_order(self, coco_factory):
        coco_factory(num_images=4)
        cfg = config()
        found = [
            sample for batch in evaluation_batches(samples.EvaluationSet(cfg, read_toy()), cfg) for sample in batch
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
            batches = training_batches(self.training_set(cfg), cfg, 0)
        else:
            batches = evaluation_batches(samples.EvaluationSet(cfg, read_toy()), cfg)
        message = rejection(list, batches)
        assert message.startswith(f"{victim}: cannot be decoded")
        assert "Traceback" not in message
        assert len(message.splitlines()) == 1


def test_stored_stream() -> None:
    """Two epochs of seven images, in pairs and without; resumed runs rely on these numbers."""
    paired = Stream(3, 7, np.array([1, 0, 0, 1, 0, 1, 0], bool))
    assert [paired.at(position)[0] for position in range(14)] == [6, 2, 5, 3, 1, 4, 0, 5, 4, 1, 6, 2, 3, 0]
    assert [Stream(3, 7).at(position)[0] for position in range(7)] == [5, 6, 2, 1, 4, 3, 0]
    assert Stream(3, 7).at(5)[1].integers(1000) == 270


def test_grouping_is_by_orientation(coco_factory) -> None:
    coco_factory()
    for grouped in (True, False):
        dataset = samples.TrainingSet(config(DATALOADER__ASPECT_RATIO_GROUPING=grouped), [read_toy()])
        assert (dataset.stream.portrait is not None) == grouped
    dataset = samples.TrainingSet(config(DATALOADER__ASPECT_RATIO_GROUPING=True), [read_toy()])
    assert dataset.stream.portrait.tolist() == [False, True, False]


class TestRepeatFactors:
    def test_they_are_those_of_the_rarest_class(self, coco_factory):
        """``toy_train`` has 6 images with objects; of class 9 only the third one keeps an object."""

        def change(content):
            for one in content["annotations"]:
                one["category_id"] = 9 if one["image_id"] == 3 and one["id"] % 2 else 2 if one["image_id"] < 4 else 5

        coco_factory(num_images=7, change=change)
        cfg = config(DATALOADER__SAMPLER_TRAIN=REPEATS, DATALOADER__REPEAT_THRESHOLD=0.7)
        data = read_toy()
        factors = repeat_factors(cfg, [data, data], [np.arange(6), np.arange(3)])
        shares = {2: 6 / 9, 5: 3 / 9, 9: 2 / 9}
        two, five, nine = (max(1, np.sqrt(0.7 / share)) for share in shares.values())
        assert factors == pytest.approx([two, two, nine, five, five, five, two, two, nine])
        cfg.DATALOADER.REPEAT_SQRT = False
        assert repeat_factors(cfg, [data], [np.arange(6)]).max() == pytest.approx(0.7 * 6)
        samples = TrainingSet(cfg, [data])
        assert "an image up to 4.2 times: 12 in a pass over the data" in samples.description
