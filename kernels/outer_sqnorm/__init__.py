"""Squared norms of per-segment weight gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.kernels._checks import check_floats, check_offsets, check_shape, check_untracked
from fastreg.kernels._examples import OFFSETS, normal
from fastreg.kernels._launch import implementation
from fastreg.kernels._registry import Op
from fastreg.kernels.outer_sqnorm import native, reference


def examples(dtype: torch.dtype, device: str) -> list[tuple[object, ...]]:
    """Every segmentation, with sizes on each side of the choice of form; segments one row past a block."""
    draw = normal(dtype, device)
    cases: list[tuple[object, ...]] = []
    for offsets in OFFSETS:
        for inputs, outputs in ((1, 1), (3, 7), (16, 32), (37, 5)):
            rows = offsets[-1]
            cases.append((draw(rows, inputs), draw(rows, outputs), list(offsets), len(cases) % 2 == 0))
    for inputs, outputs in ((440, 450), (65, 130)):
        cases.append((draw(134, inputs), draw(134, outputs), [0, 129, 129, 134], True))
    return cases


OP = Op(
    name="outer_sqnorm",
    schema="(Tensor a, Tensor d, int[] offsets, bool bias) -> Tensor",
    reference=reference.outer_sqnorm,
    examples=examples,
    implementations=(implementation("outer_sqnorm"), native.IMPLEMENTATION),
)


def outer_sqnorm(a: Tensor, d: Tensor, offsets: Sequence[int], bias: bool = False) -> Tensor:
    r"""Squared norms of the gradients of a linear layer, one per segment of rows.

    ``sq_k = || sum_{s in k} d_s a_s^T ||_F^2``, plus ``|| sum_{s in k} d_s ||^2`` with ``bias``.

    Nothing is scaled: rows of a mean loss carry its 1/b in ``d``.

    Args:
        a: [S, I] float, input rows.
        d: [S, O] float, output-gradient rows, dtype of ``a``.
        offsets: m + 1 ascending row numbers from 0 to S; segments may be empty.
        bias: add the squared norm of the bias gradient.

    Returns:
        [m] float32, or float64 for float64 inputs.

    Raises:
        FastregError: shapes, dtypes or offsets do not fit, or an input requires grad.

    Source: Goodfellow 2015, "Efficient per-example gradient computations" (s = 1); Li et al. 2022,
    "Large language models can be strong differentially private learners" (pairs of rows).

    Example:
        >>> import torch
        >>> from fastreg.kernels import outer_sqnorm
        >>> outer_sqnorm(torch.ones(4, 2), torch.ones(4, 3), [0, 2, 4])
        tensor([24., 24.])
    """
    check_untracked("outer_sqnorm", a, d)
    check_floats("outer_sqnorm", a=a, d=d)
    check_shape("outer_sqnorm", "a", a, "[S, I]", (None, None))
    check_shape("outer_sqnorm", "d", d, "[S, O]", (a.shape[0], None))
    check_offsets("outer_sqnorm", offsets, a.shape[0])
    return OP(a, d, offsets, bias)
