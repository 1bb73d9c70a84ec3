"""Triton forms of a norm layer with its scale and bias, its backward and its double backward.

They serve the norm layers without parameters too (:mod:`fastreg.kernels.normalize`): there is then no weight, hence no
gradient of it, and where xhat takes the place of x no mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastreg.kernels._launch import launch, multiprocessors
from fastreg.kernels._segments import Segments, of
from fastreg.kernels.norm_affine.config import BACKWARD, DOUBLE_BACKWARD, DOUBLE_BACKWARD_SINGLE, FORWARD
from fastreg.kernels.norm_affine.long import (
    norm_long_backward_kernel,
    norm_long_double_backward_kernel,
    norm_long_kernel,
)
from fastreg.kernels.norm_affine.whole import norm_backward_kernel, norm_double_backward_kernel, norm_kernel


def norm_affine(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, center: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``x [S, C, P], weight [C], bias [C] -> y [S, C, P], mean [S, G], rstd [S, G]``."""
    x, weight, bias = _contiguous(x, weight, bias)
    samples, sizes = x.shape[0], _sizes(x, groups)
    y = torch.empty_like(x)
    mean, rstd = (x.new_empty(samples, groups, dtype=torch.float32) for _ in range(2))
    operands, tile = (x, weight, bias, y, mean, rstd), FORWARD.tile(samples, *sizes)
    if tile.holds(*sizes):
        launch(
            norm_kernel, (-(-samples // tile.BLOCK_R), groups), *operands, samples, *sizes, eps,
            CENTER=center, BLOCK_R=tile.BLOCK_R, **tile.row, warps=tile.warps,
        )  # fmt: skip
    else:
        launch(norm_long_kernel, (samples, groups), *operands, *sizes, eps, CENTER=center, **tile.row, warps=tile.warps)
    return y, mean, rstd


def norm_affine_backward(
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    d: Tensor,
    offsets: Sequence[int],
    center: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``x, d [S, C, P], mean, rstd [S, G], weight [C] -> dx [S, C, P], scale [m, C], bias [m, C]``."""
    inputs, found = _contiguous(x, mean, rstd, weight, d), of(offsets)
    dx, groups, sizes = torch.empty_like(inputs[0]), rstd.shape[1], _sizes(x, rstd.shape[1])
    tile = BACKWARD.tile(found.longest, *sizes)
    if tile.holds(*sizes):
        assert BACKWARD.resident is not None
        parts = tile.parts(found, groups, BACKWARD.resident * multiprocessors(x.device))
        sums = _sums(weight, 2, found.count, parts)
        launch(
            norm_backward_kernel, (found.count * parts, groups), *inputs, found.on(x.device), dx, sums, *sizes, parts,
            CENTER=center, BLOCK_R=tile.BLOCK_R, **tile.row, warps=tile.warps,
        )  # fmt: skip
        return dx, *((None, None) if weight is None else over_runs(sums))
    sums = _sums(weight, 2, x.shape[0])
    launch(
        norm_long_backward_kernel, (x.shape[0], groups), *inputs, dx, sums, *sizes,
        CENTER=center, **tile.row, warps=tile.warps,
    )  # fmt: skip
    return dx, *((None, None) if weight is None else (_by_segment(found, rows) for rows in sums))


def norm_affine_double_backward(
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    d: Tensor,
    v: Tensor,
    v_scale: Tensor | None,
    v_bias: Tensor | None,
    offsets: Sequence[int],
    center: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``x, d, v [S, C, P], v_scale, v_bias [m, C] -> grad_d, grad_x [S, C, P], grad_weight [C]``."""
    inputs, found = _contiguous(x, mean, rstd, weight, d, v, v_scale, v_bias), of(offsets)
    grad_d, grad_x = (torch.empty_like(inputs[0]) for _ in range(2))
    groups, sizes = rstd.shape[1], _sizes(x, rstd.shape[1])
    config = DOUBLE_BACKWARD_SINGLE if x.dtype == torch.float32 else DOUBLE_BACKWARD
    tile = config.tile(found.longest, *sizes)
    if tile.holds(*sizes):
        assert config.resident is not None
        parts = tile.parts(found, groups, config.resident * multiprocessors(x.device))
        grad_weight = _sums(weight, found.count * parts)
        launch(
            norm_double_backward_kernel, (found.count * parts, groups), *inputs, found.on(x.device),
            grad_d, grad_x, grad_weight, *sizes, parts,
            CENTER=center, BLOCK_R=tile.BLOCK_R, **tile.row, warps=tile.warps,
        )  # fmt: skip
    else:
        grad_weight = _sums(weight, x.shape[0])
        segment = None if weight is None else _segment_of_sample(found, x)
        launch(
            norm_long_double_backward_kernel, (x.shape[0], groups), *inputs, segment,
            grad_d, grad_x, grad_weight, *sizes, CENTER=center, **tile.row, warps=tile.warps,
        )  # fmt: skip
    return grad_d, grad_x, None if weight is None else grad_weight.sum(0).to(weight.dtype)


def over_runs(sums: Tensor) -> Tensor:
    """``[2, m, parts, C] -> [2, m, C]``."""
    return sums.squeeze(2) if sums.shape[2] == 1 else sums.sum(2)


def typical(dtype: torch.dtype) -> dict[str, list[tuple[object, ...]]]:
    """Calls of transformers and of convolutional nets, by op; no memory behind them."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    forward: list[tuple[object, ...]] = []
    backward: list[tuple[object, ...]] = []
    double: list[tuple[object, ...]] = []
    # Layer norm of GPT-2 small; layer and RMS norm of large models; RMS norm of attention heads; group norm of small
    # and of large images; a layer norm of more features than a program holds.
    for samples, channels, places, groups, center in (
        (8192, 768, 1, 1, True),
        (4096, 4096, 1, 1, False),
        (4096, 8192, 1, 1, True),
        (65536, 128, 1, 1, False),
        (64, 256, 32 * 32, 32, True),
        (64, 64, 112 * 112, 32, True),
        (512, 65536, 1, 1, True),
    ):
        x, weight = empty(samples, channels, places), empty(channels)
        offsets = list(range(0, samples + 1, samples // 8))
        statistics = [empty(samples, groups, dtype=torch.float32) for _ in range(2)]
        gradients = [empty(len(offsets) - 1, channels, dtype=torch.float32) for _ in range(2)]
        forward.append((x, weight, weight if center else None, groups, 1e-5, center))
        backward.append((x, *statistics, weight, x, offsets, center))
        double.append((x, *statistics, weight, x, x, *gradients, offsets, center))
    return {"norm_affine": forward, "norm_affine_backward": backward, "norm_affine_double_backward": double}


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.contiguous() for t in tensors]


def _sizes(x: Tensor, groups: int) -> tuple[int, int]:
    """Channels of a group, and their places."""
    return x.shape[1] // groups, x.shape[2]


def _by_segment(found: Segments, rows: Tensor) -> Tensor:
    """``[S, C] -> [m, C]``."""
    return found.per_segment([part.sum(1) for part in found.split(rows)])


def _segment_of_sample(found: Segments, x: Tensor) -> Tensor:
    """``[S]`` int64, found on the device: nothing is copied to it."""
    samples = torch.arange(x.shape[0], device=x.device)
    return torch.bucketize(samples, found.on(x.device), right=True) - 1


def _sums(weight: Tensor | None, *runs: int) -> Any:
    """Room for sums ``[*runs, C]``, if there is a weight that they belong to."""
    return None if weight is None else weight.new_empty(*runs, weight.shape[0], dtype=torch.float32)
