"""torch.compile's modules: left out where torchvision is imported, there when something asks for them."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from scratch_det.engine.state import SGD

IMPORT = """
import sys
from scratch_det.eager import without_compiler
with without_compiler():
    import torch, torchvision
    from torchvision.transforms.v2 import functional as F
assert not {"torch._dynamo", "torch._dynamo.utils", "sympy", "triton"} & sys.modules.keys()
"""


@pytest.mark.parametrize(
    "code",
    [
        IMPORT + "assert torchvision.ops.roi_align.__globals__['is_compile_supported']('meta') is False",
        IMPORT + "assert torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item() == 2",
        IMPORT + "assert torch._dynamo.config.suppress_errors is False",
        IMPORT + "with without_compiler():\n    import torch._dynamo\nassert 'torch._dynamo' not in sys.modules",
        IMPORT
        + "with without_compiler():\n    from torch._dynamo import config\nassert 'torch._dynamo' in sys.modules",
        "import torch._dynamo as real\n"
        + IMPORT.replace("assert not", "_ =")
        + "assert sys.modules[real.__name__] is real",
    ],
)
def test_the_compiler_is_there_when_it_is_used(code: str) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_sgd_is_torchs() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(5), torch.randn(4, 5)
    found = []
    for kind in (SGD, torch.optim.SGD):
        parameter = nn.Parameter(start.clone())
        optimizer = kind([parameter], lr=0.1, momentum=0.9, weight_decay=0.01, fused=True)
        for number, gradient in enumerate(gradients):
            optimizer.zero_grad()
            assert parameter.grad is None
            parameter.grad = gradient.clone()
            optimizer.step()
            if number == 1:
                optimizer.load_state_dict(optimizer.state_dict())
        assert not parameter.grad_fn
        found.append((parameter.detach(), optimizer.state_dict()["state"][0]["momentum_buffer"]))
    for own, theirs in zip(*found, strict=True):
        assert torch.equal(own, theirs)
