"""The detectron2 backend, and proof that both backends are the same model."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from fvcore.common.config import CfgNode
from pycocotools import mask as mask_api
from run_folder import NO_TEST, interrupted_after, is_same, read
from samples import sample
from torch import nn

from scratch_det import backends
from scratch_det.backends.torchvision import model as torchvision_backend
from scratch_det.benchmark.loops import loop_against_plain_script
from scratch_det.benchmark.pairs import plan_training
from scratch_det.config import flatten, get_cfg, load_config
from scratch_det.config.choices import BACKBONES
from scratch_det.config.schedule import learning_rate
from scratch_det.conversion import agreement, convert_file
from scratch_det.data.catalog import lookup
from scratch_det.data.coco import read_coco
from scratch_det.data.dataset import TrainingSet, as_sample
from scratch_det.data.digits.make import make_digits
from scratch_det.data.image import read_image
from scratch_det.data.transforms import resize
from scratch_det.engine.optimizer import build_optimizer
from scratch_det.engine.plan import Request, start
from scratch_det.errors import ConfigError, UserError
from scratch_det.modeling.norm import NORM_LAYERS, SyncBatchNorm
from scratch_det.weights.convert import convert
from scratch_det.weights.names import Scheme, renamed
from scratch_det.weights.read import Weights

SMALL = ROOT / "configs/Digits/quickstart.yaml"
LEAVES = sorted(
    path for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name not in ("_base_", "Digits", "Pretraining")
)
R50 = ROOT / "configs/COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_3x_gn.yaml"
THREE = ("SOLVER.MAX_ITER", 3, "SOLVER.CHECKPOINT_PERIOD", 1, *NO_TEST)
KEYS = f"from .config import CfgNode\n_C = CfgNode.load_cfg({get_cfg().dump()!r})\n"
BROKEN = {  # files of a package called detectron2
    "an error in it": {"__init__.py": "raise ImportError('libcudart.so.99: cannot open')", "config/defaults.py": KEYS},
    "no compiled part": {"__init__.py": "", "config/defaults.py": KEYS},
    "another package": {"__init__.py": ""},
    "too old": {"__init__.py": "", "config/defaults.py": KEYS + "del _C.FLOAT32_PRECISION\n"},
}


@pytest.fixture
def config(small_model: list[str]) -> Callable[..., CfgNode]:
    """``config(KEY, VALUE, ...)``: the quickstart's Mask R-CNN made tiny, with ten classes."""
    return lambda *overrides: load_config(SMALL, [*small_model, "MODEL.ROI_HEADS.NUM_CLASSES", "10", *overrides]).cfg


class TestChoice:
    @pytest.mark.parametrize(("installed", "expected"), [(True, "detectron2"), (False, "torchvision")])
    def test_auto(self, installed: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backends, "is_installed", lambda name: installed or name == "torchvision")
        assert backends.choose("auto") == expected
        assert backends.choose("torchvision") == "torchvision"

    def test_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backends, "is_installed", lambda name: False)
        with pytest.raises(UserError) as refusal:
            backends.choose("detectron2")
        for words in ("not installed", backends.INSTALL_PAGE, backends.TESTED, "--backend torchvision"):
            assert words in str(refusal.value)

    @pytest.mark.parametrize("fault", BROKEN)
    def test_there_but_broken(self, fault: str, toy_recipe: Path, tmp_path: Path) -> None:
        """What failed is said once, and nothing is written."""
        for name, content in BROKEN[fault].items():
            file = tmp_path / "path/detectron2" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
        command = [sys.executable, ROOT / "tools/train_net.py", "--config-file", toy_recipe, "--backend", "detectron2"]
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'path'}:{ROOT}"}
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("error:") == 1
        assert "is installed, but does not work (" in done.stderr
        assert "--backend torchvision" in done.stderr
        assert not (tmp_path / "run").exists()

    def test_a_key_that_only_detectron2_has(self) -> None:
        with pytest.raises(ConfigError, match=r"MODEL\.RETINANET\.NUM_CONVS .*only --backend detectron2 has"):
            load_config(SMALL, ["MODEL.RETINANET.NUM_CONVS", 2])


@pytest.mark.detectron2
class TestKeys:
    def test_defaults_are_detectron2s_own_and_need_no_torch(self) -> None:
        code = "import sys; from scratch_det import backends; print(backends.defaults('detectron2').dump());"
        code += "assert 'torch' not in sys.modules"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        from detectron2.config import get_cfg as stock_cfg

        assert done.stdout.strip() == stock_cfg().dump().strip()

    def test_every_key_of_detectron2_works(self) -> None:
        defaults = backends.defaults("detectron2")
        assert load_config(SMALL, ["MODEL.RETINANET.NUM_CONVS", 2], defaults).cfg.MODEL.RETINANET.NUM_CONVS == 2
        assert flatten(get_cfg()).keys() < flatten(defaults).keys()

    def test_what_the_loop_does_not_have_is_refused(self) -> None:
        cfg = load_config(SMALL, ["INPUT.CROP.ENABLED", True, "MODEL.META_ARCHITECTURE", "PanopticFPN"]).cfg
        with pytest.raises(ConfigError, match=r"the detectron2 backend cannot honour(?s:.)*CROP(?s:.)*PanopticFPN"):
            backends.check_keys("detectron2", cfg)
        for leaf in (SMALL, *LEAVES):
            backends.check_keys("detectron2", load_config(leaf).cfg)


@pytest.mark.detectron2
class TestModel:
    def test_a_backbone_that_nobody_knows(self, config: Callable[..., CfgNode]) -> None:
        with pytest.raises(ConfigError, match=r"build_vgg_backbone, .* did you mean 'build_vgg16_backbone'"):
            backends.load("detectron2").build(config("MODEL.BACKBONE.NAME", "build_vgg_backbone"))

    @pytest.fixture
    def models(self, config: Callable[..., CfgNode]) -> Callable[..., dict[str, nn.Module]]:
        """The two backends' models of a recipe."""

        def build(*overrides: str) -> dict[str, nn.Module]:
            cfg = config(*overrides)
            return {name: backends.load(name).build(cfg) for name in backends.BACKENDS}

        return build

    @pytest.mark.parametrize("norm", ["GN", "BN", "SyncBN", "FrozenBN"])
    def test_norms_are_those_of_the_other_backend(self, norm: str, models: Callable) -> None:
        keys = [f"MODEL.{part}.NORM" for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")]
        kinds = {}
        for name, model in models(*(word for key in keys for word in (key, norm))).items():
            layers = {f"{layer}.weight": kind for layer, kind in _norms(model)}
            kinds[name] = _named_as_detectron2(layers, name)
        assert kinds["detectron2"] == kinds["torchvision"]
        assert set(kinds["detectron2"].values()) == {"SyncBatchNorm" if norm == "SyncBN" else _kind_of(norm)}
        assert len(kinds["detectron2"]) == 30  # 20 of the ResNet-18, 8 of the pyramid, one of each head

    def test_frozen_stages_are_those_of_the_other_backend(self, models: Callable) -> None:
        for freeze_at in range(6):
            frozen = {}
            for name, model in models("MODEL.BACKBONE.FREEZE_AT", str(freeze_at)).items():
                kept = {key: key for key, parameter in model.named_parameters() if not parameter.requires_grad}
                frozen[name] = set(_named_as_detectron2(kept, name))
            assert frozen["detectron2"] == frozen["torchvision"]
            assert bool(frozen["detectron2"]) == (freeze_at > 0)

    def test_initial_weights_are_as_wide_as_the_other_backends(self, models: Callable) -> None:
        """detectron2's own initialisation against the torchvision backend's table, layer by layer."""
        widths = {}
        for name, model in models("MODEL.FPN.NORM", "", "MODEL.ROI_BOX_HEAD.NUM_FC", "2").items():
            parameters = _named_as_detectron2(dict(model.named_parameters()), name)
            widths[name] = {key: (p.std().item(), p.numel()) for key, p in parameters.items() if p.numel() > 1}
        assert widths["detectron2"].keys() == widths["torchvision"].keys()
        for key, (std, count) in widths["detectron2"].items():
            assert std == pytest.approx(widths["torchvision"][key][0], rel=6 / math.sqrt(count), abs=1e-12), key

    @pytest.mark.parametrize("keys", [(), ("SOLVER.BIAS_LR_FACTOR", "2.0", "SOLVER.WEIGHT_DECAY_BIAS", "0.0")])
    def test_parameter_groups_are_those_of_detectron2_and_the_other_backend(
        self, keys: tuple[str, ...], models: Callable, config: Callable
    ) -> None:
        from detectron2.solver import build_optimizer as stock_optimizer

        from scratch_det.backends.detectron2.model import stock_cfg

        cfg, found = config(*keys), {}
        built = models(*keys)
        for name, model in built.items():
            groups = build_optimizer(cfg, model).param_groups
            named = {parameter: key for key, parameter in model.named_parameters()}
            settings = {
                named[parameter]: (group["lr_factor"] * cfg.SOLVER.BASE_LR, group["weight_decay"])
                for group in groups
                for parameter in group["params"]
            }
            found[name] = _named_as_detectron2(settings, name)
        named = {parameter: key for key, parameter in built["detectron2"].named_parameters()}
        stock = stock_optimizer(stock_cfg(cfg, "cpu"), built["detectron2"])
        expected = {
            named[parameter]: (group["lr"], group["weight_decay"])
            for group in stock.param_groups
            for parameter in group["params"]
        }
        assert found["detectron2"] == found["torchvision"] == expected

    def test_learning_rate_of_every_iteration_is_detectron2s(self, config: Callable) -> None:
        from detectron2.solver import build_lr_scheduler

        from scratch_det.backends.detectron2.model import stock_cfg

        cfg = config("SOLVER.MAX_ITER", "90", "SOLVER.STEPS", "(30, 70)", "SOLVER.WARMUP_ITERS", "20")
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
        scheduler, rates = build_lr_scheduler(stock_cfg(cfg, "cpu"), optimizer), []
        for _ in range(90):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert rates == pytest.approx([learning_rate(cfg, i) for i in range(90)], rel=1e-12)

    @pytest.mark.parametrize("masks", [True, False])
    @pytest.mark.parametrize("heads", ["StandardROIHeads", "CascadeROIHeads"])
    def test_an_overflow_gives_the_same_losses_as_not_finite(self, heads: str, masks: bool, config: Callable) -> None:
        """detectron2's RPN raises; the loop wants to tell all processes, which wait for these losses."""
        backend = backends.load("detectron2")
        cascade = ("MODEL.ROI_HEADS.NAME", heads, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", str("Cascade" in heads))
        model = backend.build(config(*cascade, "MODEL.MASK_ON", str(masks)))
        batch = [{key: value for key, value in sample().items() if masks or key != "masks"}]
        sound = backend.losses(model, batch)
        with torch.no_grad():
            model.proposal_generator.rpn_head.anchor_deltas.weight.fill_(math.inf)
        broken = backend.losses(model, batch)
        assert list(broken) == list(sound)
        assert all(loss.isnan() for loss in broken.values())
        sum(broken.values()).backward()

    def test_sync_bn_works_without_proposals_and_gpu(self, config: Callable) -> None:
        backend = backends.load("detectron2")
        model = backend.build(config("MODEL.ROI_BOX_HEAD.NORM", "SyncBN", "MODEL.ROI_MASK_HEAD.NORM", "SyncBN"))
        assert not [layer for layer in model.modules() if isinstance(layer, nn.SyncBatchNorm)]
        assert sum(isinstance(layer, SyncBatchNorm) for layer in model.modules()) == 2
        losses = backend.losses(model, [sample(objects=0)])
        assert all(loss.isfinite() for loss in losses.values())

    @pytest.mark.parametrize("path", LEAVES, ids=lambda path: path.stem)
    def test_stock_detectron2_builds_every_recipe(self, path: Path) -> None:
        from detectron2.config import get_cfg as stock_cfg
        from detectron2.modeling import build_model

        from scratch_det.backends.detectron2.model import register_backbones

        cfg = stock_cfg()
        cfg.merge_from_file(str(path))
        cfg.MODEL.DEVICE = "meta"
        ours = load_config(path).cfg
        if cfg.MODEL.BACKBONE.NAME in BACKBONES:
            register_backbones()  # the one thing that it lacks
        with torch.device("meta"):
            stock, own = build_model(cfg), torchvision_backend.build(ours)
        background = 0 if "Cascade" in cfg.MODEL.ROI_HEADS.NAME else 4 * (cfg.MODEL.ROI_BOX_HEAD.FC_DIM + 1)
        background += cfg.MODEL.ROI_MASK_HEAD.CONV_DIM + 1 if cfg.MODEL.MASK_ON else 0
        assert _count(stock) == _count(own) - background


@pytest.mark.detectron2
class TestRuns:
    def test_the_folder_says_who_built_the_model(self, train: Callable, capsys: pytest.CaptureFixture) -> None:
        folder = train(*NO_TEST, backend="detectron2")
        library = backends.library("detectron2")
        assert f"backend {library}" in capsys.readouterr().out.splitlines()[0]
        environment = read(folder, "environment.json")
        assert (environment["backend"], environment["library"]) == ("detectron2", library)
        assert read(folder, "result.json")["backend"] == "detectron2"

    def test_resumed_and_branched_bit_for_bit(self, train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
        use = {"backend": "detectron2"}
        whole = train(*THREE, name="whole", keep_at=(2,), **use)
        with interrupted_after(monkeypatch, 2):
            train(*THREE, name="halves", **use)
        assert is_same(train(*THREE, name="halves", resume=True, **use), whole)
        longer = ("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 1, *NO_TEST)
        branch = train(*longer, name="branch", branch_from=str(whole / "model_0000001.pth"), **use)
        assert is_same(branch, train(*longer, name="direct", **use))

    def test_resume_keeps_the_backend(self, train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
        """A requeued command goes on with the backend that began, whatever has been installed since."""
        whole = train(*THREE, name="whole", backend="torchvision")
        with interrupted_after(monkeypatch, 2):
            train(*THREE, name="halves", backend="torchvision")
        assert is_same(train(*THREE, name="halves", resume=True), whole)

    def test_two_processes(self, toy_recipe: Path, tmp_path: Path, datasets_root: Path) -> None:
        """With SyncBN, and from a checkpoint: on the CPU detectron2's own trainer starts one process only."""
        keys = ("MODEL.RESNETS.NORM", "SyncBN", "MODEL.FPN.NORM", "SyncBN", "MODEL.ROI_BOX_HEAD.NORM", "SyncBN",
                "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.MAX_ITER", 4, *NO_TEST)  # fmt: skip
        command = (sys.executable, ROOT / "tools/train_net.py", "--config-file", toy_recipe, "--backend", "detectron2",
                   "--num-gpus", 2, *keys)  # fmt: skip

        def run(name: str, *flags: Any) -> Path:
            words = [*command, *flags, "OUTPUT_DIR", tmp_path / name]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=environment)
            assert done.returncode == 0, done.stderr[-3000:]
            return tmp_path / name

        whole = run("whole")
        assert is_same(run("branch", "--branch-from", whole / "model_0000001.pth"), whole)

    def test_a_checkpoint_of_the_other_backend(self, train: Callable) -> None:
        """Recognised and named, with what to do, for weights and for --resume."""
        made = {name: train(*THREE, name=name, backend=name) for name in backends.BACKENDS}
        for other, name in (backends.BACKENDS, backends.BACKENDS[::-1]):
            file = made[other] / "checkpoints/model_final.pth"
            with pytest.raises(UserError, match=rf"is a {other} checkpoint, .*convert_checkpoint.py .* --to {name}"):
                train("MODEL.WEIGHTS", file, *NO_TEST, name="new", backend=name)
            (made[other] / "result.json").unlink()
            with pytest.raises(UserError, match=rf"of the {other} backend.* give --backend {other}"):
                train(*THREE, name=other, backend=name, resume=True)


@pytest.mark.detectron2
class TestStock:
    """detectron2 without this repository, on its recipes and weights."""

    @pytest.fixture
    def stock(self, toy_recipe: Path, tmp_path: Path, datasets_root: Path) -> CfgNode:
        from detectron2.config import get_cfg as stock_cfg
        from detectron2.data import DatasetCatalog, MetadataCatalog
        from detectron2.data.datasets import register_coco_instances

        cfg = stock_cfg()
        cfg.merge_from_file(str(toy_recipe))
        cfg.merge_from_list(["MODEL.ROI_HEADS.NUM_CLASSES", 3, "DATASETS.TEST", "()", "INPUT.MASK_FORMAT", "bitmask",
                             "OUTPUT_DIR", str(tmp_path / "stock")])  # fmt: skip
        folder = datasets_root / "toy_train"
        register_coco_instances("toy_train", {}, str(folder / "annotations.json"), str(folder / "images"))
        yield cfg
        DatasetCatalog.remove("toy_train")
        MetadataCatalog.pop("toy_train")

    def test_its_trainer_trains_our_recipe(self, stock: CfgNode) -> None:
        from detectron2.engine import DefaultTrainer

        Path(stock.OUTPUT_DIR).mkdir()
        trainer = DefaultTrainer(stock)
        trainer.resume_or_load(resume=False)
        trainer.train()
        assert (Path(stock.OUTPUT_DIR) / "model_final.pth").exists()

    def test_its_checkpointer_loads_our_checkpoint(self, stock: CfgNode, train: Callable) -> None:
        from detectron2.checkpoint import DetectionCheckpointer
        from detectron2.modeling import build_model

        keys = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)
        folder = train(*THREE, *keys, backend="detectron2")
        stock.merge_from_list(keys)
        theirs = build_model(stock)
        DetectionCheckpointer(theirs).load(str(folder / "checkpoints/model_final.pth"))
        backend = backends.load("detectron2")
        ours = backend.build(load_config(folder / "config.yaml", defaults=backends.defaults("detectron2")).cfg)
        ours.load_state_dict(torch.load(folder / "checkpoints/model_final.pth", weights_only=True)["model"])
        one, other = (backend.predict(model, [sample()])[0] for model in (ours, theirs))
        assert len(one["scores"]) > 0
        assert all(one[key].equal(other[key]) for key in ("boxes", "scores", "labels"))
        assert one["masks"] == other["masks"]


@pytest.mark.detectron2
class TestAgainstDetectron2:
    """The same recipe with the same weights gives the same numbers in both libraries."""

    SAMPLE_ALL = (  # every anchor and proposal is sampled, so that chance has no part in the losses
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "16384",
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "512",
        "MODEL.ROI_HEADS.POSITIVE_FRACTION", "0.5",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0",
    )  # fmt: skip

    @pytest.fixture(params=["R18 GN, ROIAlignV2, L1", "R50 BN, ROIAlign, smooth L1", "R18 GN, cascade", "VGG-16"])
    def pair(self, request: pytest.FixtureRequest, small_model: list[str]) -> tuple[nn.Module, nn.Module]:
        """Our model and detectron2's with the same weights, drawn wider than the start so that outputs differ."""
        from detectron2.config import get_cfg as stock_cfg
        from detectron2.modeling import build_model

        from scratch_det.backends.detectron2.model import register_backbones

        recipe, overrides = SMALL, [*small_model, *self.SAMPLE_ALL, "MODEL.ROI_HEADS.NUM_CLASSES", "10"]
        if request.param == "VGG-16":
            recipe = ROOT / "configs/Digits/vgg16.yaml"
            overrides += ["MODEL.ANCHOR_GENERATOR.SIZES", "[[8, 16, 32]]", "MODEL.ROI_BOX_HEAD.NUM_CONV", "0"]
            overrides += ["MODEL.ROI_BOX_HEAD.NUM_FC", "2"]
        if request.param.endswith("cascade"):
            overrides += ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"]
        if request.param.startswith("R50"):
            overrides += ["MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.RES2_OUT_CHANNELS", "256"]
            overrides += ["MODEL.RESNETS.STRIDE_IN_1X1", "True", "MODEL.ROI_BOX_HEAD.NORM", ""]
            overrides += ["MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "", "MODEL.ROI_MASK_HEAD.NORM", ""]
            overrides += ["MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlign", "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", "1.0"]
            overrides += ["MODEL.RPN.SMOOTH_L1_BETA", "0.1111", "MODEL.ROI_MASK_HEAD.NUM_CONV", "2"]
            overrides += ["MODEL.RPN.CONV_DIMS", "[-1, -1]"]
        torch.manual_seed(0)
        ours = torchvision_backend.build(load_config(recipe, overrides).cfg)
        for layer in ours.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 1.0  # take over the statistics of the next batch: without, evaluation overflows
        ours.train().backbone(ours.preprocess([sample(), sample(seed=1)]).tensors)
        cfg = stock_cfg()
        cfg.merge_from_file(str(recipe))
        cfg.merge_from_list(overrides)
        register_backbones()
        theirs = build_model(cfg)
        with torch.no_grad():
            for name, layer in ours.named_modules():
                if name.endswith(("cls_score", "mask_fcn_logits")):
                    layer.weight.normal_(std=0.03)
                elif name.endswith("bbox_pred"):  # which of them leave the image depends on the CPU if they go far
                    layer.weight.normal_(std=0.01)
        theirs.load_state_dict(_to_detectron2(ours))
        return ours, theirs

    @staticmethod
    def batch() -> list[dict[str, Any]]:
        from detectron2.structures import BitMasks, Boxes, Instances

        batch = [sample(64, 96, objects=3, scale=1.5), sample(80, 64, seed=1)]
        for one in batch:
            truth = Instances(one["image"].shape[-2:])
            truth.gt_boxes, truth.gt_classes = Boxes(one["boxes"]), one["labels"]
            truth.gt_masks = BitMasks(one["masks"])
            one["instances"] = truth
        return batch

    def test_backbone_and_rpn(self, pair: tuple[nn.Module, nn.Module]) -> None:
        ours, theirs = (model.eval() for model in pair)
        batch = self.batch()
        with torch.no_grad():
            images, their_images = ours.preprocess(batch).tensors, theirs.preprocess_image(batch).tensor
            torch.testing.assert_close(images, their_images)
            maps, their_maps = ours.backbone(images), theirs.backbone(images)
            logits, deltas = ours.rpn.head(list(maps.values()))
            their_logits, their_deltas = theirs.proposal_generator.rpn_head(list(their_maps.values()))
        assert len(maps) == len(their_maps)
        for found, expected in [
            *zip(maps.values(), their_maps.values(), strict=True),
            *zip(logits, their_logits, strict=True),
            *zip(deltas, their_deltas, strict=True),
        ]:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def test_heads(self, pair: tuple[nn.Module, nn.Module]) -> None:
        channels = pair[0].backbone.out_channels
        ours, theirs = (model.eval().roi_heads for model in pair)
        torch.manual_seed(0)
        pooled, mask_pooled = torch.randn(5, channels, 7, 7), torch.randn(5, channels, 14, 14)
        cascade = hasattr(ours, "stages")
        own = [stage.box_head for stage in ours.stages] if cascade else [ours.box_head]
        predictors = [stage.box_predictor for stage in ours.stages] if cascade else [ours.box_predictor]
        other = (
            list(zip(theirs.box_head, theirs.box_predictor, strict=True))
            if cascade
            else [(theirs.box_head, theirs.box_predictor)]
        )
        with torch.no_grad():
            for head, predictor, (their_head, their_predictor) in zip(own, predictors, other, strict=True):
                logits, deltas = predictor(head(pooled))
                their_logits, their_deltas = their_predictor(their_head(pooled))
                torch.testing.assert_close(logits.roll(-1, 1), their_logits, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(deltas if cascade else deltas[:, 4:], their_deltas, rtol=1e-4, atol=1e-4)
            if ours.has_mask():
                masks, expected = ours.mask_predictor(ours.mask_head(mask_pooled)), theirs.mask_head.layers(mask_pooled)
                torch.testing.assert_close(masks[:, 1:], expected, rtol=1e-4, atol=1e-4)

    def test_losses_and_gradients(self, pair: tuple[nn.Module, nn.Module]) -> None:
        from detectron2.utils.events import EventStorage

        ours, theirs = pair
        batch = self.batch()
        losses = torchvision_backend.losses(ours, batch)
        with EventStorage():
            expected = theirs.train()(batch)
        assert {n: loss.item() for n, loss in losses.items()} == pytest.approx(
            {n: loss.item() for n, loss in expected.items()}, rel=1e-4
        )
        sum(losses.values()).backward()
        sum(expected.values()).backward()
        body, their_body = (next(iter(own.parameters())) for own in (ours.backbone.body, theirs.backbone.bottom_up))
        assert F.cosine_similarity(body.grad.flatten(), their_body.grad.flatten(), dim=0) > 0.9999
        assert body.grad.norm().item() == pytest.approx(their_body.grad.norm().item(), rel=1e-3)

    def test_detections(self, pair: tuple[nn.Module, nn.Module]) -> None:
        ours, theirs = pair
        found = torchvision_backend.predict(ours, self.batch())
        with torch.no_grad():
            expected = [output["instances"] for output in theirs.eval()(self.batch())]
        for one, other in zip(found, expected, strict=True):
            assert len(one["scores"]) == 10
            torch.testing.assert_close(one["scores"], other.scores, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(one["boxes"], other.pred_boxes.tensor, rtol=1e-3, atol=1e-2)
            assert one["labels"].equal(other.pred_classes)
            if "masks" in one:
                masks = np.stack([mask_api.decode(rle) for rle in one["masks"]])
                assert (masks != other.pred_masks.numpy()).mean() < 1e-3

    @pytest.mark.slow
    def test_a_large_model_sees_the_same_in_photographs(self, tiny_coco: Path) -> None:
        """R50-FPN GN at 800 px; random weights, widened so that there is something to see."""
        cfg = load_config(R50, ["MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]).cfg
        torch.manual_seed(0)
        ours, theirs = (backends.load(name).build(cfg) for name in ("torchvision", "detectron2"))
        with torch.no_grad():
            for layer in (ours.roi_heads.box_predictor.cls_score, ours.roi_heads.box_predictor.bbox_pred,
                          ours.roi_heads.mask_predictor.mask_fcn_logits, ours.rpn.head.cls_logits,
                          ours.rpn.head.bbox_pred):  # fmt: skip
                layer.weight.mul_(10)
        theirs.load_state_dict(_to_detectron2(ours))
        for path in sorted((tiny_coco / "val2017").glob("*.jpg"))[:10]:
            one = resize(as_sample(read_image(path), "BGR"), 800, 1333)
            found = agreement(
                torchvision_backend.predict(ours, [one])[0], backends.load("detectron2").predict(theirs, [one])[0]
            )
            print(f"{path.name}: {found}")
            assert found.holds, path
            assert found.compared == 20


BITMASKS = ["INPUT.MASK_FORMAT", "bitmask"]  # the toy data set has masks that are no polygons
PLAIN = """
from detectron2.data import build_detection_train_loader
def do_train(cfg, model):
    model.train()
    for batch in build_detection_train_loader(cfg):
        with open({seen!r}, "a") as out:
            out.write(" ".join(str(one["image_id"]) for one in batch) + "\\n")
"""


@pytest.mark.detectron2
class TestPeers:
    """tools/benchmark.py peers, with a script of our own in the place of detectron2's."""

    def test_both_train_the_same_images(self, toy_recipe: Path, tmp_path: Path) -> None:
        from detectron2.data import DatasetCatalog, MetadataCatalog

        (tmp_path / "plain.py").write_text(PLAIN.format(seen=str(tmp_path / "seen")))
        plan = plan_training(str(toy_recipe), BITMASKS, 4, "detectron2")
        found = loop_against_plain_script(plan, 4, tmp_path / "plain.py")
        DatasetCatalog.remove("toy_train")
        MetadataCatalog.pop("toy_train")
        assert len(found.first) == len(found.second) == 4
        cfg = load_config(toy_recipe).cfg
        dataset = TrainingSet(cfg, [read_coco(lookup("toy_train"), need_masks=True)])
        expected = [" ".join(str(dataset.image_id(2 * i + k)) for k in range(2)) for i in range(5)] * 2
        assert (tmp_path / "seen").read_text().splitlines() == expected

    def test_no_script(self, toy_recipe: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"detectron2's script \S+nothing\.py is missing.*--script"):
            loop_against_plain_script(plan_training(str(toy_recipe), [], 4, "detectron2"), 4, tmp_path / "nothing.py")


@pytest.mark.detectron2
@pytest.mark.slow
@pytest.mark.parametrize("source", backends.BACKENDS)
def test_a_trained_detector_is_worth_as_much_with_the_other_backend(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    make_digits(tmp_path / "digits", seed=0, train=400, val=60)
    target = next(name for name in backends.BACKENDS if name != source)
    keys = ("SOLVER.MAX_ITER", "160", "SOLVER.STEPS", "(140,)", "SOLVER.WARMUP_ITERS", "20")
    start(Request(str(SMALL), [*keys, "OUTPUT_DIR", str(tmp_path / "run")], backend=source))
    convert_file(str(tmp_path / "run/checkpoints/model_final.pth"), tmp_path / "converted.pth", target)
    keys = ("MODEL.WEIGHTS", str(tmp_path / "converted.pth"), "OUTPUT_DIR", str(tmp_path / "other"))
    start(Request(str(SMALL), list(keys), backend=target, eval_only=True))
    before, after = read(tmp_path / "run", "result.json"), read(tmp_path / "other", "inference/result.json")
    for task in ("bbox", "segm"):
        assert before["metrics"][task]["AP"] > 0.5
        assert after["metrics"][task]["AP"] == pytest.approx(before["metrics"][task]["AP"], abs=0.1)


def _norms(model: nn.Module) -> list[tuple[str, str]]:
    """Names and kinds of the normalisation layers, FrozenBN's included."""
    frozen = [(n, "FrozenBatchNorm2d") for n, m in model.named_modules() if type(m).__name__ == "FrozenBatchNorm2d"]
    return frozen + [(n, type(m).__name__) for n, m in model.named_modules() if isinstance(m, NORM_LAYERS)]


def _kind_of(norm: str) -> str:
    return {"GN": "GroupNorm", "BN": "BatchNorm2d", "FrozenBN": "FrozenBatchNorm2d"}[norm]


def _named_as_detectron2(values: dict[str, Any], backend: str) -> dict[str, Any]:
    """The same values by detectron2's names; ``backend`` gave the names."""
    if backend == "detectron2":
        return values
    names = renamed(values, "torchvision", "detectron2")
    return {str(names[name]): value for name, value in values.items()}


def _to_detectron2(model: nn.Module) -> dict[str, torch.Tensor]:
    weights = Weights(Path("memory"), model.state_dict(), Scheme("torchvision", whole=True))
    return convert(weights, "detectron2").tensors


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
