"""What one line of BACKBONES gives a backbone. VGG-16: test_backbones_vgg; timm: projects/timm_backbones."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import ROOT, restored_registries
from four_maps import FourMaps
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from scratch_det import backends
from scratch_det.analysis import analyze
from scratch_det.command_line import load_project
from scratch_det.config.choices import BACKBONES, PROJECT_KEYS, Choice, backbone_names, is_resnet
from scratch_det.config.load import flatten, get_cfg, load_config
from scratch_det.config.rules import check_config, check_model, norms
from scratch_det.conversion import convert_file
from scratch_det.errors import ConfigError, UserError
from scratch_det.modeling.backbones import StemPool, build_bottom_up
from scratch_det.modeling.norm import NORMS
from scratch_det.weights.names import renamed

INSTALLED = [name for name in backends.BACKENDS if backends.is_installed(name)]
MODEL = ROOT / "configs/_base_/model/mask_rcnn_R_18_FPN_gn_small.yaml"
SMALL = ["MODEL.BACKBONE.NAME", "build_steps_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", "0", "MODEL.DEVICE", "cpu",
         "DATASETS.TRAIN", "('any',)", "SOLVER.BASE_LR", "0.02"]  # fmt: skip


class Steps(FourMaps):
    """Four steps with BN, and a layer that nothing uses where MODEL.STEPS.WASTE asks for it."""

    def __init__(self, cfg: CfgNode):
        super().__init__((8, 16, 32, 64), nn.BatchNorm2d)
        self.stages = [[name] for name in self.channels]
        if cfg.MODEL.STEPS.WASTE:
            self.wasted = nn.Conv2d(1, 1, 1)


@pytest.fixture(autouse=True)
def steps() -> Iterator[None]:
    keys = {"MODEL.STEPS.WASTE": False, "MODEL.STEPS.NORM": "BN"}
    with patch.dict(BACKBONES, steps=Choice(f"{__name__}:Steps", tuple(keys))), patch.dict(PROJECT_KEYS, keys):
        yield


def config(backend: str, *keys: str) -> CfgNode:
    return load_config(MODEL, [*SMALL, *keys], backends.defaults(backend)).cfg


@pytest.mark.parametrize("name", INSTALLED)
class TestUnderFPN:
    def test_maps(self, name: str) -> None:
        backends.check_keys(name, config(name))
        backbone = backends.load(name).build(config(name)).backbone
        maps = backbone(torch.zeros(2, 3, 64, 96))
        assert [tuple(one.shape) for one in maps.values()] == [
            (2, 64, math.ceil(64 / stride), math.ceil(96 / stride)) for stride in (4, 8, 16, 32, 64)
        ]
        assert backbone.size_divisibility == 32

    def test_layers_are_hes(self, name: str) -> None:
        torch.manual_seed(0)
        model = backends.load(name).build(config(name))
        layer = next(m for n, m in model.named_modules() if n.endswith("res5.0"))
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.02)

    def test_frozen_stages_keep_their_statistics(self, name: str) -> None:
        model = backends.load(name).build(config(name, "MODEL.BACKBONE.FREEZE_AT", "2"))
        body = model.get_submodule("backbone.body" if name == "torchvision" else "backbone.bottom_up")
        kinds = [type(body.get_submodule(f"{stage}.1")) for stage in body.strides]
        assert kinds == [FrozenBatchNorm2d, FrozenBatchNorm2d, nn.BatchNorm2d, nn.BatchNorm2d]
        training = {key.split(".")[0] for key, p in body.named_parameters() if p.requires_grad}
        assert training == {"res4", "res5"}

    def test_analysis_names_what_does_not_train(self, name: str) -> None:
        cfg = config(name, "MODEL.STEPS.WASTE", "True", "MODEL.BACKBONE.FREEZE_AT", "1")
        found = analyze(backends.load(name), cfg, (64, 96))
        assert [(found.maps[key][:2]) for key in ("res2", "res5", "p2")] == [(8, 4), (64, 32), (64, 4)]
        assert found.parts["bottom-up"].norms == {"BatchNorm2d": 3, "FrozenBatchNorm2d": 1}
        assert {key.split(".", 1)[1] for key in found.frozen} == {"res2.0.weight", "res2.0.bias"}
        assert {key.split(".", 1)[1] for key in found.unused} == {"wasted.weight", "wasted.bias"}


@pytest.mark.detectron2
def test_both_backends_give_the_same_maps() -> None:
    ours, theirs = (backends.load(name).build(config(name)) for name in ("torchvision", "detectron2"))
    values = ours.state_dict()
    names = renamed(values, "torchvision", "detectron2")
    assert {names[key] for key in values} >= {key for key in theirs.state_dict() if key.startswith("backbone.")}
    theirs.load_state_dict({names[key]: value for key, value in values.items() if key[:8] == "backbone"}, strict=False)
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    for one, other in zip(ours.backbone(images).values(), theirs.backbone(images).values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def changed(change: Callable[[Any], object]) -> Any:
    """Instead of Steps, as BACKBONES finds it: the same body, changed before it is handed over."""

    def build(cfg: CfgNode, own: type[Steps] = Steps) -> nn.Module:
        body = own(cfg)
        change(body)
        return body

    return patch(f"{__name__}.Steps", build)


class TestWhatABodyStates:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda body: setattr(body.res5[0], "stride", (1, 1)),
                r".* a map of \[64, 4, 6\], but gives \[64, 8, 12\]",
            ),
            (lambda body: body.channels.update(res5=32), r"states 32 channels .* for res5, .*, but gives \[64, 4, 6\]"),
            (lambda body: body.channels.pop("res2"), "states None channels and stride 4 for res2"),
            (
                lambda body: setattr(body, "forward", lambda x: {"res2": x}),
                r"gives maps .*, but has strides of \[.*res5",
            ),
        ],
    )
    def test_has_to_be_what_it_gives(self, change: Callable[[Any], object], message: str) -> None:
        with changed(change), pytest.raises(ConfigError, match=f"build_steps_fpn_backbone {message}"):
            build_bottom_up(config("torchvision"))

    def test_is_compared_without_a_trace(self) -> None:
        """Neither statistics nor random numbers show that an image went through."""
        torch.manual_seed(0)
        body, after = build_bottom_up(config("torchvision")), torch.rand(1)
        assert body.training
        assert body.res2[1].num_batches_tracked == 0
        assert body.res2[1].running_var.eq(1).all()
        torch.manual_seed(0)
        with patch("scratch_det.modeling.backbones._misstated", return_value=[]):
            build_bottom_up(config("torchvision"))
        assert torch.rand(1).equal(after)

    @pytest.mark.parametrize("stages", [[], None])
    def test_no_more_stages_are_frozen_than_there_are(self, stages: list[list[str]] | None) -> None:
        with pytest.raises(ConfigError, match="FREEZE_AT is 5, but build_steps_fpn_backbone has 4 stages to freeze"):
            build_bottom_up(config("torchvision", "MODEL.BACKBONE.FREEZE_AT", "5"))
        with changed(lambda body: delattr(body, "stages") if stages is None else setattr(body, "stages", stages)):
            assert all(p.requires_grad for p in build_bottom_up(config("torchvision")).parameters())
            with pytest.raises(ConfigError, match="FREEZE_AT is 1, but build_steps_fpn_backbone has 0 stages"):
                build_bottom_up(config("torchvision", "MODEL.BACKBONE.FREEZE_AT", "1"))

    @pytest.mark.parametrize(
        ("name", "weights"), [("scale", nn.Parameter(torch.ones(1))), ("norm", nn.InstanceNorm2d(3, affine=True))]
    )
    def test_weights_without_a_rule_are_its_own_to_draw(self, name: str, weights: Any) -> None:
        message = "build_steps_fpn_backbone: layer .* has weights but no rule in initialize; .* `initialized = True`"
        with changed(lambda body: setattr(body, name, weights)), pytest.raises(ConfigError, match=message):
            build_bottom_up(config("torchvision"))
        with changed(lambda body: body.__dict__.update(initialized=True) or setattr(body, name, weights)):
            assert name in build_bottom_up(config("torchvision")).state_dict() or name == "norm"

    def test_gn_needs_its_widths(self) -> None:
        with pytest.raises(ConfigError, match=r"a layer of 40 channels into 32 groups; .* by a factor of 4"):
            NORMS["GN"](40)
        assert NORMS[""](40)(torch.ones(1)) == 1


class Stems(Steps):
    """The same steps by names that a ResNet's layers have."""

    LIKE = {"res2": "stem", "res3": "layer1", "res4": "conv1", "res5": "bn1"}  # noqa: RUF012

    def __init__(self, cfg: CfgNode):
        super().__init__(cfg)
        for name, like in self.LIKE.items():
            self.add_module(like, nn.Sequential(nn.ModuleDict({"conv1": self._modules.pop(name)})))
        self.stages = [[like] for like in self.LIKE.values()]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = {}
        for name, like in self.LIKE.items():
            x = maps[name] = self.get_submodule(f"{like}.0.conv1")(x)
        return maps


def test_names_like_a_resnets_are_converted_as_they_are(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"_BASE_: {MODEL}\nMODEL: {{DEVICE: cpu, BACKBONE: {{NAME: build_steps_fpn_backbone, FREEZE_AT: 0}}}}"
    )
    with patch.dict(BACKBONES, steps=Choice(f"{__name__}:Stems", BACKBONES["steps"].keys)):
        torch.save(backends.load("torchvision").build(config("torchvision")).state_dict(), tmp_path / "ours.pth")
        convert_file(str(tmp_path / "ours.pth"), tmp_path / "theirs.pth", "detectron2", recipe)
        convert_file(str(tmp_path / "theirs.pth"), tmp_path / "back.pth", "torchvision", recipe)
    ours, theirs, back = (torch.load(tmp_path / f"{name}.pth") for name in ("ours", "theirs", "back"))
    assert "backbone.bottom_up.layer1.0.conv1.1.running_mean" in theirs["model"]
    bodys = [name for name in ours if name.startswith("backbone.body.")]
    assert len(bodys) == 28
    assert all(back["model"][name].equal(ours[name]) for name in bodys)


class TestRules:
    def test_two_names_a_line(self) -> None:
        assert {name for name, body in backbone_names().items() if body == "steps"} == {
            "build_steps_backbone",
            "build_steps_fpn_backbone",
        }

    def test_fpn_takes_four_strides(self) -> None:
        with pytest.raises(ConfigError, match=r"expected four maps of strides \[4, 8, 16, 32\]; .* are \{'res2': 4"):
            build_bottom_up(config("torchvision", "MODEL.FPN.IN_FEATURES", "['res3', 'res4', 'res5']"))

    def test_without_fpn_maps_are_as_wide(self) -> None:
        with pytest.raises(ConfigError, match=r"maps of \[8, 16, 32, 64\] channels, which need a pyramid"):
            build_bottom_up(config("torchvision", "MODEL.BACKBONE.NAME", "build_steps_backbone"))

    def test_its_norm_is_under_the_rules(self) -> None:
        with pytest.raises(ConfigError, match=r"MODEL\.STEPS\.NORM is BN with 2 images"):
            check_config(config("torchvision", "SOLVER.IMS_PER_BATCH", "2"))
        with pytest.raises(ConfigError, match=r"MODEL\.STEPS\.NORM is FrozenBN while MODEL\.WEIGHTS"):
            check_config(config("torchvision", "MODEL.STEPS.NORM", "FrozenBN"))

    @pytest.mark.parametrize(
        ("name", "read"),
        [
            ("resnet_fpn", ["RESNETS", "FPN"]),
            ("resnet", ["RESNETS"]),  # detectron2's
            ("net_fpn", ["FPN", "NET"]),
            ("myresnet_fpn", ["FPN"]),
            ("fpnnet", []),
        ],
    )
    def test_whose_norm_is_read(self, name: str, read: list[str]) -> None:
        """By a body's whole name, not by what is a part of it."""
        PROJECT_KEYS["MODEL.NET.NORM"] = "GN"
        others = dict.fromkeys(("myresnet", "fpnnet"), Choice(""))
        with patch.dict(BACKBONES, {"net": Choice("", ("MODEL.NET.NORM",)), **others}):
            cfg = config("torchvision", "MODEL.BACKBONE.NAME", f"build_{name}_backbone")
            assert [key.split(".")[1] for key in norms(cfg)] == [*read, "ROI_BOX_HEAD", "ROI_MASK_HEAD"]
            assert is_resnet(cfg) == ("RESNETS" in read)

    def test_another_bodys_keys_are_rejected(self) -> None:
        cfg = config("torchvision", "MODEL.BACKBONE.NAME", "build_vgg16_fpn_backbone", "MODEL.STEPS.WASTE", "True")
        with pytest.raises(ConfigError, match=r"MODEL\.STEPS\.WASTE is True, which .*vgg16_fpn_backbone ignores"):
            check_model(cfg)

    def test_a_body_has_a_rule(self) -> None:
        with patch.dict(
            BACKBONES, steps=Choice("", BACKBONES["steps"].keys, lambda cfg: iter(["MODEL.STEPS.WASTE is bad"]))
        ):
            with pytest.raises(ConfigError, match=r"MODEL\.STEPS\.WASTE is bad"):
                check_model(config("torchvision"))
            check_model(config("torchvision", "MODEL.BACKBONE.NAME", "build_vgg16_fpn_backbone"))

    @pytest.mark.parametrize("name", INSTALLED)
    def test_keys_of_a_project(self, name: str) -> None:
        assert flatten(backends.defaults(name))["MODEL.STEPS.NORM"] == "BN"
        with patch.dict(PROJECT_KEYS, clear=True):
            assert "MODEL.STEPS.NORM" not in flatten(get_cfg())

    def test_a_folder_that_is_no_project(self) -> None:
        with pytest.raises(UserError, match=r"is no folder with an __init__\.py; give one such as projects/"):
            load_project(ROOT / "projects")
        with pytest.raises(UserError, match=r"has no function add\(\)"):
            load_project(ROOT / "scratch_det")

    def test_a_choice_with_a_key_that_is_nowhere(self, tmp_path: Path) -> None:
        (tmp_path / "keyless").mkdir()
        (tmp_path / "keyless/__init__.py").write_text(
            "from scratch_det.config.choices import BACKBONES, Choice\n"
            "def add():\n"
            "    BACKBONES['keyless'] = Choice('keyless:Net', ('MODEL.KEYLESS.NORM', 'MODEL.RESNETS.NORM'))\n"
        )
        message = r"the Choice 'keyless' of a project lists MODEL\.KEYLESS\.NORM, expected keys (.|\n)*PROJECT_KEYS"
        with restored_registries():
            load_project(tmp_path / "keyless")
            with pytest.raises(ConfigError, match=message):
                load_config(MODEL)

    @pytest.mark.parametrize(
        ("name", "message"), [("my.net", "is no name for a Python package"), ("json", "has the same name; rename")]
    )
    def test_a_name_that_is_none_or_taken(self, tmp_path: Path, name: str, message: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("def add(): pass\n")
        with pytest.raises(UserError, match=message):
            load_project(tmp_path / name)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_pooling_of_resnets_is_torchs_bit_for_bit(kind: torch.dtype) -> None:
    """Ties included: most values of a ReLU are zero."""
    maps = torch.randn(2, 32, 37, 50, generator=torch.Generator().manual_seed(0)).relu().to(kind)
    found = []
    for pool in (StemPool(), nn.MaxPool2d(3, 2, 1)):
        leaf = maps.clone().requires_grad_()
        pooled = pool(leaf)
        (pooled * torch.arange(pooled.shape[-1])).sum().backward()
        assert leaf.grad is not None
        found.append((pooled, leaf.grad))
    assert all(ours.equal(theirs) for ours, theirs in zip(*found, strict=True))
