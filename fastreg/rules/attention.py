"""``F.scaled_dot_product_attention``: no parameter, but torch's fused forms have no double backward."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreg.attention import Attention
from fastreg.errors import FastregError, UnsupportedOperation
from fastreg.fused_attention import FusedAttention, fits
from fastreg.kernels import Pattern
from fastreg.kernels._checks import accumulator
from fastreg.rules.activations import refuse_parameters
from fastreg.rules.registry import route
from fastreg.rules.tape import Tape

# Any 63 bits.
_SEEDS = 2**63 - 1


@route(F.scaled_dot_product_attention, always=True, second_order=True)
def scaled_dot_product_attention(
    tape: Tape,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention``."""
    refuse_parameters(tape, query, key, value, attn_mask)
    device = query.device.type
    if torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
        query, key, value = query.to(low), key.to(low), value.to(low)
    return attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The first result of :func:`attend`, without storing a softmax where that is possible.

    Left to the general form: operands of other than four dimensions or that broadcast against each other, values of
    another width than keys, several dtypes, devices that the ops are not made for, and nothing at all to compute.
    Dropout differs from that of the general form: it draws one seed from torch's generator of the device.
    """
    if not fits(query, key, value, grouped=enable_gqa) or (mask is not None and mask.dim() > 4):
        return attend(query, key, value, mask, dropout, is_causal, scale, enable_gqa)[0]
    _check_mask(mask, is_causal)
    seed = torch.randint(_SEEDS, (1,), device=query.device) if dropout > 0 else None
    pattern = Pattern(
        mask=None if mask is None else mask[(None,) * (4 - mask.dim())],
        seed=seed,
        scale=1 / math.sqrt(query.shape[-1]) if scale is None else scale,
        right=0 if is_causal else -1,
        dropout=dropout,
    )
    return FusedAttention.apply(query, key, value, *pattern)[0]


def _check_mask(mask: Tensor | None, is_causal: bool) -> None:
    if mask is not None and is_causal:
        raise FastregError("scaled_dot_product_attention: attn_mask must be None with is_causal=True, got a tensor")
    if mask is not None and mask.requires_grad:
        raise UnsupportedOperation("attn_mask requires grad; add it to the scores and take softmax and matmul yourself")


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Attention over any batch dimensions, differentiable twice.

    ``softmax(scale Q K^T + mask) V``, with ``scale = 1 / sqrt(E)`` unless it is given.

    Args:
        query: ``[*batch, L, E]``.
        key: ``[*batch, S, E]``; with ``enable_gqa`` the last batch dimension divides that of ``query``.
        value: ``[*batch, S, F]``, likewise.
        mask: ``[*, L, S]``, bool (True takes part) or float (added to the scores); it may not require grad.
        dropout: the probability of dropping an entry of the softmax.
        is_causal: whether query i sees keys 0 .. i only; excludes ``mask``.

    Returns:
        The output ``[*batch, L, F]``, zero for a query that may see no key, and the dropped softmax
        ``[*batch, L, S]`` in float32 or wider, which means nothing for such a query.

    Raises:
        UnsupportedOperation: ``mask`` requires grad.
        FastregError: both ``mask`` and ``is_causal`` are given, or the head counts do not divide.

    Source: Vaswani et al. 2017, arXiv:1706.03762; grouped queries: Ainslie et al. 2023, arXiv:2305.13245.

    Example:
        >>> x = torch.zeros(2, 4, 3, 5)
        >>> [tuple(t.shape) for t in attend(x, x, x, is_causal=True)]
        [(2, 4, 3, 5), (2, 4, 3, 3)]
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    mask, alive = _additive(mask, is_causal, query, key)
    batch, grouped = _batches(query, key, value, enable_gqa)
    length, keys = query.shape[-2], key.shape[-2]
    q = query.expand(*batch, -1, -1).reshape(math.prod(grouped), -1, query.shape[-1])
    k, v = (t.expand(*grouped, -1, -1).reshape(-1, *t.shape[-2:]) for t in (key, value))
    out, weights = Attention.apply(q, k, v, scale, mask, (*batch, length, keys), dropout)
    out = out.view(*batch, length, value.shape[-1])
    return out if alive is None else out * alive, weights.view(*batch, length, keys)


def _batches(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The batch shape of the output, and that of keys and values, whose heads may serve a group of queries each.

    The queries of a group follow each other in memory, so a group is one longer sequence of queries.
    """
    shapes = [tuple(t.shape[:-2]) for t in (query, key, value)]
    if not enable_gqa:
        batch = tuple(torch.broadcast_shapes(*shapes))
        return batch, batch
    if not all(shapes) or key.shape[-3] != value.shape[-3] or query.shape[-3] % key.shape[-3]:
        raise FastregError(
            "scaled_dot_product_attention: the heads of key and value must be equal and divide those of query, got "
            f"shapes {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)} (dimension -3 holds the heads)"
        )
    lead = tuple(torch.broadcast_shapes(*(shape[:-1] for shape in shapes)))
    return (*lead, query.shape[-3]), (*lead, key.shape[-3])


def _additive(
    mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The mask in its additive form, and zeros ``[*, L, 1]`` for queries that it leaves without any key.

    Such queries are unmasked, and their output is multiplied by zero: no NaN can arise in any derivative, and
    nothing of the size of the scores is read for it.
    """
    _check_mask(mask, is_causal)
    wide = accumulator(query.dtype)
    if is_causal:
        shape = query.shape[-2], key.shape[-2]
        return torch.full(shape, -math.inf, dtype=wide, device=query.device).triu_(1), None
    if mask is None:
        return None, None
    hidden = ~mask if mask.dtype == torch.bool else mask.isneginf()
    dead = hidden.all(-1, keepdim=True)
    additive = torch.zeros(mask.shape, dtype=wide, device=mask.device) if mask.dtype == torch.bool else mask.to(wide)
    return additive.masked_fill(hidden & ~dead, -math.inf).masked_fill(dead, 0), (~dead).to(query.dtype)
