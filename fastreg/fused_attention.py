"""Self-attention without mask or dropout: torch's fused forward, and two backward passes that recompute the softmax.

Nothing of the size of the scores is stored. :mod:`fastreg.attention` has the general form.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastreg.kernels import attention_backward, attention_double_backward

_LIMIT = 4096


def fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the fused form serves these operands, ``[B, H, T, E]`` each.

    Beyond 4096 tokens one head's scores leave the cache of any CPU, and the general form is no slower.
    """
    same = query.shape == key.shape == value.shape and query.dtype == key.dtype == value.dtype
    cpu = query.device.type == "cpu" and query.dtype in (torch.float32, torch.float64)
    cpu = cpu and not torch.is_autocast_enabled("cpu")
    return same and cpu and query.dim() == 4 and 0 < query.shape[2] <= _LIMIT and query.numel() > 0


class FusedAttention(Function):
    """``softmax(scale q k^T) v`` for ``[B, H, T, E]``; the arguments are those of the general form."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        ctx.scale, ctx.causal = scale, causal
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, lse)
        return out

    @staticmethod
    def backward(ctx, d: Tensor | None):
        if d is None:
            return (None,) * 5
        return *FusedAttentionBackward.apply(d, *ctx.saved_tensors, ctx.scale, ctx.causal), None, None


class FusedAttentionBackward(Function):
    """The backward of :class:`FusedAttention`, differentiable once more by hand."""

    @staticmethod
    def forward(ctx, d: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, scale: float, causal: bool):
        ctx.scale, ctx.causal = scale, causal
        ctx.save_for_backward(d, q, k, v, lse)
        return attention_backward(q, k, v, lse, d, scale, causal)

    @staticmethod
    @once_differentiable
    def backward(ctx, vq: Tensor, vk: Tensor, vv: Tensor):
        d, q, k, v, lse = ctx.saved_tensors
        return *attention_double_backward(q, k, v, lse, d, vq, vk, vv, ctx.scale, ctx.causal), None, None, None

