"""Backward and double backward of softmax attention, the softmax recomputed from its log-sum-exp."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastreg.kernels._checks import check_floats, check_shape, check_untracked
from fastreg.kernels._examples import normal
from fastreg.kernels._registry import Op
from fastreg.kernels.attention import native, reference

_SHAPES = ((1, 1, 1, 1), (2, 1, 5, 3), (1, 3, 13, 16), (2, 2, 33, 40), (1, 1, 64, 64), (0, 2, 4, 8))


def examples_backward(dtype: torch.dtype, device: str) -> list[tuple[object, ...]]:
    """One query, odd lengths and widths, whole tiles, no head; causal and full."""
    return [(*tensors[:5], scale, causal) for *tensors, scale, causal in examples_double(dtype, device)]


def examples_double(dtype: torch.dtype, device: str) -> list[tuple[object, ...]]:
    """The same with three directions."""
    return [_example(dtype, device, shape, causal) for shape in _SHAPES for causal in (True, False)]


def _example(dtype: torch.dtype, device: str, shape: tuple[int, ...], causal: bool) -> tuple[object, ...]:
    draw, scale = normal(dtype, device), 1 / math.sqrt(shape[3])
    q, k, v, d, vq, vk, vv = (draw(*shape) for _ in range(7))
    scores = (q.double() @ k.double().mT) * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    lse = scores.logsumexp(3).to(torch.float64 if dtype == torch.float64 else torch.float32)
    return q, k, v, lse, d, vq, vk, vv, scale, causal


BACKWARD = Op(
    name="attention_backward",
    schema="(Tensor q, Tensor k, Tensor v, Tensor lse, Tensor d, float scale, bool causal) -> (Tensor, Tensor, Tensor)",
    reference=reference.attention_backward,
    examples=examples_backward,
    implementations=(native.BACKWARD,),
)
DOUBLE_BACKWARD = Op(
    name="attention_double_backward",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor lse, Tensor d, Tensor vq, Tensor vk, Tensor vv, float scale, "
        "bool causal) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    reference=reference.attention_double_backward,
    examples=examples_double,
    implementations=(native.DOUBLE_BACKWARD,),
)


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, d: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Gradients of ``O = P V``, ``P = softmax(c Q K^T)``, with respect to Q, K and V.

    ``dP = D V^T``, ``dS = P (dP - rowsum(P dP))``, ``dQ = c dS K``, ``dK = c dS^T Q``, ``dV = P^T D``.

    Args:
        q, k, v: [B, H, T, E] float, H heads of B samples.
        lse: [B, H, T] float32 or wider, the log-sum-exp of each row of ``c Q K^T``.
        d: [B, H, T, E], the gradient of O.
        scale: c.
        causal: whether row i sees columns 0 .. i only.

    Returns:
        dq, dk, dv [B, H, T, E] in the dtype of ``q``.

    Raises:
        FastregError: shapes or dtypes do not fit, or an input requires grad.

    Source: Vaswani et al. 2017, arXiv:1706.03762; recomputation: Dao et al. 2022, arXiv:2205.14135.

    Example:
        >>> import torch
        >>> from fastreg.kernels import attention_backward
        >>> x = torch.zeros(1, 1, 2, 4)
        >>> [tuple(g.shape) for g in attention_backward(x, x, x, torch.full((1, 1, 2), 0.69), x, 0.5, False)]
        [(1, 1, 2, 4), (1, 1, 2, 4), (1, 1, 2, 4)]
    """
    _check("attention_backward", lse, q=q, k=k, v=v, d=d)
    return BACKWARD(q, k, v, lse, d, scale, causal)


def attention_double_backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, d: Tensor, vq: Tensor, vk: Tensor, vv: Tensor, scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    r"""Gradients of ``<vQ, dQ> + <vK, dK> + <vV, dV>`` of :func:`attention_backward` with respect to D, Q, K, V.

    With ``R = c (vQ K^T + Q vK^T)``, ``R -= rowsum(P R)``, ``Z = P (D vV^T) + dS R``, ``Z -= P rowsum(Z)``:
    ``grad_D = P vV + (P R) V``, ``grad_V = (P R)^T D``, ``grad_Q = c (Z K + dS vK)``,
    ``grad_K = c (Z^T Q + dS^T vQ)``. Derived here.

    Args:
        q, k, v, lse, d, scale, causal: as for :func:`attention_backward`.
        vq, vk, vv: [B, H, T, E], the gradients of its results.

    Returns:
        grad_d, grad_q, grad_k, grad_v [B, H, T, E] in the dtype of ``q``.

    Raises:
        FastregError: shapes or dtypes do not fit, or an input requires grad.

    Example:
        >>> import torch
        >>> from fastreg.kernels import attention_double_backward
        >>> x = torch.zeros(1, 1, 2, 4)
        >>> len(attention_double_backward(x, x, x, torch.full((1, 1, 2), 0.69), x, x, x, x, 0.5, False))
        4
    """
    _check("attention_double_backward", lse, q=q, k=k, v=v, d=d, vq=vq, vk=vk, vv=vv)
    return DOUBLE_BACKWARD(q, k, v, lse, d, vq, vk, vv, scale, causal)


def _check(function: str, lse: Tensor, **tensors: Tensor) -> None:
    q = tensors["q"]
    check_untracked(function, lse, *tensors.values())
    check_floats(function, **tensors)
    check_shape(function, "q", q, "[B, H, T, E]", (None, None, None, None))
    for name, tensor in tensors.items():
        check_shape(function, name, tensor, "[B, H, T, E]", q.shape)
    check_shape(function, "lse", lse, "[B, H, T]", q.shape[:3])
