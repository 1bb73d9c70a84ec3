"""C++ forms of attention's backward and double backward: one head at a time, in cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastreg.kernels import _native
from fastreg.kernels._registry import Implementation

_BACKWARD = _native.calls("attention_backward")
_DOUBLE_BACKWARD = _native.calls("attention_double_backward")


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, d: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``[B, H, T, E]`` each, ``lse [B, H, T]`` -> gradients of q, k, v."""
    return _call(_BACKWARD[q.dtype], (q, k, v, d), lse, 3, scale, causal)


def attention_double_backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, d: Tensor, vq: Tensor, vk: Tensor, vv: Tensor, scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``[B, H, T, E]`` each, ``lse [B, H, T]`` -> gradients of d, q, k, v."""
    return _call(_DOUBLE_BACKWARD[q.dtype], (q, k, v, d, vq, vk, vv), lse, 4, scale, causal)


def _call(
    function: Callable[..., None], operands: tuple[Tensor, ...], lse: Tensor, results: int, scale: float, causal: bool
) -> tuple[Tensor, ...]:
    # Heads are often views of one packed tensor: rows must be contiguous, the rest goes by strides.
    operands = tuple(t if t.stride(3) == 1 else t.contiguous() for t in operands)
    lse, shape = lse.contiguous(), operands[0].shape
    out = tuple(torch.empty(shape, dtype=lse.dtype) for _ in range(results))
    function(
        [(t.data_ptr(), *t.stride()[:3]) for t in operands], lse.data_ptr(), [t.data_ptr() for t in out], *shape,
        scale, causal, torch.get_num_threads(),
    )  # fmt: skip
    return out


BACKWARD = Implementation("native", attention_backward, _native.why_not)
DOUBLE_BACKWARD = Implementation("native", attention_double_backward, _native.why_not)
