"""Counting what a model costs: against published numbers, against fvcore and by hand; and the committed table."""

import csv
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, load_command
from samples import sample
from torch import nn
from torchvision.models import ResNet50_Weights, ResNet101_Weights, ResNeXt101_32X8D_Weights

from scratch_det import backends
from scratch_det.analysis import (
    Analysis,
    Cost,
    HeadWithPredictor,
    Pass,
    _heads,
    analyze,
    table,
    write_table,
)
from scratch_det.backends import torchvision as torchvision_backend
from scratch_det.config.load import load_config
from scratch_det.errors import ConfigError, UserError

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
    from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis

QUICKSTART = ROOT / "configs/Digits/quickstart.yaml"
R50 = ROOT / "configs/COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_2x_gn.yaml"
X152 = ROOT / "configs/_base_/model/mask_rcnn_X_152_8x32d_FPN_gn.yaml"
CLASSIFIER = 2048 * 1000
BACKENDS = ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)]

Tool = Callable[..., str]


def examine(recipe: Path, overrides: tuple[Any, ...], backend: str, size: tuple[int, int] | None = None) -> Analysis:
    return analyze(backends.load(backend), backends.model_config(recipe, overrides, backend), size)


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Tool:
    """Runs scratch-det analyze model inside this process and returns what it printed."""

    def run(*arguments: Any) -> str:
        monkeypatch.setattr("sys.argv", ["analyze_model.py", *map(str, arguments)])
        load_command("analyze_model").main()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("backend", BACKENDS)
class TestBackends:
    def test_r50(self, backend: str) -> None:
        found = examine(R50, (), backend)
        background_slots = 4_357 if backend == "torchvision" else 0
        assert found.total.parameters == found.total.trainable == 45_711_152 + background_slots
        assert list(found.parts) == ["bottom-up", "FPN", "RPN", "box head", "mask head"]
        assert [sum(part.norms.values()) for part in found.parts.values()] == [53, 8, 0, 4, 4]
        assert set(found.total.norms) == {"GroupNorm"}
        assert found.image == (800, 1344)
        assert list(found.maps.values())[-5:] == [
            (256, 4, 200, 336), (256, 8, 100, 168), (256, 16, 50, 84), (256, 32, 25, 42), (256, 64, 13, 21),
        ]  # fmt: skip

    def test_frozen_layers(self, backend: str) -> None:
        recipe = R50.with_name("pretrained_mask_rcnn_R_50_FPN_2x_syncbn.yaml")
        found = examine(recipe, (), backend)
        stem, first, others = 64 * 3 * 49, 64 * (64 + 9 * 64 + 256 + 256), 2 * 64 * (256 + 9 * 64 + 256)
        assert found.parts["bottom-up"].parameters - found.parts["bottom-up"].trainable == stem + first + others
        assert found.parts["bottom-up"].norms == {"FrozenBatchNorm2d": 11, "SyncBatchNorm": 42}

    @pytest.mark.slow
    def test_x152_trains(self, backend: str) -> None:
        few = ["MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.DEVICE", "cpu", "MODEL.RPN.POST_NMS_TOPK_TRAIN", 8]
        few += ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8]
        cfg = load_config(X152, few, backends.defaults(backend)).cfg
        backends.check_keys(backend, cfg)
        torch.manual_seed(0)
        model = backends.load(backend).build(cfg)
        losses = backends.load(backend).losses(model, [sample(128, 128)])
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values())
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert [name for name, grad in gradients.items() if grad is None or not grad.isfinite().all()] == []


@pytest.mark.parametrize(
    ("overrides", "weights"),
    [
        (("MODEL.RESNETS.DEPTH", 50), ResNet50_Weights.IMAGENET1K_V1),
        (("MODEL.RESNETS.DEPTH", 101), ResNet101_Weights.IMAGENET1K_V1),
        (
            ("MODEL.RESNETS.DEPTH", 101, "MODEL.RESNETS.NUM_GROUPS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 8),
            ResNeXt101_32X8D_Weights.IMAGENET1K_V1,
        ),
    ],
    ids=["R50", "R101", "X101"],
)
def test_bodies_have_the_published_flops(overrides: tuple[Any, ...], weights: Any) -> None:
    """torchvision's, of the classifier at 224 px, in billions with three decimals."""
    found = examine(R50, overrides, "torchvision", (224, 224))
    assert (found.parts["bottom-up"].flops + CLASSIFIER) / 1e9 == pytest.approx(weights.meta["_ops"], abs=0.0005)


class TestCounting:
    @pytest.mark.parametrize("part", ["backbone", "RPN", "box", "mask"])
    def test_agrees_with_fvcore(self, part: str, small_model: list[str]) -> None:
        """Which counts norms and upsampling too; convolutions and linear layers are compared."""
        model = torchvision_backend.build(load_config(QUICKSTART, small_model).cfg).eval()
        heads, generator = model.roi_heads, torch.Generator().manual_seed(0)
        module, size = {
            "backbone": (model.backbone, (1, 3, 64, 96)),
            "RPN": (model.rpn.head, (1, 32, 8, 12)),
            "box": (nn.Sequential(heads.box_head, heads.box_predictor), (5, 32, 7, 7)),
            "mask": (nn.Sequential(heads.mask_head, heads.mask_predictor), (5, 32, 14, 14)),
        }[part]
        inputs: Any = torch.rand(size, generator=generator)
        inputs = [inputs] if part == "RPN" else inputs
        flops = FlopCountAnalysis(module, (inputs,)).unsupported_ops_warnings(False).by_operator()
        activations = ActivationCountAnalysis(module, (inputs,)).unsupported_ops_warnings(False)
        found = Pass(module, inputs).cost()
        assert found.flops == flops["conv"] + flops["linear"] + flops["addmm"] > 0
        assert found.activations == activations.total() > 0

    def test_heads_by_hand(self) -> None:
        """50 proposals, 20 boxes, 64 channels; the box head has a convolution and 256 units, the mask head two."""
        found = examine(QUICKSTART, (), "torchvision")
        conv, units = 9 * 64 * 64, 64 * 49 * 256 + 256 * 5 * 81
        assert found.parts["box head"].flops == 50 * (49 * conv + units)
        assert found.parts["box head"].activations == 50 * (49 * 64 + 256 + 5 * 81)
        assert found.parts["mask head"].flops == 20 * (2 * 196 * conv + 784 * (64 * 64 + 64 * 81))

    @pytest.mark.parametrize(
        ("key", "part"), [("MODEL.RPN.POST_NMS_TOPK_TEST", "box head"), ("TEST.DETECTIONS_PER_IMAGE", "mask head")]
    )
    def test_one_key_decides_on_how_many_boxes_a_head_works(self, key: str, part: str) -> None:
        ten, thirty = (examine(QUICKSTART, (key, number), "torchvision") for number in (10, 30))
        assert thirty.parts.pop(part).flops == 3 * ten.parts.pop(part).flops
        assert thirty.parts == ten.parts

    def test_a_box_model_has_no_mask_head(self) -> None:
        found = examine(QUICKSTART, ("MODEL.MASK_ON", False), "torchvision")
        assert list(found.parts) == ["bottom-up", "FPN", "RPN", "box head"]

    def test_a_head_with_its_predictor(self) -> None:
        with torch.device("meta"):
            one = Pass(HeadWithPredictor(nn.Linear(8, 8), nn.Linear(8, 8)), torch.empty(5, 8)).cost()
        assert (one.flops, one.parameters) == (2 * 5 * 64, 2 * 72)

    def test_stages_of_a_cascade_add_up(self) -> None:
        cfg = load_config(QUICKSTART).cfg

        def cost(stages: int) -> Cost:
            heads = nn.Module()
            for name, inputs in (("box_head", cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION), ("box_predictor", 8)):
                heads.add_module(name, nn.ModuleList([nn.Linear(inputs, 8) for _ in range(stages)]))
            return _heads(heads, cfg, channels=4)["box head"]

        with torch.device("meta"):
            one, three = cost(1), cost(3)
        assert (one.flops, one.parameters) == (50 * 4 * 7 * 8 * (7 + 8), 64 + 72)
        assert three == one + one + one

    @pytest.mark.parametrize("name", ["body", "stem"])
    def test_a_backbone_without_a_pyramid(self, name: str, small_model: list[str]) -> None:
        cfg = load_config(QUICKSTART, small_model).cfg

        def build(cfg: Any) -> nn.Module:
            model = torchvision_backend.build(cfg)
            model.backbone = SingleMap(name)
            return model

        found = analyze(SimpleNamespace(build=build), cfg, (60, 90))
        assert found.image == (64, 96)
        assert list(found.parts) == ["bottom-up", "RPN", "box head", "mask head"]
        assert found.parts["bottom-up"].flops == 4 * 6 * 32 * 3 * 256
        assert found.maps == {"conv5": (32, 16, 4, 6)}

    def test_heads_of_another_kind_are_rejected(self, small_model: list[str]) -> None:
        def build(cfg: Any) -> nn.Module:
            model = torchvision_backend.build(cfg)
            model.roi_heads.res5 = nn.Linear(10, 1, bias=False)
            return model

        backend = SimpleNamespace(build=build)
        with pytest.raises(UserError, match=r"^RoIHeads has weights in res5; only those of parts called"):
            analyze(backend, load_config(QUICKSTART, small_model).cfg, (64, 64))


class SingleMap(nn.Module):
    """A convolution, called ``name``, whose output is the only map."""

    size_divisibility = 16

    def __init__(self, name: str):
        super().__init__()
        setattr(self, name, nn.Conv2d(3, 32, 16, stride=16))

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"conv5": next(self.children())(image)}


@pytest.mark.detectron2
class TestDetectron2:
    """What stock detectron2 has beyond the recipes."""

    def test_cascade(self) -> None:
        agnostic = ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)
        one, three = (
            examine(R50, (*agnostic, "MODEL.ROI_HEADS.NAME", name), "detectron2")
            for name in ("StandardROIHeads", "CascadeROIHeads")
        )
        box = one.parts.pop("box head")
        assert three.parts.pop("box head") == box + box + box
        assert three.parts == one.parts

    def test_keypoints(self) -> None:
        cfg = load_config(R50, ("MODEL.KEYPOINT_ON", True), backends.defaults("detectron2")).cfg
        found = analyze(backends.load("detectron2"), cfg, (64, 64)).parts["keypoint head"]
        convs = 196 * 9 * 512 * (256 + 7 * 512)
        assert found.flops == 100 * (convs + 196 * 16 * 512 * 17)

    def test_c4_is_rejected(self) -> None:
        overrides = ("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", "['res4']")
        overrides += ("MODEL.RPN.IN_FEATURES", "['res4']", "MODEL.ROI_HEADS.IN_FEATURES", "['res4']")
        overrides += ("MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "MODEL.ANCHOR_GENERATOR.SIZES", "[[32, 64]]")
        with pytest.raises(UserError, match=r"^Res5ROIHeads has weights in res5, box_predictor; only those of parts"):
            examine(R50, overrides, "detectron2")


class TestTable:
    def test_some_rows_of_the_committed_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Those of a few recipes; of all of them in the slow test below."""
        (tmp_path / "configs").mkdir()
        for folder in ("_base_", "COCO-Keypoints", "PascalVOC-Detection"):
            (tmp_path / "configs" / folder).symlink_to(ROOT / "configs" / folder)
        monkeypatch.chdir(tmp_path)
        write_table(tmp_path / "models.md", "torchvision")
        rows, committed = ({row["model"]: row for row in csv.DictReader((root / "models.csv").read_text().splitlines())}
                           for root in (tmp_path, ROOT / "results"))  # fmt: skip
        assert rows.keys() == {"keypoint_rcnn_R_50_FPN_gn", "faster_rcnn_R_101_FPN_gn"}
        for name, row in rows.items():
            assert row | {"recipes": "-"} == {column: committed[name][column] for column in row} | {"recipes": "-"}

    @pytest.mark.slow
    def test_the_committed_one_is_what_the_models_are(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """If not: scratch-det analyze model --table results/models.md --backend torchvision."""
        monkeypatch.chdir(ROOT)
        write_table(tmp_path / "models.md", "torchvision")
        written = (tmp_path / "models.md").read_text().replace(str(tmp_path), "results")
        assert (ROOT / "results/models.md").read_text() == written
        assert (ROOT / "results/models.csv").read_text() == (tmp_path / "models.csv").read_text()

    def test_writing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: Tool) -> None:
        (tmp_path / "configs/own").mkdir(parents=True)
        model = ROOT / "configs/_base_/model/mask_rcnn_R_18_FPN_gn_small.yaml"
        recipe = f"_BASE_: {model}\nINPUT: {{MIN_SIZE_TEST: 128, MAX_SIZE_TEST: 160}}\n"
        (tmp_path / "configs/own/one.yaml").write_text(recipe)
        monkeypatch.chdir(tmp_path)
        assert tool("--table", "models.md", "--backend", "torchvision") == ""
        written = (tmp_path / "models.md").read_text()
        assert "`scratch-det analyze model --table models.md --backend torchvision`" in written
        cells = [[cell.strip() for cell in line.split("|")] for line in written.splitlines() if line.startswith("|")]
        assert [row[1:4] for row in cells] == [
            ["model", "recipes", "image"],
            cells[1][1:4],
            ["mask_rcnn_R_18_FPN_gn_fc256", "1", "128 x 160"],
        ]
        (row,) = csv.DictReader((tmp_path / "models.csv").read_text().splitlines())
        assert (row["model"], row["parameters"]) == ("mask_rcnn_R_18_FPN_gn_fc256", "12464181")

    def test_elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match="there is no folder absent; make it"):
            write_table(Path("absent/models.md"), "torchvision")
        with pytest.raises(UserError, match=r"is a folder; name a file, such as .*models\.md"):
            write_table(tmp_path, "torchvision")
        assert list(tmp_path.iterdir()) == []

    def test_columns_line_up(self) -> None:
        rows = [("part", "size", "norms"), ("p2", "32 x 4", "20 GN"), ("body", "8 x 4", "-")]
        assert table(rows, False, ["left", "right", "left"]).splitlines() == [
            "part    size  norms", "p2    32 x 4  20 GN", "body   8 x 4  -",
        ]  # fmt: skip
        assert table(rows, True).splitlines()[:2] == ["| part   |   size |   norms |", "|:-------|-------:|--------:|"]


class TestTool:
    def test_describes(self, tool: Tool) -> None:
        said = tool("--config-file", QUICKSTART, "--size", "100x130", "MODEL.ROI_HEADS.NUM_CLASSES", 10)
        assert "an image of 128 x 160 with its padding, 50 proposals, 20 boxes, 10 classes" in said
        assert said.count("GroupNorm") == 5

    @pytest.mark.parametrize(
        ("arguments", "answer"),
        [
            (["--size", "800"], "--size: '800', expected HEIGHTxWIDTH in pixels, such as 800x1333"),
            (["--size", "0x800"], "--size: '0x800'"),
            (["--size=-1x800"], "--size: '-1x800'"),
            (["INPUT.MIN_SIZE_TEST", "0"], "images stay as they are stored: give a size, --size 800x1333"),
            (["MODEL.DEPTH", "50"], "unknown key MODEL.DEPTH"),
            (["MODEL.RESNETS.DEPTH", "51"], "MODEL.RESNETS.DEPTH is 51, expected 18, 34, 50, 101 or 152"),
            (["MODEL.FPN.OUT_CHANNELS", "100"], "which GN (MODEL.FPN.NORM) cannot split into 32 groups"),
            (["--backend", "torchvision", "MODEL.RPN.HEAD_NAME", "Own"], "backend does not support this recipe"),
        ],
    )
    def test_rejects(self, arguments: list[str], answer: str, tool: Tool, capsys: pytest.CaptureFixture) -> None:
        with pytest.raises(SystemExit) as end:
            tool("--config-file", QUICKSTART, *arguments)
        assert end.value.code == 2
        said = capsys.readouterr().err
        assert "error: " in said
        assert answer in said

    def test_nothing_is_ignored(self, tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        with pytest.raises(SystemExit) as end:
            tool("--table", tmp_path / "models.md", "--size", "800x800")
        assert end.value.code == 2
        assert "leave out --size, --markdown" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []

    def test_a_model_that_cannot_be_trained_can_be_counted(self, tool: Tool) -> None:
        """Its bases alone have frozen random layers and no data."""
        with pytest.raises(ConfigError):
            backends.model_config(X152, ("MODEL.RESNETS.NORM", "GM"), "torchvision")
        said = tool("--config-file", X152, "--backend", "torchvision", "--markdown")
        assert "| total     |  186,933,557 |" in said
