"""Pre-training: a classifier learns in the detectors' loop, and its body is where a detector starts."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, load_command
from PIL import Image
from run_folder import is_same, lines, read, weights

from scratch_det import backends
from scratch_det.config.load import load_config
from scratch_det.data.catalog import lookup_folder, read_image_folder
from scratch_det.data.dataset import load_sample
from scratch_det.engine import classification, loop
from scratch_det.engine.classification import FolderSet, draw_crop, ranks
from scratch_det.engine.command import start
from scratch_det.engine.plan import CLASSIFICATION, Request
from scratch_det.errors import UserError
from scratch_det.weights.load import load_weights
from scratch_det.weights.names import BOTTOM_UP, renamed
from scratch_det.weights.origin import read_weights
from scratch_det.weights.pixels import Pixels

RECIPES = sorted((ROOT / "configs/Pretraining").glob("*.yaml"))
DIGITS = ROOT / "configs/Pretraining/digits_R_18_gn.yaml"
DETECTOR = ROOT / "configs/Digits/quickstart.yaml"
KEYS = {
    "DATASETS.TRAIN": "('toy_train',)", "DATASETS.TEST": "('toy_val',)", "INPUT.MIN_SIZE_TRAIN": "(32,)",
    "INPUT.MIN_SIZE_TEST": 36, "SOLVER.IMS_PER_BATCH": 4, "SOLVER.BASE_LR": 0.02, "SOLVER.MAX_ITER": 4,
    "SOLVER.WARMUP_ITERS": 1, "SOLVER.CHECKPOINT_PERIOD": 2, "TEST.EVAL_PERIOD": 2,
}  # fmt: skip
LIBRARIES = ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)]

Pretrain = Callable[..., Path]


@pytest.fixture
def folders(datasets_root: Path) -> Callable[..., Path]:
    """``make(classes=3)`` makes toy_train and toy_val, 4 and 2 noisy images of one colour a class; returns the root."""

    def make(classes: int = 3) -> Path:
        entries = {f"toy_{part}": {"folder": f"toy/{part}"} for part in ("train", "val")}
        (datasets_root / "catalog.yaml").write_text(yaml.safe_dump(entries))
        rng = np.random.default_rng(0)
        for part, number in (("train", 4), ("val", 2)):
            for label in range(classes):
                folder = datasets_root / "toy" / part / f"class{label}"
                folder.mkdir(parents=True)
                for image in range(number):
                    pixels = rng.integers(0, 100, (40, 52, 3), dtype=np.uint8)
                    pixels[:, :, label % 3] += np.uint8(60 + 15 * label)
                    Image.fromarray(pixels).save(folder / f"{image}.png")
        return datasets_root / "toy"

    return make


@pytest.fixture
def pretrain(tmp_path: Path) -> Pretrain:
    """``pretrain(KEY, VALUE, ..., name="run", **request)`` starts a run on the toy folders, returns its folder."""

    def begin(*overrides: Any, name: str = "run", **request: Any) -> Path:
        folder = tmp_path / name
        words = [word for pair in KEYS.items() for word in pair]
        words += [*map(str, overrides), "OUTPUT_DIR", str(folder)]
        start(Request(str(DIGITS), words, **request), task=CLASSIFICATION)
        return folder

    return begin


class TestRun:
    def test_leaves_the_folder_of_a_run(self, folders: Callable, pretrain: Pretrain) -> None:
        folders()
        folder = pretrain()
        middle, losses, final = lines(folder)
        assert [middle["iteration"], losses["iteration"], final["iteration"]] == [1, 3, 4]
        assert 0 < losses["loss_cls"] == losses["total_loss"]
        assert set(final) == {"iteration", "classification/top1"}  # of three classes all are among the first five
        assert (folder / "curves.png").exists()
        result = read(folder, "result.json")
        assert result["metrics"] == {"classification": {"top1": final["classification/top1"]}}
        assert read(folder, "environment.json")["datasets"]["toy_train"]["images"] == 12
        assert "12 training images" in (folder / "log.txt").read_text()
        assert (folder / "checkpoints/model_best.pth").exists()

    def test_learns_colours(self, folders: Callable, pretrain: Pretrain) -> None:
        folders(6)
        folder = pretrain("SOLVER.MAX_ITER", 25, "SOLVER.BASE_LR", 0.005, "TEST.EVAL_PERIOD", 0)
        found = read(folder, "result.json")["metrics"]["classification"]
        assert set(found) == {"top1", "top5"}
        assert found["top1"] >= 60 > 100 / 6
        assert found["top5"] >= found["top1"]

    def test_stopped_and_resumed_is_uninterrupted(
        self, folders: Callable, pretrain: Pretrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folders()
        whole = pretrain(name="whole")

        def step(*arguments: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return original(*arguments)

        original, words = loop.Trainer.step, [str(word) for pair in KEYS.items() for word in pair]
        command = ["pretrain_net.py", "--config-file", str(DIGITS), *words, "OUTPUT_DIR", str(tmp_path / "parts")]
        with monkeypatch.context() as patch:
            patch.setattr(loop.Trainer, "step", step)
            patch.setattr(sys, "argv", command)
            with pytest.raises(SystemExit) as stopped:
                load_command("pretrain").main()
        assert stopped.value.code == 75
        assert read(tmp_path / "parts", "status.json")["state"] == "stopped"
        parts = pretrain(name="parts", resume=True)
        assert is_same(parts, whole)
        assert (parts / "backbone.pth").read_bytes() == (whole / "backbone.pth").read_bytes()

    def test_other_files_cannot_be_continued_on(self, folders: Callable, pretrain: Pretrain) -> None:
        root = folders()
        (pretrain() / "result.json").unlink()
        (root / "train/class0/0.png").unlink()
        with pytest.raises(UserError, match=r"the files of toy_train .* other images from now on"):
            pretrain(resume=True)

    def test_a_longer_cosine_is_another_run(self, folders: Callable, pretrain: Pretrain) -> None:
        folders()
        (pretrain() / "result.json").unlink()
        with pytest.raises(UserError, match=r"SOLVER\.MAX_ITER was 4, now 6: the learning rate of iteration 1 would"):
            pretrain("SOLVER.MAX_ITER", 6, resume=True)

    @pytest.mark.slow
    def test_two_processes_are_one(self, folders: Callable, pretrain: Pretrain, tmp_path: Path) -> None:
        folders()
        words = [str(word) for pair in KEYS.items() for word in pair]
        command = [sys.executable, str(ROOT / "tools/pretrain_net.py"), "--config-file", str(DIGITS), "--num-gpus", "2"]
        subprocess.run([*command, *words, "OUTPUT_DIR", str(tmp_path / "two")], check=True, cwd=tmp_path)
        one, two = weights(pretrain(name="one")), weights(tmp_path / "two")
        assert all(torch.allclose(value, two[name], atol=1e-4) for name, value in one.items())


class TestWeights:
    def test_the_average_of_them(self, folders: Callable, pretrain: Pretrain) -> None:
        folders()
        folder = pretrain("MODEL_EMA.ENABLED", True)
        assert set(read(folder, "result.json")["metrics"]) == {"classification", "classification_EMA"}
        cfg = load_config(DETECTOR).cfg
        file, found = folder / "checkpoints/model_final.pth", []
        for part in ("", "#model_ema"):
            model = backends.load("torchvision").build(cfg)
            load_weights(model, f"{file}{part}", "torchvision", cfg)
            found.append(model.state_dict()["backbone.body.conv1.weight"])
        assert found[0].equal(weights(folder)["conv1.weight"])
        assert not found[1].equal(found[0])

    @pytest.mark.parametrize("library", LIBRARIES)
    def test_a_detector_starts_from_them(self, library: str, folders: Callable, pretrain: Pretrain) -> None:
        folders()
        file = pretrain() / "backbone.pth"
        cfg = load_config(DETECTOR, ["MODEL.WEIGHTS", str(file)], backends.defaults(library)).cfg
        model = backends.load(library).build(cfg)
        said = load_weights(model, str(file), library, cfg)
        assert said.endswith("the backbone, from a torchvision or timm classifier")  # pixels are the same: no word
        body = {BOTTOM_UP["torchvision"] + name: value for name, value in read_weights(file).tensors.items()}
        names = renamed(body, "torchvision", "detectron2") if library == "detectron2" else {name: name for name in body}
        found = model.state_dict()
        assert all(found[names[name]].equal(value) for name, value in body.items())
        assert sum(name.startswith(BOTTOM_UP[library]) for name in found) == len(body)

    def test_they_say_what_they_were_trained_with(self, folders: Callable, pretrain: Pretrain) -> None:
        folders()
        folder = pretrain("MODEL.PIXEL_STD", "[58.0, 57.0, 57.0]", "INPUT.FORMAT", "RGB")
        pixels = Pixels("RGB", (102.9801, 115.9465, 122.7717), (58.0, 57.0, 57.0))
        for file in (folder / "backbone.pth", folder / "checkpoints/model_final.pth"):
            found = read_weights(file)
            assert (found.pixels, found.stride_in_1x1) == (pixels, False)
            assert not any(name.startswith("fc.") for name in found.tensors)

    @pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
    def test_every_recipe_trains_the_body_of_its_detector(self, recipe: Path) -> None:
        cfg = load_config(recipe).cfg
        with torch.device("meta"):
            model, detector = classification.build(cfg), backends.load("torchvision").build(cfg)
        body = {name: value.shape for name, value in model.state_dict().items() if not name.startswith("fc.")}
        inside = {name: value.shape for name, value in detector.state_dict().items() if name.startswith("backbone.bo")}
        assert {BOTTOM_UP["torchvision"] + name: shape for name, shape in body.items()} == inside

    def test_the_start_is_hes(self) -> None:
        cfg = load_config(DIGITS).cfg
        torch.manual_seed(0)
        model = classification.build(cfg)
        block = model.get_submodule("layer3.0")
        assert block.conv2.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 256)), rel=0.02)
        assert (block.bn1.weight.unique().tolist(), block.bn2.weight.unique().tolist()) == ([1], [0])
        assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize(("scores", "expected"), [([3, 1, 2], 0), ([1, 3, 2], 2), ([1, 1, 1], 2), ([math.nan] * 3, 2)])
def test_a_rank_counts_ties_and_nan_as_wrong(scores: list[float], expected: int) -> None:
    model = SimpleNamespace(eval=lambda: lambda batch: torch.tensor([scores] * len(batch)))
    assert ranks(model, [{"label": 0}, {"label": 0}]).tolist() == [expected] * 2


class TestImages:
    def sets(self, *overrides: str) -> tuple[FolderSet, FolderSet]:
        words = [str(word) for pair in KEYS.items() for word in pair]
        cfg, data = load_config(DIGITS, [*words, *overrides]).cfg, read_image_folder(lookup_folder("toy_train"))
        return FolderSet(cfg, [data]), FolderSet(cfg, [data], is_training=False)

    def test_a_position_has_one_image(self, folders: Callable) -> None:
        folders()
        (first, _), (again, _) = self.sets(), self.sets()
        assert {first[position]["image_id"] for position in range(12)} == {again[i]["image_id"] for i in range(12)}
        assert first[17]["image"].equal(again[17]["image"])
        sample = first[5]
        assert (sample["image"].shape, sample["image"].dtype) == ((3, 32, 32), torch.uint8)
        assert sample["image_id"].startswith(f"class{sample['label']}/")

    def test_flips_where_the_recipe_says_so(self, folders: Callable) -> None:
        folders()
        flip = ("INPUT.RANDOM_FLIP", "horizontal")
        (plain, _), (flipped, _) = (
            self.sets("INPUT.CROP.ENABLED", "False"),
            self.sets("INPUT.CROP.ENABLED", "False", *flip),
        )
        mirrored = [flipped[i]["image"].equal(plain[i]["image"].flip(-1)) for i in range(12)]
        assert 0 < sum(mirrored) < 12
        assert all(m or flipped[i]["image"].equal(plain[i]["image"]) for i, m in enumerate(mirrored))

    def test_the_middle_is_tested(self, folders: Callable) -> None:
        folders()
        _, test = self.sets("INPUT.MIN_SIZE_TEST", "40")  # as stored
        path = test.roots[0] / test[0]["image_id"]
        assert test[0]["image"].equal(load_sample(path, test.cfg)["image"][:, 4:36, 10:42])
        _, test = self.sets("INPUT.MIN_SIZE_TEST", "64")
        assert test[0]["image"].shape == (3, 32, 32)

    def test_crops(self) -> None:
        rng = np.random.default_rng(0)
        crops = np.array([draw_crop(300, 400, 0.08, rng) for _ in range(2000)])
        top, left, height, width = crops.T
        assert (top >= 0).all()
        assert (left >= 0).all()
        assert (top + height <= 300).all()
        assert (left + width <= 400).all()
        areas, aspects = height * width / (300 * 400), width / height
        assert 0.079 < areas.min() < 0.1
        assert 0.9 < areas.max() <= 1
        assert 0.73 < aspects.min() < 0.77
        assert 1.3 < aspects.max() < 1.36
        assert draw_crop(1000, 10, 0.9, rng) == (495, 0, 10, 10)  # where nothing fits


class TestBadInput:
    @pytest.fixture
    def rejected(self, folders: Callable, pretrain: Pretrain, tmp_path: Path) -> Callable[..., str]:
        """The message that ``spoil(folder)``, then a start with overrides, ends with; no run folder is left."""

        def begin(*overrides: Any, spoil: Callable[[Path], object] = lambda root: None, **request: Any) -> str:
            spoil(folders())
            with pytest.raises(UserError) as caught:
                pretrain(*overrides, **request)
            assert not (tmp_path / "run").exists()
            return str(caught.value)

        return begin

    @pytest.mark.parametrize(
        ("overrides", "expected"),
        [
            (("DATASETS.TRAIN", "('imagenet_train',)"), "imagenet/train"),
            (("DATASETS.TRAIN", "('coco_2017_train',)"), "expected classified images, {folder: PATH}"),
            (("DATASETS.TRAIN", "('toy_trian',)"), "did you mean 'toy_train'"),
            (("MODEL.WEIGHTS", "a.pth"), 'pre-training starts at random; set MODEL.WEIGHTS ""'),
            (("MODEL.ROI_HEADS.NUM_CLASSES", 5), "has 3 classes; leave the key out"),
            (("INPUT.MIN_SIZE_TRAIN", "(32, 48)"), "expected one side"),
            (("INPUT.MIN_SIZE_TEST", 16), "expected INPUT.MIN_SIZE_TRAIN 32 or more"),
            (("INPUT.CROP.TYPE", "absolute"), "expected 'relative_range'"),
            (("INPUT.CROP.SIZE", "[0.0, 1.5]"), "expected the smallest fraction of height and width"),
            (("VIS_PERIOD", "5"), "VIS_PERIOD is 5, which draws boxes; pre-training has none"),
            (("MODEL.BACKBONE.NAME", "build_vgg16_fpn_backbone"), "only ResNets are pre-trained here"),
            (("MODEL.BACKBONE.NAME", "build_resnt_fpn_backbone"), "did you mean 'build_resnet_fpn_backbone'"),
            (("MODEL.RESNETS.STEM_OUT_CHANNELS", 32), "MODEL.RESNETS.STEM_OUT_CHANNELS is 32; allowed: 64"),
        ],
    )
    def test_recipes(self, rejected: Callable[..., str], overrides: tuple, expected: str) -> None:
        assert expected in rejected(*overrides)

    @pytest.mark.detectron2
    def test_another_backend(self, rejected: Callable[..., str]) -> None:
        assert "its weights serve both backends; leave the flag out" in rejected(backend="detectron2")

    @pytest.mark.parametrize(
        ("flag", "said"),
        [({"init_std": -1.0}, "--init-std is -1, expected above 0"), ({"switch_from": "a.pth"}, "starts a cascade")],
    )
    def test_flags(self, rejected: Callable[..., str], flag: dict[str, Any], said: str) -> None:
        assert said in rejected(**flag)

    def test_a_class_only_in_val(self, rejected: Callable[..., str]) -> None:
        message = rejected(spoil=lambda root: (root / "val/class2").rename(root / "val/other"))
        assert "toy/train has 1 classes, class2" in message
        assert "toy/val has 1 classes, other" in message

    def test_a_class_without_images(self, rejected: Callable[..., str]) -> None:
        message = rejected(spoil=lambda root: (root / "train/class3").mkdir())
        assert "toy/train: 1 of 4 class folders have no image, class3" in message

    def test_one_class(self, rejected: Callable[..., str]) -> None:
        def spoil(root: Path) -> None:
            for label in (1, 2):
                (root / f"train/class{label}").rename(root / f"class{label}")

        assert "has one folder, class0; expected a folder for each of two or more classes" in rejected(spoil=spoil)

    def test_no_class_folders(self, rejected: Callable[..., str], datasets_root: Path) -> None:
        message = rejected("DATASETS.TRAIN", "('flat',)", spoil=lambda root: self.flat(root.parent))
        assert "has no folders" in message
        assert "it holds: a.png" in message

    @staticmethod
    def flat(root: Path) -> None:
        (root / "flat").mkdir()
        Image.new("RGB", (8, 8)).save(root / "flat/a.png")
        with open(root / "catalog.yaml", "a") as catalog:
            yaml.safe_dump({"flat": {"folder": "flat"}}, catalog)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_an_image_that_cannot_be_decoded(
        self, workers: int, folders: Callable, pretrain: Pretrain, tmp_path: Path
    ) -> None:
        file = folders() / "train/class1/2.png"
        file.write_bytes(file.read_bytes()[:200])
        with pytest.raises(UserError, match=r"class1/2\.png: cannot be decoded"):
            pretrain("DATALOADER.NUM_WORKERS", workers)
        status = json.loads((tmp_path / "run/status.json").read_text())
        assert status["state"] == "failed"
        assert "class1/2.png" in status["error"]
