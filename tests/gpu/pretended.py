"""A GPU without a GPU: tensors that say cuda:0 and hold their values on the CPU.

``Card`` is such a tensor. torch takes it for one of CUDA's: it dispatches and casts (autocast) as for a GPU. ``OnCard``
answers every operator: it computes on the CPU, and
  - refuses what CUDA refuses: one operator on tensors of both devices, NumPy views,
  - counts ``waits``: operators whose result has to come to the CPU before the next one can be queued,
  - counts ``copies`` to the card that block, since they come from memory that is not pinned,
each with the lines of code that asked for it. What it cannot see: kernels (numbers, speed, memory), and NCCL.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode

CARD, CPU = torch.device("cuda", 0), torch.device("cpu")
WAITING = {  # the size of their result, or their result itself, is read by the CPU
    "_local_scalar_dense", "bincount", "equal", "is_nonzero", "masked_select", "nms", "nonzero", "repeat_interleave",
    "unique_consecutive", "unique_dim", "_unique2",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
TAKES_A_CPU_NUMBER = {"_fused_sgd_", "fill_", "index_fill", "index_fill_", "lerp_", "masked_fill", "masked_fill_"}
LIBRARIES = (
    "scratch_det",
    "torchvision",
    "detectron2",
    "torch.amp",
    "torch.nn",
    "torch.optim",
)  # whose lines are named
FOLDERS = tuple(f"{Path(spec.origin).parent}/" for spec in map(find_spec, LIBRARIES) if spec and spec.origin)


class MixedDevices(RuntimeError):
    """What CUDA would have refused."""


class Card(Tensor):
    """A tensor on cuda:0 whose values are ``values``, on the CPU."""

    values: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor) -> "Card":
        card = Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device=CARD,
        )  # fmt: skip
        card.values = values
        return card

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        raise MixedDevices(f"{func} outside of OnCard")

    def __repr__(self, **_: Any) -> str:
        return f"Card({self.values})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().cpu().__reduce_ex__(protocol)

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise MixedDevices("numpy() of a tensor on cuda:0")

    __array__ = numpy

    def unsqueeze_(self, dim: int) -> Tensor:  # a wrapper keeps its shape; detectron2's ImageList does this
        return self.unsqueeze(dim)

    def register_hook(self, hook: Callable[[Tensor], Tensor | None]) -> None:
        HOOKS[self.grad_fn, self.output_nr].append(hook)

    def backward(self, *_: Any, **__: Any) -> None:
        """The backward pass over torch's own graph. Its engine, in C++, would ask a driver for the GPU's streams."""
        with torch.no_grad():
            waiting = {self.grad_fn: {self.output_nr: torch.ones_like(self)}}
            while waiting:
                node = max(waiting, key=lambda node: node._sequence_nr())  # the one that was made last
                found = _gradients(node, waiting.pop(node))
                for (following, place), gradient in found:
                    if following is not None and gradient is not None:
                        slots = waiting.setdefault(following, {})
                        slots[place] = slots[place] + gradient if place in slots else gradient
        HOOKS.clear()


HOOKS: dict[tuple[Any, int], list[Callable]] = defaultdict(list)


def _gradients(node: Any, given: dict[int, Tensor]) -> Iterator[tuple[tuple[Any, int], Tensor | None]]:
    """The gradient for each node, and its output, that a node was made of; ``given``: those of its own outputs."""
    grads: list[Tensor | None] = []
    for place, output in enumerate(node._input_metadata):
        gradient = given.get(place)
        if gradient is None and isinstance(node, BackwardCFunction):
            gradient = torch.zeros(output.shape, dtype=output.dtype, device=output.device)
        if gradient is not None:
            if gradient.device != output.device:
                raise MixedDevices(f"{node} gets a gradient on {gradient.device}, expected {output.device}")
            gradient = gradient.sum_to_size(output.shape).to(output.dtype)
            for hook in HOOKS.get((node, place), ()):
                changed = hook(gradient)
                gradient = gradient if changed is None else changed
        grads.append(gradient)
    if isinstance(node, BackwardCFunction):  # written in Python: it has a gradient for every argument
        pairs = zip(_as_tuple(node.apply(*grads)), node.needs_input_grad, strict=False)
        return zip([edge for edge in node.next_functions if edge[0]], [one for one, used in pairs if used], strict=True)
    return zip(node.next_functions, _as_tuple(node(*grads)), strict=bool(node.next_functions))


def _as_tuple(found: Any) -> tuple[Tensor | None, ...]:
    return found if isinstance(found, tuple) else (found,)


class OnCard(TorchDispatchMode):
    """Answers all operators of its block; ``waits`` and ``copies`` are counted by what they are and who asked."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.pinned: dict[int, Tensor] = {}  # by address; kept, so that no other tensor has it

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # its import takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.partition("::")[2]
        tensors = _tensors([args, list(kwargs.values())])
        has_card = any(isinstance(tensor, Card) for tensor in tensors)
        kwargs.pop("pin_memory", None)
        asked = kwargs.get("device")
        device = torch.device(asked) if asked is not None else CARD if has_card else CPU
        if asked is not None:
            kwargs["device"] = CPU
        if name in ("pin_memory", "_pin_memory"):
            copy = args[0].clone()
            self.pinned[copy.untyped_storage().data_ptr()] = copy
            return copy
        if name in ("_to_copy", "copy_"):
            self.copied(name, device, args, kwargs)
        elif name in INDEXING and has_card:
            self.indexed(name, args)
        elif has_card:
            self.refuse_mixed(func, name, tensors)
            if name in WAITING and kwargs.get("output_size") is None:  # which repeat_interleave would ask for
                self.waits[f"{name} {place()}"] += 1
        found = func(*_each(args, _values), **{key: _each(value, _values) for key, value in kwargs.items()})
        if (returned := _returned_argument(func)) is not None:
            return args[returned[0]] if returned[0] < len(args) else kwargs[returned[1]]
        return _each(found, _on_card) if device.type == "cuda" else found

    def copied(self, name: str, device: torch.device, args: tuple, kwargs: dict[str, Any]) -> None:
        """Count a copy from one device to the other."""
        source, goal = (args[0], device) if name == "_to_copy" else (args[1], args[0].device)
        is_late = kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,))
        is_pinned = not isinstance(source, Card) and source.untyped_storage().data_ptr() in self.pinned
        if isinstance(source, Card) and goal.type == "cpu" and not is_late:
            self.waits[f"copy to the CPU {place()}"] += 1
        elif not isinstance(source, Card) and goal.type == "cuda" and not (is_late and is_pinned):
            self.copies[f"{'not pinned' if is_late else 'blocking'} {place()}"] += 1

    def indexed(self, name: str, args: tuple) -> None:
        """Count what an index costs: a mask is counted on the card, an index from the CPU is copied."""
        if not isinstance(args[0], Card):
            raise MixedDevices(f"{name} of a CPU tensor by one on the card, at {place()}")
        values = args[2] if len(args) > 2 else None
        if values is not None and not isinstance(values, Card) and values.dim():
            raise MixedDevices(f"{name} of a tensor on the card with values on the CPU, at {place()}")
        indices = [one for one in args[1] if one is not None]
        self.copies.update(f"index {place()}" for one in indices if not isinstance(one, Card))
        if values is None or values.numel() != 1:  # with one value it is a masked fill
            self.waits.update(f"mask as index {place()}" for one in indices if one.dtype in (torch.bool, torch.uint8))

    def refuse_mixed(self, func: Any, name: str, tensors: list[Tensor]) -> None:
        """Raise MixedDevices unless all are on the card, but for single numbers where CUDA takes these."""
        others = [tensor for tensor in tensors if not isinstance(tensor, Card)]
        takes_numbers = torch.Tag.pointwise in func.tags or name in TAKES_A_CPU_NUMBER
        if others and not (takes_numbers and all(tensor.dim() == 0 for tensor in others)):
            raise MixedDevices(f"{name} of tensors on both devices, at {place()}")

    def clear(self) -> None:
        """Begin to count anew."""
        self.waits.clear()
        self.copies.clear()


@cache
def _returned_argument(func: Any) -> tuple[int, str] | None:
    """Place and name of the argument that an operator changes and returns; None when it returns something new."""
    is_old = any(one.alias_info and one.alias_info.is_write for one in func._schema.returns[:1])
    changed = [(place, one.name) for place, one in enumerate(func._schema.arguments)
               if one.alias_info and one.alias_info.is_write]  # fmt: skip
    return changed[0] if is_old else None


def _tensors(arguments: Any) -> list[Tensor]:
    if isinstance(arguments, list | tuple):
        return [tensor for one in arguments for tensor in _tensors(one)]
    return [arguments] if isinstance(arguments, Tensor) else []


def _each(arguments: Any, change: Callable[[Any], Any]) -> Any:
    """Lists and tuples of what ``change`` makes of their items: torch's tree_map takes most of the time of a run."""
    kind = type(arguments)
    return kind([_each(one, change) for one in arguments]) if kind in (list, tuple) else change(arguments)


def _values(one: Any) -> Any:
    return one.values if isinstance(one, Card) else one


def _on_card(one: Any) -> Any:
    return Card(one) if isinstance(one, Tensor) else one


def place() -> str:
    """The innermost line of a library or the project that is at work, and the innermost one of the project."""
    frame, lines = sys._getframe(1), []
    while frame:
        if frame.f_code.co_filename.startswith(FOLDERS):
            lines.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    own = [line for line in lines if line[0].startswith(FOLDERS[0])]
    named = dict.fromkeys([*lines[:1], *own[:1]])
    return " < ".join(f"{'/'.join(path.split('/')[-2:])}:{number}" for path, number in named) or "the test"


@contextmanager
def pretended_card(bfloat16: bool = True) -> Iterator[OnCard]:
    """In this block there is one card, which computes in bfloat16 or not."""
    torch._C._ensureCUDADeviceGuardSet()  # streams that do nothing; FakeTensorMode does this too
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_name": "a pretended card",
        "is_bf16_supported": bfloat16, "max_memory_allocated": 0, "current_stream": MagicMock(),
        "manual_seed_all": None, "set_device": None, "reset_peak_memory_stats": None, "_lazy_init": None,
    }  # fmt: skip
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, return_value=answer))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))  # its own operators have no kernel here
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # Module.to makes Cards of its parameters
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(0.5, device="cuda") is made here, then copied
        card = OnCard()
        stack.enter_context(patch("torch.cuda.synchronize", lambda *_: card.waits.update([f"synchronize {place()}"])))
        yield stack.enter_context(card)
