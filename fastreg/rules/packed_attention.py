"""``torch.nn.attention.varlen.varlen_attn``: documents packed one after the other, none of which sees another.

torch has no kernel for it on the CPU, and no double backward anywhere.
"""

from __future__ import annotations

import math

import torch
import torch.nn.attention.varlen  # Defines the operator.
from torch import Tensor

from fastreg.errors import FastregError, UnsupportedOperation
from fastreg.fused_attention import FusedAttention
from fastreg.kernels import Pattern
from fastreg.rules.activations import refuse_parameters
from fastreg.rules.registry import route
from fastreg.rules.tape import Tape


@route(torch.ops.torch_attn._varlen_attn, torch.ops.torch_attn._varlen_attn.default, always=True)
def varlen_attention(
    tape: Tape,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: list[int] | None = None,
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator beneath ``varlen_attn``, on ``[tokens, heads, E]``: output, log-sum-exp, and no random state.

    The tokens of a sample follow each other; a document may not reach from one sample into the next. As torch's own,
    the log-sum-exp carries no gradient.
    """
    refuse_parameters(tape, query, key, value)
    if seqused_k is not None or block_table is not None:
        raise UnsupportedOperation("seqused_k and block_table are for inference")
    if cu_seq_k is None or not cu_seq_q.is_set_to(cu_seq_k):
        raise UnsupportedOperation("cu_seq_q and cu_seq_k must be one tensor: queries and keys of the same documents")
    _check_documents(cu_seq_q, tape.session.micro_batches.rows_per_sample(query, "the query of varlen_attn"))
    left, right = (-1, -1) if window_size is None else window_size
    pattern = Pattern(
        spans=spans_of(cu_seq_q, query.shape[0]),
        scale=1 / math.sqrt(query.shape[-1]) if scale is None else scale,
        left=left,
        right=0 if is_causal else right,
    )
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
    out, lse = FusedAttention.apply(q, k, v, *pattern)
    return out.squeeze(0).transpose(0, 1), lse.squeeze(0), torch.zeros(2, dtype=torch.uint64, device=query.device)


def spans_of(cu_seq: Tensor, tokens: int) -> Tensor:
    """``[2, T]`` int32: where the document of each token begins and ends; empty beyond the last document.

    Args:
        cu_seq: ``[N + 1]``, ascending from 0: document n has the tokens ``cu_seq[n] .. cu_seq[n + 1] - 1``.
        tokens: T, at least ``cu_seq[N]``. Nothing is read on the host.

    Example:
        >>> spans_of(torch.tensor([0, 2, 3]), 4)
        tensor([[0, 0, 2, 3],
                [2, 2, 3, 3]], dtype=torch.int32)
    """
    token = torch.arange(tokens, device=cu_seq.device, dtype=cu_seq.dtype)
    document = torch.searchsorted(cu_seq[1:].contiguous(), token, right=True)
    ends = torch.cat((cu_seq[1:], cu_seq[-1:]))
    return torch.stack((cu_seq[document], ends[document])).to(torch.int32)


def _check_documents(cu_seq: Tensor, per_sample: int) -> None:
    """Refuse documents of two samples; on a GPU the host would have to wait for it, and does not."""
    if cu_seq.device.type != "cpu":
        return
    first, last = cu_seq[:-1], cu_seq[1:] - 1
    across = (first // per_sample != last // per_sample) & (first <= last)
    if across.any():
        document = int(across.nonzero()[0])
        raise FastregError(
            f"varlen_attn: cu_seq_q must end a document where a sample ends, every {per_sample} tokens, got document "
            f"{document} with tokens {int(first[document])} to {int(last[document])} (cut it there)"
        )
