"""Activations with a hand-written double backward: derivatives against finite differences and torch's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from fastreg.rules.activations import Gelu, Silu

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "gelu": (lambda x: Gelu.apply(x, "none"), F.gelu),
    "gelu_tanh": (lambda x: Gelu.apply(x, "tanh"), lambda x: F.gelu(x, approximate="tanh")),
    "silu": (Silu.apply, F.silu),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_against_finite_differences(name: str) -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(4, 7, dtype=torch.float64)).requires_grad_()
    assert gradcheck(ACTIVATIONS[name][0], x)
    assert gradgradcheck(ACTIVATIONS[name][0], x)


def derivatives(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, ...]:
    """Output, gradient, and the gradients of a functional of the gradient, for an expanded, strided cotangent."""
    d = torch.linspace(-2, 2, x.shape[0], dtype=x.dtype).requires_grad_()
    out = function(x)
    (gradient,) = torch.autograd.grad(out, x, d[:, None].expand_as(out), create_graph=True)
    return out, gradient, *torch.autograd.grad((gradient * gradient.detach().cos()).sum(), (d, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_not_less_accurate_than_torch(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours, torchs = ACTIVATIONS[name]
    x = (4 * torch.randn(37, 29)).to(dtype).t().requires_grad_()
    want = derivatives(torchs, x.detach().double().requires_grad_())
    reference = derivatives(torchs, x)
    got = derivatives(ours, x)
    # Each of the two gradients and the functional round once more.
    rounding = 4 * torch.finfo(dtype).eps
    for a, b, w in zip(got, reference, want, strict=True):
        scale = w.norm()
        assert (a.double() - w).norm() / scale < 2 * (b.double() - w).norm() / scale + rounding
