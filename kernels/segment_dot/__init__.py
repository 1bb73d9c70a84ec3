"""Inner products over segments of rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.kernels._checks import check_floats, check_offsets, check_shape, check_untracked
from fastreg.kernels._examples import OFFSETS, normal
from fastreg.kernels._launch import implementation
from fastreg.kernels._registry import Op
from fastreg.kernels.segment_dot import native, reference


def examples(dtype: torch.dtype, device: str) -> list[tuple[object, ...]]:
    """Every segmentation, with one column, odd widths and a full vector register."""
    draw = normal(dtype, device)
    return [
        (draw(offsets[-1], width), draw(offsets[-1], width), list(offsets))
        for offsets in OFFSETS
        for width in (1, 7, 64, 131)
    ]


OP = Op(
    name="segment_dot",
    schema="(Tensor x, Tensor y, int[] offsets) -> Tensor",
    reference=reference.segment_dot,
    examples=examples,
    implementations=(implementation("segment_dot"), native.IMPLEMENTATION),
)


def segment_dot(x: Tensor, y: Tensor, offsets: Sequence[int]) -> Tensor:
    r"""Inner product of two tensors over each segment of rows, with no temporary.

    ``out_k = sum_{s in k} x_s . y_s``. Unscaled.

    Args:
        x: [S, N] float.
        y: [S, N] float, dtype of ``x``.
        offsets: m + 1 ascending row numbers from 0 to S; segments may be empty.

    Returns:
        [m] float32, or float64 for float64 inputs.

    Raises:
        FastregError: shapes, dtypes or offsets do not fit, or an input requires grad.

    Example:
        >>> import torch
        >>> from fastreg.kernels import segment_dot
        >>> segment_dot(torch.ones(3, 2), torch.ones(3, 2), [0, 1, 3])
        tensor([2., 4.])
    """
    check_untracked("segment_dot", x, y)
    check_floats("segment_dot", x=x, y=y)
    check_shape("segment_dot", "x", x, "[S, N]", (None, None))
    check_shape("segment_dot", "y", y, "[S, N]", x.shape)
    check_offsets("segment_dot", offsets, x.shape[0])
    return OP(x, y, offsets)
