"""Attention whose two backward passes recompute the softmax: nothing of the size of the scores is stored.

:mod:`fastreg.attention` has the form that returns the softmax and takes operands of any shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastreg.kernels import Pattern, attention_backward, attention_double_backward, attention_forward


def fits(query: Tensor, key: Tensor, value: Tensor, *, grouped: bool) -> bool:
    """Whether the fused form serves these operands: ``[B, H, T, E]``, and ``[B, J, U, E]`` twice.

    ``J = H``, or a divisor of H if heads are ``grouped``.
    """
    if query.dim() != 4 or key.dim() != 4 or key.shape != value.shape or 0 in (*query.shape, *key.shape):
        return False
    (samples, heads, _, width), (of_samples, shared, _, of_width) = query.shape, key.shape
    if query.device.type not in ("cpu", "cuda") or not query.dtype == key.dtype == value.dtype:
        return False
    return samples == of_samples and width == of_width and (heads == shared or (grouped and heads % shared == 0))


class FusedAttention(Function):
    """``attention_forward``, differentiable twice; its log-sum-exp carries no gradient."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *pattern: Any) -> tuple[Tensor, Tensor]:
        with torch.autocast(q.device.type, enabled=False):
            out, lse = attention_forward(q, k, v, *pattern)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(lse)
        _keep(ctx, pattern, q, k, v, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, d: Tensor | None, _of_lse: None) -> tuple[Tensor | None, ...]:
        if d is None:
            return (None,) * (3 + len(Pattern._fields))
        (q, k, v, lse), pattern = _kept(ctx)
        return *FusedAttentionBackward.apply(d, q, k, v, lse, *pattern), *(None,) * len(pattern)


class FusedAttentionBackward(Function):
    """The backward of :class:`FusedAttention`, differentiable once more by hand."""

    @staticmethod
    def forward(
        ctx: Any, d: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, *pattern: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        _keep(ctx, pattern, d, q, k, v, lse)
        with torch.autocast(q.device.type, enabled=False):
            return attention_backward(q, k, v, lse, d, *pattern)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, vq: Tensor, vk: Tensor, vv: Tensor) -> tuple[Tensor | None, ...]:
        (d, q, k, v, lse), pattern = _kept(ctx)
        with torch.autocast(q.device.type, enabled=False):
            grads = attention_double_backward(q, k, v, lse, d, vq, vk, vv, *pattern)
        return *grads, None, *(None,) * len(pattern)


def _keep(ctx: Any, pattern: tuple[Any, ...], *tensors: Tensor) -> None:
    mask, spans, seed, *numbers = pattern
    ctx.numbers = numbers
    ctx.save_for_backward(*tensors, mask, spans, seed)


def _kept(ctx: Any) -> tuple[tuple[Tensor, ...], Pattern]:
    *tensors, mask, spans, seed = ctx.saved_tensors
    return tuple(tensors), Pattern(mask, spans, seed, *ctx.numbers)
