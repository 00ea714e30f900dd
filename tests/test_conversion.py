"""scratch-det convert, and whether two models agree on an image."""

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load_command
from run_folder import NO_TEST
from torchvision.models import resnet18

from scratch_det import backends, conversion
from scratch_det.conversion import agreement
from scratch_det.data.image import encode_masks
from scratch_det.weights.convert import convert
from scratch_det.weights.origin import Weights, read_weights
from scratch_det.weights.pixels import IMAGENET
from scratch_det.weights.read import read_checkpoint


class TestConversion:
    """scratch-det convert."""

    @pytest.fixture
    def convert_checkpoint(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        tool = load_command("convert")

        def run(*arguments: Any) -> None:
            monkeypatch.setattr("sys.argv", ["convert_checkpoint.py", *map(str, arguments)])
            tool.main()

        return run

    @pytest.fixture
    def trained(self, train: Callable) -> Path:
        """A checkpoint of the torchvision backend."""
        return train(*NO_TEST, backend="torchvision") / "checkpoints/model_final.pth"

    def test_there_and_back(
        self, trained: Path, convert_checkpoint: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        """Background slots that detectron2 does not have come back as zeros, everything else as it was."""
        convert_checkpoint(trained, tmp_path / "there.pth", "--to", "detectron2")
        assert re.search(r"roi_heads\.mask_predictor +4 of +4", capsys.readouterr().out)
        convert_checkpoint(tmp_path / "there.pth", tmp_path / "back.pth", "--to", "torchvision")
        before, there, after = (read_checkpoint(p) for p in (trained, tmp_path / "there.pth", tmp_path / "back.pth"))
        assert there["converted_from"]["kind"] == "torchvision detector"
        assert before["pixels"] == there["pixels"] == after["pixels"]
        assert before["model"].keys() == after["model"].keys()
        slots = {"box_predictor.bbox_pred": 4, "mask_predictor.mask_fcn_logits": 1}
        for key, value in before["model"].items():
            slot = next((size for layer, size in slots.items() if layer in key), 0)
            assert after["model"][key][slot:].equal(value[slot:]), key
            assert not after["model"][key][:slot].any()
        scores = "roi_heads.box_predictor.cls_score.bias"
        assert there["model"][scores].equal(before["model"][scores].roll(-1))

    @pytest.mark.detectron2
    def test_verified_on_an_image(
        self, train: Callable, convert_checkpoint: Callable, tmp_path: Path, datasets_root: Path, capsys: Any
    ) -> None:
        image = datasets_root / "toy_train/images/1.jpg"
        for source, target in (backends.BACKENDS, backends.BACKENDS[::-1]):
            folder = train("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, *NO_TEST, name=source, backend=source)
            new = tmp_path / f"{target}.pth"
            convert_checkpoint(folder / "checkpoints/model_final.pth", new, "--to", target, "--verify", image)
            said = capsys.readouterr().out
            assert f"it fills a {backends.library(target)} model of the recipe" in said
            assert re.search(r"1\.jpg: 10 and 10 detections: 10 of the same class", said)
            again = train("MODEL.WEIGHTS", new, *NO_TEST, name=f"from_{source}", backend=target)
            assert "tensors loaded" in (again / "log.txt").read_text()

    @pytest.mark.detectron2
    def test_a_difference_is_found(
        self, train: Callable, convert_checkpoint: Callable, tmp_path: Path, datasets_root: Path, capsys: Any,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """Masks turned inside out in the conversion."""
        keys = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, *NO_TEST)
        trained = train(*keys, backend="torchvision") / "checkpoints/model_final.pth"
        original = conversion.convert

        def spoilt(weights: Weights, to: str, own_names: bool) -> Any:
            found = original(weights, to, own_names)
            found[0]["roi_heads.mask_head.predictor.weight"] *= -1
            return found

        monkeypatch.setattr(conversion, "convert", spoilt)
        image = datasets_root / "toy_train/images/1.jpg"
        with pytest.raises(SystemExit):
            convert_checkpoint(trained, tmp_path / "new.pth", "--to", "detectron2", "--verify", image)
        assert "the models do not agree on" in capsys.readouterr().err
        assert not (tmp_path / "new.pth").exists()

    def test_heads_that_are_not_by_class(
        self, trained: Path, convert_checkpoint: Callable, tmp_path: Path, capsys: Any
    ):
        convert_checkpoint(trained, tmp_path / "there.pth", "--to", "detectron2")
        content = read_checkpoint(tmp_path / "there.pth")
        name = "roi_heads.box_predictor.bbox_pred.weight"
        content["model"][name] = content["model"][name][:4]
        torch.save(content, tmp_path / "agnostic.pth")
        with pytest.raises(SystemExit):
            convert_checkpoint(tmp_path / "agnostic.pth", tmp_path / "back.pth", "--to", "torchvision")
        assert "has 4 outputs, expected 12 for 3 classes" in capsys.readouterr().err

    def test_what_old_files_of_detectron2_hold_beside_weights(self, trained: Path, tmp_path: Path) -> None:
        there = convert(read_weights(trained), "detectron2")[0]
        extra = {"proposal_generator.anchor_generator.cell_anchors.0": np.zeros((3, 4)), "pixel_mean": np.zeros(3)}
        arrays = {name: value.numpy() for name, value in there.items()} | extra
        (tmp_path / "zoo.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
        assert read_weights(tmp_path / "zoo.pkl").tensors.keys() == there.keys()

    def test_a_classifier(self, convert_checkpoint: Callable, tmp_path: Path) -> None:
        torch.manual_seed(0)
        classifier = resnet18().state_dict()
        torch.save(classifier, tmp_path / "resnet18.pth")
        convert_checkpoint(tmp_path / "resnet18.pth", tmp_path / "there.pth", "--to", "detectron2")
        there = read_checkpoint(tmp_path / "there.pth")
        assert there["matching_heuristics"] is True
        assert there["pixels"] == IMAGENET.as_dict()
        assert there["model"]["res5.1.conv2.norm.running_var"].equal(classifier["layer4.1.bn2.running_var"])
        convert_checkpoint(tmp_path / "there.pth", tmp_path / "back.pth", "--to", "torchvision")
        back = read_checkpoint(tmp_path / "back.pth")["model"]
        assert back.keys() == {key for key in classifier if not key.startswith("fc.")}
        assert all(value.equal(classifier[key]) for key, value in back.items())

    def test_weights_without_a_place(self, trained: Path, convert_checkpoint: Callable, tmp_path: Path, capsys: Any):
        content = read_checkpoint(trained)
        content["model"]["roi_heads.novel_head.weight"] = torch.zeros(2)
        torch.save(content, trained)
        new = tmp_path / "new.pth"
        with pytest.raises(SystemExit) as end:
            convert_checkpoint(trained, new, "--to", "detectron2")
        said = capsys.readouterr()
        assert end.value.code == 2
        assert "1 tensors of" in said.err
        assert "the first is roi_heads.novel_head.weight; use --backend torchvision, or give --partial" in said.err
        assert re.search(r"roi_heads\.novel_head +0 of +1", said.out)
        assert not new.exists()
        convert_checkpoint(trained, new, "--to", "detectron2", "--partial")
        assert len(read_checkpoint(new)["model"]) == len(content["model"]) - 1

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (("SRC", "DST", "--to", "torchvision"), "is a torchvision detector already"),
            (("SRC", "SRC", "--to", "detectron2"), "exists; name another file"),
            (("/nowhere.pth", "DST", "--to", "detectron2"), "there is no /nowhere.pth"),
            (("COPY", "DST", "--to", "detectron2", "--verify", "IMAGE"), "give its recipe, --config-file FILE"),
        ],
    )
    def test_mistakes(
        self, words: tuple[str, ...], expected: str, trained: Path, convert_checkpoint: Callable, tmp_path: Path,
        datasets_root: Path, capsys: pytest.CaptureFixture,
    ) -> None:  # fmt: skip
        copied = tmp_path / "elsewhere/copied.pth"
        copied.parent.mkdir()
        copied.write_bytes(trained.read_bytes())
        places = {"SRC": trained, "DST": tmp_path / "new.pth", "COPY": copied, "IMAGE": datasets_root / "toy_val"}
        with pytest.raises(SystemExit) as end:
            convert_checkpoint(*(places.get(word, word) for word in words))
        assert end.value.code == 2
        assert expected in capsys.readouterr().err
        assert not [path for path in tmp_path.iterdir() if path.name.startswith("new.pth")]


class TestAgreement:
    @staticmethod
    def detections(*scores: float) -> dict[str, Any]:
        boxes = torch.arange(4.0 * len(scores)).reshape(-1, 4)
        return {"boxes": boxes, "scores": torch.tensor(scores), "labels": torch.arange(len(scores))}

    def test_the_same(self) -> None:
        assert agreement(self.detections(0.9, 0.5), self.detections(0.9, 0.5)).holds

    def test_order_says_nothing_where_scores_are_close(self) -> None:
        one, other = self.detections(0.9, 0.5001, 0.5), self.detections(0.9, 0.5001, 0.5)
        for key in ("boxes", "labels"):
            other[key] = other[key][[0, 2, 1]]
        assert agreement(one, other).holds

    def test_empty_masks_are_equal(self) -> None:
        one = self.detections(0.9, 0.5)
        empty, full = encode_masks(np.stack([np.zeros((4, 5), np.uint8), np.ones((4, 5), np.uint8)]))
        one["masks"] = [empty, full]
        assert agreement(one, one).holds
        assert not agreement(one, {**one, "masks": [full, full]}).holds

    def test_another_number(self) -> None:
        assert not agreement(self.detections(0.9, 0.5), self.detections(0.9)).holds
        assert not agreement(self.detections(), self.detections(0.9)).holds

    @pytest.mark.parametrize("key", ["boxes", "scores", "labels"])
    def test_a_difference(self, key: str) -> None:
        other = self.detections(0.9, 0.5)
        other[key] = other[key] + (1 if key != "scores" else 0.01)
        assert not agreement(self.detections(0.9, 0.5), other).holds

    def test_nothing_is_no_agreement(self) -> None:
        assert not agreement(self.detections(), self.detections()).holds
