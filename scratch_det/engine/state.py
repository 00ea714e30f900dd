"""The state of a training (model, optimizer, loss scaler): building it, distributing it over processes, saving it."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from copy import copy, deepcopy
from itertools import chain
from pkgutil import resolve_name
from typing import Any, NamedTuple, Protocol

import msgspec
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim.swa_utils import get_ema_multi_avg_fn

from scratch_det.config.choices import choice_of
from scratch_det.config.schedule import learning_rate
from scratch_det.distributed.group import Group
from scratch_det.engine.run_dir import Count, Seconds
from scratch_det.evaluation.metrics import EMA
from scratch_det.modeling.init import fill_alike
from scratch_det.modeling.norm import NORM_LAYERS
from scratch_det.weights.origin import AVERAGE
from scratch_det.weights.pixels import Pixels
from scratch_det.weights.read import require_numbers

MOMENTS = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")  # of torch's optimizers: as the parameter is


class Saved(msgspec.Struct):
    """The types in a ``state_dict``; ``window``: the loop adds it."""

    model: dict[str, Any]
    optimizer: dict[str, Any] | None
    scaler: dict[str, float]
    iteration: Count
    seconds: Seconds
    window: list[dict[str, float]] = []
    model_ema: dict[str, Any] | None = None


class TrainingBackend(Protocol):
    """The part of ``scratch_det.backends.Backend`` that training needs; all that classification implements."""

    def build(self, cfg: CfgNode) -> nn.Module: ...

    def losses(self, model: nn.Module, batch: list[dict[str, Any]]) -> dict[str, Tensor]: ...


class Size(NamedTuple):
    """Numbers in a model: parameters, trainable parameters, and all weights in a checkpoint (with buffers)."""

    parameters: int
    trainable: int
    weights: int


def size_of(model: nn.Module) -> Size:
    """The size of ``model``, which may be on the meta device."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    weights = sum(tensor.numel() for tensor in model.state_dict().values())
    return Size(sum(n for n, _ in counts), sum(n for n, trained in counts if trained), weights)


class State:
    """Model, optimizer, loss scaler, number of completed iterations and seconds spent on them.

    ema: with MODEL_EMA.ENABLED a second model, of moving averages of the model's parameters and buffers, else None.
    SOLVER.AMP.ENABLED means bfloat16 where the device supports it (no loss scaling needed), else float16 with scaling.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, device: torch.device):
        self.model, self.device = model, device
        self.parallel = model  # the module that the loop calls; see ``spread``
        self.ema = deepcopy(model).requires_grad_(False) if cfg.MODEL_EMA.ENABLED else None
        self.decay = cfg.MODEL_EMA.DECAY
        self.optimizer = build_optimizer(cfg, model)
        self.amp = cfg.SOLVER.AMP.ENABLED
        bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
        self.amp_type = torch.bfloat16 if bfloat16 else torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp and not bfloat16)
        self.traits = {"pixels": Pixels.of(cfg).as_dict(), "stride_in_1x1": cfg.MODEL.RESNETS.STRIDE_IN_1X1,
                       "classes": list(cfg.DATASETS.CLASS_NAMES)}  # fmt: skip
        self.iteration, self.seconds = 0, 0.0

    def spread(self, group: Group) -> None:
        """From now on train together with the other processes of ``group``, which hold the same weights."""
        # On GPUs DistributedDataParallel averages gradients while they are computed. It changes their order after its
        # first iteration, which changes the last digits of sums over three or more ranks. On the CPU a resumed run
        # has to be exact, so ``average_gradients`` sums in one fixed order there.
        if group.size > 1 and self.device.type == "cuda":
            # Only an evaluation needs equal buffers (BN's running statistics), and broadcasts them.
            self.parallel = DDP(self.model, broadcast_buffers=False, gradient_as_bucket_view=True)

    def average_gradients(self, group: Group) -> None:
        """Average the gradients over the processes, unless DistributedDataParallel did it already."""
        if group.size > 1 and self.parallel is self.model:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            means = group.mean(torch.cat([gradient.flatten() for gradient in gradients]))
            for gradient, mean in zip(gradients, means.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(mean.view_as(gradient))

    def evaluated(self) -> dict[str, nn.Module]:
        """What is evaluated, by what ends the names of its metrics."""
        return {"": self.model} | ({EMA: self.ema} if self.ema else {})

    def average_weights(self) -> None:
        """Take the weights after iteration ``self.iteration`` into the moving average, also after a skipped step.

        BN's running statistics are averaged as in d2go: those of the model do not suit other weights.

        In iteration n the share n / (n + 9) of the average stays, DECAY at most: TensorFlow's moving averages have
        (1 + n) / (10 + n). So nothing stays of the random weights, and little of the steps that follow them.
        """
        if self.ema:
            stays = min(self.decay, self.iteration / (self.iteration + 9))
            average, now = (
                [one for one in chain(model.parameters(), model.buffers()) if one.is_floating_point()]
                for model in (self.ema, self.model)
            )
            get_ema_multi_avg_fn(stays)(average, now, None)

    @contextmanager
    def forward(self, synchronize: bool = True) -> Iterator[None]:
        """Sets the precision of the forward pass; without ``synchronize`` gradients are only summed in this process.

        With gradient accumulation the ranks exchange gradients once per iteration, in the last micro-batch.
        """
        model = self.parallel
        local = model.no_sync() if isinstance(model, DDP) and not synchronize else nullcontext()
        with local, torch.autocast(self.device.type, dtype=self.amp_type, enabled=self.amp):
            yield

    def state_dict(self) -> dict[str, Any]:
        """Tensors on the CPU and plain numbers; ``iteration`` is the last completed one, 0-based as in detectron2.

        No random state: the random numbers of an iteration depend only on SEED and the iteration.
        """
        copies = on_cpu({
            "model": self.model.state_dict(),
            **({AVERAGE: self.ema.state_dict()} if self.ema else {}),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "iteration": self.iteration - 1,
            "seconds": self.seconds,
            **self.traits,
        })  # fmt: skip
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # once, for all copies
        return copies

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a ``state_dict``; an optimizer whose state it lacks starts empty, an average with the weights.

        Raises UserError, ValueError, KeyError or RuntimeError for one of another model or optimizer, or damaged.
        """
        require_numbers(state["model"], "the model")
        self.model.load_state_dict(state["model"])
        if self.ema:
            require_numbers(averaged := state.get(AVERAGE) or state["model"], "the average")
            self.ema.load_state_dict(averaged)
        if state["optimizer"]:
            own, saved = self.optimizer.state_dict()["param_groups"], state["optimizer"]
            if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in own]:
                raise ValueError("its optimizer has other groups of parameters")
            names = {parameter: name for name, parameter in self.model.named_parameters()}
            parameters = dict(enumerate(one for group in self.optimizer.param_groups for one in group["params"]))
            for number, moments in saved["state"].items():
                parameter = parameters[number]
                for moment in (name for name in MOMENTS if moments.get(name) is not None):
                    what, found = f"{moment} of {names[parameter]}", moments[moment]
                    require_numbers({what: found}, "the optimizer")
                    if found.shape != parameter.shape:  # a fused optimizer would read past its end
                        raise ValueError(f"{what} is {tuple(found.shape)}, expected {tuple(parameter.shape)}")
                    moments[moment] = torch.empty_like(parameter).copy_(found)  # such a one reads the weight's layout
            self.optimizer.load_state_dict({"state": saved["state"], "param_groups": own})
        if state["scaler"]:  # empty without loss scaling: bfloat16 or float32
            self.scaler.load_state_dict(state["scaler"])
        self.iteration, self.seconds = state["iteration"] + 1, state["seconds"]


def on_cpu(value: Any) -> Any:
    """``value`` with every tensor of its dictionaries on the CPU; copies from a GPU may still be under way."""
    if isinstance(value, dict):
        copies = copy(value)  # the model's has attributes, too
        copies.update({name: on_cpu(one) for name, one in value.items()})
        return copies
    return value.to("cpu", non_blocking=value.is_cuda) if isinstance(value, Tensor) else value


def build_state(cfg: CfgNode, backend: TrainingBackend, device: torch.device, init_std: float | None = None) -> State:
    """The model with weights initialised from SEED, on its device, with its optimizer and loss scaler.

    init_std: draw all weights from one normal distribution, see ``fill_alike``.
    """
    if cfg.FLOAT32_PRECISION:
        torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    torch.manual_seed(max(cfg.SEED, 0))
    model = backend.build(cfg)
    if init_std is not None:
        fill_alike(model, init_std)
    model.to(device)
    if cfg.MODEL.CHANNELS_LAST:
        model.to(memory_format=torch.channels_last)
    if cfg.MODEL.COMPILE:
        getattr(model, "backbone", model).compile(dynamic=True)
    return State(cfg, model, device)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer of the trainable parameters; ``lr_factor`` of a group multiplies the learning rate."""
    return resolve_name(choice_of(cfg, "SOLVER.OPTIMIZER").function)(cfg, model)


def build_sgd(cfg: CfgNode, model: nn.Module) -> torch.optim.SGD:
    """SGD with Detectron's parameter groups."""
    keys = {"lr": cfg.SOLVER.BASE_LR, "momentum": cfg.SOLVER.MOMENTUM, "nesterov": cfg.SOLVER.NESTEROV}
    # fused, one pass over the weights: 4 ms instead of 10 (foreach: 13) for ResNet-18 on two CPU cores
    return torch.optim.SGD(parameter_groups(cfg, model), **keys, fused=True)


def parameter_groups(
    cfg: CfgNode, model: nn.Module, without: Collection[nn.Parameter] = frozenset()
) -> list[dict[str, Any]]:
    """The trainable parameters of ``model``, some left out, grouped by learning-rate factor and weight decay.

    As in detectron2: WEIGHT_DECAY_NORM for the parameters of normalisation layers; then, for every parameter called
    "bias" (also in norms), BIAS_LR_FACTOR and, unless it is None, WEIGHT_DECAY_BIAS. Detectron used 0, 2 and 0.
    """
    solver, seen = cfg.SOLVER, set(without)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for module in model.modules():
        is_norm = isinstance(module, NORM_LAYERS)
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            decay = (
                solver.WEIGHT_DECAY_NORM if is_norm and solver.WEIGHT_DECAY_NORM is not None else solver.WEIGHT_DECAY
            )
            factor = 1.0
            if name == "bias":
                decay = decay if solver.WEIGHT_DECAY_BIAS is None else solver.WEIGHT_DECAY_BIAS
                factor = solver.BIAS_LR_FACTOR
            groups.setdefault((factor, decay), []).append(parameter)
    return [{"params": params, "lr_factor": f, "weight_decay": decay} for (f, decay), params in groups.items()]


def set_learning_rate(optimizer: torch.optim.Optimizer, cfg: CfgNode, iteration: int) -> float:
    """Set every group's rate: the rate of ``iteration`` times the group's factor; returns the rate without factor."""
    lr = learning_rate(cfg, iteration)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
    return lr


def clip_gradients(cfg: CfgNode, model: nn.Module) -> None:
    """Apply SOLVER.CLIP_GRADIENTS to each parameter separately, as detectron2 does: by value, or by its norm."""
    keys = cfg.SOLVER.CLIP_GRADIENTS
    for parameter in model.parameters():
        if parameter.grad is not None and keys.CLIP_TYPE == "value":
            nn.utils.clip_grad_value_(parameter, keys.CLIP_VALUE)
        elif parameter.grad is not None:
            nn.utils.clip_grad_norm_(parameter, keys.CLIP_VALUE, keys.NORM_TYPE)
