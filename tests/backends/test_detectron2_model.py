"""The detectron2 backend's models beside those of the torchvision backend."""

import math
from collections.abc import Callable
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from fvcore.common.config import CfgNode
from samples import sample
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from scratch_det import backends
from scratch_det.backends import torchvision as torchvision_backend
from scratch_det.config.load import load_config
from scratch_det.config.schedule import learning_rate
from scratch_det.engine.state import build_optimizer
from scratch_det.errors import ConfigError
from scratch_det.modeling.norm import NORM_LAYERS, SyncBatchNorm
from scratch_det.weights.names import renamed

SMALL = ROOT / "configs/Digits/quickstart.yaml"
LEAVES = sorted(
    path
    for path in (ROOT / "configs").glob("*/*.yaml")
    if path.parent.name not in ("_base_", "Digits", "Pretraining", "Torchvision")
)


def overflow_in_rank_1(rank: int, folder: Path, cfg: CfgNode) -> None:
    """One of two processes, as on two GPUs: DistributedDataParallel, and an iteration in which rank 1 overflows."""
    torch.set_num_threads(1)
    timeout = timedelta(seconds=60)  # of a rank that waits for one that has left
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timeout)
    backend = backends.load("detectron2")
    model = DistributedDataParallel(backend.build(cfg))
    if rank:
        with torch.no_grad():
            model.module.proposal_generator.rpn_head.anchor_deltas.weight.fill_(math.inf)
    losses = backend.losses(model, [sample(seed=rank)])
    sum(losses.values()).backward()
    total = sum(losses.values()).detach()
    dist.all_reduce(total)  # the loop's next collective
    trained = [one for one in model.module.backbone.parameters() if one.requires_grad]
    assert all(one.grad.isnan().any() for one in trained), "not the other rank's gradients"
    assert not total.isfinite()
    dist.destroy_process_group()


@pytest.fixture
def config(small_model: list[str]) -> Callable[..., CfgNode]:
    """``config(KEY, VALUE, ...)``: the quickstart's Mask R-CNN made tiny, with ten classes."""
    return lambda *overrides: load_config(SMALL, [*small_model, "MODEL.ROI_HEADS.NUM_CLASSES", "10", *overrides]).cfg


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

        from scratch_det.backends.detectron2 import stock_cfg

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

        from scratch_det.backends.detectron2 import stock_cfg

        cfg = config("SOLVER.MAX_ITER", "90", "SOLVER.STEPS", "(30, 70)", "SOLVER.WARMUP_ITERS", "20")
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
        scheduler, rates = build_lr_scheduler(stock_cfg(cfg, "cpu"), optimizer), []
        for _ in range(90):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert rates == pytest.approx([learning_rate(cfg, i) for i in range(90)], rel=1e-12)

    @pytest.mark.parametrize("broken_part", ["anchor_deltas", "box_predictor", ""])
    @pytest.mark.parametrize("masks", [True, False])
    @pytest.mark.parametrize("heads", ["StandardROIHeads", "CascadeROIHeads"])
    def test_an_overflow_gives_the_same_losses_as_not_finite(
        self, heads: str, masks: bool, broken_part: str, config: Callable
    ) -> None:
        """detectron2's RPN raises; the loop wants to tell all processes, which wait for these losses."""
        backend = backends.load("detectron2")
        cascade = ("MODEL.ROI_HEADS.NAME", heads, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", str("Cascade" in heads))
        model = backend.build(config(*cascade, "MODEL.MASK_ON", str(masks)))
        batch = [{key: value for key, value in sample().items() if masks or key != "masks"}]
        sound = backend.losses(model, batch)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if broken_part in name:
                    parameter.fill_(math.inf if broken_part == "anchor_deltas" else math.nan)
        broken = backend.losses(model, batch)
        assert list(broken) == list(sound)
        assert not sum(broken.values()).isfinite()
        sum(broken.values()).backward()

    @pytest.mark.parametrize("norm", ["GN", "SyncBN"])  # of the latter the heads, too, wait for the other process
    def test_an_overflow_in_one_of_two_processes_reaches_both(
        self, norm: str, config: Callable, tmp_path: Path
    ) -> None:
        norms = [(f"MODEL.{part}.NORM", norm) for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")]
        torch.multiprocessing.spawn(overflow_in_rank_1, (tmp_path, config(*chain(*norms))), nprocs=2)

    def test_sync_bn_works_without_proposals_and_gpu(self, config: Callable) -> None:
        backend = backends.load("detectron2")
        model = backend.build(config("MODEL.ROI_BOX_HEAD.NORM", "SyncBN", "MODEL.ROI_MASK_HEAD.NORM", "SyncBN"))
        assert not [layer for layer in model.modules() if isinstance(layer, nn.SyncBatchNorm)]
        assert sum(isinstance(layer, SyncBatchNorm) for layer in model.modules()) == 2
        losses = backend.losses(model, [sample(objects=0)])
        assert all(loss.isfinite() for loss in losses.values())

    def test_stock_detectron2_builds_every_recipe(self) -> None:
        from detectron2.config import get_cfg as stock_cfg
        from detectron2.modeling import build_model

        from scratch_det.backends.detectron2 import register_backbones

        register_backbones()  # VGG-16: the one thing that it lacks
        for path in LEAVES:
            cfg = stock_cfg()
            cfg.merge_from_file(str(path))
            cfg.MODEL.DEVICE = "meta"
            with torch.device("meta"):
                stock, own = build_model(cfg), torchvision_backend.build(load_config(path).cfg)
            background = 0 if "Cascade" in cfg.MODEL.ROI_HEADS.NAME else 4 * (cfg.MODEL.ROI_BOX_HEAD.FC_DIM + 1)
            background += cfg.MODEL.ROI_MASK_HEAD.CONV_DIM + 1 if cfg.MODEL.MASK_ON else 0
            assert _count(stock) == _count(own) - background, path


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


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
