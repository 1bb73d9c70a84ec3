"""Triton forms of attention: forward, backward, double backward.

No tile of scores leaves a program: each is computed again from the log-sum-exp where it is needed, and so are the
random numbers of dropout. A program owns rows of one side and sums over the other in registers, so there are no
atomics, and memory is that of the operands and three numbers per query. Keys outside a window or a document are not
visited; a mask is read in tiles as it lies, by its strides.

In products of ``2 T U E`` operations per head (half of them if causal), forward: 2. Backward: 2 for ``rowsum(P dP)``,
then 3 for dQ, 3 for dK and 2 for dV, in all 10 or 5 times the forward; 5 products with the scores stored. Double
backward: 5 for the sums of rows, 5 for grad_D, 7 for grad_Q, 7 for grad_K and 4 for grad_V, in all 28 or 14 times the
forward; 12 with the scores stored. Two results in one program would save 1 and 6 of them, but two sums of 128 features
are half of all registers, and fewer rows per program cost more. A program has PART features of a result: wider heads
compute the pairs once for each part. Dropout adds ten rounds of Philox for each pair in every kernel, some sixty
integer operations: more than the products of a head of 64 features.

Memory traffic, below the L2 cache: each operand and result once for each kernel that has it. Above: a program reads all
rows of the other side, ``2 U E`` numbers in the forward and ``4 U E`` in the double backward for BLOCK_OWN queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fastreg.kernels._launch import launch
from fastreg.kernels._tiles import precision
from fastreg.kernels.attention.backward import attention_backward_kernel
from fastreg.kernels.attention.config import BACKWARD, DOUBLE, FORWARD, SUMS, Tiles
from fastreg.kernels.attention.double_backward import attention_double_backward_kernel
from fastreg.kernels.attention.forward import attention_forward_kernel
from fastreg.kernels.attention.pattern import Pattern, factor, threshold
from fastreg.kernels.attention.sums import attention_sums_kernel


@dataclass(frozen=True)
class _Call:
    """Shapes and pattern of a call: whatever its kernels share."""

    q: Tensor
    k: Tensor
    pattern: Pattern

    def run(
        self, kernel: Callable[..., None], tiles: Tiles, keys: bool, *tensors: Tensor | None, **meta: object
    ) -> None:
        """Launch a kernel whose programs own rows of the keys, or else of the queries."""
        own, other = (self.k, self.q) if keys else (self.q, self.k)
        width, tile = own.shape[3], tiles.of(own.dtype, own.shape[3], self._crowded())
        whole = max(16, triton.next_power_of_2(width))
        part = min(whole, tile.PART)
        blocks = own.shape[0] * own.shape[1] * triton.cdiv(own.shape[2], tile.BLOCK_OWN)
        launch(
            kernel, (blocks, triton.cdiv(width, part)), *tensors, own.shape[2], other.shape[2], self.pattern.scale,
            *self._window(keys), *self._mask(keys), *self._dropout(), KEYS=keys,
            GROUP=self.q.shape[1] // self.k.shape[1], **meta, E=width, BLOCK_OWN=tile.BLOCK_OWN,
            BLOCK_OTHER=tile.BLOCK_OTHER, BLOCK_E=part, DEPTH=min(whole, tile.DEPTH), PRECISION=precision(own.dtype),
            warps=tile.warps, stages=tile.stages,
        )  # fmt: skip

    def _crowded(self) -> bool:
        """Whether entries of the softmax need registers beside it."""
        mask = self.pattern.mask
        return self.pattern.dropout > 0 or (mask is not None and mask.dtype != torch.bool)

    def _window(self, keys: bool) -> tuple[int | Tensor | None, ...]:
        """Places back and ahead that a row sees, and the documents."""
        # Bounds beyond the other side's end say nothing: None costs nothing.
        left = self.pattern.left if 0 <= self.pattern.left < self.q.shape[2] else None
        right = self.pattern.right if 0 <= self.pattern.right < self.k.shape[2] else None
        spans = None if self.pattern.spans is None else self.pattern.spans.contiguous()
        return (right, left, spans) if keys else (left, right, spans)

    def _mask(self, keys: bool) -> tuple[int | Tensor | None, ...]:
        """The mask, the number of heads, and strides of samples, heads, own rows and others."""
        if self.pattern.mask is None:
            return (None,) * 6
        mask = self.pattern.mask.expand(*self.q.shape[:3], self.k.shape[2])
        at_sample, at_head, at_query, at_key = mask.stride()
        rows = (at_key, at_query) if keys else (at_query, at_key)
        return mask.view(torch.uint8) if mask.dtype == torch.bool else mask, self.q.shape[1], at_sample, at_head, *rows

    def _dropout(self) -> tuple[int | float | Tensor | None, ...]:
        """The seed, the threshold less 2^31, since numbers of 32 bits arrive with a sign, and the factor."""
        p = self.pattern.dropout
        return (self.pattern.seed, threshold(p) - 2**31, factor(p)) if p > 0 else (None,) * 3


def attention_forward(q: Tensor, k: Tensor, v: Tensor, *pattern: Any) -> tuple[Tensor, Tensor]:
    """``q [B, H, T, E], k, v [B, J, U, E] -> out [B, H, T, E], lse [B, H, T]``."""
    q, k, v = _contiguous(q, k, v)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    _Call(q, k, Pattern(*pattern)).run(attention_forward_kernel, FORWARD, False, q, k, v, out, lse)
    return out, lse


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, d: Tensor, *pattern: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """``q, d [B, H, T, E], k, v [B, J, U, E], lse [B, H, T]`` -> gradients of q, k, v."""
    q, k, v, lse, d = _contiguous(q, k, v, lse, d)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    delta, call = torch.empty_like(lse), _Call(q, k, Pattern(*pattern))
    call.run(attention_sums_kernel, SUMS, False, q, d, None, k, v, None, None, lse, delta, SUMS=1)
    call.run(attention_backward_kernel, BACKWARD, False, q, d, k, v, lse, delta, dq, None)
    for one in ((dk, None), (None, dv)):
        call.run(attention_backward_kernel, BACKWARD, True, k, v, q, d, lse, delta, *one)
    return dq, dk, dv


def attention_double_backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, d: Tensor, vq: Tensor, vk: Tensor, vv: Tensor, *pattern: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``q, d, vq [B, H, T, E], k, v, vk, vv [B, J, U, E], lse [B, H, T]`` -> gradients of d, q, k, v."""
    q, k, v, lse, d, vq, vk, vv = _contiguous(q, k, v, lse, d, vq, vk, vv)
    grad_d, grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (d, q, k, v))
    sums, call = lse.new_empty(*lse.shape[:2], 3, lse.shape[2]), _Call(q, k, Pattern(*pattern))
    call.run(attention_sums_kernel, SUMS, False, q, d, vq, k, v, vk, vv, lse, sums, SUMS=3)
    queries, keys = (q, d, vq, None), (k, v, vk, vv)
    for one in ((grad_q, None), (None, grad_d)):
        call.run(attention_double_backward_kernel, DOUBLE, False, *queries, *keys, lse, sums, *one)
    for one in ((grad_k, None), (None, grad_v)):
        call.run(attention_double_backward_kernel, DOUBLE, True, *keys, *queries, lse, sums, *one)
    return grad_d, grad_q, grad_k, grad_v


def typical(dtype: torch.dtype) -> dict[str, list[tuple[object, ...]]]:
    """Calls of transformers, by op; no memory behind them."""
    found: dict[str, list[tuple[object, ...]]] = {}
    for (samples, heads, length, shared, keys, width), pattern in _typical_patterns():
        q = torch.empty(samples, heads, length, width, dtype=dtype, device="meta")
        k = torch.empty(samples, shared, keys, width, dtype=dtype, device="meta")
        lse = q.new_empty(samples, heads, length, dtype=torch.float32)
        found.setdefault("attention_forward", []).append((q, k, k, *pattern))
        found.setdefault("attention_backward", []).append((q, k, k, lse, q, *pattern))
        found.setdefault("attention_double_backward", []).append((q, k, k, lse, q, q, k, k, *pattern))
    return found


def _typical_patterns() -> Iterator[tuple[tuple[int, ...], Pattern]]:
    """GPT-2 small; a large model; packed documents with biases and a window; images with wide heads, some padded."""
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    spans = torch.empty(2, 1024, dtype=torch.int32, device="meta")
    biases = torch.empty(1, 12, 1024, 1024, device="meta")
    padding = torch.empty(2, 1, 1, 576, dtype=torch.bool, device="meta")
    yield (8, 12, 1024, 12, 1024, 64), Pattern(seed=seed, right=0, dropout=0.1)
    yield (1, 32, 4096, 8, 4096, 128), Pattern(right=0)
    yield (8, 12, 1024, 12, 1024, 64), Pattern(mask=biases, spans=spans, left=256, right=0)
    yield (2, 8, 1000, 8, 576, 256), Pattern(mask=padding)


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [t.contiguous() for t in tensors]
