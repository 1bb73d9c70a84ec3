"""Softmax attention to second order: the softmax is recomputed from its log-sum-exp, so nothing of its size is kept.

Three ops share this folder: they are one function and its derivatives. Letters: B samples, H heads of queries in J
groups that share a head of keys, T queries, U keys, E features of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastreg.errors import FastregError
from fastreg.kernels._checks import accumulator, check_dtype, check_floats, check_shape, check_untracked
from fastreg.kernels._launch import implementation
from fastreg.kernels._registry import Op
from fastreg.kernels.attention import examples, native, reference
from fastreg.kernels.attention.pattern import SCHEMA, Pattern

# Features of a head that the Triton kernels have tiles for.
_WIDEST = 256


def _too_wide(q: Tensor, *_rest: object) -> str | None:
    return f"it takes heads of at most {_WIDEST} features, not {q.shape[3]}" if q.shape[3] > _WIDEST else None


FORWARD = Op(
    name="attention_forward",
    schema=f"(Tensor q, Tensor k, Tensor v, {SCHEMA}) -> (Tensor, Tensor)",
    reference=reference.attention_forward,
    examples=examples.examples_forward,
    implementations=(implementation("attention", "attention_forward", _too_wide), native.FORWARD),
)
BACKWARD = Op(
    name="attention_backward",
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor lse, Tensor d, {SCHEMA}) -> (Tensor, Tensor, Tensor)",
    reference=reference.attention_backward,
    examples=examples.examples_backward,
    implementations=(implementation("attention", "attention_backward", _too_wide), native.BACKWARD),
)
DOUBLE_BACKWARD = Op(
    name="attention_double_backward",
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor lse, Tensor d, Tensor vq, Tensor vk, Tensor vv, "
        f"{SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    reference=reference.attention_double_backward,
    examples=examples.examples_double,
    implementations=(implementation("attention", "attention_double_backward", _too_wide), native.DOUBLE_BACKWARD),
)


def attention_forward(q: Tensor, k: Tensor, v: Tensor, *pattern: Any) -> tuple[Tensor, Tensor]:
    r"""``O = (M P) V``, ``P = softmax(S)``, ``S = c Q K^T + mask``, and the log-sum-exp of each row of S.

    ``M`` is 1 without dropout; with dropout it is ``1 / (1 - p)`` where an entry is kept and 0 elsewhere. Whether
    entry (b, h, i, j) is kept depends on the seed and these four numbers alone, by Philox-4x32-10 of the counter
    ``(j, i, b H + h, 0)``: the same on any device and backend.

    Args:
        q: [B, H, T, E] float, H heads of B samples.
        k, v: [B, J, U, E], dtype of ``q``; J divides H, and head h of the queries has head ``h J // H`` of these.
        pattern: the fields of :class:`~fastreg.kernels.attention.pattern.Pattern`: which keys a query sees, scale,
            dropout.

    Returns:
        O [B, H, T, E] in the dtype of ``q``; lse [B, H, T] in float32, or float64 for float64. A query that sees no
        key has O = 0 and lse = +inf, and takes part in no derivative.

    Raises:
        FastregError: shapes or dtypes do not fit, dropout comes without seed, or an input requires grad.

    Source: Vaswani et al. 2017, arXiv:1706.03762; without storing P: Dao et al. 2022, arXiv:2205.14135; shared heads:
    Ainslie et al. 2023, arXiv:2305.13245; windows: Beltagy et al. 2020, arXiv:2004.05150; Philox: Salmon et al. 2011.

    Example:
        >>> import torch
        >>> from fastreg.kernels.attention import Pattern, attention_forward
        >>> x = torch.ones(1, 1, 2, 4)
        >>> out, lse = attention_forward(x, x, x, *Pattern(scale=0.5, right=0))
        >>> out.shape, (lse - 2).exp().round()
        (torch.Size([1, 1, 2, 4]), tensor([[[1., 2.]]]))
    """
    seen = Pattern(*pattern)
    _check("attention_forward", {"q": q}, {"k": k, "v": v}, None, seen)
    return FORWARD(q, k, v, *seen)


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, d: Tensor, *pattern: Any
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Gradients of the output of :func:`attention_forward` with respect to Q, K and V.

    ``dP = M (D V^T)``, ``dS = P (dP - rowsum(P dP))``, ``dQ = c dS K``, ``dK = c dS^T Q``, ``dV = (M P)^T D``.

    Args:
        q, k, v, pattern: as for :func:`attention_forward`.
        lse: [B, H, T], its second result.
        d: [B, H, T, E], the gradient of O.

    Returns:
        dq [B, H, T, E], dk, dv [B, J, U, E] in the dtype of ``q``; sums over the heads that share a head of keys.

    Raises:
        FastregError: as for :func:`attention_forward`.

    Source: Vaswani et al. 2017, arXiv:1706.03762; recomputation: Dao et al. 2022, arXiv:2205.14135.

    Example:
        >>> import torch
        >>> from fastreg.kernels.attention import Pattern, attention_backward
        >>> x = torch.zeros(1, 1, 2, 4)
        >>> [tuple(g.shape) for g in attention_backward(x, x, x, torch.full((1, 1, 2), 0.69), x, *Pattern(scale=0.5))]
        [(1, 1, 2, 4), (1, 1, 2, 4), (1, 1, 2, 4)]
    """
    seen = Pattern(*pattern)
    _check("attention_backward", {"q": q, "d": d}, {"k": k, "v": v}, lse, seen)
    return BACKWARD(q, k, v, lse, d, *seen)


def attention_double_backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, d: Tensor, vq: Tensor, vk: Tensor, vv: Tensor, *pattern: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Gradients of ``<vQ, dQ> + <vK, dK> + <vV, dV>`` of :func:`attention_backward` with respect to D, Q, K, V.

    With ``R = c (vQ K^T + Q vK^T)``, ``R -= rowsum(P R)``, ``Z = P M (D vV^T) + dS R``, ``Z -= P rowsum(Z)``:
    ``grad_D = (M P) vV + (M P R) V``, ``grad_V = (M P R)^T D``, ``grad_Q = c (Z K + dS vK)``,
    ``grad_K = c (Z^T Q + dS^T vQ)``. Derived here.

    Args:
        q, k, v, lse, d, pattern: as for :func:`attention_backward`.
        vq: [B, H, T, E], the gradient of dq.
        vk, vv: [B, J, U, E], the gradients of dk and dv.

    Returns:
        grad_d, grad_q [B, H, T, E], grad_k, grad_v [B, J, U, E] in the dtype of ``q``.

    Raises:
        FastregError: as for :func:`attention_forward`.

    Example:
        >>> import torch
        >>> from fastreg.kernels.attention import Pattern, attention_double_backward
        >>> x = torch.zeros(1, 1, 2, 4)
        >>> len(attention_double_backward(x, x, x, torch.full((1, 1, 2), 0.69), x, x, x, x, *Pattern(scale=0.5)))
        4
    """
    seen = Pattern(*pattern)
    _check("attention_double_backward", {"q": q, "d": d, "vq": vq}, {"k": k, "v": v, "vk": vk, "vv": vv}, lse, seen)
    return DOUBLE_BACKWARD(q, k, v, lse, d, vq, vk, vv, *seen)


def _check(
    function: str, queries: dict[str, Tensor], keys: dict[str, Tensor], lse: Tensor | None, pattern: Pattern
) -> None:
    """Operands that fit each other; lse and pattern that fit them."""
    check_floats(function, **queries, **keys)
    q, k = queries["q"], keys["k"]
    check_shape(function, "q", q, "[B, H, T, E]", (None, None, None, None))
    check_shape(function, "k", k, "[B, J, U, E]", (q.shape[0], None, None, q.shape[3]))
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise FastregError(
            f"{function}: k must be [B, J, U, E] with J a divisor of H = {q.shape[1]}, got {list(k.shape)} (every head "
            "of keys serves as many heads of queries)"
        )
    for name, tensor in queries.items():
        check_shape(function, name, tensor, "[B, H, T, E]", q.shape)
    for name, tensor in keys.items():
        check_shape(function, name, tensor, "[B, J, U, E]", k.shape)
    if lse is not None:
        check_shape(function, "lse", lse, "[B, H, T]", q.shape[:3])
        check_dtype(function, "lse", lse, accumulator(q.dtype))
    tracked = [t for t in (lse, pattern.mask) if t is not None]
    check_untracked(function, *queries.values(), *keys.values(), *tracked)
    _check_pattern(function, q, k, pattern)


def _check_pattern(function: str, q: Tensor, k: Tensor, pattern: Pattern) -> None:
    mask, spans, seed, *_, dropout = pattern
    if mask is not None:
        if mask.device != q.device or not (mask.dtype == torch.bool or mask.is_floating_point()):
            raise FastregError(
                f"{function}: mask must be bool or floating on {q.device}, got {mask.dtype} on {mask.device} (cast or "
                "move it)"
            )
        full = (*q.shape[:3], k.shape[2])
        shape = (None,) * 4 if mask.dim() != 4 else [1 if n == 1 else m for n, m in zip(mask.shape, full, strict=True)]
        check_shape(function, "mask", mask, "[B, H, T, U], each or 1", shape)
    if spans is not None:
        check_shape(function, "spans", spans, "[2, T]", (2, q.shape[2]))
        check_dtype(function, "spans", spans, torch.int32)
        check_shape(function, "k with spans", k, "[B, J, T, E]", (None, None, q.shape[2], None))
    if not 0 <= dropout <= 1 or (dropout > 0 and seed is None):
        raise FastregError(
            f"{function}: dropout must be a probability that comes with a seed, got {dropout} and {seed} (draw the "
            "seed with torch.randint)"
        )
    if seed is not None:
        check_shape(function, "seed", seed, "[1]", (1,))
        check_dtype(function, "seed", seed, torch.int64)
