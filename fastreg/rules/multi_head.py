"""``F.multi_head_attention_forward``: routed projections around the attention that can be differentiated twice.

torch's function takes sequences first, whatever the module's ``batch_first``; the rule works batch first inside.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreg.errors import FastregError, UnsupportedOperation
from fastreg.rules.activations import refuse_parameters
from fastreg.rules.attention import attend, attention
from fastreg.rules.linear import linear
from fastreg.rules.registry import route
from fastreg.rules.tape import Tape


@route(F.multi_head_attention_forward, always=True)
def multi_head_attention_forward(
    tape: Tape,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``F.multi_head_attention_forward`` without added key and value tokens."""
    if add_zero_attn or any(t is not None for t in (bias_k, bias_v, static_k, static_v)):
        raise UnsupportedOperation("add_bias_kv, add_zero_attn, static_k and static_v have no rule")
    refuse_parameters(tape, query, key, value, attn_mask, key_padding_mask)
    _check_layout(tape, query, embed_dim_to_check, num_heads)
    # Those of the form in use are there.
    weights: Any = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else in_proj_weight
    q, k, v = _project(tape, (query, key, value), weights, in_proj_bias)
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    mask, causal = _merged_mask(q, k, attn_mask, key_padding_mask, is_causal)
    dropout = dropout_p if training else 0.0
    if need_weights:
        out, attended = attend(q, k, v, mask, dropout, causal)
    else:
        out = attention(q, k, v, mask, dropout, causal)
    out = linear(tape, out.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias).transpose(0, 1)
    if not need_weights:
        return out, None
    attended = attended.to(out.dtype)
    return out, attended.mean(1) if average_attn_weights else attended


def _check_layout(tape: Tape, query: Tensor, width: int, heads: int) -> None:
    if query.dim() != 3:
        raise UnsupportedOperation("an input without a batch dimension has no rule")
    if query.shape[1] % tape.samples:
        raise FastregError(
            f"multi_head_attention_forward: query must be [sequence, {tape.samples}, features] for a batch of "
            f"{tape.samples} samples, got {tuple(query.shape)} (build the attention or transformer module with "
            "batch_first=True and give it the batch first)"
        )
    if query.shape[2] != width or width % heads:
        raise FastregError(
            f"multi_head_attention_forward: query must have {width} features, a multiple of {heads} heads, got "
            f"{tuple(query.shape)}"
        )


def _project(
    tape: Tape,
    inputs: tuple[Tensor, Tensor, Tensor],
    weights: Tensor | tuple[Tensor, ...],
    bias: Tensor | None,
) -> tuple[Tensor, ...]:
    """q, k, v ``[B, L, E]``: one product for self-attention, else one per input with its part of the parameters."""
    query, key, value = inputs
    if isinstance(weights, Tensor):
        if query is key and key is value:
            return linear(tape, query.transpose(0, 1), weights, bias).chunk(3, -1)
        weights = _thirds(tape, weights)
    biases = (None, None, None) if bias is None else _thirds(tape, bias)
    return tuple(linear(tape, x.transpose(0, 1), w, b) for x, w, b in zip(inputs, weights, biases, strict=True))


def _thirds(tape: Tape, packed: Tensor) -> tuple[Tensor, ...]:
    """``packed.chunk(3)``, with lineages if ``packed`` is tracked."""
    parts, lineage = packed.chunk(3), tape.lineage(packed)
    if lineage is not None:
        for i, part in enumerate(parts):
            tape.derive(part, lineage, partial(_third, i), isometric=True)
    return parts


def _third(i: int, packed: Tensor) -> Tensor:
    return packed.chunk(3)[i]


def _merged_mask(
    q: Tensor, k: Tensor, attn_mask: Tensor | None, padding: Tensor | None, is_causal: bool
) -> tuple[Tensor | None, bool]:
    """Both masks as one ``[*, L, S]`` to be added to the scores, and whether the causal one stands for it."""
    if is_causal and attn_mask is None:
        raise FastregError(
            "multi_head_attention_forward: attn_mask must be given with is_causal=True, got None (is_causal is a hint "
            "about the mask; see nn.Transformer.generate_square_subsequent_mask)"
        )
    if is_causal and padding is None:
        return None, True
    merged = None
    if attn_mask is not None:
        merged = _added(attn_mask, q)
        if merged.dim() == 3:
            merged = merged.view(*q.shape[:2], *merged.shape[1:])
    if padding is not None:
        padding = _added(padding, q)[:, None, None]
        merged = padding if merged is None else merged + padding
    if merged is not None and merged.shape[-1] != k.shape[-2]:
        raise FastregError(
            f"multi_head_attention_forward: masks must cover {k.shape[-2]} keys, got {tuple(merged.shape)}"
        )
    return merged, False


def _added(mask: Tensor, q: Tensor) -> Tensor:
    """A mask of this function (True: hidden) in its additive form."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(mask, -math.inf)
