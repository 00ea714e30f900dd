"""A trained detector as an object: what it finds is what the run's evaluation found; its inputs and its outputs."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import resnet18

import scratch_det
from scratch_det.detector import Detector, Found
from scratch_det.errors import DataError, UserError

ALL = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)  # even a model of two iterations finds something


@pytest.fixture
def run(train: Callable[..., Path], points_recipe: Path) -> Path:
    """A run of two iterations with masks and keypoints, whose test set is ``toy_val``."""
    return train(*ALL, "MODEL.KEYPOINT_ON", True, "TEST.KEYPOINT_OKS_SIGMAS", "[0.1, 0.1, 0.1]")


@pytest.fixture(scope="module")
def model(small_detector: Detector) -> Detector:
    return small_detector


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)


class TestLoad:
    def test_what_it_finds_is_what_the_evaluation_found(self, run: Path, datasets_root: Path) -> None:
        config = run / "config.yaml"  # a run of the time before this key
        config.write_text(re.sub(r"    ROUNDING: .*\n", "", config.read_text()))
        model, images = scratch_det.load(run), sorted((datasets_root / "toy_val" / "images").iterdir())
        assert model.classes == ("class2", "class5", "class9")
        rows = [row for number, found in enumerate(model.predict(images), 1)
                for row in found.to_coco(number, (2, 5, 9))]  # fmt: skip
        evaluated = json.loads((run / "inference" / "coco_instances_results.json").read_text())
        assert evaluated
        assert rows == evaluated

    def test_weights_with_their_recipe(self, run: Path, tmp_path: Path) -> None:
        weights = tmp_path / "best.pth"
        (run / "checkpoints" / "model_final.pth").rename(weights)
        with pytest.raises(UserError, match=r"name its recipe, --config-file FILE \(in Python config=FILE\)"):
            scratch_det.load(weights)
        assert scratch_det.load(weights, config=run / "config.yaml", device="cpu").classes[0] == "class2"
        for device in ("gpu", "0"):
            with pytest.raises(UserError, match=f"MODEL.DEVICE is '{device}', expected cuda .cuda:0, mps, xpu"):
                scratch_det.load(weights, config=run / "config.yaml", device=device)
        with pytest.raises(
            UserError, match=r"best.pth has no average of the weights: it was trained without MODEL_EMA"
        ):
            scratch_det.load(f"{weights}#model_ema", config=run / "config.yaml")
        with pytest.raises(UserError, match=r"has no weights, .*model_0*1.pth is missing|model_final.pth is missing"):
            scratch_det.load(run)

    def test_a_backbone_is_no_detector(self, run: Path, tmp_path: Path) -> None:
        torch.save(resnet18().state_dict(), tmp_path / "a.pth")
        with pytest.raises(UserError, match=r"a.pth holds a .*classifier, which is a backbone, no detector; train"):
            scratch_det.load(tmp_path / "a.pth", config=run / "config.yaml")

    def test_the_package_alone_does_not_import_torch(self) -> None:
        code = "import scratch_det, sys; assert 'torch' not in sys.modules; assert scratch_det.load"
        subprocess.run([sys.executable, "-c", code], check=True)
        with pytest.raises(AttributeError, match=r"no attribute 'lood'"):
            _ = scratch_det.lood


class TestPredict:
    def test_every_kind_of_source(self, model: Detector, image: np.ndarray, tmp_path: Path) -> None:
        path = tmp_path / "image.png"
        Image.fromarray(image).save(path)
        expected = model.predict(image)
        assert len(expected) == 10
        for source in (path, str(path), Image.open(path)):
            assert model.predict(source).boxes.tolist() == expected.boxes.tolist()
        grey = image[..., 0]
        assert model.predict(grey).boxes.tolist() == model.predict(np.dstack([grey] * 3)).boxes.tolist()
        assert model.predict([]) == []
        with pytest.raises(UserError, match=r"the batch size is 0, expected 1 or more images"):
            model.predict(image, batch_size=0)

    def test_an_image_of_pillow_is_read_as_its_file(self, model: Detector, image: np.ndarray, tmp_path: Path) -> None:
        turned = Image.Exif()
        turned[0x0112] = 6
        Image.fromarray(image[..., 0].astype(np.uint16) << 8).save(tmp_path / "grey.png")
        Image.fromarray(image).save(tmp_path / "turned.png", exif=turned)
        for path in (tmp_path / "grey.png", tmp_path / "turned.png"):
            with Image.open(path) as opened:
                assert np.array_equal(model.predict(opened).image, model.predict(path).image)

    def test_batches_change_only_the_last_bits(self, model: Detector, image: np.ndarray) -> None:
        one, other = (model.predict([image, image[::-1], image], batch_size=size) for size in (1, 2))
        for single, in_batch in zip(one, other, strict=True):
            assert in_batch.scores == pytest.approx(single.scores, abs=1e-5)
        assert list(one[2].scores) == list(one[0].scores)

    @pytest.mark.parametrize("shape", [(8, 8, 4), (3, 8, 8), (0, 8, 3), (8,)])
    def test_other_arrays_are_rejected(self, model: Detector, shape: tuple[int, ...]) -> None:
        for array in (np.zeros(shape, np.uint8), np.zeros((8, 8, 3))):
            with pytest.raises(UserError, match=r"expected uint8 \[H, W, 3\] in RGB, or \[H, W\]"):
                model.predict(array)

    def test_a_damaged_file(self, model: Detector, tmp_path: Path) -> None:
        (tmp_path / "broken.jpg").write_bytes(b"no image")
        with pytest.raises(DataError, match=r"broken.jpg: cannot be decoded"):
            model.predict([tmp_path / "broken.jpg"])

    def test_views(self, model: Detector, image: np.ndarray) -> None:
        cfg = model.cfg.clone()
        cfg.TEST.AUG.FLIP, cfg.TEST.AUG.MIN_SIZES = True, [64]
        other = Detector(cfg, model.backend, model.model, model.classes)
        with pytest.raises(UserError, match=r"set TEST.AUG.FLIP False"):
            other.predict(image, augment=True)
        cfg.TEST.AUG.FLIP = False
        found = other.predict(image, augment=True)
        assert found.boxes == pytest.approx(model.predict(image).boxes, abs=1e-3)


class TestFound:
    @pytest.fixture
    def found(self, model: Detector, image: np.ndarray) -> Found:
        return model.predict(image)

    def test_score(self, model: Detector, image: np.ndarray, found: Found) -> None:
        some = found.above(float(found.scores[2]))
        assert found.rles
        assert len(some) == len(some.boxes) == len(some.class_names) == 3
        assert some.rles == found.rles[:3]
        assert model.predict(image, score=float(found.scores[2])).scores.tolist() == some.scores.tolist()

    def test_masks(self, found: Found) -> None:
        assert found.masks is not None
        assert (found.masks.shape, found.masks.dtype) == ((10, 64, 96), bool)

    def test_text(self, found: Found) -> None:
        assert str(found).startswith(f"image, 96 x 64: 10 objects: {found.class_names[0]} {found.scores[0]:.2f}, ")
        assert str(found.above(2)) == "image, 96 x 64: 0 objects"

    def test_category_ids(self, found: Found) -> None:
        labels = found.labels.tolist()
        with pytest.raises(UserError, match=r"to_coco: 2 category_ids, expected one for each of 3 classes"):
            found.to_coco(5, [1, 2])
        assert [row["category_id"] for row in found.to_coco(7)] == [label + 1 for label in labels]
        assert [row["category_id"] for row in found.to_coco(7, (2, 5, 9))] == [(2, 5, 9)[label] for label in labels]

    def test_a_small_image_is_enlarged_to_be_read(self, found: Found) -> None:
        assert found.draw().size == (400, 267)
        assert np.any(np.array(found.draw(score=0)) != np.array(found.above(2).draw()))

    def test_a_large_image_keeps_its_size(self, model: Detector) -> None:
        assert model.predict(np.zeros((300, 500, 3), np.uint8)).draw().size == (500, 300)


def test_what_is_no_run_and_no_image(small_detector: Detector, image: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no .*nope; give a run's folder, a weights file or its address"):
        scratch_det.load(tmp_path / "nope")
    others = [
        (3, "3 is no image; expected a file"),
        (b"x", r"b'x' is no image"),
        (tmp_path, r"give its images: sorted"),
    ]
    for source, message in others:
        with pytest.raises(UserError, match=f"^predict: .*{message}"):
            small_detector.predict(source)
    with pytest.raises(TypeError, match=r"predict\(\) got an unexpected keyword argument 'conf'"):
        small_detector.predict(image, conf=0.5)  # type: ignore[call-arg]
    with pytest.raises(UserError, match=r"the score is -1, expected 0 to 1"):
        small_detector.predict(image, score=-1)
    found = small_detector.predict([image])
    assert repr(found) == f"[{found[0]}]"
