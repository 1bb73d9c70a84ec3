"""A linear layer's weight gradient and its segments' squared norms in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.kernels._checks import check_floats, check_offsets, check_shape, check_untracked
from fastreg.kernels._examples import OFFSETS, normal
from fastreg.kernels._launch import implementation
from fastreg.kernels._registry import Op
from fastreg.kernels.outer_sum import native, reference


def examples(dtype: torch.dtype, device: str) -> list[tuple[object, ...]]:
    """Every segmentation, with sizes that fill, miss and overrun a register tile or one of a GPU's, and many tiles."""
    draw = normal(dtype, device)
    small = [
        (draw(offsets[-1], inputs), draw(offsets[-1], outputs), list(offsets))
        for offsets in OFFSETS
        for inputs, outputs in ((1, 1), (3, 7), (32, 8), (67, 13), (5, 37))
    ]
    return [
        *small,
        (draw(130, 130), draw(130, 70), [0, 65, 65, 130]),
        (draw(65, 70), draw(65, 600), [0, 65]),
    ]


OP = Op(
    name="outer_sum",
    schema="(Tensor a, Tensor d, int[] offsets) -> (Tensor, Tensor)",
    reference=reference.outer_sum,
    examples=examples,
    implementations=(implementation("outer_sum"), native.IMPLEMENTATION),
)


def outer_sum(a: Tensor, d: Tensor, offsets: Sequence[int]) -> tuple[Tensor, Tensor]:
    r"""The weight gradient of a linear layer and the squared norm of every segment's share of it.

    ``G_k = sum_{s in k} d_s a_s^T``; ``total = sum_k G_k``; ``sq_k = ||G_k||_F^2``. Unscaled.

    Args:
        a: [S, I] float, input rows.
        d: [S, O] float, output-gradient rows, dtype of ``a``.
        offsets: m + 1 ascending row numbers from 0 to S; segments may be empty.

    Returns:
        total [O, I] in the dtype of ``a``; sq [m] float32, or float64 for float64 inputs.

    Raises:
        FastregError: shapes, dtypes or offsets do not fit, or an input requires grad.

    Example:
        >>> import torch
        >>> from fastreg.kernels import outer_sum
        >>> total, sq = outer_sum(torch.ones(4, 2), torch.ones(4, 1), [0, 2, 4])
        >>> total, sq
        (tensor([[4., 4.]]), tensor([8., 8.]))
    """
    check_untracked("outer_sum", a, d)
    check_floats("outer_sum", a=a, d=d)
    check_shape("outer_sum", "a", a, "[S, I]", (None, None))
    check_shape("outer_sum", "d", d, "[S, O]", (a.shape[0], None))
    check_offsets("outer_sum", offsets, a.shape[0])
    return OP(a, d, offsets)
