"""Parameter groups, the learning rate of an iteration, clipping; what is otherwise on a GPU."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import nn

from scratch_det.backends import torchvision as backend
from scratch_det.config.load import get_cfg, load_config
from scratch_det.config.rules import check_config
from scratch_det.engine import state as module
from scratch_det.engine.state import State, build_optimizer, build_state, clip_gradients, set_learning_rate
from scratch_det.errors import ConfigError

R50 = ROOT / "configs/COCO-InstanceSegmentation/scratch_mask_rcnn_R_50_FPN_3x_gn.yaml"


def test_momentum_follows_its_weight_into_another_layout(small_model: list[str]) -> None:
    """A run may be resumed with another MODEL.CHANNELS_LAST; the fused optimizer reads memory as it lies."""
    recipe, ends = ROOT / "configs/Digits/quickstart.yaml", []
    plain = [*small_model, "MODEL.ROI_HEADS.NUM_CLASSES", "10", "MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN",
             "MODEL.ROI_BOX_HEAD.NORM", "BN", "MODEL.ROI_MASK_HEAD.NORM", "BN"]  # fmt: skip

    def step(state: State, seed: int) -> None:
        torch.manual_seed(seed)
        for parameter in state.model.parameters():
            parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape))
        state.optimizer.step()

    for kind in ("False", "True"):
        first, second = (build_state(load_config(recipe, [*plain, "MODEL.CHANNELS_LAST", name]).cfg, backend,
                                     torch.device("cpu")) for name in ("False", kind))  # fmt: skip
        step(first, 1)
        second.load_state_dict(first.state_dict())
        step(second, 2)
        ends.append([parameter.detach() for parameter in second.model.parameters()])
    assert any(not one.is_contiguous() for one in ends[1])
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))


class TestOptimizer:
    def groups(self, *overrides: str) -> dict[tuple[float, float], tuple[int, int]]:
        """(factor on the rate, decay) -> (tensors, numbers) for the paper's R50 model."""
        cfg = load_config(R50, overrides).cfg
        with torch.device("meta"):
            model = backend.build(cfg)
        found = build_optimizer(cfg, model).param_groups
        sizes = {(g["lr_factor"], g["weight_decay"]): [p.numel() for p in g["params"]] for g in found}
        assert len(sizes) == len(found)
        return {group: (len(numbers), sum(numbers)) for group, numbers in sizes.items()}

    def test_groups_with_detectron2s_defaults(self) -> None:
        """Counted in detectron2: 85 tensors with decay, the 138 of the 69 norms without; plus background slots."""
        groups = self.groups("SOLVER.WEIGHT_DECAY_BIAS", "None", "SOLVER.BIAS_LR_FACTOR", "1.0")
        assert groups == {(1.0, 1e-4): (85, 45_649_840 + 4_357), (1.0, 0.0): (138, 61_312)}

    def test_groups_of_the_recipe_are_detectrons(self) -> None:
        groups = self.groups()
        unnormed = 3 + 1 + 2 + 2  # RPN, fc, box predictors, deconvolution and mask logits: weight and bias
        assert {group: tensors for group, (tensors, _) in groups.items()} == {
            (1.0, 1e-4): 85 - unnormed,
            (1.0, 0.0): 69,  # scales of the norms
            (2.0, 0.0): 69 + unnormed,
        }
        assert groups[1.0, 0.0] == (69, 61_312 // 2)

    def test_decay_of_norms_and_of_biases(self) -> None:
        overrides = (
            "SOLVER.WEIGHT_DECAY_NORM",
            "0.5",
            "SOLVER.WEIGHT_DECAY_BIAS",
            "0.25",
            "SOLVER.BIAS_LR_FACTOR",
            "1.0",
        )
        groups = self.groups(*overrides)
        assert groups[1.0, 0.5] == (69, 61_312 // 2)
        assert set(groups) == {(1.0, 1e-4), (1.0, 0.5), (1.0, 0.25)}

    def test_frozen_parameters_stay_out(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[0].requires_grad_(False)
        optimizer = build_optimizer(get_cfg(), model)
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
            id(p) for p in model[1].parameters()
        }

    def test_momentum_and_nesterov_reach_sgd(self) -> None:
        cfg = get_cfg()
        cfg.SOLVER.MOMENTUM, cfg.SOLVER.NESTEROV = 0.8, True
        (group,) = build_optimizer(cfg, nn.Linear(1, 1)).param_groups
        assert (group["momentum"], group["nesterov"]) == (0.8, True)

    @pytest.mark.parametrize(
        ("iteration", "rate"),
        [(0, 0.02 * 0.333333), (250, 0.02 * 0.6666665), (500, 0.02), (209_999, 0.02), (210_000, 0.002),
         (249_999, 0.002), (250_000, 0.0002), (269_999, 0.0002)],
    )  # fmt: skip
    def test_learning_rate(self, iteration: int, rate: float) -> None:
        cfg = load_config(R50).cfg
        optimizer = build_optimizer(cfg, nn.Linear(1, 1))
        assert set_learning_rate(optimizer, cfg, iteration) == pytest.approx(rate)
        assert {group["lr_factor"]: group["lr"] for group in optimizer.param_groups} == {
            1.0: pytest.approx(rate),
            2.0: pytest.approx(2 * rate),
        }

    @pytest.mark.parametrize(
        ("kind", "expected"),
        [("value", ([1.0, -1.0], [0.5])), ("norm", ([0.6, -0.8], [0.5]))],
    )
    def test_clipping_acts_on_each_parameter(self, kind: str, expected: tuple[list, list]) -> None:
        cfg = get_cfg()
        cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = kind
        model = nn.ParameterList([torch.zeros(2), torch.zeros(1), torch.zeros(1)])
        model[0].grad, model[1].grad = torch.tensor([3.0, -4.0]), torch.tensor([0.5])
        clip_gradients(cfg, model)
        torch.testing.assert_close(model[0].grad, torch.tensor(expected[0]))
        torch.testing.assert_close(model[1].grad, torch.tensor(expected[1]))
        assert model[2].grad is None


class TestOnGPU:
    """Functions of torch stand for a GPU."""

    @pytest.fixture
    def state(self, monkeypatch: pytest.MonkeyPatch) -> State:
        """That of a small model after one step, which says that it is on a GPU."""
        model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
        state = State(get_cfg(), model, torch.device("cpu"))
        model(torch.randn(2, 3, 4, 4)).sum().backward()
        state.optimizer.step()
        state.iteration, state.device = 1, torch.device("cuda")
        return state

    def test_a_checkpoint_waits_once(self, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
        copied: list[tuple[Any, ...]] = []
        move = torch.Tensor.to
        monkeypatch.setattr(torch.Tensor, "to", lambda *given, **how: (copied.append((*given, how)), move(*given))[1])
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: copied.append(("wait",)))
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        found = state.state_dict()
        *copies, last = copied
        assert last == ("wait",)
        assert all(how == {"non_blocking": True} and to == "cpu" for _, to, how in copies)
        tensors = [
            *state.model.state_dict().values(),
            *(one["momentum_buffer"] for one in state.optimizer.state.values()),
        ]
        assert len(copies) == len(tensors) == 11
        assert {one.data_ptr() for one, *_ in copies} == {one.data_ptr() for one in tensors}
        assert found["model"]._metadata == state.model.state_dict()._metadata  # versions of layers
        assert found["optimizer"]["param_groups"] == state.optimizer.state_dict()["param_groups"]

    @pytest.mark.parametrize(("processes", "device"), [(2, "cuda"), (2, "cpu"), (1, "cuda")])
    def test_gradients_are_exchanged_in_place_and_buffers_are_not(
        self, processes: int, device: str, state: State, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "DDP", lambda model, **how: (model, how))
        state.device = torch.device(device)
        state.spread(SimpleNamespace(size=processes))  # type: ignore[arg-type]
        how = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
        is_wrapped = processes > 1 and device == "cuda"
        assert state.parallel == ((state.model, how) if is_wrapped else state.model)


class TestLayoutAndCompilation:
    """Off by default; neither changes what is computed, but for rounding."""

    def losses(self, recipe: Path, *keys: object) -> tuple[State, list[float]]:
        cfg = load_config(recipe, ["MODEL.DEVICE", "cpu", "SEED", 3, "MODEL.RESNETS.NORM", "SyncBN", *keys]).cfg
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
        state = build_state(cfg, backend, torch.device("cpu"))
        torch.manual_seed(0)
        objects = {"boxes": torch.tensor([[4.0, 4, 40, 50]]), "labels": torch.tensor([1])}
        batch = [{"image": torch.randint(256, (3, 64, 96), dtype=torch.uint8), "height": 64, "width": 96, **objects}]
        cfg.MODEL.MASK_ON = False
        return state, [loss.item() for loss in backend.losses(state.model.train(), batch).values()]

    @pytest.mark.parametrize("key", ["MODEL.CHANNELS_LAST", "MODEL.COMPILE"])
    def test_the_same_losses(self, key: str, toy_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        compiled: list[object] = []
        monkeypatch.setattr(nn.Module, "compile", lambda module, **options: compiled.append((module, options)))
        keys = ("MODEL.MASK_ON", False)
        plain, expected = self.losses(toy_recipe, *keys)
        assert not compiled
        state, found = self.losses(toy_recipe, *keys, key, True)
        assert found == pytest.approx(expected, rel=1e-4)
        weight = state.model.backbone.body.layer1[0].conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == (key == "MODEL.CHANNELS_LAST")
        assert compiled == ([(state.model.backbone, {"dynamic": True})] if key == "MODEL.COMPILE" else [])
        assert list(state.model.state_dict()) == list(plain.model.state_dict())

    def test_channels_last_is_not_for_gn(self) -> None:
        cfg = load_config(R50, ["MODEL.CHANNELS_LAST", True]).cfg
        with pytest.raises(ConfigError, match=r"CHANNELS_LAST is True, but MODEL\.RESNETS\.NORM is GN"):
            check_config(cfg)
