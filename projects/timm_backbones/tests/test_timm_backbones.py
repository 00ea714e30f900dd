"""timm's models as bodies: they train, resume exactly and evaluate in both backends; weights, AdamW, rejections."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import restored_registries
from fvcore.common.config import CfgNode
from run_folder import interrupted_after, is_same, read
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from scratch_det import backends
from scratch_det.analysis import analyze
from scratch_det.command_line import load_project
from scratch_det.config.load import load_config
from scratch_det.config.rules import check_config
from scratch_det.data.digits import make_digits
from scratch_det.engine.command import start
from scratch_det.engine.plan import Request
from scratch_det.engine.state import build_optimizer
from scratch_det.errors import ConfigError, UserError
from scratch_det.modeling.backbones import build_bottom_up
from scratch_det.study.experiments import of_place
from scratch_det.weights.load import load_weights
from scratch_det.weights.pixels import Pixels

timm = pytest.importorskip("timm", reason="timm is not installed: pip install --editable '.[timm]'")

PROJECT = Path(__file__).parents[1]
ROOT = PROJECT.parents[1]
RECIPES = sorted((PROJECT / "configs").glob("*.yaml"))
INSTALLED = [name for name in backends.BACKENDS if backends.is_installed(name)]
MODELS = {  # recipe, and the small model in the place of its own
    "convnext": ("MODEL.TIMM.NAME", "test_convnext", "MODEL.TIMM.DROP_PATH", "0.2", "SOLVER.LAYER_DECAY", "0.9"),
    "swin": ("MODEL.TIMM.NAME", "swin_of_tests", "MODEL.TIMM.DROP_PATH", "0.2"),
    "efficientnet": ("MODEL.TIMM.NAME", "test_efficientnet"),
}
FEW = ("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "SOLVER.WARMUP_ITERS", "1", "SOLVER.STEPS", "()",
       "SOLVER.CHECKPOINT_PERIOD", "1")  # fmt: skip


@timm.models.register_model
def swin_of_tests(pretrained: bool = False, **arguments: Any) -> nn.Module:
    small = {"embed_dim": 24, "depths": (1, 1, 1, 2), "num_heads": (1, 2, 4, 8)}
    return timm.models.swin_transformer.swin_tiny_patch4_window7_224(pretrained, **small, **arguments)


@pytest.fixture(autouse=True)
def project() -> Iterator[None]:
    with restored_registries():
        load_project(PROJECT)
        yield


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_digits(folder / "digits", seed=0, train=24, val=3)
    return folder


@pytest.fixture
def run(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """``run(model, name, KEY, VALUE, ..., **request)``: the run's folder."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(digits))

    def begin(model: str, name: str, *keys: Any, **request: Any) -> Path:
        words = [*MODELS[model], *FEW, *map(str, keys), "OUTPUT_DIR", str(tmp_path / name)]
        start(Request(str(PROJECT / f"configs/digits_{model}.yaml"), words, **request))
        return tmp_path / name

    return begin


def config(model: str, *keys: str, backend: str = "torchvision") -> CfgNode:
    path = PROJECT / f"configs/digits_{model}.yaml"
    return load_config(path, [*MODELS[model], *keys], backends.defaults(backend)).cfg


@pytest.mark.parametrize("backend", INSTALLED)
@pytest.mark.parametrize("iterations", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", MODELS)
def test_trains_resumes_and_evaluates(
    model: str, iterations: int, backend: str, run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ("SOLVER.MAX_ITER", iterations)
    whole = run(model, "whole", *keys, backend=backend)
    with interrupted_after(monkeypatch, iterations - 1):
        run(model, "halves", *keys, backend=backend)
    halves = run(model, "halves", *keys, backend=backend, resume=True)
    assert is_same(halves, whole)
    assert set(read(halves, "result.json")["metrics"]) == {"bbox", "segm"}


@pytest.mark.parametrize("backend", INSTALLED)
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_can_be_trained(path: Path, backend: str) -> None:
    cfg = load_config(path, (), backends.defaults(backend)).cfg
    check_config(cfg)
    backends.check_keys(backend, cfg)
    found = analyze(backends.load(backend), cfg, (256, 320))
    assert [found.maps[name][1] for name in ("res2", "res3", "res4", "res5")] == [4, 8, 16, 32]
    assert not found.frozen
    assert not found.unused
    assert any("Norm" in norm for norm in found.parts["bottom-up"].norms)
    with torch.device("meta"):
        build_optimizer(cfg, backends.load(backend).build(cfg))


class TestBody:
    @pytest.mark.parametrize("size", [(32, 32), (64, 160), (224, 224)])
    @pytest.mark.parametrize("model", MODELS)
    def test_maps_of_any_size(self, model: str, size: tuple[int, int]) -> None:
        body = build_bottom_up(config(model)).eval()
        maps = body(torch.randn(2, 3, *size))
        assert {name: tuple(one.shape) for name, one in maps.items()} == {
            name: (2, body.channels[name], size[0] // stride, size[1] // stride)
            for name, stride in body.strides.items()
        }

    def test_swin_shifts_its_windows_in_the_last_stage_too(self) -> None:
        """At 224 pixels, which it is made for, one window covers that stage; in larger images it does not."""
        last = build_bottom_up(config("swin")).net.model.layers[3].blocks[1]
        assert (last.window_size, last.shift_size) == ((7, 7), (3, 3))

    @pytest.mark.parametrize(
        ("norm", "kind"), [("BN", nn.BatchNorm2d), ("SyncBN", nn.BatchNorm2d), ("FrozenBN", FrozenBatchNorm2d)]
    )
    def test_norms_take_over_statistics_and_activation(self, norm: str, kind: type) -> None:
        torch.manual_seed(0)
        body, own = (
            build_bottom_up(config("efficientnet", "MODEL.TIMM.NORM", norm)),
            timm.create_model("test_efficientnet"),
        )
        assert type(body.net.model.bn1).__name__ == {"BN": "BatchNorm2d", "SyncBN": "SyncBatchNorm"}.get(
            norm, "FrozenBatchNorm2d"
        )
        assert isinstance(body.net.model.bn1, kind)
        own.bn1.running_mean += 1
        body.net.model.load_state_dict(own.state_dict(), strict=False)
        x = torch.randn(2, own.bn1.num_features, 4, 4)
        torch.testing.assert_close(body.eval().net.model.bn1(x), own.eval().bn1(x))

    def test_gn_and_frozen_stages(self) -> None:
        body = build_bottom_up(
            config(
                "efficientnet", "MODEL.TIMM.NAME", "resnet18", "MODEL.TIMM.NORM", "GN", "MODEL.BACKBONE.FREEZE_AT", "2"
            )
        )
        assert isinstance(body.net.model.bn1, nn.GroupNorm)
        names = {name.split(".")[2] for name, p in body.named_parameters() if not p.requires_grad}
        assert names == {"conv1", "bn1", "layer1"}

    def test_without_groups_of_layers_nothing_can_be_frozen(self) -> None:
        """timm's RDNet has no stages."""
        with torch.device("meta"):
            assert build_bottom_up(config("convnext", "MODEL.TIMM.NAME", "rdnet_tiny")).stages == []
            with pytest.raises(ConfigError, match="FREEZE_AT is 1, but build_timm_fpn_backbone has 0 stages"):
                build_bottom_up(config("convnext", "MODEL.TIMM.NAME", "rdnet_tiny", "MODEL.BACKBONE.FREEZE_AT", "1"))

    def test_a_tag_says_the_pixels_alone(self) -> None:
        bodies = []
        for name in ("mobilenetv3_small_050", "mobilenetv3_large_100", "mobilenetv3_large_100.miil_in21k_ft_in1k"):
            torch.manual_seed(0)
            bodies.append(build_bottom_up(config("efficientnet", "MODEL.TIMM.NAME", name)))
        assert all(p.equal(q) for p, q in zip(bodies[1].parameters(), bodies[2].parameters(), strict=True))
        assert [body.pixels.std[0] for body in bodies] == [58.395, 58.395, 255]


class TestWeights:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        torch.manual_seed(1)
        torch.save(timm.create_model("test_convnext").state_dict(), tmp_path / "convnext.pth")
        return tmp_path / "convnext.pth"

    @pytest.mark.parametrize("backend", INSTALLED)
    def test_all_of_the_body(self, backend: str, file: Path) -> None:
        cfg = config("convnext", backend=backend)
        model = backends.load(backend).build(cfg)
        said = load_weights(model, file, backend, cfg)
        body = next(module for module in model.modules() if type(module).__name__ == "TimmBottomUp")
        own, values = body.net.model.state_dict(), torch.load(file)
        assert f"{len(own)} of " in said
        assert "the backbone, from a classifier" in said
        assert all(value.equal(values[name]) for name, value in own.items() if name != "stem.0.weight")
        ratio = own["stem.0.weight"] / values["stem.0.weight"]  # test_convnext has pixels from -1 to 1
        torch.testing.assert_close(ratio, torch.tensor(cfg.MODEL.PIXEL_STD).view(1, 3, 1, 1).expand_as(ratio) / 127.5)

    def test_a_whole_detector_under_other_pixel_statistics(self, tmp_path: Path) -> None:
        """Its first layer is adapted as a classifier's is."""
        cfg = config("convnext")
        model = backends.load("torchvision").build(cfg)
        first = model.backbone.body.net.model.get_parameter("stem.0.weight")
        before, pixels = first.detach().clone(), Pixels.of(cfg)._replace(std=(127.5,) * 3)
        torch.save({"model": model.state_dict(), "pixels": pixels.as_dict()}, tmp_path / "whole.pth")
        assert "instead of 127.5 127.5 127.5" in load_weights(model, tmp_path / "whole.pth", "torchvision", cfg)
        torch.testing.assert_close(first.detach(), before * torch.tensor(cfg.MODEL.PIXEL_STD).view(1, 3, 1, 1) / 127.5)

    def test_of_another_model(self, file: Path) -> None:
        cfg = config("convnext", "MODEL.TIMM.NAME", "convnext_atto")
        model = backends.load("torchvision").build(cfg)
        with pytest.raises(
            UserError, match=r"does not fit the 124 tensors of the backbone: 27 missing.*97 of another shape"
        ):
            load_weights(model, file, "torchvision", cfg)

    def test_statistics_have_no_place_in_gn(self, tmp_path: Path) -> None:
        torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "resnet18.pth")
        cfg = config("efficientnet", "MODEL.TIMM.NAME", "resnet18", "MODEL.TIMM.NORM", "GN")
        with torch.device("meta"):
            model = backends.load("torchvision").build(cfg)
        with pytest.raises(UserError, match=r"40 without a place.*bn1\.running_mean\n.*these are BN's"):
            load_weights(model, tmp_path / "resnet18.pth", "torchvision", cfg)


class TestAdamW:
    def groups(self, *keys: str) -> tuple[nn.Module, dict[str, tuple[float, float]]]:
        cfg = config("swin", *keys)
        model = backends.load("torchvision").build(cfg)
        optimizer = build_optimizer(cfg, model)
        assert type(optimizer) is torch.optim.AdamW
        names = {parameter: name for name, parameter in model.named_parameters()}
        found = {names[p]: (g["lr_factor"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
        assert len(found) == sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
        return model, found

    def test_layers_learn_at_falling_rates(self) -> None:
        _, found = self.groups("SOLVER.LAYER_DECAY", "0.5")
        net = "backbone.body.net.model."
        rates = [found[net + name][0] for name in (
            "patch_embed.proj.weight", "layers.0.blocks.0.mlp.fc1.weight", "layers.3.blocks.1.mlp.fc1.weight"
        )]  # fmt: skip
        assert rates == [0.5**5, 0.5**4, 1.0]
        assert found["rpn.head.cls_logits.weight"] == (1.0, 0.05)

    def test_what_does_not_decay(self) -> None:
        _, found = self.groups()
        without = {name.rpartition(".")[2] for name, (_, decay) in found.items() if not decay}
        assert without == {"weight", "bias", "relative_position_bias_table"}
        assert all(decay == 0.05 for name, (_, decay) in found.items() if name.endswith(("fc1.weight", "qkv.weight")))
        assert all(decay == 0 for name, (_, decay) in found.items() if ".norm1." in name)


RESNET = ROOT / "configs/Digits/quickstart.yaml"
UNREAD = {
    "a body's keys": (("MODEL.TIMM.NORM", "BN", "MODEL.TIMM.NAME", "nonsense"), "MODEL.TIMM.NAME is 'nonsense', which"),
    "an optimizer's key": (("SOLVER.LAYER_DECAY", "0.9"), "LAYER_DECAY is 0.9, which SOLVER.OPTIMIZER SGD ignores"),
    "layers of another body": (
        ("SOLVER.OPTIMIZER", "AdamW", "SOLVER.LAYER_DECAY", "0.9"),
        "LAYER_DECAY is 0.9, which MODEL.BACKBONE.NAME build_resnet_fpn_backbone ignores",
    ),
}


def test_the_study_of_blood_cells() -> None:
    """Both initialisations with three numbers of images; frozen norms with all images only, and only with weights."""
    runs = {run.name: run for run in of_place("bccd") if run.seed is None}
    rows = {name.rsplit("_", 2)[0] for name in runs if "_tenth_" in name}
    assert rows == {"random", "imagenet", "random_own_rate"}
    assert {name for name in runs if "frozen" in name} == {f"imagenet_frozen_bn_all_{k}x" for k in (1, 3, 6)}
    for run in runs.values():
        cfg = load_config(run.config, run.changes).cfg
        check_config(cfg)
        assert run.per_x == run.iterations / run.k == cfg.SOLVER.MAX_ITER / run.k


@pytest.mark.parametrize("case", UNREAD)
def test_nothing_is_set_that_nobody_reads(case: str) -> None:
    keys, message = UNREAD[case]
    check_config(load_config(RESNET).cfg)
    with pytest.raises(ConfigError, match=message) as raised:
        check_config(load_config(RESNET, keys).cfg)
    assert len(str(raised.value).splitlines()) == keys.count("MODEL.TIMM.NORM") + 1


REFUSED = {
    "a name": ("convnext", ["MODEL.TIMM.NAME", "convnext_atoo"], "timm .* lacks; did you mean 'convnext_atto'"),
    "one stride": ("convnext", ["MODEL.TIMM.NAME", "test_vit"], r"strides \[16, 16, 16\]; FPN needs 4, 8, 16 and 32"),
    "one size": ("convnext", ["MODEL.TIMM.NAME", "hiera_tiny_224"], "no pyramid for images of any size"),
    "rounding": ("efficientnet", ["MODEL.TIMM.NAME", "inception_v3"], "no pyramid for images of any size .*it makes"),
    "no paths": ("efficientnet", ["MODEL.TIMM.NAME", "vgg16_bn", "MODEL.TIMM.DROP_PATH", "0.2"], "no paths to drop"),
    "GN": ("efficientnet", ["MODEL.TIMM.NORM", "GN"], "bn1 of test_efficientnet has 24 channels, no multiple of GN"),
    "no batch norm": ("convnext", ["MODEL.TIMM.NORM", "GN"], 'no batch norm to replace; set it to ""'),
    "no norm said": ("efficientnet", ["MODEL.TIMM.NORM", ""], "has 12 batch norms; set it to GN, SyncBN or BN"),
    "small batch": ("efficientnet", ["SOLVER.IMS_PER_BATCH", "2", "SOLVER.BASE_LR", "0.001"], "is BN with 2 images"),
    "dropped paths": ("convnext", ["MODEL.TIMM.DROP_PATH", "1.5"], "DROP_PATH is 1.5, expected a probability"),
    "no name": ("convnext", ["MODEL.TIMM.NAME", ""], "NAME is '', .*set MODEL.TIMM.NAME convnext_tiny"),
    "a tag": ("convnext", ["MODEL.TIMM.NAME", "test_convnext.r"], "leave out the tag; .* 'test_convnext.r160_in1k'"),
    "Nesterov": ("swin", ["SOLVER.NESTEROV", "True"], "NESTEROV is True, which SOLVER.OPTIMIZER AdamW does not have"),
    "layers' decay": ("swin", ["SOLVER.LAYER_DECAY", "1.5"], "a factor above 0 and at most 1"),
    "an optimizer": ("convnext", ["SOLVER.OPTIMIZER", "Adam"], "expected 'SGD' or 'AdamW'; did you mean 'AdamW'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_rejected(case: str, run: Callable[..., Path], tmp_path: Path) -> None:
    model, keys, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as raised:
        run(model, "run", *keys, backend="torchvision")
    assert len(str(raised.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_timm_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"needs timm, which is not installed; pip install --editable '\.\[timm\]'"):
        load_project(PROJECT)


def test_on_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "tools/train_net.py", "--config-file", str(PROJECT / "configs/digits_swin.yaml")]

    def end(*words: str) -> tuple[int, str]:
        done = subprocess.run(
            [*command, *words, "OUTPUT_DIR", str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True
        )
        return done.returncode, done.stderr

    code, said = end()
    assert (code, said.splitlines()[-1].partition("; ")[2]) == (2, f"give --project {PROJECT}")
    code, said = end("--project", "projects/timm_backbones", "MODEL.TIMM.NAMES", "swin_tiny")
    assert (code, said) == (2, "error: command line: unknown key MODEL.TIMM.NAMES; did you mean 'MODEL.TIMM.NAME'?\n")
    assert not list(tmp_path.iterdir())
