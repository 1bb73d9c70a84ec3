"""Triton forms of the convolutions of segments: implicit matrix products, nothing is unfolded in memory.

Images are read with channels last, so that the taps of a pixel are runs of channels; a net in that memory format costs
no copy. A column of the unfolded image is a (tap, channel) pair, numbered with the channel fastest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreg.kernels._launch import launch, multiprocessors
from fastreg.kernels._tiles import dot, precision, rounded
from fastreg.kernels.convolution import places
from fastreg.kernels.convolution.config import fitting

Pair = list[int]


@triton.jit
def pixel(r, P, Q, H, W, stride_h, stride_w, pad_h, pad_w):
    """Where the window of output pixel r of a run of images begins: image, row and column, which may be negative."""
    inside = r % (P * Q)
    return r // (P * Q), inside // Q * stride_h - pad_h, inside % Q * stride_w - pad_w


@triton.jit
def tap(column, C, KW, dilation_h, dilation_w):
    """Row, column and channel that a column of the unfolded image adds to where its window begins."""
    number = column // C
    return number // KW * dilation_h, number % KW * dilation_w, column % C


@triton.jit
def unfolded(image, down, right, down_by, right_by, channel, H, W, C):
    """Offsets into images ``[n, H, W, C]`` for pixels against columns, and whether they are in the image."""
    h, w = down + down_by, right + right_by
    return ((image * H + h) * W + w) * C + channel, (h >= 0) & (h < H) & (w >= 0) & (w < W)


@triton.jit
def conv_outer_kernel(
    x_ptr,  # [m, b, H, W, C]
    d_ptr,  # [m, b, P, Q, O]
    out_ptr,  # [splits, m, O, KH, KW, C]
    rows,  # b P Q
    H, W, C, P, Q, O,
    columns,  # KH KW C
    KW, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    number, segment, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    tiles_m = tl.cdiv(O, BLOCK_M)
    offs_m = number % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = number // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < O, offs_n < columns
    down_by, right_by, channel = tap(offs_n[None, :], C, KW, dilation_h, dilation_w)
    x_ptr += segment * (rows // (P * Q)) * H * W * C
    d_ptr += segment * rows * O
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for first in range(split * BLOCK_K, rows, tl.num_programs(2) * BLOCK_K):
        r = first + tl.arange(0, BLOCK_K).to(tl.int64)
        exist = r < rows
        image, down, right = pixel(r[:, None], P, Q, H, W, stride_h, stride_w, pad_h, pad_w)
        x_offs, seen = unfolded(image, down, right, down_by, right_by, channel, H, W, C)
        x = tl.load(x_ptr + x_offs, mask=seen & exist[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        d_offs = r[None, :] * O + offs_m[:, None]
        d = tl.load(d_ptr + d_offs, mask=exist[None, :] & mask_m[:, None], other=0.0)  # [BLOCK_M, BLOCK_K]
        acc = dot(d, x, acc, PRECISION)
    out_ptr += (split * tl.num_programs(1) + segment) * O * columns
    out_offs = offs_m[:, None].to(tl.int64) * columns + offs_n[None, :]
    tl.store(out_ptr + out_offs, rounded(acc, out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def conv_apply_kernel(
    x_ptr,  # [m, b, H, W, C]
    weights_ptr,  # [m, O, KH, KW, C]
    biases_ptr,  # [m, O], or None
    y_ptr,  # [m, b, P, Q, O]
    rows,  # b P Q
    H, W, C, P, Q, O,
    columns,  # KH KW C
    KW, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    number, segment = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tiles_n = tl.cdiv(O, BLOCK_N)
    r = (number // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = number % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    exist, mask_n = r < rows, offs_n < O
    image, down, right = pixel(r[:, None], P, Q, H, W, stride_h, stride_w, pad_h, pad_w)
    x_ptr += segment * (rows // (P * Q)) * H * W * C
    weights_ptr += segment * O * columns
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for first in range(0, columns, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        known = column < columns
        down_by, right_by, channel = tap(column[None, :], C, KW, dilation_h, dilation_w)
        x_offs, seen = unfolded(image, down, right, down_by, right_by, channel, H, W, C)
        x = tl.load(x_ptr + x_offs, mask=seen & exist[:, None] & known[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        w_offs = offs_n[None, :].to(tl.int64) * columns + column[:, None]
        w = tl.load(weights_ptr + w_offs, mask=mask_n[None, :] & known[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = dot(x, w, acc, PRECISION)
    if biases_ptr is not None:
        acc += tl.load(biases_ptr + segment * O + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_ptr += segment * rows * O
    y_offs = r[:, None] * O + offs_n[None, :]
    tl.store(y_ptr + y_offs, rounded(acc, y_ptr.dtype.element_ty), mask=exist[:, None] & mask_n[None, :])


def conv_outer(x: Tensor, d: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """``x [m, b, C, H, W], d [m, b, O, P, Q] -> [m, O, C, *kernel]``."""
    x, d = channels_last(x), channels_last(d)
    count, samples, *image, channels = x.shape
    *found, outputs = d.shape[2:]
    rows, columns = samples * found[0] * found[1], kernel[0] * kernel[1] * channels
    tile = fitting(x.dtype, outputs, columns, channels)
    tiles = tile.count(outputs, columns)
    splits = tile.splits(tiles * count, rows, tile.resident * multiprocessors(x.device))
    out = x.new_empty(splits, count, outputs, *kernel, channels, dtype=x.dtype if splits == 1 else torch.float32)
    launch(
        conv_outer_kernel, (tiles, count, splits),
        x, d, out, rows, *image, channels, *found, outputs, columns, kernel[1], *stride, *padding, *dilation,
        **tile.meta, PRECISION=precision(x.dtype), warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    out = out[0] if splits == 1 else out.sum(0).to(x.dtype)
    return out.movedim(4, 2)


def conv_apply(
    x: Tensor, weights: Tensor, biases: Tensor | None, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """``x [m, b, C, H, W], weights [m, O, C, *kernel], biases [m, O] -> [m, b, O, P, Q]``."""
    kernel = list(weights.shape[3:])
    found = places(x.shape[3:], kernel, stride, padding, dilation)
    x, weights = channels_last(x), channels_last(weights)
    biases = None if biases is None else biases.contiguous()
    count, samples, *image, channels = x.shape
    outputs, rows, columns = weights.shape[1], samples * found[0] * found[1], kernel[0] * kernel[1] * channels
    y = x.new_empty(count, samples, *found, outputs)
    tile = fitting(x.dtype, rows, outputs, channels)
    launch(
        conv_apply_kernel, (tile.count(rows, outputs), count),
        x, weights, biases, y, rows, *image, channels, *found, outputs, columns, kernel[1],
        *stride, *padding, *dilation,
        **tile.meta, PRECISION=precision(x.dtype), warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return y.movedim(4, 2)


def channels_last(x: Tensor) -> Tensor:
    """``[m, n, C, H, W] -> [m, n, H, W, C]`` contiguous; a view of what has that memory order."""
    return x.movedim(2, 4).contiguous()


def typical(dtype: torch.dtype) -> dict[str, list[tuple[object, ...]]]:
    """Calls of residual nets at micro-batches of 32 images, by op; no memory behind them."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    outer: list[tuple[object, ...]] = []
    apply: list[tuple[object, ...]] = []
    # The first layer of a ResNet, its layers at 32 x 32 and at 4 x 4, and one that halves the image.
    for channels, outputs, size, kernel, stride in (
        (3, 64, 64, 7, 2),
        (64, 64, 32, 3, 1),
        (512, 512, 4, 3, 1),
        (128, 256, 16, 3, 2),
    ):
        x, d = empty(8, 32, channels, size, size), empty(8, 32, outputs, size // stride, size // stride)
        geometry = [stride] * 2, [kernel // 2] * 2, [1, 1]
        outer.append((x, d, [kernel] * 2, *geometry))
        apply.append((x, empty(8, outputs, channels, kernel, kernel), empty(8, outputs), *geometry))
    return {"conv_outer": outer, "conv_apply": apply}
