"""torch.compile's modules, left out of a start: their import takes 1.2 s, and no run compiles anything.

torchvision imports ``torch._dynamo`` (with sympy, triton and sharded tensors) only to mark a function that is not to be
compiled, and to know later whether a device can compile; ``engine.state.SGD`` is torch's optimizer without such marks.
A model on the meta device marks functions too; detectron2's layers ask in their first step whether they are compiled.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
UTILS = f"{COMPILER}.utils"


class _StandIn(ModuleType):
    """Marks no function; whatever else is asked for, the real module does."""

    def disable(self, function: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
        return function

    def is_compile_supported(self, device: str) -> bool:
        return _real(UTILS).is_compile_supported(device)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system's questions, such as whether it is a package
            raise AttributeError(name)
        return getattr(_real(self.__name__), name)


@contextmanager
def without_compiler() -> Iterator[None]:
    """Imports, and models on the meta device, do without torch.compile's modules inside; a use of them imports them."""
    if COMPILER not in sys.modules:
        sys.modules.update({name: _StandIn(name) for name in (COMPILER, UTILS)})
    try:
        yield
    finally:
        _remove_stand_ins()


def _remove_stand_ins() -> None:
    for name in (COMPILER, UTILS):
        if isinstance(sys.modules.get(name), _StandIn):
            del sys.modules[name]


def _real(name: str) -> ModuleType:
    _remove_stand_ins()
    return import_module(name)
