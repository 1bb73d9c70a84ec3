"""The ops that are derivatives, against autograd of what they differentiate, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastreg.kernels import (
    backend,
    gelu_double_backward,
    normalize,
    normalize_backward,
    normalize_double_backward,
)
from tolerances import Comparison, assert_all_close

EPS = 1e-3


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal float64 numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def composed(x: Tensor, center: bool) -> Tensor:
    """Row normalisation written with differentiable torch functions."""
    width = x.shape[1:]
    return F.layer_norm(x, width, eps=EPS) if center else F.rms_norm(x, width, eps=EPS)


@pytest.mark.parametrize("backend_name", ["reference", "native"])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("width", [1, 7, 64])
def test_normalize_to_second_order(backend_name: str, center: bool, width: int) -> None:
    x, g, v = (normal(5, width, seed=seed).requires_grad_(seed < 2) for seed in range(3))
    xhat = composed(x, center)
    (dx,) = torch.autograd.grad(xhat, x, g, create_graph=True)
    expected_g, expected_x = torch.autograd.grad(dx, (g, x), v)
    with torch.no_grad(), backend(backend_name):
        hat, rstd = normalize(x, EPS, center)
        first = normalize_backward(hat, rstd, g, center)
        grad_g, grad_x = normalize_double_backward(hat, rstd, g, v, center)
    unit = torch.ones(1, dtype=torch.float64)
    # One column normalises to zero: differences there are judged against numbers of order one.
    pairs = ((hat, xhat), (first, dx), (grad_g, expected_g), (grad_x, expected_x))
    with_unit = [[torch.cat([x.detach().flatten(), unit]) for x in pair] for pair in pairs]
    names = ("xhat", "dx", "grad_g", "grad_x")
    assert_all_close([Comparison(name, *pair) for name, pair in zip(names, with_unit, strict=True)])


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_double_backward_is_autograd_of_gelu(approximate: str) -> None:
    x = torch.linspace(-12, 12, 997, dtype=torch.float64).requires_grad_()
    d, v = normal(997, seed=1).requires_grad_(), normal(997, seed=2)
    (dx,) = torch.autograd.grad(F.gelu(x, approximate=approximate), x, d, create_graph=True)
    expected = torch.autograd.grad(dx, (d, x), v)
    with torch.no_grad():
        actual = gelu_double_backward(x, d, v, approximate == "tanh")
    pairs = zip(actual, expected, strict=True)
    assert_all_close([Comparison(f"output {i}", *pair) for i, pair in enumerate(pairs)])


@pytest.mark.parametrize("approximate", [True, False])
def test_native_gelu_is_a_few_roundings_from_exact_at_every_scale(approximate: bool) -> None:
    scales = torch.logspace(-30, 30, 601)
    x = torch.cat([torch.linspace(-40, 40, 200001), scales, -scales])
    one = torch.ones_like(x)
    with backend("native"):
        actual = gelu_double_backward(x, one, one, approximate)
    with backend("reference"):
        expected = gelu_double_backward(x.double(), one.double(), one.double(), approximate)
    # The float64 oracle itself overflows on the far scales, where the answer is 0 or 1.
    near = x.abs() < 1e6
    pairs = [(a[near], e[near]) for a, e in zip(actual, expected, strict=True)]
    assert_all_close([Comparison(f"output {i}", *pair) for i, pair in enumerate(pairs)])
    far = x > 1e6
    assert bool((actual[0][far] == 1).all())
    assert float(actual[1][far].abs().max()) < torch.finfo(torch.float32).eps
