"""Gradients of a channelwise scale and bias, and their squared norms, per segment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.kernels._checks import check_floats, check_offsets, check_shape, check_untracked
from fastreg.kernels._examples import OFFSETS, normal
from fastreg.kernels._launch import implementation
from fastreg.kernels._registry import Op
from fastreg.kernels.affine_sqnorm import native, reference


def examples(dtype: torch.dtype, device: str) -> list[tuple[object, ...]]:
    """Every segmentation; P = 1 is a layer norm, P > 1 an image."""
    draw = normal(dtype, device)
    return [
        (draw(offsets[-1], channels, places), draw(offsets[-1], channels, places), list(offsets))
        for offsets in OFFSETS
        for channels, places in ((1, 1), (19, 1), (7, 9), (3, 64))
    ]


OP = Op(
    name="affine_sqnorm",
    schema="(Tensor x, Tensor d, int[] offsets) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.affine_sqnorm,
    examples=examples,
    implementations=(implementation("affine_sqnorm"), native.IMPLEMENTATION),
)


def affine_sqnorm(
    x: Tensor, d: Tensor, offsets: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Segment gradients of ``y = scale * x + bias`` and their squared norms, in one read.

    ``scale_k[c] = sum_{s in k, p} d[s,c,p] x[s,c,p]``, ``bias_k[c] = sum_{s in k, p} d[s,c,p]``,
    ``sq_scale_k = ||scale_k||^2``, ``sq_bias_k = ||bias_k||^2``. Unscaled.

    Args:
        x: [S, C, P] float, the normalised input.
        d: [S, C, P] float, output gradients, dtype of ``x``.
        offsets: m + 1 ascending row numbers from 0 to S; segments may be empty.

    Returns:
        sq_scale [m], sq_bias [m], scale [m, C], bias [m, C]; float32, or float64 for float64.

    Raises:
        FastregError: shapes, dtypes or offsets do not fit, or an input requires grad.

    Example:
        >>> import torch
        >>> from fastreg.kernels import affine_sqnorm
        >>> x = torch.ones(2, 3, 1)
        >>> affine_sqnorm(x, 2 * x, [0, 1, 2])[0]
        tensor([12., 12.])
    """
    check_untracked("affine_sqnorm", x, d)
    check_floats("affine_sqnorm", x=x, d=d)
    check_shape("affine_sqnorm", "x", x, "[S, C, P]", (None, None, None))
    check_shape("affine_sqnorm", "d", d, "[S, C, P]", x.shape)
    check_offsets("affine_sqnorm", offsets, x.shape[0])
    return OP(x, d, offsets)
