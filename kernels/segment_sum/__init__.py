"""Sums over segments of rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.kernels._checks import check_floats, check_offsets, check_shape, check_untracked
from fastreg.kernels._examples import OFFSETS, normal
from fastreg.kernels._launch import implementation
from fastreg.kernels._registry import Op
from fastreg.kernels.segment_sum import reference


def examples(dtype: torch.dtype, device: str) -> list[tuple[object, ...]]:
    """Every segmentation and one of more rows than a block, with one column, odd widths and one past a block."""
    draw = normal(dtype, device)
    return [
        (draw(offsets[-1], width), list(offsets))
        for offsets in (*OFFSETS, (0, 33, 100))
        for width in (1, 7, 129)
    ]


OP = Op(
    name="segment_sum",
    schema="(Tensor x, int[] offsets) -> Tensor",
    reference=reference.segment_sum,
    examples=examples,
    implementations=(implementation("segment_sum"),),
)


def segment_sum(x: Tensor, offsets: Sequence[int]) -> Tensor:
    r"""Sum of each segment's rows: the gradient of a bias for every micro-batch.

    ``out_k = sum_{s in k} x_s``. Unscaled.

    Args:
        x: [S, N] float.
        offsets: m + 1 ascending row numbers from 0 to S; segments may be empty.

    Returns:
        [m, N] float32, or float64 for float64 inputs.

    Raises:
        FastregError: shapes or offsets do not fit, or the input requires grad.

    Example:
        >>> import torch
        >>> from fastreg.kernels import segment_sum
        >>> segment_sum(torch.ones(3, 2), [0, 1, 3])
        tensor([[1., 1.],
                [2., 2.]])
    """
    check_untracked("segment_sum", x)
    check_floats("segment_sum", x=x)
    check_shape("segment_sum", "x", x, "[S, N]", (None, None))
    check_offsets("segment_sum", offsets, x.shape[0])
    return OP(x, offsets)
