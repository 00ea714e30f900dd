"""Detectors as files: the pieces are what predicting has, the files find what the detector finds, at any size."""

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_MODEL
from PIL import Image
from torchvision.ops import batched_nms
from torchvision.transforms.v2 import functional as F

from scratch_det import backends, export
from scratch_det.command_line import load_project
from scratch_det.data.image import decode_masks
from scratch_det.detector import Detector
from scratch_det.errors import ConfigError, UserError
from scratch_det.export import Run, Whole, compare, decoded, nms_of_groups, pasted, patched, shares
from scratch_det.modeling.ops import decode_keypoints, paste_masks

SIZES = ((64, 96), (90, 50), (33, 200))  # height and width
CASCADE = ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True")
MASK_R_CNN = "configs/Torchvision/mask_rcnn_R_50_FPN.yaml"
QUICK, KEYPOINTS = "configs/Digits/quickstart.yaml", "configs/Digits/keypoints.yaml"
LITE0 = "projects/timm_backbones/configs/scratch_faster_rcnn_lite0_FPN_small.yaml"
KINDS: dict[str, tuple[str, bool, tuple[str, ...]]] = {  # recipe, whether it is made small, changes
    "BN": (QUICK, True, ("MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN")),
    "FrozenBN": (QUICK, True, ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "")),
    "cascade": (QUICK, True, CASCADE),
    "Detectron": (QUICK, True, ("MODEL.ANCHOR_GENERATOR.ROUNDING", "Detectron")),
    "keypoints": (KEYPOINTS, True, ()),
    "torchvision": (MASK_R_CNN, False, ("MODEL.WEIGHTS", "", "INPUT.MIN_SIZE_TEST", "160")),
    "VGG-16": ("configs/_base_/model/faster_rcnn_VGG16.yaml", False, ("INPUT.MIN_SIZE_TEST", "160")),
    "EfficientNet-Lite0": (LITE0, False, ()),
    "ConvNeXt": ("projects/timm_backbones/configs/digits_convnext.yaml", False, ()),
}


def image_of(size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)


@pytest.fixture
def detector() -> Callable[..., Detector]:
    """``detector(recipe, is_small, changes)`` at random, which finds 30 objects in any image."""

    def build(recipe: str, is_small: bool, changes: tuple[str, ...] = ()) -> Detector:
        if recipe.startswith("projects"):
            pytest.importorskip("timm")
            load_project(ROOT / "projects" / "timm_backbones")
        all_found = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "TEST.DETECTIONS_PER_IMAGE", "30")
        small = [word for pair in SMALL_MODEL.items() for word in pair] if is_small else []
        cfg = backends.model_config(ROOT / recipe, [*small, *all_found, *changes], "torchvision")
        torch.manual_seed(0)
        model = backends.load("torchvision").build(cfg).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "mask_fcn_logits" in name:
                    weight *= 100  # at random all probabilities are near 0.5, and rounding decides masks
        return Detector(cfg, "torchvision", model, [f"class {k}" for k in range(cfg.MODEL.ROI_HEADS.NUM_CLASSES)])

    return build


class TestPieces:
    @pytest.mark.parametrize("sizes", [(130, 160), (480, 96), (333, 800), (64, 64), (3, 7)])
    def test_resizing_is_torchs_to_the_last_bit(self, sizes: tuple[int, int]) -> None:
        old, new = sizes
        image = torch.from_numpy(image_of((old, old + 10))).permute(2, 0, 1)
        across = (image.float() @ shares(old + 10, 50).T + 0.5).floor()
        found = (shares(old, new) @ across + 0.5).floor()
        assert torch.equal(found, F.resize(image, [new, 50], antialias=True).float())

    def test_masks(self) -> None:
        torch.manual_seed(0)
        boxes = torch.rand(5, 4) * 30
        boxes[:, 2:] += boxes[:, :2] + 3
        masks = torch.rand(5, 28, 28)
        expected = decode_masks(paste_masks(masks, boxes, 50, 60), 50, 60).astype(bool)
        assert np.array_equal(pasted(masks, boxes, 50, 60).numpy(), expected)

    def test_keypoints(self) -> None:
        torch.manual_seed(0)
        boxes = torch.rand(5, 4) * 30
        boxes[:, 2:] += boxes[:, :2] + 80 * torch.rand(5, 2)
        boxes[0, 2:] = boxes[0, :2] + 0.3
        maps = torch.randn(5, 3, 56, 56)
        torch.testing.assert_close(decoded(maps, boxes), decode_keypoints(maps, boxes))

    @pytest.mark.parametrize("count", [0, 1, 200])
    def test_nms(self, count: int) -> None:
        torch.manual_seed(0)
        boxes, scores, groups = torch.rand(count, 4) * 20, torch.rand(count), torch.randint(0, 3, (count,))
        boxes[:, 2:] += boxes[:, :2]
        found = nms_of_groups(boxes, scores, groups, 0.5)
        assert found.tolist() == batched_nms(boxes, scores, groups, 0.5).tolist()
        assert len(found) >= count // 4

    @pytest.mark.parametrize("kind", ["cascade", "Detectron", "keypoints"])
    def test_the_whole(self, detector: Callable[..., Detector], kind: str) -> None:
        model = detector(*KINDS[kind])
        with patched(), torch.no_grad():
            found = {name: value.numpy() for name, value in Whole(model)(torch.from_numpy(image_of((90, 50)))).items()}
        expected = model.predict(image_of((90, 50)))
        assert len(expected) > 8
        assert max(compare(expected, found).values()) < 1e-5


class TestRefusals:
    @pytest.fixture
    def writes(self, small_detector: Detector, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        """``writes(change)``: a file is what the detector finds, changed."""

        def begin(change: Callable[[dict[str, Any]], Any]) -> None:
            def write(model: Detector, path: Path) -> Run:
                path.write_text("a model")

                def run(image: np.ndarray) -> dict[str, np.ndarray]:
                    found = model.predict(image)
                    outputs = {name: getattr(found, name).copy() for name in ("boxes", "scores", "labels", "masks")}
                    outputs |= {"keypoints": found.keypoints}
                    return outputs | (change(outputs) or {})

                return run

            monkeypatch.setitem(export.WRITERS, ".onnx", write)

        return begin

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda one: {"scores": one["scores"] * 1.002}, r"differs from the detector by boxes 0, scores 0.002"),
            (lambda one: {"boxes": one["boxes"] + 1}, r"by boxes 0.01, "),
            (lambda one: {"boxes": one["boxes"] + math.nan}, r"by boxes nan, "),
            (lambda one: {"scores": one["scores"] * np.array([1] * 9 + [math.nan])}, r"by boxes 0, scores nan, "),
            (lambda one: {"masks": ~one["masks"]}, r"masks [1-9]"),
            (lambda one: {name: value[1:] for name, value in one.items()}, r"finds 9 objects, the detector 10"),
        ],
    )
    def test_a_model_that_differs_is_not_left(
        self, small_detector: Detector, writes: Callable[..., None], change: Any, message: str, tmp_path: Path
    ) -> None:
        writes(change)
        with pytest.raises(UserError, match=message):
            export.export(small_detector, tmp_path / "model.onnx", image_of((64, 96)))
        assert not [*tmp_path.iterdir()]

    def test_equal_scores_in_another_order(
        self, small_detector: Detector, writes: Callable[..., None], tmp_path: Path
    ) -> None:
        writes(lambda one: {name: value[::-1] for name, value in one.items()})
        count, differences = export.export(small_detector, tmp_path / "model.onnx", image_of((64, 96)))
        assert (count, set(differences.values())) == (10, {0.0})
        assert (tmp_path / "model.onnx").read_text() == "a model"

    def test_the_command(
        self, small_detector: Detector, writes: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        writes(lambda one: {})
        monkeypatch.setattr(export, "load", lambda *words: small_detector)
        said = export.export_model("run", None, tmp_path / "model.onnx", None)
        assert said.endswith("model.onnx, 0 MB: 10 objects in coloured blobs differ by at most boxes 0, scores 0, "
                             "masks 0, keypoints 0")  # fmt: skip

        def refuse(*words: object) -> None:
            raise ConfigError("the torchvision backend does not support a key")

        monkeypatch.setattr(export, "load", refuse)
        with pytest.raises(ConfigError, match=r"a key\n  only models of the torchvision backend"):
            export.export_model("run", None, tmp_path / "other.onnx", None)

    def test_other_names_and_backends(self, small_detector: Detector, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"expected a name that ends with .onnx or .pt2"):
            export.export(small_detector, tmp_path / "model.pth", image_of((64, 96)))
        for name in ("file", "folder.onnx/model.onnx"):
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text("a good model")
        for name, said in (("folder.onnx", "folder.onnx exists; name another file"),
                           ("folder.onnx/model.onnx", "model.onnx exists; name another file"),
                           ("file/model.onnx", r"model.onnx cannot be written .*file: Not a directory")):  # fmt: skip
            with pytest.raises(UserError, match=said):
                export.export_model("no run", None, tmp_path / name, None)
        assert path.read_text() == "a good model"
        other = Detector(small_detector.cfg, "detectron2", small_detector.model, small_detector.classes)
        with pytest.raises(UserError, match=r"detectron2 built this model; load it with backend='torchvision'"):
            export.export(other, tmp_path / "model.onnx", image_of((64, 96)))

    def test_what_torch_cannot_trace(self, small_detector: Detector, tmp_path: Path) -> None:
        model = deepcopy(small_detector.model)
        model.backbone.body.register_forward_hook(lambda _, inputs, maps: maps if inputs[0].sum() > 0 else {})
        other = Detector(small_detector.cfg, "torchvision", model, small_detector.classes)
        with pytest.raises(UserError, match=r"cannot export this model, with build_resnet_fpn_backbone: .*guard"):
            export.export(other, tmp_path / "model.pt2", image_of((64, 96)))
        assert not [*tmp_path.iterdir()]


def check_at_any_size(model: Detector, run: Run) -> set[int]:
    """The numbers of objects in noise, and in darker noise."""
    counts = set()
    for size in SIZES:
        for image in (image_of(size), image_of(size) // 3):
            expected = model.predict(image)
            compare(expected, run(image))
            counts.add(len(expected))
    return counts


def run_of(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    return lambda image: dict(zip(names, session.run(None, {"image": image}), strict=True))


@pytest.mark.slow
def test_onnx(
    small_detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Masks and keypoints of one object, by the lines of docs/using_a_model.md; of two or none in other images."""
    pytest.importorskip("onnxruntime")
    model = Detector(small_detector.cfg, "torchvision", deepcopy(small_detector.model), small_detector.classes)
    model.model.roi_heads.score_thresh = float(model.predict(image_of(SIZES[0])).scores[:2].mean())
    count, differences = export.export(model, tmp_path / "model.onnx", image_of(SIZES[0]))
    assert (count, set(differences)) == (1, {"boxes", "scores", "masks", "keypoints"})
    Image.fromarray(image_of(SIZES[0])).save(tmp_path / "image.jpg", format="PNG")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    page = (ROOT / "docs/using_a_model.md").read_text().split("## As one file")[1]
    exec(page.split("```python")[1].split("```")[0], scope)
    expected = model.predict(image_of(SIZES[0]))
    compare(expected, scope["found"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == expected.class_names
    assert check_at_any_size(model, run_of(tmp_path / "model.onnx")) == {0, 1, 2}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_onnx_of_each_kind(detector: Callable[..., Detector], kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = detector(*KINDS[kind])
    count, _ = export.export(model, tmp_path / "model.onnx", image_of((90, 50)))
    assert count > 8
    check_at_any_size(model, run_of(tmp_path / "model.onnx"))


@pytest.mark.slow
def test_pt2(small_detector: Detector, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    _, differences = export.export(small_detector, path, image_of((90, 50)))
    assert max(differences.values()) < 1e-9
    module = torch.export.load(path).module()
    check_at_any_size(
        small_detector, lambda image: {name: one.numpy() for name, one in module(torch.from_numpy(image)).items()}
    )
