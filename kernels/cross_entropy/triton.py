"""Triton form of softmax cross entropy: a program owns whole rows, so sums stay inside it and repeat bit for bit.

A row is cut into blocks of classes. The first pass keeps every block's maximum and sum of exponentials; from these
the draw finds the one block in which the cumulative probability passes its random number, and reads that block
again. A second pass over the row runs backwards: what was read last is still in cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreg.kernels._launch import launch
from fastreg.kernels.cross_entropy import reference
from fastreg.kernels.cross_entropy.config import config

IGNORED = tl.constexpr(reference.IGNORED)


@triton.jit
def _judged(value, label, C):
    """``value``, 0 where the label is ignored, NaN where it names no class."""
    known = tl.where((label >= 0) & (label < C), value, float("nan"))
    return tl.where(label == IGNORED, 0.0, known)


@triton.jit
def _rows(R, ROWS: tl.constexpr):
    """The program's rows, int64, and which of them it owns: beyond the end it computes the last one again."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return tl.minimum(rows, R - 1), rows < R


@triton.jit
def _logits(z_ptr, at, mask):
    """Logits ``[ROWS, BLOCK]``, -inf beyond the mask."""
    return tl.load(z_ptr + at, mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def _softmax(z_ptr, at, mask, lse):
    """Probabilities ``[ROWS, BLOCK]``, 0 beyond the mask."""
    return tl.exp(_logits(z_ptr, at, mask) - lse[:, None])


@triton.jit
def _uniform(rows, seed, draw):
    """One number of 32 random bits per row, float64, inside (0, 1)."""
    counter = tl.zeros_like(rows) + draw
    bits, _, _, _ = tl.philox(
        seed, rows.to(tl.uint32), (rows >> 32).to(tl.uint32), counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    )
    return (bits.to(tl.float64) + 0.5) / 4294967296.0


@triton.jit
def _drawn(z_ptr, start, weights, highest, uniform, C, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """The first class at which the cumulative sum of exponentials exceeds its share ``uniform`` of the total."""
    parts = tl.arange(0, PARTS)[None, :]
    cumulative = tl.cumsum(weights.to(tl.float64), 1)  # [ROWS, PARTS]
    target = uniform * tl.max(cumulative, 1)
    part = tl.sum((cumulative <= target[:, None]).to(tl.int32), 1)
    before = tl.sum(tl.where(parts == part[:, None] - 1, cumulative, 0.0), 1)
    classes = part[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    e = _softmax(z_ptr, start[:, None] + classes, classes < C, highest)
    passed = (tl.cumsum(e, 1) <= (target - before).to(tl.float32)[:, None]) & (classes < C)
    found = part * BLOCK + tl.sum(passed.to(tl.int32), 1)
    # Sums in another order may end just short of the target: then it is the last class that can occur.
    return tl.minimum(found, tl.max(tl.where(e > 0, classes, 0), 1))


@triton.jit(do_not_specialize=["seed", "draw"])
def head_kernel(
    z_ptr,  # [R, C]
    labels_ptr,  # [R], or None: the drawn ones
    scale_ptr,  # [R], or None with dz
    loss_ptr,  # [R]
    lse_ptr,  # [R]
    drawn_ptr,  # [R]
    dz_ptr,  # [R, C], may be z; or None: it is not wanted
    R,
    C,
    seed,
    draw,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    rows, mask_r = _rows(R, ROWS)
    start, count = rows * C, tl.cdiv(C, BLOCK)
    maxima = tl.full([ROWS, PARTS], float("-inf"), tl.float32)
    sums = tl.zeros([ROWS, PARTS], tl.float32)
    parts = tl.arange(0, PARTS)[None, :]
    for part in range(0, count):
        classes = part * BLOCK + tl.arange(0, BLOCK)[None, :]
        z = _logits(z_ptr, start[:, None] + classes, classes < C)
        top = tl.max(z, 1)
        # A block all of whose logits are -inf has the sum 0.
        e = tl.exp(z - tl.where(top == float("-inf"), 0.0, top)[:, None])
        maxima = tl.where(parts == part, top[:, None], maxima)
        sums = tl.where(parts == part, tl.sum(e, 1)[:, None], sums)
    highest = tl.max(maxima, 1)
    weights = sums * tl.exp(maxima - highest[:, None])  # [ROWS, PARTS]
    lse = highest + tl.log(tl.sum(weights, 1))
    drawn = _drawn(z_ptr, start, weights, highest, _uniform(rows, seed, draw), C, BLOCK, PARTS)
    label = drawn.to(tl.int64)
    tl.store(drawn_ptr + rows, label, mask=mask_r)
    if labels_ptr is not None:
        label = tl.load(labels_ptr + rows)  # [ROWS]
    inside = (label >= 0) & (label < C)
    z = tl.load(z_ptr + start + label, mask=inside, other=0.0).to(tl.float32)  # [ROWS]
    tl.store(lse_ptr + rows, lse, mask=mask_r)
    tl.store(loss_ptr + rows, _judged(lse - z, label, C), mask=mask_r)
    if dz_ptr is not None:
        # Everything above has been read by every thread before anything is written.
        tl.debug_barrier()
        scale = tl.load(scale_ptr + rows)  # [ROWS]
        weight = _judged(scale, label, C)
        for back in range(1, count + 1):
            classes = (count - back) * BLOCK + tl.arange(0, BLOCK)[None, :]
            at = start[:, None] + classes
            p = _softmax(z_ptr, at, classes < C, lse)
            dz = weight[:, None] * (p - (classes == label[:, None]).to(tl.float32))
            tl.store(dz_ptr + at, dz, mask=mask_r[:, None] & (classes < C))


@triton.jit
def backward_kernel(
    z_ptr,  # [R, C]
    lse_ptr,  # [R]
    labels_ptr,  # [R]
    scale_ptr,  # [R]
    dz_ptr,  # [R, C]
    R,
    C,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows, mask_r = _rows(R, ROWS)
    classes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    at = (rows * C)[:, None] + classes
    label = tl.load(labels_ptr + rows)  # [ROWS]
    weight = _judged(tl.load(scale_ptr + rows), label, C)  # [ROWS]
    p = _softmax(z_ptr, at, classes < C, tl.load(lse_ptr + rows))
    dz = weight[:, None] * (p - (classes == label[:, None]).to(tl.float32))
    tl.store(dz_ptr + at, dz, mask=mask_r[:, None] & (classes < C))


@triton.jit
def double_backward_kernel(
    z_ptr,  # [R, C]
    lse_ptr,  # [R]
    labels_ptr,  # [R]
    scale_ptr,  # [R]
    v_ptr,  # [R, C]
    grad_z_ptr,  # [R, C]
    grad_scale_ptr,  # [R]
    R,
    C,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows, mask_r = _rows(R, ROWS)
    start, count = rows * C, tl.cdiv(C, BLOCK)
    lse = tl.load(lse_ptr + rows)  # [ROWS]
    products = tl.zeros([ROWS, BLOCK], tl.float32)
    for part in range(0, count):
        classes = part * BLOCK + tl.arange(0, BLOCK)[None, :]
        at = start[:, None] + classes
        v = tl.load(v_ptr + at, mask=classes < C, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        products += _softmax(z_ptr, at, classes < C, lse) * v
    mean = tl.sum(products, 1)
    label = tl.load(labels_ptr + rows)  # [ROWS]
    weight = _judged(tl.load(scale_ptr + rows), label, C)  # [ROWS]
    inside = (label >= 0) & (label < C)
    at_label = tl.load(v_ptr + start + label, mask=inside, other=0.0).to(tl.float32)  # [ROWS]
    tl.store(grad_scale_ptr + rows, _judged(mean - at_label, label, C), mask=mask_r)
    for back in range(1, count + 1):
        classes = (count - back) * BLOCK + tl.arange(0, BLOCK)[None, :]
        at = start[:, None] + classes
        v = tl.load(v_ptr + at, mask=classes < C, other=0.0).to(tl.float32)  # [ROWS, BLOCK]
        grad_z = weight[:, None] * _softmax(z_ptr, at, classes < C, lse) * (v - mean[:, None])
        tl.store(grad_z_ptr + at, grad_z, mask=mask_r[:, None] & (classes < C))


def cross_entropy(z: Tensor, labels: Tensor | None, seed: int, draw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``z [R, C], labels [R] -> loss [R], lse [R], drawn [R]``."""
    return _head(z.contiguous(), labels, None, None, seed, draw)


def cross_entropy_gradient(
    z: Tensor, labels: Tensor | None, scale: Tensor, seed: int, draw: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``z [R, C], labels, scale [R] -> loss [R], lse [R], drawn [R], dz [R, C]``."""
    z = z.contiguous()
    dz = torch.empty_like(z)
    return *_head(z, labels, scale, dz, seed, draw), dz


def cross_entropy_gradient_(
    z: Tensor, labels: Tensor | None, scale: Tensor, seed: int, draw: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`cross_entropy_gradient`, with dz written over z."""
    dense = z.contiguous()
    results = _head(dense, labels, scale, dense, seed, draw)
    if dense is not z:
        z.copy_(dense)
    return results


def _head(
    z: Tensor, labels: Tensor | None, scale: Tensor | None, dz: Tensor | None, seed: int, draw: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (rows, classes), chosen = z.shape, config(z.shape[1])
    loss, lse = (z.new_empty(rows, dtype=torch.float32) for _ in range(2))
    drawn = z.new_empty(rows, dtype=torch.int64)
    launch(
        head_kernel, (triton.cdiv(rows, chosen.ROWS),),
        z, labels if labels is None else labels.contiguous(), scale if scale is None else scale.contiguous(),
        loss, lse, drawn, dz, rows, classes, seed, int(draw),
        ROWS=chosen.ROWS, BLOCK=chosen.BLOCK, PARTS=triton.next_power_of_2(triton.cdiv(classes, chosen.BLOCK)),
        warps=chosen.warps,
    )  # fmt: skip
    return loss, lse, drawn


def cross_entropy_backward(z: Tensor, lse: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """``z [R, C], lse, labels, scale [R] -> dz [R, C]``."""
    z, lse, labels, scale = (t.contiguous() for t in (z, lse, labels, scale))
    (rows, classes), chosen = z.shape, config(z.shape[1])
    dz = torch.empty_like(z)
    launch(
        backward_kernel, (triton.cdiv(rows, chosen.ROWS), triton.cdiv(classes, chosen.BLOCK)),
        z, lse, labels, scale, dz, rows, classes,
        ROWS=chosen.ROWS, BLOCK=chosen.BLOCK, warps=chosen.warps,
    )  # fmt: skip
    return dz


def cross_entropy_double_backward(
    z: Tensor, lse: Tensor, labels: Tensor, scale: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """``z, v [R, C], lse, labels, scale [R] -> grad_z [R, C], grad_scale [R]``."""
    z, lse, labels, scale, v = (t.contiguous() for t in (z, lse, labels, scale, v))
    (rows, classes), chosen = z.shape, config(z.shape[1])
    grad_z, grad_scale = torch.empty_like(z), torch.empty_like(lse)
    launch(
        double_backward_kernel, (triton.cdiv(rows, chosen.ROWS),),
        z, lse, labels, scale, v, grad_z, grad_scale, rows, classes,
        ROWS=chosen.ROWS, BLOCK=chosen.BLOCK, warps=chosen.warps,
    )  # fmt: skip
    return grad_z, grad_scale


def typical(dtype: torch.dtype) -> dict[str, list[tuple[object, ...]]]:
    """Calls of a large vocabulary's and of few classes' size, by op; no memory behind them."""
    found: dict[str, list[tuple[object, ...]]] = {}
    for rows, classes in ((8192, 131072), (65536, 48)):
        z = torch.empty(rows, classes, dtype=dtype, device="meta")
        labels = torch.empty(rows, dtype=torch.int64, device="meta")
        lse = torch.empty(rows, device="meta")
        calls = {
            "cross_entropy": (z, None, 12, 34),
            "cross_entropy_gradient": (z, None, lse, 12, 34),
            "cross_entropy_gradient_": (z, labels, lse, 12, 34),
            "cross_entropy_backward": (z, lse, labels, lse),
            "cross_entropy_double_backward": (z, lse, labels, lse, z),
        }
        for name, args in calls.items():
            found.setdefault(name, []).append(args)
    return found
