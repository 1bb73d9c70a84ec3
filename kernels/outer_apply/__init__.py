"""Per-segment weight gradients applied to rows, without forming them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.kernels._checks import (
    accumulator,
    check_dtype,
    check_floats,
    check_offsets,
    check_shape,
    check_untracked,
)
from fastreg.kernels._examples import OFFSETS, normal
from fastreg.kernels._launch import implementation
from fastreg.kernels._registry import Op
from fastreg.kernels.outer_apply import native, reference


def examples(dtype: torch.dtype, device: str) -> list[tuple[object, ...]]:
    """Every segmentation, with sizes on each side of the choice of form."""
    draw = normal(dtype, device)
    cases: list[tuple[object, ...]] = []
    for offsets in OFFSETS:
        for inputs, outputs in ((1, 1), (3, 7), (16, 32), (37, 5)):
            rows = offsets[-1]
            q, k, v = draw(rows, inputs), draw(rows, inputs), draw(rows, outputs)
            factors, onto = draw(len(offsets) - 1).to(accumulator(dtype)), draw(rows, outputs)
            rest = ((None, None), (factors, None), (factors, onto))[len(cases) % 3]
            cases.append((q, k, v, list(offsets), len(cases) % 2 == 0, *rest))
            cases.append((q, q, v, list(offsets), len(cases) % 2 == 0, None, None))
    # One past a block of pairs, and of outputs.
    q, v = draw(68, 5), draw(68, 66)
    return [*cases, (q, q, v, [0, 65, 68], True, None, draw(68, 66))]


OP = Op(
    name="outer_apply",
    schema="(Tensor q, Tensor k, Tensor v, int[] offsets, bool bias, Tensor? factors, Tensor? onto) -> Tensor",
    reference=reference.outer_apply,
    examples=examples,
    implementations=(implementation("outer_apply"), native.IMPLEMENTATION),
)


def outer_apply(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Sequence[int],
    bias: bool = False,
    factors: Tensor | None = None,
    onto: Tensor | None = None,
) -> Tensor:
    r"""Each row of ``q`` through its own segment's outer-product sum of ``v`` and ``k``.

    ``out_s = onto_s + factors_k sum_{t in k} (q_s.k_t + bias) v_t`` for the segment k of row s: the matrix product
    ``(Q K^T) V`` with ``Q K^T`` masked to segments, or ``G_k q_s`` with ``G_k = sum_{t in k} v_t k_t^T``. Unscaled.

    Args:
        q: [S, I] float.
        k: [S, I] float, dtype of ``q``.
        v: [S, O] float, dtype of ``q``.
        offsets: m + 1 ascending row numbers from 0 to S; segments may be empty.
        bias: add the segment's sum of ``v`` to each row, as a constant input feature of 1 does.
        factors: [m] float32, or float64 for float64; 1 if not given.
        onto: [S, O], dtype of ``v``; 0 if not given.

    Returns:
        [S, O] in the dtype of ``v``, accumulated in float32 or float64.

    Raises:
        FastregError: shapes, dtypes or offsets do not fit, or an input requires grad.

    Source: the unnormalised block-diagonal case of linear attention, Katharopoulos et al. 2020,
    "Transformers are RNNs".

    Example:
        >>> import torch
        >>> from fastreg.kernels import outer_apply
        >>> one = torch.ones(4, 1)
        >>> outer_apply(one, one, one, [0, 1, 4]).flatten()
        tensor([1., 3., 3., 3.])
    """
    check_untracked("outer_apply", q, k, v)
    check_floats("outer_apply", q=q, k=k, v=v)
    check_shape("outer_apply", "q", q, "[S, I]", (None, None))
    check_shape("outer_apply", "k", k, "[S, I]", q.shape)
    check_shape("outer_apply", "v", v, "[S, O]", (q.shape[0], None))
    check_offsets("outer_apply", offsets, q.shape[0])
    if factors is not None:
        check_untracked("outer_apply", factors)
        check_shape("outer_apply", "factors", factors, "[m]", (len(offsets) - 1,))
        check_dtype("outer_apply", "factors", factors, accumulator(v.dtype))
    if onto is not None:
        check_untracked("outer_apply", onto)
        check_floats("outer_apply", v=v, onto=onto)
        check_shape("outer_apply", "onto", onto, "[S, O]", v.shape)
    return OP(q, k, v, offsets, bias, factors, onto)
