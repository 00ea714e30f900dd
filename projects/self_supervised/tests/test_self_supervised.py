"""Barlow Twins on the pre-training loop: exact resume, processes, views by position, a backbone that detectors take."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import restored_registries
from PIL import Image
from run_folder import interrupted_after, is_same, lines, read, weights

from scratch_det import backends
from scratch_det.command_line import load_project
from scratch_det.config.load import load_config
from scratch_det.data.catalog import lookup_folder, read_image_folder
from scratch_det.engine.command import start
from scratch_det.engine.plan import CLASSIFICATION, Request
from scratch_det.errors import ConfigError, UserError
from scratch_det.weights.load import load_weights
from scratch_det.weights.origin import read_weights
from scratch_det.weights.pixels import Pixels

PROJECT = Path(__file__).parents[1]
ROOT = PROJECT.parents[1]
RECIPE = PROJECT / "configs/digits_R_18_gn.yaml"
KEYS = ("DATASETS.TRAIN", "('toy_train',)", "DATASETS.TEST", "('toy_val',)", "SOLVER.IMS_PER_BATCH", "8",
        "SOLVER.BASE_LR", "0.1", "SOLVER.MAX_ITER", "4", "SOLVER.WARMUP_ITERS", "1", "SOLVER.CHECKPOINT_PERIOD", "2",
        "TEST.EVAL_PERIOD", "2", "MODEL.BARLOW_TWINS.WIDTH", "16")  # fmt: skip

pytest.importorskip("lightly", reason="lightly is not installed: pip install --editable '.[self_supervised]'")


@pytest.fixture(autouse=True)
def project() -> Iterator[None]:
    with restored_registries():
        load_project(PROJECT)
        yield


@pytest.fixture
def pretrain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """``pretrain(KEY, VALUE, ..., name="run")`` starts a run on 12 and 6 noisy images of three colours."""
    datasets_root = tmp_path / "datasets"
    datasets_root.mkdir()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets_root))
    entries = "".join(f"toy_{part}: {{folder: toy/{part}}}\n" for part in ("train", "val"))
    (datasets_root / "catalog.yaml").write_text(entries)
    rng = np.random.default_rng(0)
    for part, number in (("train", 4), ("val", 2)):
        for label in range(3):
            folder = datasets_root / "toy" / part / f"class{label}"
            folder.mkdir(parents=True)
            for image in range(number):
                pixels = rng.integers(0, 100, (40, 52, 3), dtype=np.uint8)
                pixels[:, :, label] += np.uint8(120)
                Image.fromarray(pixels).save(folder / f"{image}.png")

    def begin(*overrides: str, name: str = "run", **request: Any) -> Path:
        words = [*KEYS, *overrides, "OUTPUT_DIR", str(tmp_path / name)]
        start(Request(str(RECIPE), words, **request), task=CLASSIFICATION)
        return tmp_path / name

    return begin


def test_a_run(pretrain: Callable[..., Path]) -> None:
    """Its folder is that of a pre-training; a detector takes the backbone, whose pixels and stride it knows."""
    folder = pretrain()
    assert lines(folder)[1]["loss_barlow_twins"] > 0
    assert set(read(folder, "result.json")["metrics"]["classification"]) == {"top1"}
    file = read_weights(folder / "backbone.pth")
    assert (file.pixels, file.stride_in_1x1) == (Pixels.of(load_config(RECIPE).cfg), False)
    assert not any(name.startswith("fc.") for name in file.tensors)
    cfg = load_config(ROOT / "configs/Digits/quickstart.yaml", ["MODEL.WEIGHTS", str(folder / "backbone.pth")]).cfg
    assert "the backbone" in load_weights(
        backends.load("torchvision").build(cfg), cfg.MODEL.WEIGHTS, "torchvision", cfg
    )


def test_interrupted_and_resumed_is_uninterrupted(
    pretrain: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with interrupted_after(monkeypatch, 3):
        pretrain(name="parts")
    parts = pretrain(name="parts", resume=True)
    assert is_same(parts, pretrain("DATALOADER.NUM_WORKERS", "2", name="whole"))


@pytest.mark.slow
def test_two_processes_are_one(pretrain: Callable[..., Path], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/pretrain_net.py"), "--project", str(PROJECT), "--config-file",
               str(RECIPE), "--num-gpus", "2", *KEYS, "OUTPUT_DIR", str(tmp_path / "two")]  # fmt: skip
    subprocess.run(command, check=True, cwd=tmp_path)
    one, two = pretrain(name="one"), tmp_path / "two"
    found = weights(two)
    for name, value in weights(one).items():
        torch.testing.assert_close(found[name], value, atol=1e-3, rtol=0)
    assert lines(one)[-1]["classification/top1"] == lines(two)[-1]["classification/top1"]


class TestViews:
    @pytest.fixture
    def dataset(self, pretrain: Callable[..., Path]) -> Any:
        from self_supervised.barlow_twins import FolderSet

        cfg = load_config(RECIPE, KEYS).cfg
        return FolderSet(cfg, [read_image_folder(lookup_folder("toy_train"))])

    def test_a_position_has_two(self, dataset: Any) -> None:
        torch.manual_seed(1)
        before, first = torch.get_rng_state(), dataset[5]
        assert before.equal(torch.get_rng_state())  # it is not ours
        torch.manual_seed(2)
        again = dataset[5]
        assert all(first[view].equal(again[view]) for view in ("image", "view"))
        assert first["image"].shape == first["view"].shape == (3, 32, 32)
        assert not first["image"].equal(first["view"])
        assert not first["image"].equal(dataset[5 + len(dataset)]["image"])  # in the next epoch

    def test_colours_are_those_of_the_order(self, dataset: Any) -> None:
        """In BGR the same colours as in RGB."""
        sample, rng = {"image": torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)}, np.random.default_rng
        dataset.cfg.INPUT.FORMAT = "RGB"
        rgb = dataset.coloured(sample, rng(0))["image"]
        dataset.cfg.INPUT.FORMAT = "BGR"
        assert dataset.coloured({"image": sample["image"].flip(0)}, rng(0))["image"].flip(0).equal(rgb)
        assert not rgb.equal(sample["image"])

    def test_labels_do_not_matter(self, dataset: Any) -> None:
        from self_supervised import barlow_twins

        torch.manual_seed(0)
        model = barlow_twins.build(dataset.cfg)
        batch = [dataset[position] for position in range(8)]
        others = [{**sample, "label": 2 - sample["label"]} for sample in batch]
        (loss,), (other,) = (barlow_twins.losses(model, one).values() for one in (batch, others))
        assert loss.equal(other)
        alike = [{**sample, "view": sample["image"]} for sample in batch]
        assert barlow_twins.losses(model, alike)["loss_barlow_twins"] < loss


REFUSED = {
    "no crop": (("INPUT.CROP.ENABLED", "False"), "INPUT.CROP.ENABLED is False, but two views"),
    "one channel": (("MODEL.BARLOW_TWINS.WIDTH", "1"), "WIDTH is 1, expected 2 channels or more"),
    "a method": (("MODEL.PRETRAINING", "barlow"), "MODEL.PRETRAINING is 'barlow', .*did you mean 'barlow_twins'"),
    "another one's key": (("MODEL.PRETRAINING", "classification"), "WIDTH is 16, which MODEL.PRETRAINING classif"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rejected(case: str, pretrain: Callable[..., Path], tmp_path: Path) -> None:
    keys, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        pretrain(*keys)
    assert not (tmp_path / "run").exists()


def test_not_with_accumulate(pretrain: Callable[..., Path]) -> None:
    with pytest.raises(
        UserError, match="sees 4 images at once, expected all 8 of an iteration: leave out --accumulate"
    ):
        pretrain(accumulate=2)


def test_lightly_is_missing(pretrain: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightly", None)
    with pytest.raises(ConfigError, match=r"needs lightly, which is not installed; pip install"):
        pretrain()
