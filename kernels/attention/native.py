"""C++ forms of attention's backward and double backward: one head at a time, in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreg.kernels import _native
from fastreg.kernels._registry import Implementation

_BACKWARD = _native.calls("attention_backward")
_DOUBLE_BACKWARD = _native.calls("attention_double_backward")


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, d: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``[N, T, E]`` each, ``lse [N, T]`` -> gradients of q, k, v."""
    taken = tuple(t.contiguous() for t in (q, k, v, lse, d))
    out = tuple(torch.empty_like(taken[0]) for _ in range(3))
    _BACKWARD[q.dtype](*(t.data_ptr() for t in (*taken, *out)), *q.shape, scale, causal, torch.get_num_threads())
    return out


def attention_double_backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, d: Tensor, vq: Tensor, vk: Tensor, vv: Tensor, scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``[N, T, E]`` each, ``lse [N, T]`` -> gradients of d, q, k, v."""
    taken = tuple(t.contiguous() for t in (q, k, v, lse, d, vq, vk, vv))
    out = tuple(torch.empty_like(taken[0]) for _ in range(4))
    _DOUBLE_BACKWARD[q.dtype](
        *(t.data_ptr() for t in (*taken, *out)), *q.shape, scale, causal, torch.get_num_threads()
    )
    return out


BACKWARD = Implementation("native", attention_backward, _native.why_not)
DOUBLE_BACKWARD = Implementation("native", attention_double_backward, _native.why_not)
