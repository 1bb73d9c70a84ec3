"""The attention that recomputes its softmax, against finite differences and torch's own math backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastreg.fused_attention import FusedAttention, fits

SHAPES = [(1, 1, 1, 1), (2, 3, 5, 4), (1, 2, 33, 20)]


def heads(shape: tuple[int, ...], count: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for _ in range(count)]


@pytest.mark.parametrize("causal", [False, True])
def test_finite_differences(causal: bool) -> None:
    q, k, v = heads((2, 2, 4, 3), 3)
    assert gradcheck(lambda *x: FusedAttention.apply(*x, 0.6, causal), (q, k, v))
    assert gradgradcheck(lambda *x: FusedAttention.apply(*x, 0.6, causal), (q, k, v))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_second_derivatives_equal_the_math_backend(shape: tuple[int, ...], causal: bool) -> None:
    q, k, v = heads(shape, 3)
    weights = [t.detach() for t in heads(shape, 4)]

    def second(attend) -> list[Tensor]:
        out = attend(q, k, v)
        grads = torch.autograd.grad((out * out * weights[0]).sum(), (q, k, v), create_graph=True)
        return [out, *torch.autograd.grad(sum((g * w).sum() for g, w in zip(grads, weights[1:])), (q, k, v))]

    got = second(lambda *x: FusedAttention.apply(*x, shape[-1] ** -0.5, causal))
    with sdpa_kernel(SDPBackend.MATH):
        want = second(lambda *x: F.scaled_dot_product_attention(*x, is_causal=causal))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_heads_that_are_views_of_one_packed_tensor() -> None:
    packed = torch.randn(2, 7, 3, 4, 5, dtype=torch.float64, requires_grad=True)

    def second(attend) -> Tensor:
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        (grad,) = torch.autograd.grad(attend(q, k, v).square().sum(), packed, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), packed)[0]

    got = second(lambda *x: FusedAttention.apply(*x, 5**-0.5, True))
    with sdpa_kernel(SDPBackend.MATH):
        want = second(lambda *x: F.scaled_dot_product_attention(*x, is_causal=True))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_what_it_serves() -> None:
    q = torch.zeros(2, 3, 4, 5)
    assert fits(q, q, q)
    assert not fits(q, q[:, :1], q[:, :1])
    assert not fits(q.bfloat16(), q.bfloat16(), q.bfloat16())
    assert not fits(q[0], q[0], q[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert not fits(q, q, q)
