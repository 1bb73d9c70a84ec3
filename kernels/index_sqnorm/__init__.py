"""Embedding gradients per segment: squared norms, and the row each position shares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.kernels._checks import (
    check_floats,
    check_index,
    check_offsets,
    check_shape,
    check_untracked,
)
from fastreg.kernels._examples import OFFSETS, normal
from fastreg.kernels._launch import implementation
from fastreg.kernels._registry import Op
from fastreg.kernels.index_sqnorm import native, reference


def examples(dtype: torch.dtype, device: str) -> list[tuple[object, ...]]:
    """Every segmentation, with few indices (many repeats), many, and one."""
    draw = normal(dtype, device)
    generator = torch.Generator().manual_seed(0)
    # The last segmentation has runs over several blocks of rows.
    return [
        (
            torch.randint(0, size, (offsets[-1],), generator=generator).to(device),
            draw(offsets[-1], width),
            list(offsets),
        )
        for offsets in (*OFFSETS, (0, 10, 130, 200))
        for size, width in ((1, 1), (3, 17), (1000, 32))
    ]


OP = Op(
    name="index_sqnorm",
    schema="(Tensor index, Tensor d, int[] offsets) -> (Tensor, Tensor)",
    reference=reference.index_sqnorm,
    examples=examples,
    implementations=(implementation("index_sqnorm"), native.IMPLEMENTATION),
)


def index_sqnorm(index: Tensor, d: Tensor, offsets: Sequence[int]) -> tuple[Tensor, Tensor]:
    r"""Squared norms of per-segment embedding gradients, without a table of gradients.

    ``shared_s = sum_{t in seg(s), index_t = index_s} d_t`` is the gradient row position s sees;
    ``sq_k = sum_{s in k} d_s . shared_s`` is the squared norm of segment k's gradient. Unscaled.

    Args:
        index: [S] int64, the embedding row of each position.
        d: [S, D] float, output gradients; rows of a padding index must be zero.
        offsets: m + 1 ascending row numbers from 0 to S; segments may be empty.

    Returns:
        sq [m] float32 (float64 for float64 inputs); shared [S, D] in the dtype of ``d``.

    Raises:
        FastregError: shapes, dtypes or offsets do not fit, or ``d`` requires grad.

    Example:
        >>> import torch
        >>> from fastreg.kernels import index_sqnorm
        >>> index_sqnorm(torch.tensor([5, 5, 5]), torch.ones(3, 1), [0, 2, 3])[0]
        tensor([4., 1.])
    """
    check_untracked("index_sqnorm", d)
    check_floats("index_sqnorm", d=d)
    check_shape("index_sqnorm", "d", d, "[S, D]", (None, None))
    check_shape("index_sqnorm", "index", index, "[S]", (d.shape[0],))
    check_index("index_sqnorm", "index", index, d)
    check_offsets("index_sqnorm", offsets, d.shape[0])
    return OP(index, d, offsets)
